"""Progressive distillation: phases equal trainings of their own, in one go and after a kill; the anchor stays."""

from __future__ import annotations

import json

import pytest
import torch

from hf_distill.data import RowSet, load_collection
from hf_distill.errors import InputError
from hf_distill.losses import kl_loss
from hf_distill.models import DenseRetriever, load_model, student_from
from hf_distill.retrieval import mine
from hf_distill.teachers import LiveTeacher
from hf_distill.trainers import (
    DistillTrainer,
    DistillTrainingArguments,
    Phase,
    ProgressiveTrainer,
)


LOSSES = [
    {"name": "contrastive", "weight": 0.1, "candidates": "own"},
    {"name": "kl", "weight": 0.9, "candidates": "own", "temperature": 4, "scale_by_temperature": True},
    {"name": "lwf", "candidates": "own", "temperature": 4},
]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from tests.conftest import MICRO

    return load_collection(MICRO, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def rows(collection, tmp_path_factory) -> RowSet:
    return mine("bm25", collection, "train", depth=20, num_negatives=8, cache_dir=tmp_path_factory.mktemp("mined"))


@pytest.fixture(scope="module")
def teachers(tiny_bert_source):
    torch.manual_seed(0)
    first = DenseRetriever.from_pretrained(tiny_bert_source, normalize=True)
    second = DenseRetriever.from_pretrained(tiny_bert_source, pooling="cls")
    return LiveTeacher("teacher", first), LiveTeacher("teacher", second)


def arguments(folder, **settings) -> DistillTrainingArguments:
    defaults = {"use_cpu": True, "per_device_train_batch_size": 8, "num_negatives": 3, "max_steps": 4}
    defaults |= {"learning_rate": 1e-3, "save_steps": 2, "logging_steps": 1, "seed": 5, "report_to": "none"}
    return DistillTrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def phases(rows, teachers, prepare=None) -> list[Phase]:
    second = {"losses": json.dumps(LOSSES), "learning_rate": 2e-3, "num_negatives": 5, "max_steps": 3}
    second |= {"negative_sampling": "hardest"}
    chosen = {"rows": rows, "teachers": [teachers[1]]} if prepare is None else {"prepare": prepare}
    return [Phase("dense", rows, [teachers[0]]), Phase("stronger", settings=second, **chosen)]


def start(source) -> DenseRetriever:
    return student_from("layers:2", source)


@pytest.fixture(scope="module")
def progression(tmp_path_factory, tiny_bert_source, rows, teachers):
    """An uninterrupted run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("progression") / "out"
    trainer = ProgressiveTrainer(start(tiny_bert_source), arguments(folder), phases(rows, teachers))
    trainer.train()
    trainer.save_model()
    trainer.write_history()
    return folder, trainer


def same(one, other) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def test_phases_equal_trainings_of_their_own(progression, tmp_path, tiny_bert_source, rows, teachers):
    folder, trainer = progression
    student = start(tiny_bert_source)
    student.save_pretrained(tmp_path / "start")
    student = load_model(tmp_path / "start")
    for number, phase in enumerate(phases(rows, teachers)):
        args = arguments(tmp_path / f"stage-{number}", **phase.settings)
        stage = DistillTrainer(student, args, teachers=phase.teachers, rows=rows)
        stage.train()
        stage.save_model()
        student = load_model(tmp_path / f"stage-{number}")
        same(student, load_model(trainer.phase_folder(number)))
    same(student, trainer.student)
    same(student, load_model(folder))
    assert (folder / "config.json").is_file() and (folder / "modules.json").is_file()


def test_one_state_for_the_whole_progression(progression):
    folder, _ = progression
    progress = json.loads((folder / "progression.json").read_text())
    assert [(phase["name"], phase["steps"]) for phase in progress["phases"]] == [("dense", 4), ("stronger", 3)]
    history = json.loads((folder / "history.json").read_text())
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["phase"] for entry in losses] == ["dense"] * 4 + ["stronger"] * 3
    assert losses[4]["phase_step"] == 1
    assert "lwf" in losses[4] and "lwf" not in losses[3]


def test_a_cut_off_progression_goes_on(progression, tmp_path, tiny_bert_source, rows, teachers, monkeypatch):
    """Cut off after the first checkpoint of the second phase; the anchor is that of the phase's start."""
    whole, trainer = progression

    class Cut(Exception):
        pass

    original = ProgressiveTrainer._save_checkpoint

    def cut(self, *args):
        original(self, *args)
        if self.number == 1:
            raise Cut

    monkeypatch.setattr(ProgressiveTrainer, "_save_checkpoint", cut)
    with pytest.raises(Cut):
        ProgressiveTrainer(start(tiny_bert_source), arguments(tmp_path / "out"), phases(rows, teachers)).train()
    monkeypatch.undo()
    again = ProgressiveTrainer(start(tiny_bert_source), arguments(tmp_path / "out"), phases(rows, teachers))
    assert again.number == 1
    same(again.teachers["anchor"].model, load_model(trainer.phase_folder(0)))
    again.train()
    same(again.student, trainer.student)
    assert [entry["step"] for entry in again.progress["history"] if "loss" in entry][-1] == 7
    # Once more: nothing is left to do.
    finished = ProgressiveTrainer(start(tiny_bert_source), arguments(tmp_path / "out"), phases(rows, teachers))
    assert finished.train() is None
    same(finished.student, trainer.student)


def test_rows_are_refreshed_with_the_student_as_it_is(tmp_path, tiny_bert_source, collection, rows, teachers):
    seen = []

    def prepare(student):
        seen.append(student.weights_fingerprint())
        mined = mine(student, collection, "train", depth=20, num_negatives=8)
        return mined, [teachers[1]]

    trainer = ProgressiveTrainer(start(tiny_bert_source), arguments(tmp_path / "out"), phases(rows, teachers, prepare))
    trainer.train()
    assert seen == [load_model(trainer.phase_folder(0)).weights_fingerprint()]


def test_the_anchor_reads_the_same_candidates_without_gradient(tmp_path, tiny_bert_source, rows, teachers):
    student = start(tiny_bert_source).eval()
    args = arguments(tmp_path / "out", losses=json.dumps(LOSSES), dropout=0.0)
    trainer = DistillTrainer(student, args, teachers=[teachers[0]], rows=rows)
    anchor = trainer.teachers["anchor"]
    assert not any(parameter.requires_grad for parameter in anchor.model.parameters())
    assert not {id(one) for one in anchor.model.parameters()} & {id(one) for one in student.parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["tokens"]) == {"student", "teacher"}, "the anchor reads the student's tokens"
    trainer.compute_loss(student, batch)
    model = start(tiny_bert_source).eval()
    with torch.no_grad():
        before = model.batch_scores(model(**batch["tokens"]["student"]), batch, "own")
        now = student.batch_scores(student(**batch["tokens"]["student"]), batch, "own")
    expected = kl_loss(now, before, 4.0, True)
    torch.testing.assert_close(trainer._part_sums["lwf"], expected, rtol=1e-4, atol=1e-6)


def test_bad_phases(tmp_path, tiny_bert_source, rows, teachers):
    student = start(tiny_bert_source)
    with pytest.raises(InputError, match="at least one phase"):
        ProgressiveTrainer(student, arguments(tmp_path), [])
    with pytest.raises(InputError, match="each with a name of its own"):
        ProgressiveTrainer(student, arguments(tmp_path), [Phase("a", rows), Phase("a", rows)])
    with pytest.raises(InputError, match="sets learning_rat, output_dir"):
        Phase("a", rows, settings={"learning_rat": 1, "output_dir": "x"})
    with pytest.raises(InputError, match="either rows or prepare"):
        Phase("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "progression.json").write_text('{"phases": [{"name": "b", "steps": 1}], "history": []}')
    with pytest.raises(InputError, match="holds another progression"):
        ProgressiveTrainer(student, arguments(tmp_path / "out"), [Phase("a", rows, [teachers[0]])])
