"""Multi-vector models: folders of other libraries, reading of text, scores, layers."""

from __future__ import annotations

import json
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_distill.errors import InputError
from hf_distill.models import CrossEncoderRanker, DenseRetriever, MultiVectorRetriever, load_model, student_from

from .model_zoo import TEXTS, save_tiny, tokenizer_for, tokenizer_of_words


GOLDEN = Path(__file__).parent / "golden"
QUERIES = ["how does the heart pump blood", "volcano", "", "what is (this), please? " * 5, "cats and dogs"]
FOREIGN = """
import json, sys
sys.modules["hf_distill"] = None
import numpy as np
from sentence_transformers import MultiVectorEncoder
from transformers import AutoModel
cases = json.load(open(sys.argv[1]))
for folder in cases["folders"]:
    model = MultiVectorEncoder(folder)
    options = {"batch_size": 3, "show_progress_bar": False}
    query = model.encode_query(cases["queries"], **options)
    passage = model.encode_document(cases["texts"], **options)
    AutoModel.from_pretrained(folder)
    np.savez(
        folder + "/foreign.npz",
        scores=np.asarray(model.similarity(query, passage)),
        query=np.concatenate(query),
        passage=np.concatenate(passage),
        lengths=[len(one) for one in passage],
    )
for source, target in cases["resave"]:
    MultiVectorEncoder(source).save(target)
assert "hf_distill" not in {name for name, module in sys.modules.items() if module is not None}
"""


def tokens(model: MultiVectorRetriever, texts: list[str], kind: str, chunk: int = 2) -> list[torch.Tensor]:
    """Our vectors of the tokens that count, text by text, encoded a few texts at a time."""
    processor = model.processor()
    features = processor.encode(texts, kind)
    found = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(features), chunk):
            vectors, mask = model.encode(processor.pad(features[start : start + chunk]), kind)[:2]
            found += [one[keep] for one, keep in zip(vectors, mask)]
    return found


def scores_by_hand(queries: list[torch.Tensor], passages: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([[(q @ p.T).amax(1).sum().item() if len(p) else 0.0 for p in passages] for q in queries])


def stanford_folder(folder: Path, source: Path, tokenizer) -> Path:
    """What Stanford's code saves: a BertModel under `bert.`, the projection as `linear.weight`, artifact.metadata."""
    save_tiny(folder, "bert", tokenizer)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(3)
    save_file({**weights, "linear.weight": torch.randn(16, 32)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_maxlen": 12,
        "doc_maxlen": 30,
        "attend_to_mask_tokens": False,
        "mask_punctuation": True,
    }
    (folder / "artifact.metadata").write_text(json.dumps(metadata))
    return folder


def with_tokens(tokenizer, *words: str):
    """A copy of the tokenizer with further plain words in its vocabulary (as [unused0] is in BERT's)."""
    from tokenizers import Tokenizer
    from transformers import BertTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for word in words:
        state["model"]["vocab"][word] = len(state["model"]["vocab"])
    names = {key: tokenizer.special_tokens_map[key] for key in ("pad_token", "unk_token", "cls_token", "sep_token")}
    backend = Tokenizer.from_str(json.dumps(state))
    return BertTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", model_max_length=64, **names)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """Models saved in every layout, and what sentence-transformers makes of them in one fresh process."""
    root, sources = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("sources")
    bert = save_tiny(sources / "bert", "bert", tiny_tokenizer)
    spare = save_tiny(sources / "spare", "bert", with_tokens(tiny_tokenizer, "[unused0]", "[unused1]"))
    roberta = save_tiny(sources / "roberta", "roberta", tokenizer_for(tiny_tokenizer))
    llama = save_tiny(sources / "llama", "llama", tokenizer_for(tiny_tokenizer, "left", specials=False))
    short = {"query_length": 12, "passage_length": 20}
    torch.manual_seed(6)
    make = MultiVectorRetriever.from_pretrained
    models = {
        "pylate": make(bert, projection_dim=16, **short),
        "pylate-attend-skip": make(bert, attend_to_expansion=True, skip_punctuation=True, **short),
        "pylate-spare-markers": make(spare, projection_dim=8, **short),
        "pylate-no-expansion": make(bert, query_expansion=0, **short),
        "full-size": make(bert, projection_dim=0, **short),
        "full-size-skip": make(spare, projection_dim=0, skip_punctuation=True, attend_to_expansion=True, **short),
        "not-normalised": make(bert, projection_dim=16, normalize=False, **short),
        "least-width": make(bert, query_length=30, query_expansion=12, passage_length=20),
        "prompts": make(bert, query_prompt="find: ", passage_prompt="text: ", **short),
        "roberta": make(roberta, projection_dim=16, **short),
        "llama": make(llama, projection_dim=16, **short),
    }
    models["layers"] = student_from("layers:2:even", models["pylate"])
    for name, model in models.items():
        model.save_pretrained(root / name)
    stanford = stanford_folder(root / "stanford", bert, with_tokens(tiny_tokenizer, "[unused0]", "[unused1]"))
    models["stanford"] = load_model(stanford)
    resaved = {name: root / f"resaved-{name}" for name in ("pylate", "full-size", "stanford")}
    cases = {
        "folders": [str(root / name) for name in models],
        "queries": QUERIES,
        "texts": TEXTS,
        "resave": [(str(root / name), str(target)) for name, target in resaved.items()],
    }
    (root / "cases.json").write_text(json.dumps(cases))
    (root / "foreign.py").write_text(FOREIGN)
    done = subprocess.run(
        [sys.executable, str(root / "foreign.py"), str(root / "cases.json")], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, models, resaved


CASES = (
    "pylate", "pylate-attend-skip", "pylate-spare-markers", "pylate-no-expansion", "full-size", "full-size-skip",
    "not-normalised", "least-width", "prompts", "roberta", "llama", "layers", "stanford",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_opens_in_sentence_transformers_with_equal_scores(name, exported):
    root, models, _ = exported
    assert set(models) == set(CASES)
    foreign = np.load(root / name / "foreign.npz")
    ours_query, ours_passage = tokens(models[name], QUERIES, "query"), tokens(models[name], TEXTS, "passage")
    assert [len(one) for one in ours_passage] == foreign["lengths"].tolist()
    np.testing.assert_allclose(torch.cat(ours_query), foreign["query"], atol=1e-5)
    np.testing.assert_allclose(torch.cat(ours_passage), foreign["passage"], atol=1e-5)
    np.testing.assert_allclose(
        scores_by_hand(ours_query, ours_passage), foreign["scores"], atol=1e-4 if name == "not-normalised" else 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "stanford"])
def test_saved_models_are_read_again(name, exported):
    root, models, _ = exported
    again = load_model(root / name)
    assert isinstance(again, MultiVectorRetriever)
    own, theirs = models[name].config.to_dict(), again.config.to_dict()
    for field in ("query_length", "passage_length", "query_expansion", "skip_words", "normalize", "projections"):
        assert own[field] == theirs[field], field
    assert again.processor().query_prompt == models[name].processor().query_prompt
    torch.testing.assert_close(tokens(again, QUERIES, "query"), tokens(models[name], QUERIES, "query"))
    other = root / name / "again"
    again.save_pretrained(other)
    assert json.loads((other / "modules.json").read_text()) == json.loads((root / name / "modules.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pylate", "full-size", "stanford"])
def test_reads_what_sentence_transformers_saves(name, exported):
    _, models, resaved = exported
    again = load_model(resaved[name])
    torch.testing.assert_close(tokens(again, QUERIES, "query"), tokens(models[name], QUERIES, "query"))
    torch.testing.assert_close(tokens(again, TEXTS, "passage"), tokens(models[name], TEXTS, "passage"))


def test_layouts_written(tmp_path, tiny_bert):
    MultiVectorRetriever.from_pretrained(tiny_bert, projection_dim=16).save_pretrained(tmp_path / "projected")
    modules = json.loads((tmp_path / "projected" / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        "sentence_transformers.models.Transformer",
        "pylate.models.Dense.Dense",
    ]
    settings = json.loads((tmp_path / "projected" / "config_sentence_transformers.json").read_text())
    assert settings["model_type"] == "ColBERT" and settings["query_prefix"] == "[Q] "
    assert settings["query_length"] == 32 and settings["do_query_expansion"] is True
    # The markers are single tokens, which PyLate inserts by their ids.
    tokenizer = MultiVectorRetriever.from_pretrained(tmp_path / "projected").tokenizer
    assert tokenizer.convert_tokens_to_ids("[Q] ") not in (None, tokenizer.unk_token_id)
    assert tokenizer("[Q] a cat")["input_ids"][1] == tokenizer.convert_tokens_to_ids("[Q] ")
    MultiVectorRetriever.from_pretrained(tiny_bert, projection_dim=0).save_pretrained(tmp_path / "full")
    modules = json.loads((tmp_path / "full" / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "MultiVectorMask", "Normalize"]


def test_pylate_defaults_are_read(tmp_path, tiny_bert):
    """What PyLate leaves unsaid: 32 and 180 tokens (this model reads 64), queries filled up, punctuation left out."""
    MultiVectorRetriever.from_pretrained(tiny_bert, projection_dim=16).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    for key in ("query_length", "document_length", "do_query_expansion", "skiplist_words"):
        del settings[key]
    path.write_text(json.dumps(settings))
    config = load_model(tmp_path / "model").config
    assert (config.query_length, config.query_expansion, config.passage_length) == (32, 32, 64)
    assert config.skip_words == list(string.punctuation)


def test_queries_are_filled_up(tiny_bert):
    model = MultiVectorRetriever.from_pretrained(tiny_bert, query_length=10)
    processor = model.processor()
    chunk = processor.pad(processor.queries(["cat", "a cat sat on the mat"]))
    filled, counted = model.expanded(chunk)
    assert filled["input_ids"].shape == (2, 10) and counted.all()
    mask = model.tokenizer.mask_token_id
    assert (filled["input_ids"][0] == mask).sum() == 10 - chunk["attention_mask"][0].sum()
    assert torch.equal(filled["attention_mask"].sum(1), chunk["attention_mask"].sum(1))
    model.config.attend_to_expansion = True
    assert model.expanded(chunk)[0]["attention_mask"].all()


@pytest.fixture
def original() -> tuple[dict, Any]:
    """The golden inputs of LEAD's own loader, and a tokenizer of their vocabulary."""
    with np.load(GOLDEN / "lead_inputs.npz") as arrays:
        golden = {key: arrays[key] for key in arrays.files}
    return golden, tokenizer_of_words(golden["vocab"].tolist())


def original_passages(golden: dict) -> list[str]:
    """Title [SEP] text of the passages in the order of the batch: the positive, then negatives, one repeated."""
    passages = [line.split("\t") for line in golden["passages"].tolist()]
    return [f"{passages[number][2]} [SEP] {passages[number][1]}" for number in (0, 1, 2, 3, 2, 2)]


def test_inputs_of_the_original_code(original):
    """The token ids of LEAD's own loader: [CLS] replaced, queries cut without [SEP], title [SEP] text."""
    from transformers import BertConfig, BertModel

    golden, tokenizer = original
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    from hf_distill.models.multi_vector import MultiVectorConfig

    config = MultiVectorConfig(
        layout="lead",
        query_marker="[unused1]",
        passage_marker="[unused2]",
        query_length=int(golden["max_query_length"]),
        query_expansion=int(golden["max_query_length"]),
        passage_length=int(golden["max_doc_length"]),
        attend_to_expansion=True,
        projection_dim=0,
        template="{title} [SEP] {text}",
    )
    model = MultiVectorRetriever(config, BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer)
    processor = model.processor()
    samples = json.loads(str(golden["samples"]))
    chunk, counted = model.expanded(processor.pad(processor.queries([sample["question"] for sample in samples])))
    np.testing.assert_array_equal(chunk["input_ids"], golden["col_q_ids"])
    np.testing.assert_array_equal(chunk["attention_mask"], golden["col_q_mask"])
    assert counted.all()
    chunk = processor.pad(processor.passages(original_passages(golden)))
    np.testing.assert_array_equal(chunk["input_ids"], golden["col_d_ids"])
    np.testing.assert_array_equal(chunk["attention_mask"], golden["col_d_mask"])


def test_dense_and_pair_inputs_of_the_original_code(original):
    """Ours are the original's, but that a query that is cut keeps its [SEP] and a pair ends with one."""
    from hf_distill.models.processing import TextProcessor

    golden, tokenizer = original
    lengths = {"query_length": int(golden["max_query_length"]), "passage_length": int(golden["max_doc_length"])}
    dense, passages = TextProcessor(tokenizer, **lengths), original_passages(golden)
    short, long = (sample["question"] for sample in json.loads(str(golden["samples"])))
    chunk = dense.pad(dense.passages(passages))
    np.testing.assert_array_equal(chunk["input_ids"], golden["d_ids"])
    np.testing.assert_array_equal(chunk["attention_mask"], golden["d_mask"])
    separator = tokenizer.sep_token_id
    whole, cut = dense.queries([short, long])
    assert whole == golden["q_ids"][0][golden["q_mask"][0] == 1].tolist()
    assert cut == [*golden["q_ids"][1][:4].tolist(), separator] and len(cut) == len(golden["q_ids"][1])

    pairs = [[ids[mask == 1].tolist() for ids, mask in zip(*row)] for row in zip(golden["ce_ids"], golden["ce_mask"])]
    ours, _ = TextProcessor(tokenizer, "cross", passage_length=11).pairs([short] * 3, passages[:3])
    assert ours == [[*pair, separator] for pair in pairs[0]]
    kept = " ".join(long.split()[:4])  # as many words as the original leaves of it
    ours, _ = TextProcessor(tokenizer, "cross", passage_length=13).pairs([kept] * 3, passages[3:])
    assert ours == [[*pair[:5], separator, *pair[5:], separator] for pair in pairs[1]]


# ------------------------------------------------------------------------------------------------------- refusals


def test_refusals(tiny_bert, tmp_path, tiny_tokenizer):
    make = MultiVectorRetriever.from_pretrained
    lead = make(
        save_tiny(tmp_path / "spare", "bert", with_tokens(tiny_tokenizer, "[unused1]", "[unused2]")), layout="lead"
    )
    with pytest.raises(InputError, match="replaces .CLS. .*'inserted'"):
        lead.save_pretrained(tmp_path / "lead")
    assert not (tmp_path / "lead").exists()
    with pytest.raises(InputError, match="unknown settings .*colour"):
        make(tiny_bert, colour=1)
    with pytest.raises(InputError, match="filled up to 40"):
        make(tiny_bert, query_expansion=40)
    model = make(tiny_bert, projection_dim=16)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="projection_dim is 8, but the model has 16"):
        make(tmp_path / "saved", projection_dim=8)
    for archetype in (DenseRetriever, CrossEncoderRanker):
        with pytest.raises(InputError, match="this is a multi-vector model.*MultiVectorRetriever"):
            archetype.from_pretrained(tmp_path / "saved")
    left = save_tiny(tmp_path / "left", "llama", tokenizer_for(tiny_tokenizer, "left", specials=False))
    with pytest.raises(InputError, match="pads on the left"):
        make(left, query_expansion=8, query_length=8)
    with pytest.raises(InputError, match="has the layers 1 to 4, not 5"):
        model.check_layers([1, 5])


def test_checkpoints_are_restored(tiny_bert, tmp_path):
    torch.manual_seed(1)
    model = MultiVectorRetriever.from_pretrained(tiny_bert, projection_dim=16)
    model.save_pretrained(tmp_path / "checkpoint")
    before = tokens(model, QUERIES, "query")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(tokens(model, QUERIES, "query")[0], before[0])
    model.load_checkpoint(tmp_path / "checkpoint")
    torch.testing.assert_close(tokens(model, QUERIES, "query"), before)
    shutil.rmtree(tmp_path / "checkpoint" / "1_Dense")
    with pytest.raises(InputError, match="Dense module has no configuration"):
        model.load_checkpoint(tmp_path / "checkpoint")


def test_older_checkpoints_of_stanfords_code(tmp_path, tiny_tokenizer):
    folder = stanford_folder(tmp_path / "model", tmp_path, with_tokens(tiny_tokenizer, "[unused0]", "[unused1]"))
    expected = load_model(folder).weights_fingerprint()
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_model(folder).weights_fingerprint() == expected
    del state["linear.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="lacks the weight 'linear.weight'"):
        load_model(folder)
