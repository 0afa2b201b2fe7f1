"""Trainers in one process: they learn, resume exactly, and leave native checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.evaluation import RetrievalEvaluation, evaluate_system
from hf_distill.models import CrossEncoderRanker, DenseRetriever, student_from
from hf_distill.retrieval import search
from hf_distill.teachers import CachedScores, LiveTeacher
from hf_distill.trainers import (
    BaseTrainer,
    DistillTrainer,
    DistillTrainingArguments,
    RetrievalTrainer,
    RetrievalTrainingArguments,
)


NEGATIVES = 3


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from tests.conftest import MICRO

    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture()
def rows(collection) -> RowSet:
    """Every labelled query with its positives and ten random negatives."""
    positives = collection.qrels["train"].positives()
    generator = np.random.default_rng(0)
    queries = collection.qrels["train"].query_positions()
    documents, counts = [], []
    for query in queries:
        relevant = positives.of(query)
        others = np.setdiff1d(np.arange(len(collection.corpus)), relevant)
        documents.append(np.concatenate([relevant, generator.choice(others, 10, replace=False)]))
        counts.append(len(relevant))
    return RowSet.from_arrays(collection.queries, collection.corpus, queries, documents, counts)


def arguments(folder, kind=RetrievalTrainingArguments, **settings):
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_negatives": NEGATIVES,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
        "report_to": "none",
    }
    return kind(output_dir=str(folder), **{**defaults, **settings})


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def test_contrastive_training_lowers_the_loss(tiny_bert, rows, tmp_path):
    model = DenseRetriever.from_pretrained(tiny_bert)
    trainer = RetrievalTrainer(model, arguments(tmp_path / "out", max_steps=30), rows=rows)
    trainer.train()
    losses = losses_of(trainer)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_ranker_learns_from_own_candidates(tiny_bert, rows, tmp_path):
    model = CrossEncoderRanker.from_pretrained(tiny_bert)
    trainer = RetrievalTrainer(model, arguments(tmp_path / "out", max_steps=40), rows=rows)
    assert [term.candidates for term in trainer.terms.values()] == ["own"]
    trainer.train()
    assert np.mean(losses_of(trainer)[-5:]) < np.log(1 + NEGATIVES)


def test_a_ranker_has_no_in_batch_candidates(tiny_bert, rows, tmp_path):
    model = CrossEncoderRanker.from_pretrained(tiny_bert)
    args = arguments(tmp_path / "out", losses='[{"name": "contrastive", "candidates": "global"}]')
    with pytest.raises(InputError, match="Set candidates: own"):
        RetrievalTrainer(model, args, rows=rows)


@pytest.mark.parametrize("archetype", ["dense", "ranker"])
def test_resumed_run_equals_straight_run(archetype, tiny_bert, rows, tmp_path):
    # 32-wide projections too: they are not exported, so they must come back from elsewhere.
    def trainer(folder, **settings):
        torch.manual_seed(0)
        if archetype == "ranker":
            model = CrossEncoderRanker.from_pretrained(tiny_bert)
            return RetrievalTrainer(model, arguments(folder, **settings), rows=rows)
        model = DenseRetriever.from_pretrained(tiny_bert, projection_dim=8)
        teacher = LiveTeacher("teacher", DenseRetriever.from_pretrained(tiny_bert))
        args = arguments(folder, DistillTrainingArguments, losses="[contrastive, embedding_mse, kl]", **settings)
        return DistillTrainer(model, args, teachers=[teacher], rows=rows)

    straight = trainer(tmp_path / "straight", max_steps=8)
    straight.train()
    first = trainer(tmp_path / "resumed", max_steps=8, save_strategy="steps", save_steps=3, save_total_limit=None)
    first.train()
    second = trainer(tmp_path / "resumed", max_steps=8)
    second.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    assert_same(weights(straight.model), weights(second.model))
    if archetype == "dense":
        assert "training_modules.teacher.weight" in weights(second.model)


def test_every_save_is_a_native_checkpoint(tiny_bert, rows, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = DenseRetriever.from_pretrained(tiny_bert)
    args = arguments(tmp_path / "out", save_strategy="steps", save_steps=3, hub_token="hf_secret")
    trainer = RetrievalTrainer(model, args, rows=rows)
    trainer.train()
    trainer.save_model()
    texts = ["how to bake bread", "the moon"]
    for folder in (tmp_path / "out" / "checkpoint-3", tmp_path / "out"):
        native = SentenceTransformer(str(folder), device="cpu")
        ours = DenseRetriever.from_pretrained(folder)
        expected = native.encode_query(texts)
        batch = ours.processor().pad(ours.processor().queries(texts))
        with torch.no_grad():
            found = ours.encode(batch, "query").numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert not list(folder.glob("training_args.bin"))
        assert "hf_secret" not in (folder / "training_args.json").read_text()
        assert json.loads((folder / "training_args.json").read_text())["num_negatives"] == NEGATIVES


def test_gradient_caching_gives_the_same_training(tiny_bert, rows, tmp_path):
    def trained(**settings):
        torch.manual_seed(0)
        model = DenseRetriever.from_pretrained(tiny_bert)
        trainer = RetrievalTrainer(model, arguments(tmp_path / str(len(settings)), dropout=0.0, **settings), rows=rows)
        trainer.train()
        return trainer

    plain, cached = trained(), trained(gradient_cache_size=3)
    tokens = next(iter(cached.get_train_dataloader()))["tokens"]["student"]
    assert len(tokens["passage"]["chunks"]) > 4
    assert all(len(chunk["input_ids"]) <= 3 for batch in tokens.values() for chunk in batch["chunks"])
    np.testing.assert_allclose(losses_of(plain), losses_of(cached), rtol=1e-5)
    for name, tensor in weights(plain.model).items():
        torch.testing.assert_close(tensor, weights(cached.model)[name], rtol=1e-4, atol=1e-5)


def test_accumulation_equals_a_larger_batch_for_own_candidates(tiny_bert, rows, tmp_path):
    def gradient_norms(batch, accumulation):
        torch.manual_seed(0)
        model = DenseRetriever.from_pretrained(tiny_bert)
        args = arguments(
            tmp_path / f"{batch}",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            dropout=0.0,
            max_steps=3,
            losses='[{"name": "contrastive", "candidates": "own"}]',
        )
        trainer = RetrievalTrainer(model, args, rows=rows)
        trainer.train()
        return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]

    np.testing.assert_allclose(gradient_norms(8, 1), gradient_norms(2, 4), rtol=1e-4)


def test_bfloat16_autocast_keeps_scores_in_float32(tiny_bert, rows, tmp_path):
    seen = []

    class Watching(RetrievalTrainer):
        def loss_parts(self, model, output, batch):
            parts = super().loss_parts(model, output, batch)
            seen.append((output.passage.dtype, *(part.dtype for part in parts.values())))
            return parts

    model = DenseRetriever.from_pretrained(tiny_bert)
    Watching(model, arguments(tmp_path / "out", max_steps=1, bf16=True), rows=rows).train()
    assert set(seen[0]) == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_student_follows_its_teacher(tiny_bert, tiny_ranker, rows, tmp_path):
    teacher = DenseRetriever.from_pretrained(tiny_bert)
    student = student_from("layers:2", DenseRetriever.from_pretrained(tiny_ranker))
    args = arguments(
        tmp_path / "out",
        DistillTrainingArguments,
        max_steps=100,
        learning_rate=3e-3,
        dropout=0.0,
        losses='[{"name": "kl", "candidates": "global"}, {"name": "embedding_mse", "weight": 10}]',
    )
    trainer = DistillTrainer(student, args, teachers=[LiveTeacher("teacher", teacher)], rows=rows)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    for part in ("kl", "embedding_mse"):
        first, last = (np.mean([entry[part] for entry in steps]) for steps in (history[:5], history[-5:]))
        assert last < 0.5 * first, part
    total = history[0]["kl"] + history[0]["embedding_mse"]
    assert history[0]["loss"] == pytest.approx(total, rel=1e-3)
    assert len(student.backbone.encoder.layer) == 2


def test_several_teachers_and_unlabelled_rows(tiny_bert, tiny_ranker, rows, tmp_path):
    unlabelled = RowSet.from_arrays(
        rows.queries,
        rows.corpus,
        rows.query,
        [rows.documents_at(number)[1:] for number in range(len(rows))],
        np.zeros(len(rows), np.int64),
    )
    generator = np.random.default_rng(1)
    scored = unlabelled.with_column(
        "scores", [generator.normal(size=len(unlabelled.documents_at(row))) for row in range(len(unlabelled))]
    )
    teachers = [
        CachedScores("file"),
        LiveTeacher("dense", DenseRetriever.from_pretrained(tiny_bert)),
        LiveTeacher("ranker", CrossEncoderRanker.from_pretrained(tiny_ranker)),
    ]
    args = arguments(
        tmp_path / "out",
        DistillTrainingArguments,
        losses=json.dumps(
            [
                {"name": "kl", "teacher": "file", "calibration": "z_norm"},
                {"name": "margin_mse", "teacher": "ranker"},
                {"name": "kl", "teacher": "dense", "candidates": "in_batch"},
                {"name": "contrastive", "weight": 0.5},
            ]
        ),
    )
    trainer = DistillTrainer(student_from("layers:2", tiny_bert), args, teachers=teachers, rows=scored)
    before = weights(trainer.model)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "kl_file" in entry)
    assert entry["kl_file"] > 0 and entry["margin_mse"] > 0 and entry["kl_dense"] > 0
    assert entry["contrastive"] == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(trainer.model).items())


def test_cached_and_live_teacher_give_equal_losses(tiny_bert, tiny_ranker, rows, tmp_path):
    ranker = CrossEncoderRanker.from_pretrained(tiny_ranker)
    values = []
    for row in range(len(rows)):
        documents = rows.documents_at(row)
        query = rows.queries.texts([rows.query[row]]) * len(documents)
        features, segments = ranker.processor().pairs(query, rows.corpus.texts(documents, ranker.config.template))
        with torch.no_grad():
            values.append(ranker.score_chunk(ranker.processor().pad(features, segments)).numpy())
    scored = rows.with_column("scores", values)

    def history(teacher):
        torch.manual_seed(0)
        args = arguments(tmp_path / teacher.__class__.__name__, DistillTrainingArguments, losses="[kl, margin_mse]")
        trainer = DistillTrainer(student_from("layers:2", tiny_bert), args, teachers=[teacher], rows=scored)
        trainer.train()
        return losses_of(trainer)

    np.testing.assert_allclose(history(CachedScores("t")), history(LiveTeacher("t", ranker)), rtol=1e-4)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ('[{"name": "kl", "teacher": "nobody"}]', "The teachers are: file"),
        ('[{"name": "kl", "candidates": "global"}]', "Set candidates to one of: own"),
        ("[embedding_mse]", "Use a loss on scores"),
        ("[{name: kl, wieght: 2}]", "wieght"),
        ("[kl", "not readable as YAML"),
        ("[kl, flops]", "compares representations"),
        ("[layer_alignment]", "nothing is known of the layers of the teacher 'file'"),
    ],
)
def test_terms_that_cannot_be_computed_are_refused(losses, message, tiny_bert, rows, tmp_path):
    args = arguments(tmp_path / "out", DistillTrainingArguments, losses=losses)
    scored = rows.with_column("scores", [np.zeros(len(rows.documents_at(row))) for row in range(len(rows))])
    with pytest.raises(InputError, match=message):
        DistillTrainer(student_from("layers:2", tiny_bert), args, teachers=[CachedScores("file")], rows=scored)


def test_terms_that_no_ranker_can_follow_are_refused(tiny_bert, tiny_ranker, rows, tmp_path):
    teacher = LiveTeacher("teacher", DenseRetriever.from_pretrained(tiny_bert))
    for losses, message in (("[{name: kl, candidates: global}]", "candidates: own"), ("[embedding_mse]", "has none")):
        args = arguments(tmp_path / "out", DistillTrainingArguments, losses=losses)
        with pytest.raises(InputError, match=message):
            DistillTrainer(CrossEncoderRanker.from_pretrained(tiny_ranker), args, teachers=[teacher], rows=rows)


def test_projections_follow_the_seed(tiny_bert, rows, tmp_path):
    def projection():
        model = DenseRetriever.from_pretrained(tiny_bert)
        teacher = LiveTeacher("teacher", DenseRetriever.from_pretrained(tiny_bert, projection_dim=8))
        args = arguments(tmp_path / "out", DistillTrainingArguments, losses="[embedding_mse]")
        return weights(DistillTrainer(model, args, teachers=[teacher], rows=rows).model.training_modules)

    assert_same(projection(), projection())


def test_calibrated_scores_are_what_warnings_are_about(tiny_bert, rows, tmp_path, caplog):
    generator = np.random.default_rng(0)
    sharp = [300 * generator.normal(size=len(rows.documents_at(row))) for row in range(len(rows))]
    scored = rows.with_column("scores", sharp)
    caplog.set_level("WARNING", logger="hf_distill")
    for losses, said in (("[kl]", True), ("[{name: kl, calibration: z_norm}]", False), ("[margin_mse]", False)):
        caplog.clear()
        args = arguments(tmp_path / "out", DistillTrainingArguments, losses=losses)
        DistillTrainer(student_from("layers:2", tiny_bert), args, teachers=[CachedScores("file")], rows=scored)
        assert any("saturated" in record.getMessage() for record in caplog.records) is said


def test_flat_teacher_is_said_and_temperature_is_fitted(tiny_bert, rows, tmp_path, caplog):
    def scored(value):
        return rows.with_column("scores", [value(len(rows.documents_at(row))) for row in range(len(rows))])

    def trainer(value):
        args = arguments(
            tmp_path / "out", DistillTrainingArguments, losses='[{"name": "kl", "calibration": "temperature"}]'
        )
        return DistillTrainer(
            student_from("layers:2", tiny_bert), args, teachers=[CachedScores("file")], rows=scored(value)
        )

    caplog.set_level("WARNING", logger="hf_distill")
    generator = np.random.default_rng(0)
    confident = trainer(lambda n: np.r_[2.0, np.zeros(n - 1)] + generator.normal(size=n))
    assert 0 < confident.terms["kl"].calibration_temperature != 1.0
    assert not caplog.records
    trainer(lambda n: np.full(n, 0.5))
    assert any("file: Teacher scores are flat" in record.getMessage() for record in caplog.records)


def test_a_training_of_warm_up_alone_is_said(tiny_bert, rows, tmp_path, caplog):
    for steps, warmup, said in ((1, 0.1, True), (1, 0, False), (20, 0.1, False)):
        caplog.clear()
        args = arguments(tmp_path / "out", max_steps=steps, warmup_steps=warmup)
        RetrievalTrainer(DenseRetriever.from_pretrained(tiny_bert), args, rows=rows).create_optimizer_and_scheduler(
            steps
        )
        assert ("1 step, all of them warm-up" in caplog.text) is said


def test_too_few_rows_for_a_batch(tiny_bert, rows, tmp_path):
    args = arguments(tmp_path / "out", per_device_train_batch_size=10_000)
    with pytest.raises(InputError, match="do not fill one batch"):
        RetrievalTrainer(DenseRetriever.from_pretrained(tiny_bert), args, rows=rows)


def test_frozen_word_embeddings_stay(tiny_bert, rows, tmp_path):
    model = DenseRetriever.from_pretrained(tiny_bert)
    before = weights(model)
    RetrievalTrainer(model, arguments(tmp_path / "out", freeze_embeddings=True), rows=rows).train()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(before[name], tensor)}
    assert "backbone.embeddings.word_embeddings.weight" not in changed
    assert "backbone.embeddings.position_embeddings.weight" in changed
    assert any("encoder.layer.3" in name for name in changed)


def test_evaluation_in_the_loop_compares_as_the_model_does(collection, tiny_bert):
    model = DenseRetriever.from_pretrained(tiny_bert)  # cosine of vectors of any length
    with torch.no_grad():
        model.backbone.encoder.layer[-1].output.LayerNorm.weight.mul_(torch.linspace(0.1, 4, 32))
        model.backbone.encoder.layer[-1].output.LayerNorm.bias.add_(torch.linspace(-1, 1, 32))
    assert (model.config.similarity, model.config.normalize) == ("cosine", False)
    measures = ("nDCG@10", "RR@10", "AP@80")
    found = RetrievalEvaluation(collection, "dev", measures=measures)(model)
    queries = collection.qrels["dev"].query_positions()
    run = search(model, collection, queries, 100)
    expected = evaluate_system("model", run, collection, "dev", measures=measures).means
    assert found == {name: pytest.approx(expected[name]) for name in measures}


def test_best_checkpoint_on_dev_is_kept(collection, tiny_bert, rows, tmp_path):
    from hf_distill.evaluation import RetrievalEvaluation

    model = DenseRetriever.from_pretrained(tiny_bert)
    args = arguments(
        tmp_path / "out",
        max_steps=9,
        learning_rate=3e-2,  # ruins the model, so that the first checkpoint is the best
        warmup_steps=0,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
    )
    evaluation = RetrievalEvaluation(collection, "dev", measures=["nDCG@10", "RR@10"])
    trainer = RetrievalTrainer(model, args, rows=rows, evaluation=evaluation)
    trainer.train()
    seen = {entry["step"]: entry["eval_nDCG@10"] for entry in trainer.state.log_history if "eval_nDCG@10" in entry}
    best = max(seen, key=lambda step: (seen[step], -step))
    assert list(seen) == [3, 6, 9] and trainer.state.best_global_step == best
    assert evaluation(model)["nDCG@10"] == pytest.approx(seen[best], abs=1e-6)
    kept = DenseRetriever.from_pretrained(tmp_path / "out" / f"checkpoint-{best}")
    assert_same(weights(kept.backbone), weights(model.backbone))


@pytest.mark.parametrize("part", ["parse_losses", "loss_parts"])
def test_a_trainer_that_lacks_a_part_cannot_be_made(part):
    lacking = type("Lacking", (RetrievalTrainer,), {part: vars(BaseTrainer)[part]})
    with pytest.raises(TypeError, match=f"abstract method '?{part}"):
        lacking(None, None)
