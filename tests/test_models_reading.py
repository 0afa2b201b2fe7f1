"""Folders that sentence-transformers and others wrote, and those that are refused with a reason."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever, load_model

from .model_zoo import PAIRS, TEXTS, pair_scores, save_tiny, tokenizer_for, vectors


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("zoo") / "bert", "bert", tiny_tokenizer)


def same_as_theirs(folder, theirs=None) -> DenseRetriever:
    """Asserts that ours and sentence-transformers' reading of a folder give the same vectors."""
    from sentence_transformers import SentenceTransformer

    theirs = theirs or SentenceTransformer(str(folder))
    model = load_model(folder)
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        expected = encode(TEXTS, batch_size=4, show_progress_bar=False)
        np.testing.assert_allclose(vectors(model, TEXTS, kind).numpy(), expected, atol=1e-5, rtol=1e-5)
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("more", ["plain", "dense", "two dense", "normalize", "all"])
def test_what_sentence_transformers_writes(tmp_path, bert, pooling, more):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    torch.manual_seed(1)
    modules = [parts.Transformer(str(bert), max_seq_length=16), parts.Pooling(32, pooling)]
    if more in ("dense", "all"):
        modules.append(parts.Dense(32, 12))
    if more == "two dense":
        modules += [
            parts.Dense(32, 48, bias=False, activation_function=torch.nn.Identity()),
            parts.Dense(48, 8, activation_function=torch.nn.ReLU()),
        ]
    if more in ("normalize", "all"):
        modules += [parts.Dropout(0.3), parts.Normalize()]
    prompts = {"query": "query: ", "document": "the text: "} if more == "all" else None
    theirs = SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name="dot", device="cpu")
    theirs.save_pretrained(str(tmp_path / "model"))
    model = same_as_theirs(tmp_path / "model", theirs)
    assert model.config.similarity == "dot" and model.config.temperature == (0.05 if model.config.normalize else 1.0)
    assert model.config.passage_length == 16
    model.save_pretrained(tmp_path / "again")
    same_as_theirs(tmp_path / "again", theirs)


def test_lengths_by_task(tmp_path, bert):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    transformer = parts.Transformer(str(bert), query_length=6, document_length=20)
    SentenceTransformer(modules=[transformer, parts.Pooling(32)]).save_pretrained(str(tmp_path / "model"))
    model = same_as_theirs(tmp_path / "model")
    assert (model.config.query_length, model.config.passage_length) == (6, 20)


@pytest.mark.parametrize("shared_dense", [True, False])
def test_routers_of_two_towers(tmp_path, bert, tiny_tokenizer, shared_dense):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    other = save_tiny(tmp_path / "other", "bert", tiny_tokenizer, seed=1)
    routes = []
    for source, length in ((bert, 10), (other, 20)):
        routes.append([parts.Transformer(str(source), max_seq_length=length), parts.Pooling(32, "cls")])
        if not shared_dense:
            routes[-1].append(parts.Dense(32, 8))
    modules = [parts.Router.for_query_document(*routes)]
    if shared_dense:
        modules.append(parts.Dense(32, 8))
    theirs = SentenceTransformer(modules=[*modules, parts.Normalize()], prompts={"query": "q: "})
    theirs.save_pretrained(str(tmp_path / "model"))
    model = same_as_theirs(tmp_path / "model", theirs)
    assert set(model.towers) == {"backbone", "passage_backbone"}
    assert model.config.tied_projections is shared_dense
    model.save_pretrained(tmp_path / "again")
    same_as_theirs(tmp_path / "again", theirs)


def test_a_router_whose_routes_are_one_encoder(tmp_path, bert):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    both = [parts.Transformer(str(bert)), parts.Pooling(32)]
    theirs = SentenceTransformer(modules=[parts.Router.for_query_document(both, both)])
    theirs.save_pretrained(str(tmp_path / "model"))
    assert set(same_as_theirs(tmp_path / "model", theirs).towers) == {"backbone"}


def test_older_folders(tmp_path, bert):
    """What versions 2 to 5 wrote: old module paths, old keys, a subfolder for the transformer, pickled Dense."""
    folder = tmp_path / "old"
    shutil.copytree(bert, folder / "0_Transformer")
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 11, "do_lower_case": true}'
    )
    for name, config in {
        "1_Pooling": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        },
        "2_Dense": {
            "in_features": 32,
            "out_features": 8,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    weights = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{path[2:]}"}
        for n, path in enumerate(["0_Transformer", "1_Pooling", "2_Dense", "3_Normalize"])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    model = same_as_theirs(folder)
    assert model.config.query_length == 11 and model.embedding_size == 8


def test_pickled_weights_that_would_run_something_are_refused(tmp_path, bert):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    plain = shutil.copytree(bert, tmp_path / "plain")
    (plain / "model.safetensors").unlink()
    torch.save({"x": Evil()}, plain / "pytorch_model.bin")
    projected = tmp_path / "projected"
    DenseRetriever.from_pretrained(bert, projection_dim=8).save_pretrained(projected)
    (dense,) = projected.glob("*_Dense")
    (dense / "model.safetensors").unlink()
    torch.save({"linear.weight": Evil()}, dense / "pytorch_model.bin")
    for folder in (plain, projected):
        with pytest.raises(InputError, match="a pickle that holds more than numbers.*Give weights in safetensors"):
            load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_read_where_they_are_tensors(tmp_path, bert):
    """One rule for the backbone and for the modules after it."""
    from safetensors.torch import load_file

    folder = saved(tmp_path, bert, projection_dim=8)
    expected = vectors(load_model(folder), TEXTS, "query")
    files = [folder / "model.safetensors", folder / "2_Dense" / "model.safetensors"]
    for file in files:
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    torch.testing.assert_close(vectors(load_model(folder), TEXTS, "query"), expected, rtol=0, atol=0)
    for file in files:
        pickled = file.with_name("pytorch_model.bin")
        whole = pickled.read_bytes()
        bare = pickle.dumps({"linear.weight": print}, protocol=2)
        for damaged in (b"", b"no weights", bare, whole[: len(whole) // 2]):
            pickled.write_bytes(damaged)
            with pytest.raises(InputError, match="cannot be (loaded|read)|a pickle that holds more than numbers"):
                load_model(folder)
        pickled.write_bytes(whole)


def test_lower_casing_is_kept(tmp_path, tiny_tokenizer):
    from tokenizers import normalizers

    tokenizer = tokenizer_for(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    folder = save_tiny(tmp_path / "model", "distilbert", tokenizer)
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(folder)).save_pretrained(str(tmp_path / "cased"))
    file = tmp_path / "cased" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": True}))
    model = same_as_theirs(tmp_path / "cased")
    assert model.processor().queries(["A Cat"]) == model.processor().queries(["a cat"])
    model.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").processor().queries(["A Cat"]) == model.processor().queries(["a cat"])


@pytest.mark.parametrize(("head", "pooling"), [(None, "mean"), ("MaskedLM", "mean"), ("CausalLM", "last")])
def test_bare_checkpoints(tmp_path, tiny_tokenizer, head, pooling):
    family = "qwen2" if head == "CausalLM" else "bert"
    folder = save_tiny(tmp_path / "model", family, tokenizer_for(tiny_tokenizer), head=head)
    model = same_as_theirs(folder)
    assert model.config.pooling == pooling


def test_query_model_and_passage_model(tmp_path, bert, tiny_tokenizer):
    other = save_tiny(tmp_path / "other", "bert", tiny_tokenizer, seed=1)
    folder = tmp_path / "pair"
    shutil.copytree(bert, folder / "query_model")
    DenseRetriever.from_pretrained(other, pooling="mean", passage_prompt="p: ").save_pretrained(
        folder / "passage_model"
    )
    model = load_model(folder)
    assert not model.config.tied and model.config.passage_prompt == "p: "
    torch.testing.assert_close(vectors(model, TEXTS, "query"), vectors(load_model(bert), TEXTS, "query"))
    prompted = ["p: " + text for text in TEXTS]
    torch.testing.assert_close(vectors(model, TEXTS, "passage"), vectors(load_model(other), prompted, "passage"))


def test_prompts_named_for_passages(tmp_path, bert):
    model = DenseRetriever.from_pretrained(bert)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {"query": "query: ", "passage": "passage: "}}))
    config = load_model(tmp_path / "model").config
    assert (config.query_prompt, config.passage_prompt) == ("query: ", "passage: ")


def test_cross_encoders_of_sentence_transformers(tmp_path, tiny_tokenizer):
    from sentence_transformers import CrossEncoder

    source = save_tiny(tmp_path / "source", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    theirs = CrossEncoder(str(source), prompts={"search": "find: "}, default_prompt_name="search", max_length=20)
    theirs.save_pretrained(str(tmp_path / "model"))
    model = load_model(tmp_path / "model")
    assert isinstance(model, CrossEncoderRanker) and model.config.max_length == 20
    logits = theirs.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(pair_scores(model, PAIRS).numpy(), logits, atol=1e-5, rtol=1e-5)


def test_a_missing_padding_token_is_replaced(tmp_path, tiny_tokenizer, caplog):
    tokenizer = tokenizer_for(tiny_tokenizer)
    folder = save_tiny(tmp_path / "model", "llama", tokenizer)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    with caplog.at_level("INFO", logger="hf_distill"):
        model = load_model(folder)
    assert model.processor().pad_token_id == tokenizer.sep_token_id
    assert "no padding token" in caplog.text
    torch.testing.assert_close(vectors(model, TEXTS, "query"), vectors(model, TEXTS, "query", 1), atol=2e-5, rtol=1e-4)


def test_an_empty_text_without_special_tokens(tmp_path, tiny_tokenizer):
    from tokenizers import processors

    tokenizer = tokenizer_for(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    model = load_model(save_tiny(tmp_path / "model", "llama", tokenizer))
    found = vectors(model, ["", "a cat"], "query")
    assert found.isfinite().all()


def test_no_foreign_library_is_imported(tmp_path, bert):
    """Neither sentence-transformers nor peft is needed to open, run and save a model."""
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['sentence_transformers'] = sys.modules['peft'] = None\n"
        "from hf_distill.models import load_model\n"
        "model = load_model(sys.argv[1], tied=False)\n"
        "model.train(); model.save_pretrained(sys.argv[2])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(bert), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


# --------------------------------------------------------------------------------------------------- refusals


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved(tmp_path, bert, **settings):
    DenseRetriever.from_pretrained(bert, **settings).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pooling_of_other_kinds_is_refused(tmp_path, bert):
    folder = saved(tmp_path, bert)
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(InputError, match=r"1_Pooling: the model pools by mean \+ max.*cls, mean"):
        load_model(folder)
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=False, include_prompt=False)
    with pytest.raises(InputError, match="prompt out of its pooling"):
        load_model(folder)


def test_code_of_the_repository_is_never_run(tmp_path, bert):
    folder = saved(tmp_path, bert)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0] | {"type": "custom_st.Transformer"}, *modules[1:]]))
    with pytest.raises(InputError, match="code of the repository's own"):
        load_model(folder)
    (folder / "modules.json").unlink()
    edit(folder / "config.json", model_type="homemade", auto_map={"AutoConfig": "a.B", "AutoModel": "a.C"})
    with pytest.raises(InputError, match="never runs"):
        load_model(folder)


def test_modules_outside_the_folder_are_refused(tmp_path, bert):
    folder = saved(tmp_path, bert)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0] | {"path": "../../etc"}]))
    with pytest.raises(InputError, match="leaves the folder"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["MultiVectorEncoder", "ColBERT"])
def test_the_modules_of_another_archetype_are_refused(tmp_path, bert, kind):
    folder = saved(tmp_path, bert)
    edit(folder / "config_sentence_transformers.json", model_type=kind)
    with pytest.raises(InputError, match="1_Pooling: modules of type Pooling are not supported"):
        load_model(folder)


def test_chat_templates_are_refused(tmp_path, bert):
    folder = saved(tmp_path, bert)
    edit(folder / "sentence_bert_config.json", modality_config={"text": {}, "message": {}})
    with pytest.raises(InputError, match="chat template"):
        load_model(folder)


def test_folders_that_are_no_model(tmp_path, bert):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no config.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="only a PEFT adapter"):
        load_model(tmp_path / "empty")
    folder = saved(tmp_path, bert)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match=r"config.json"):
        load_model(folder)


def test_incomplete_weights_are_refused(tmp_path, bert):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, bert)
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.2.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights.*encoder.layer.2.output.dense.weight"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)
    edit(folder / "config.json", hidden_size=64)
    shutil.copy(bert / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(InputError):
        load_model(folder)


def test_a_tokenizer_that_does_not_fit(tmp_path, bert, tiny_tokenizer):
    folder = shutil.copytree(bert, tmp_path / "model")
    tokenizer = tokenizer_for(tiny_tokenizer)
    tokenizer.add_tokens(["[Q]", "[D]"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"largest id is \d+, but the model has embeddings for \d+ tokens.*resize"):
        load_model(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="there is no tokenizer"):
        load_model(folder)


@pytest.mark.parametrize("labels", [2, 3])
def test_classifiers_are_no_rankers(tmp_path, tiny_tokenizer, labels):
    folder = save_tiny(tmp_path / "model", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=labels)
    with pytest.raises(InputError, match=f"num_labels.*{labels} labels.*one score"):
        load_model(folder)


def test_settings_out_of_range(tmp_path, bert):
    for settings, message in (
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"similarity": "euclidean"}, "similarity is"),
        ({"passage_length": 65}, "passage_length is 65.*3 to 64"),
        ({"query_length": 1}, "query_length is 1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"poolng": "cls"}, "poolng"),
    ):
        with pytest.raises(InputError, match=message):
            DenseRetriever.from_pretrained(bert, **settings)
    folder = saved(tmp_path, bert, projection_dim=8)
    with pytest.raises(InputError, match="already projects to 8"):
        DenseRetriever.from_pretrained(folder, projection_dim=16)
    with pytest.raises(InputError, match="Known are"):
        CrossEncoderRanker.from_pretrained(bert, passage_prompt="x")


def test_the_wrong_class_for_a_folder(tmp_path, tiny_tokenizer, bert):
    ranker = save_tiny(tmp_path / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    CrossEncoderRanker.from_pretrained(ranker).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="cross-encoder.*CrossEncoderRanker"):
        DenseRetriever.from_pretrained(tmp_path / "saved")
    towers = saved(tmp_path, bert, tied=False)
    with pytest.raises(InputError, match="two towers.*DenseRetriever"):
        CrossEncoderRanker.from_pretrained(towers)


def test_positions_of_the_roberta_family_are_counted_right(tmp_path, tiny_tokenizer):
    tokenizer = tokenizer_for(tiny_tokenizer)
    tokenizer.model_max_length = 10**30
    model = load_model(save_tiny(tmp_path / "model", "roberta", tokenizer))
    # 64 positions, of which the padding token and the one before it take index 0.
    assert model.config.passage_length == 63
    assert vectors(model, ["cat " * 100], "passage").isfinite().all()
