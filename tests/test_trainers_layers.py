"""Distillation of layers: scores of layers, their pairs, live and cached teachers, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.data.collators import RetrievalCollator
from hf_distill.data.negatives import TrainingRows
from hf_distill.errors import InputError
from hf_distill.losses import contrastive_loss, interaction_map_loss, kl_loss, layer_alignment_loss, maxsim
from hf_distill.models import CrossEncoderRanker, DenseRetriever, MultiVectorRetriever, student_from
from hf_distill.models.backbones import block_list
from hf_distill.models.candidates import take_rows
from hf_distill.models.layer_scores import LayerTokens, vector_layer_scores
from hf_distill.models.multi_vector import token_scores
from hf_distill.retrieval import InferenceModel, encode_table, layer_scores, score_layers, score_rows
from hf_distill.teachers import CachedEmbeddings, CachedScores, LiveTeacher
from hf_distill.trainers import DistillTrainer, DistillTrainingArguments
from hf_distill.trainers.layers import LayerPairing

from .model_zoo import save_tiny, tokenizer_for


GOLDEN = Path(__file__).parent / "golden"
ARCHETYPES = {"dense": DenseRetriever, "tokens": MultiVectorRetriever, "pair": CrossEncoderRanker}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from tests.conftest import MICRO

    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def rows(collection) -> RowSet:
    """Every labelled query with its positives and six random negatives."""
    positives = collection.qrels["train"].positives()
    generator = np.random.default_rng(0)
    queries = collection.qrels["train"].query_positions()
    documents, counts = [], []
    for query in queries:
        relevant = positives.of(query)
        others = np.setdiff1d(np.arange(len(collection.corpus)), relevant)
        documents.append(np.concatenate([relevant, generator.choice(others, 6, replace=False)]))
        counts.append(len(relevant))
    return RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts)


def make(archetype: str, source: Path, **settings):
    torch.manual_seed(4)
    if archetype == "tokens":
        settings = {"query_length": 12, "passage_length": 32, "projection_dim": 16, **settings}
    return ARCHETYPES[archetype].from_pretrained(source, **settings)


def batch_of(model, rows: RowSet, queries: int = 4, negatives: int = 2, chunks: int = 2) -> dict:
    dataset = TrainingRows(rows, num_negatives=negatives)
    collator = RetrievalCollator(rows.queries, rows.corpus, {"student": model.processor()}, num_chunks=chunks)
    return collator([dataset[row, 0] for row in range(queries)])


def hidden_states(model, chunk: dict, number: int) -> torch.Tensor:
    """What transformers itself calls the output of a layer."""
    tower = getattr(model.backbone, "base_model", model.backbone)
    return tower(**chunk, output_hidden_states=True).hidden_states[number]


# ---------------------------------------------------------------------------------------------- scores of layers


def test_dense_layers_are_compared_by_their_pooled_vectors(tiny_bert, rows):
    model = make("dense", tiny_bert, pooling="cls", normalize=True, projection_dim=8)
    batch = batch_of(model, rows)
    output = model(**batch["tokens"]["student"], layers=(2, 4))
    scores = model.layer_scores(output, batch, "in_batch")
    assert scores.shape == (2, 4, 12) and scores.dtype == torch.float32
    processor = model.processor()
    queries = processor.pad(processor.queries(rows.queries.texts(batch["query_ids"].numpy())))
    passages = processor.pad(processor.passages(rows.corpus.texts(batch["passage_ids"].flatten().numpy())))
    for place, number in enumerate((2, 4)):
        q, p = hidden_states(model, queries, number)[:, 0], hidden_states(model, passages, number)[:, 0]
        torch.testing.assert_close(scores[place], q @ p.T, atol=1e-4, rtol=1e-4)
    own = model.layer_scores(output, batch, "own")
    torch.testing.assert_close(own[1, 2], scores[1, 2, 6:9], atol=1e-5, rtol=1e-5)


def test_token_layers_are_compared_by_maxsim(tiny_bert, rows):
    model = make("tokens", tiny_bert, skip_punctuation=True)
    batch = batch_of(model, rows)
    output = model(**batch["tokens"]["student"], layers=(1, 4))
    scores = model.layer_scores(output, batch, "in_batch")
    processor = model.processor()
    queries, counted = model.expanded(processor.pad(processor.queries(rows.queries.texts(batch["query_ids"].numpy()))))
    passages = processor.pad(processor.passages(rows.corpus.texts(batch["passage_ids"].flatten().numpy())))
    mask = passages["attention_mask"].bool() & ~torch.isin(passages["input_ids"], torch.tensor(model._skipped))
    assert counted.all() and not torch.equal(mask, passages["attention_mask"].bool())
    for place, number in enumerate((1, 4)):
        q, p = hidden_states(model, queries, number), hidden_states(model, passages, number)
        torch.testing.assert_close(scores[place], maxsim(q, p, mask), atol=1e-3, rtol=1e-4)
    # The final scores are of normalised, projected vectors.
    assert not torch.allclose(scores[1], model.batch_scores(output, batch, "in_batch"))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "llama"])
def test_a_ranker_applies_its_whole_head_to_each_layer(family, tmp_path, tiny_tokenizer, rows):
    specials = family != "llama"
    tokenizer = tiny_tokenizer if family == "bert" else tokenizer_for(tiny_tokenizer, specials=specials)
    source = save_tiny(tmp_path / family, family, tokenizer, head="SequenceClassification", num_labels=1)
    model = make("pair", source)
    batch = batch_of(model, rows)
    number = 3
    output = model(**batch["tokens"]["student"], layers=(number, model.num_layers))
    torch.testing.assert_close(output.scores, model(**batch["tokens"]["student"]))
    # A model cut after that layer says the same, but for a final norm that stands after the last layer.
    prefix, blocks = block_list(model.backbone)
    holder, _, name = prefix.rpartition(".")
    setattr(model.backbone.get_submodule(holder), name, torch.nn.ModuleList(blocks[:number]))
    scores = model.layer_scores(output, batch, "own")
    assert scores.shape == (2, 4, 3)
    if family in ("modernbert", "llama"):
        norm = next(
            module for key, module in model.backbone.base_model.named_children() if key in ("final_norm", "norm")
        )
        norm.forward = lambda hidden: hidden
    torch.testing.assert_close(model(**batch["tokens"]["student"]).view(4, 3), scores[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("archetype", ARCHETYPES)
def test_layers_under_recomputation_and_only_what_is_asked_for(archetype, tiny_bert, rows):
    model = make(archetype, tiny_bert)
    batch = batch_of(model, rows)

    def gradients(recompute: bool):
        model.train()
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.recompute = recompute
        output = model(**batch["tokens"]["student"], layers=(2,))
        loss = model.layer_scores(output, batch, "own").sum() / 100 + model.batch_scores(output, batch, "own").sum()
        loss.backward()
        return loss.detach(), {
            name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
        }

    (plain, one), (cached, two) = gradients(False), gradients(True)
    torch.testing.assert_close(plain, cached)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
    model.eval()
    assert getattr(model(**batch["tokens"]["student"]), "layers", None) is None


# ------------------------------------------------------------------------------------------------ golden cases


class Case:
    """Hidden stacks of a golden case as layer features, and its expected numbers."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(np.array(arrays[key])).float() for key in arrays.files}
        self.inputs = {
            key: self.arrays[key].clone().requires_grad_(True)
            for key in ("student_q", "student_d", "teacher_q", "teacher_d")
        }
        self.width = 1 + int(self.arrays["num_neg"])

    def of(self, who: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Position 0 of every layer, in the fixed layout: `[Q, L, H]` and `[Q, M, L, H]`."""
        query, passage = self.inputs[f"{who}_q"][:, :, 0], self.inputs[f"{who}_d"][:, :, 0]
        return query, passage.unflatten(0, (-1, self.width))


@pytest.mark.parametrize("name", ["lead_distill_de", "lead_distill_de_frozen_flag"])
def test_lead_of_a_dense_teacher(name):
    case = Case(name)
    scores = {who: vector_layer_scores(*case.of(who), "in_batch") for who in ("student", "teacher")}
    target = torch.arange(3) * case.width
    chosen = [case.arrays[f"sel_{who}"].long() for who in ("student", "teacher")]
    student, teacher = scores["student"][-1], scores["teacher"][-1]
    parts = {
        "loss_student": contrastive_loss(student, target),
        "kl_t_s": kl_loss(student, teacher),
        "layer": layer_alignment_loss(scores["student"][chosen[0]], scores["teacher"][chosen[1]], target),
    }
    if name == "lead_distill_de":
        parts |= {"loss_teacher": contrastive_loss(teacher, target), "kl_s_t": kl_loss(teacher, student)}
    for key, value in parts.items():
        torch.testing.assert_close(value, case.arrays[key], atol=1e-5, rtol=1e-5)
    total = torch.stack(list(parts.values())).sum()
    torch.testing.assert_close(total, case.arrays["loss"], atol=1e-5, rtol=1e-5)
    total.backward()
    for key, tensor in case.inputs.items():
        torch.testing.assert_close(tensor.grad, case.arrays[f"grad_{key}"], atol=1e-4, rtol=1e-4)


def test_maxsim_of_the_original():
    with np.load(GOLDEN / "lead_inbatch_colbert.npz") as arrays:
        case = {key: torch.from_numpy(np.array(arrays[key])).float() for key in arrays.files}
    width = 1 + int(case["num_neg"])
    passage, mask = case["d"].unflatten(0, (-1, width)), case["doc_mask"].bool().unflatten(0, (-1, width))
    everything = torch.ones(case["q"].shape[:2], dtype=torch.bool)
    in_batch = token_scores(case["q"], passage, everything, mask, "in_batch")
    torch.testing.assert_close(in_batch, case["scores"], atol=1e-5, rtol=1e-5)
    own = token_scores(case["q"], passage, everything, mask, "own")
    for row in range(3):
        torch.testing.assert_close(own[row], in_batch[row, row * width : (row + 1) * width])


def test_layers_drawn_as_in_the_original():
    golden = np.load(GOLDEN / "lead_select_layer.npz")
    # One generator draws all the cases of the file, one after the other, in its own order: replay each from the seed.
    pairing = LayerPairing("random", 6, 12, 5, resample_every=1, seed=888)
    drawn = [pairing.at(step) for step in range(6)]
    assert (np.array([student for student, _ in drawn]) - 1).tolist() == golden["k5_student"].tolist()
    assert (np.array([teacher for _, teacher in drawn]) - 1).tolist() == golden["k5_teacher"].tolist()
    for name, depths, count in (("k6", (6, 12), 6), ("big", (12, 24), 5)):
        pairing = LayerPairing("random", *depths, count, resample_every=1, seed=888)
        drawn = [pairing.at(step) for step in range(6)]
        assert (np.array([student for student, _ in drawn]) - 1).tolist() == golden[f"{name}_student"].tolist()
        assert (np.array([teacher for _, teacher in drawn]) - 1).tolist() == golden[f"{name}_teacher"].tolist()


# ------------------------------------------------------------------------------------------------------- pairing


def test_pairs_depend_on_the_step_alone():
    straight = LayerPairing("random", 6, 12, 3, resample_every=4, seed=7)
    seen = [straight.at(step) for step in range(40)]
    assert all(seen[step] == seen[step - step % 4] for step in range(40)) and len(set(seen)) > 5
    jumping = LayerPairing("random", 6, 12, 3, resample_every=4, seed=7)
    assert [jumping.at(step) for step in (39, 0, 17, 5)] == [seen[39], seen[0], seen[17], seen[5]]
    for student, teacher in seen:
        assert list(student) == sorted(set(student)) and list(teacher) == sorted(set(teacher))
        assert len(student) == len(teacher) == 3 and max(student) <= 6 and max(teacher) <= 12


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        # The original's own, zero-based there: student 1..5 with teacher 7..11, and with 0, 2, 4, 6, 8.
        ("last", ((2, 3, 4, 5, 6), (8, 9, 10, 11, 12))),
        ("skip", ((2, 3, 4, 5, 6), (1, 3, 5, 7, 9))),
        ("even", ((1, 2, 4, 5, 6), (1, 4, 7, 9, 12))),
        ("1:2,6:12", ((1, 6), (2, 12))),
    ],
)
def test_fixed_pairings(pairing, expected):
    assert LayerPairing(pairing, 6, 12).at(123) == expected


@pytest.mark.parametrize(
    ("pairing", "count", "message"),
    [
        ("1:2,7:12", None, "the student has the layers 1 to 6, not 7"),
        ("1:13", None, "the teacher has the layers 1 to 12, not 13"),
        ("0:1", None, "the student has the layers 1 to 6, not 0"),
        ("nearest", None, "Choose random, last, skip, even"),
        ("random", 7, "Use 1 to 6"),
        ("1:1,2:2", 3, "but 2 are named"),
    ],
)
def test_layers_that_do_not_exist_are_refused(pairing, count, message):
    with pytest.raises(InputError, match=message):
        LayerPairing(pairing, 6, 12, count)


# ------------------------------------------------------------------------------------------------------ training


def arguments(folder, **settings):
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_negatives": 3,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "dropout": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
        "report_to": "none",
        "method": "lead",
        "layer_resample_every": 2,
        "num_layer_pairs": 2,
    }
    return DistillTrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def history(trainer) -> list[dict[str, float]]:
    trainer.train()
    names = {"loss", *trainer.terms}
    return [{key: entry[key] for key in names} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("teacher", ARCHETYPES)
@pytest.mark.parametrize("student", ["dense", "tokens", "pair"])
def test_layers_of_any_teacher_teach_any_student(student, teacher, tiny_bert, rows, tmp_path):
    model = student_from("layers:2", make(student, tiny_bert))
    trainer = DistillTrainer(
        model, arguments(tmp_path, max_steps=2), [LiveTeacher("teacher", make(teacher, tiny_bert))], rows=rows
    )
    candidates = "own" if "pair" in (student, teacher) else "global"
    assert {name: term.candidates for name, term in trainer.terms.items()} == dict.fromkeys(
        ("contrastive", "kl", "layer_alignment"), candidates
    )
    before = {name: one.clone() for name, one in model.state_dict().items()}
    logged = history(trainer)
    assert all(np.isfinite(list(entry.values())).all() for entry in logged)
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][name] for name in trainer.terms), rel=1e-4)
    assert any(not torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_the_logged_term_is_the_loss_of_the_paper(tiny_bert, rows, tmp_path):
    """One step, recomputed from the collated batch with plain functions."""
    teacher, student = make("tokens", tiny_bert), student_from("layers:2", make("dense", tiny_bert, pooling="cls"))
    args = arguments(tmp_path, max_steps=1, layer_pairing="1:2,2:4", num_layer_pairs=None)
    trainer = DistillTrainer(student, args, [LiveTeacher("teacher", teacher)], rows=rows)
    trainer.terms["layer_alignment"].mask_false_negatives = False
    batch = next(iter(trainer.get_train_dataloader()))
    student.eval()
    with torch.no_grad():
        ours = student.layer_scores(student(**batch["tokens"]["student"], layers=(1, 2)), batch, "global")
        theirs = teacher.layer_scores(teacher(**batch["tokens"]["teacher"], layers=(2, 4)), batch, "global")
    expected = layer_alignment_loss(ours, theirs, torch.arange(4) * 4)
    assert history(trainer)[0]["layer_alignment"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("archetype", ARCHETYPES)
def test_a_live_teacher_reads_in_the_precision_it_is_given(archetype, tiny_bert, rows):
    model = make(archetype, tiny_bert)
    batch = batch_of(model, rows)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        teacher = LiveTeacher("student", model, dtype)
        teacher.begin_batch((2, 4))
        assert {one.dtype for one in teacher.model.backbone.parameters()} == {dtype}
        found[dtype] = [teacher.scores(batch, "own"), teacher.layer_scores(batch, (2, 4), "own")]
        if archetype == "dense":
            found[dtype] += teacher.embeddings(batch)
        described = teacher.describe()
        assert described["dtype"] == str(dtype).removeprefix("torch.")
        assert described["weights"] == model.weights_fingerprint()
    assert model.dtype == torch.float32
    for exact, rounded in zip(*found.values()):
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=5e-4 + 0.02 * exact.abs().max().item())


@pytest.mark.parametrize("archetype", ARCHETYPES)
def test_cached_layers_teach_as_live_ones_do(archetype, tiny_tokenizer, rows, tmp_path):
    """The same losses step by step, from columns that were written to disk and read again."""
    source = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    teacher = make(archetype, source)
    scored = score_layers(teacher, score_rows(teacher, rows, dtype="float32"), dtype="float32")
    scored = RowSet.load(scored.save(tmp_path / "rows"), rows.queries, rows.corpus)
    cached = CachedScores.from_rows("teacher", scored, "scores", "layer_scores_teacher", model=teacher)
    assert cached.layers == (1, 2, 3, 4) and cached.num_layers == 4
    # A dense teacher's own temperature is not part of what a row set stores.
    teacher.config.temperature = 1.0
    losses = (
        '[{"name": "contrastive", "candidates": "own"}, kl, {"name": "layer_alignment", "candidates": "own"}, '
        '{"name": "layer_alignment", "calibration": "z_norm", "calibrate_student": true, "weight": 0.5}]'
    )
    seen = []
    for one in (LiveTeacher("teacher", teacher), cached):
        student = student_from("layers:2", make("dense", source, pooling="cls", similarity="dot"))
        args = arguments(tmp_path / "out", losses=losses, max_steps=4)
        seen.append(history(DistillTrainer(student, args, [one], rows=scored)))
    for step, (live, stored) in enumerate(zip(*seen)):
        for name, value in live.items():
            assert stored[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_cached_vectors_of_layers_teach_with_any_candidates(storage, tiny_tokenizer, rows, tmp_path):
    """The objective of the paper with a frozen dense teacher: the same losses live and cached, temperature too."""
    source = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    teacher = make("dense", source, pooling="cls", normalize=True, projection_dim=8, temperature=0.5)
    tables = ((rows.queries, "query"), (rows.corpus, "passage"))
    settings = {"dtype": "float32", "storage": storage}
    stores = [encode_table(teacher, *both, **settings) for both in tables]
    layer_stores = tuple(encode_table(teacher, *both, layers=[2, 4], **settings) for both in tables)
    assert layer_stores[0].key["layers"] == [2, 4] and layer_stores[0].dim == 2 * teacher.config.hidden_size
    assert stores[0].dim == 8 and layer_stores[0].dtype == storage
    origin = {"num_layers": teacher.num_layers}
    cached = CachedEmbeddings("teacher", *stores, temperature=0.5, origin=origin, layer_stores=layer_stores)
    losses = (
        '["contrastive", {"name": "kl", "candidates": "global"}, {"name": "layer_alignment", "candidates": "global"}, '
        '{"name": "layer_alignment", "candidates": "own"}]'
    )
    seen = []
    for one in (LiveTeacher("teacher", teacher), cached):
        student = student_from("layers:2", make("dense", source, pooling="cls", similarity="dot"))
        args = arguments(tmp_path / "out", losses=losses, max_steps=2, layer_pairing="1:2,2:4", num_layer_pairs=None)
        seen.append(history(DistillTrainer(student, args, [one], rows=rows)))
    room = 1e-5 if storage == "float32" else 1e-2
    for step, (live, stored) in enumerate(zip(*seen)):
        for name, value in live.items():
            assert stored[name] == pytest.approx(value, rel=10 * room, abs=room), (step, name)
    args = arguments(tmp_path / "out", losses=losses, layer_pairing="1:1", num_layer_pairs=None)
    with pytest.raises(InputError, match="the cache of the teacher 'teacher' has the layers 2, 4, not 1"):
        DistillTrainer(student, args, [cached], rows=rows)
    with pytest.raises(InputError, match="no vectors of the same layers"):
        CachedEmbeddings("teacher", *stores, layer_stores=tuple(stores))
    with pytest.raises(InputError, match="nothing is known of the layers"):
        DistillTrainer(student, args, [CachedEmbeddings("teacher", *stores)], rows=rows)


def test_scores_of_layers_do_not_depend_on_how_many_queries_are_held(tiny_bert, rows, tmp_path, monkeypatch):
    teacher, found, readings = make("tokens", tiny_bert), [], []
    outputs = InferenceModel.outputs
    monkeypatch.setattr(InferenceModel, "outputs", lambda *given: readings.append(1) or outputs(*given))
    for room in (1 << 30, 40_000, 1):
        monkeypatch.setattr(layer_scores, "_QUERY_BYTES", room)
        readings.clear()
        settings = {"dtype": "float32", "token_budget": 32, "cache_dir": tmp_path / str(room)}
        scored = score_layers(teacher, rows, layers=[1, 4], **settings)
        values = [scored.values_at("layer_scores_teacher", row) for row in range(len(scored))]
        found.append((np.concatenate(values), len(readings)))
    (whole, once), (few, several), (one, most) = found
    # Of each of two shards the queries once, and the passages for each part of them.
    assert once == 4 < several < most
    np.testing.assert_array_equal(whole, few)
    np.testing.assert_array_equal(whole, one)


def test_scores_of_layers_are_made_once(tiny_bert, rows, tmp_path):
    teacher = make("tokens", tiny_bert)
    one = score_layers(teacher, rows, layers=[2, 4], column="layer_scores_x", dtype="float32", cache_dir=tmp_path)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    two = score_layers(teacher, rows, layers=[4, 2], column="layer_scores_x", dtype="float32", cache_dir=tmp_path)
    assert shards and shards == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    np.testing.assert_array_equal(one.values_at("layer_scores_x", 3), two.values_at("layer_scores_x", 3))
    assert one.values_at("layer_scores_x", 3).shape == (len(rows.documents_at(3)), 2)
    origin = one.metadata["teachers"]["layer_scores_x"]
    assert origin["layers"] == [2, 4] and origin["weights"] == teacher.weights_fingerprint()


def test_columns_of_other_texts_or_weights_are_refused(tiny_bert, rows, tmp_path):
    teacher = make("dense", tiny_bert)
    scored = score_layers(teacher, score_rows(teacher, rows, dtype="float32"), layers=[1, 3], dtype="float32")
    with pytest.raises(InputError, match="made by .* not by the teacher.*Score the rows again"):
        with torch.no_grad():
            teacher.backbone.embeddings.word_embeddings.weight.add_(1.0)
        CachedScores.from_rows("teacher", scored, "scores", model=teacher)
    with pytest.raises(InputError, match="no column 'scores_other'.*hf-distill score writes one"):
        CachedScores.from_rows("teacher", scored, "scores_other")
    scored.metadata["teachers"]["layer_scores_teacher"]["corpus_fingerprint"] = "0" * 16
    with pytest.raises(InputError, match="was made for other corpus than.*Score the rows again"):
        CachedScores.from_rows("teacher", scored, "scores", "layer_scores_teacher")
    scored.metadata["teachers"]["layer_scores_teacher"]["corpus_fingerprint"] = rows.corpus.fingerprint
    cached = CachedScores.from_rows("teacher", scored, "scores", "layer_scores_teacher")
    args = arguments(tmp_path, layer_pairing="1:2", num_layer_pairs=None)
    with pytest.raises(InputError, match="has the layers 1, 3, not 2.*--layers all"):
        DistillTrainer(student_from("layers:2", make("dense", tiny_bert)), args, [cached], rows=scored)
    args = arguments(tmp_path, losses='[{"name": "layer_alignment", "candidates": "global"}]')
    with pytest.raises(InputError, match="cannot score global candidates.*own; or .*--teacher_mode live"):
        DistillTrainer(student_from("layers:2", make("dense", tiny_bert)), args, [cached], rows=scored)
    with pytest.raises(InputError, match="has the layers 1 to 4, not 5"):
        score_layers(teacher, rows, layers=[5])


def test_interaction_maps_of_the_original():
    with np.load(GOLDEN / "lead_virt_baseline.npz") as arrays:
        case = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
    masks = [torch.arange(5 - short) < case[key][:, None] for short, key in ((1, "query_len"), (0, "doc_len"))]
    tokens = {}
    for who in ("student", "teacher"):
        chosen = case[f"sel_{who}"].long()
        query, passage = case[f"{who}_q"][:, chosen].float(), case[f"{who}_d"][:, chosen].float()
        tokens[who] = LayerTokens(query, passage.unflatten(0, (3, 3)), masks[0], masks[1].unflatten(0, (3, 3)))
    maps = {who: one.maps(tokens["student"], "in_batch") for who, one in tokens.items()}
    for who, found in maps.items():
        torch.testing.assert_close(found, case[f"{who}_map"].float(), atol=1e-5, rtol=1e-5)
    loss = interaction_map_loss(maps["student"], maps["teacher"])
    torch.testing.assert_close(loss, case["loss"].float(), atol=1e-5, rtol=1e-5)
    own = tokens["student"].maps(tokens["student"], "own")
    for row in range(3):
        torch.testing.assert_close(own[:, row], maps["student"][:, row, 3 * row : 3 * row + 3])


def test_virt_trains_students_that_read_the_same_tokens(tiny_bert, tiny_tokenizer, tmp_path, rows):
    teacher = make("dense", tiny_bert, pooling="cls")
    student = student_from("layers:2", teacher)
    args = arguments(tmp_path, method="attention", max_steps=2)
    trainer = DistillTrainer(student, args, [LiveTeacher("teacher", teacher)], rows=rows)
    assert trainer.terms["interaction_maps"].candidates == "in_batch"
    logged = history(trainer)
    assert all(entry["interaction_maps"] > 0 for entry in logged)
    for other, problem in (
        (make("tokens", tiny_bert), "query_prompt.* differ.*layer_alignment"),
        (make("dense", tiny_bert, query_length=9), "query_length differ"),
        (make("dense", save_tiny(tmp_path / "other", "bert", tokenizer_for(tiny_tokenizer))), "tokenizer differ"),
        (make("pair", tiny_bert), "no token vectors"),
        (CachedScores("teacher", layer_column="layer_scores_x", layers=[1, 2]), "only stored scores"),
    ):
        other = other if isinstance(other, CachedScores) else LiveTeacher("teacher", other)
        losses = '[{"name": "interaction_maps", "candidates": "own"}]'
        with pytest.raises(InputError, match=problem):
            DistillTrainer(student_from("layers:2", teacher), arguments(tmp_path, losses=losses), [other], rows=rows)


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("none", {"contrastive"}),
        ("response", {"kl"}),
        ("labelled_response", {"contrastive", "kl"}),
        ("embedding", {"contrastive", "embedding_mse"}),
        ("lead_uniform", {"contrastive", "kl", "layer_alignment"}),
    ],
)
def test_baselines_are_switches(method, terms, tiny_bert, tmp_path, rows):
    teacher = LiveTeacher("teacher", make("dense", tiny_bert))
    args = arguments(tmp_path, method=method, max_steps=1)
    trainer = DistillTrainer(student_from("layers:2", make("dense", tiny_bert)), args, [teacher], rows=rows)
    assert set(trainer.terms) == terms
    if method == "lead_uniform":
        assert trainer.terms["layer_alignment"].options == {"reweight": False}
    assert np.isfinite(history(trainer)[0]["loss"])


def test_lexical_models_have_no_layers_to_compare(tiny_tokenizer, tiny_bert, rows, tmp_path):
    from hf_distill.models import LexicalRetriever

    lexical = LexicalRetriever.from_pretrained(save_tiny(tmp_path / "mlm", "bert", tiny_tokenizer, head="MaskedLM"))
    student = student_from("layers:2", make("dense", tiny_bert))
    with pytest.raises(InputError, match="layers of a lexical model give no scores.*kl"):
        DistillTrainer(student, arguments(tmp_path), [LiveTeacher("teacher", lexical)], rows=rows)
    with pytest.raises(InputError, match="layers of a lexical model give no scores"):
        score_layers(lexical, rows)


def test_rows_in_another_order_and_rows_taken_twice():
    for index in ([2, 0, 3, 1], [1, 1, 0, 3], [3, 0]):
        index, weights = torch.tensor(index), torch.randn(len(index), 3)
        found = []
        for take in (take_rows, lambda tensor, index: tensor[index]):
            rows = torch.arange(12.0).view(4, 3).requires_grad_()
            taken = take(rows, index)
            (taken * weights).sum().backward()
            found.append((taken.detach(), rows.grad))
        for ours, theirs in zip(*found):
            assert torch.equal(ours, theirs)
