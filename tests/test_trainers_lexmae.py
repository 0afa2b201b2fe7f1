"""Pre-training runs: from a corpus or a stream, resumable exactly, to a plain checkpoint that fine-tuning takes on."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, TrainerCallback

from hf_distill.data import load_collection
from hf_distill.data.masking import MaskingCollator, StreamedTexts, TextSampler
from hf_distill.errors import InputError
from hf_distill.models import LexicalRetriever, LexMAEForPreTraining
from hf_distill.trainers import LexMAEPretrainer, LexMAETrainingArguments
from tests.model_zoo import save_tiny


@pytest.fixture(scope="module")
def collection(micro, tmp_path_factory):
    return load_collection(micro, cache_dir=tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("mlm") / "bert", "bert", tiny_tokenizer, head="MaskedLM", layers=2)


def arguments(output_dir, **more) -> LexMAETrainingArguments:
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 12,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "learning_rate": 3e-3, "seed": 5,
    }  # fmt: skip
    return LexMAETrainingArguments(**{**settings, **more})


def stream_of(collection, **more) -> StreamedTexts:
    """The corpus read in order, as a data set too large to hold would be."""
    from datasets import IterableDataset

    rows = [{"title": row["title"], "text": row["text"]} for row in collection.corpus.dataset]

    def generate():
        yield from rows

    return StreamedTexts(IterableDataset.from_generator(generate), "{title} {text}", buffer=20, **more)


def train(folder, output_dir, texts, resume=None, decoder_layers=2, callbacks=(), **more):
    torch.manual_seed(1)
    model = LexMAEForPreTraining.from_pretrained(folder, passage_length=32, decoder_layers=decoder_layers)
    trainer = LexMAEPretrainer(model, arguments(output_dir, **more), texts, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_both_losses_fall_and_stand_apart_in_the_log(collection, folder, tmp_path):
    trainer = train(folder, tmp_path / "out", collection.corpus, max_steps=25)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 25
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["encoder_loss"] + entry["decoder_loss"], rel=1e-4)
    for name in ("encoder_loss", "decoder_loss"):
        assert history[-1][name] < history[0][name] - 0.2
    trainer.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_modules.safetensors"} <= names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert sum(one.numel() for one in plain.parameters()) < sum(one.numel() for one in trainer.model.parameters())
    assert LexicalRetriever.from_pretrained(tmp_path / "out").representation == "sparse"


@pytest.mark.parametrize("kind", ["corpus", "stream"])
def test_an_interrupted_run_goes_on_exactly(kind, collection, folder, tmp_path, monkeypatch):
    masked, collate = [], MaskingCollator.__call__
    monkeypatch.setattr(MaskingCollator, "__call__", lambda *given: masked.append(given) or collate(*given))

    def texts():
        return collection.corpus if kind == "corpus" else stream_of(collection, seed=3)

    whole = train(folder, tmp_path / "whole", texts())
    train(folder, tmp_path / "parts", texts(), save_strategy="steps", save_steps=7, stop_after=7)
    masked.clear()
    rest = train(folder, tmp_path / "parts", texts(), resume=str(tmp_path / "parts" / "checkpoint-7"))
    assert len(masked) <= 5 + 1, "what is passed over is not tokenised"  # one is read ahead
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name


def test_plain_masked_language_modelling_sees_the_same_texts(collection, folder, tmp_path):
    """The comparison that counts: same encoder, texts and masks, without bottleneck and decoder."""
    plain = train(folder, tmp_path / "plain", collection.corpus, decoder_layers=0, max_steps=1)
    lexmae = train(folder, tmp_path / "lexmae", collection.corpus, max_steps=1)
    first = [trainer.state.log_history[0]["encoder_loss"] for trainer in (plain, lexmae)]
    assert "decoder_loss" not in plain.state.log_history[0]
    assert first[0] == pytest.approx(first[1], abs=0.3)  # their dropout differs


def test_half_precision(collection, folder, tmp_path):
    trainer = train(folder, tmp_path / "out", collection.corpus, bf16=True, max_steps=3)
    full = train(folder, tmp_path / "full", collection.corpus, max_steps=3)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(one.dtype == torch.float32 for one in trainer.model.parameters())


def test_a_stream_goes_round_in_another_order(collection):
    texts = stream_of(collection, seed=1)
    found = []
    for example in texts.examples():
        found.append(example)
        if len(found) == 2 * len(collection.corpus):
            break
    first, second = found[: len(collection.corpus)], found[len(collection.corpus) :]
    assert {example.text for example in first} == {example.text for example in second}
    assert [example.text for example in first] != [example.text for example in second]
    assert [example.number for example in found] == list(range(len(found))) and second[0].epoch == 1


@pytest.fixture()
def files(tmp_path) -> list[str]:
    """Two files of 11 texts each, which `datasets` would give to two workers."""
    for part in range(2):
        lines = [json.dumps({"text": f"text {number} of {part}"}) for number in range(11)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / f"{part}.jsonl") for part in range(2)]


def stream_files(files, **more) -> StreamedTexts:
    from datasets import load_dataset

    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    return StreamedTexts(stream, "{text}", **{"buffer": 5, "seed": 2, **more})


@pytest.mark.parametrize("number", [1, 2])
def test_workers_and_processes_share_the_batches_of_a_stream(number, files):
    texts = stream_files(files[:number])
    expected = list(TextSampler(texts, 4, 8))
    assert len(expected) == 32 and expected[-1].epoch == 31 // (11 * number)
    assert len({(example.epoch, example.number) for example in expected}) == 32
    loader = DataLoader(texts, 4, sampler=TextSampler(texts, 4, 8), num_workers=2, collate_fn=list)
    assert [example for batch in loader for example in batch] == expected
    for rank in (0, 1):
        mine = list(TextSampler(texts, 2, 8, processes=2, rank=rank))
        own = [place % 4 // 2 == rank for place in range(32)]
        assert mine == [example if ours else None for example, ours in zip(expected, own)]


def test_what_was_read_of_a_stream_is_passed_over(files, monkeypatch):
    texts = stream_files(files[:1])
    expected = list(TextSampler(texts, 4, 12))
    rendered, epochs = [], []
    render, set_epoch = texts._render, texts.stream.set_epoch
    monkeypatch.setattr(texts, "_render", lambda *given: rendered.append(given) or render(*given))
    monkeypatch.setattr(texts.stream, "set_epoch", lambda epoch: epochs.append(epoch) or set_epoch(epoch))
    for skipped in range(13):
        rendered.clear(), epochs.clear()
        sampler = TextSampler(texts, 4, 12)
        sampler.skip_next(skipped)
        assert list(sampler) == [None] * 4 * skipped + expected[4 * skipped :]
        assert len(rendered) == 48 - 4 * skipped
    sampler.skip_next(11)
    rendered.clear(), epochs.clear()
    assert list(sampler)[44:] == expected[44:] and epochs == [0, 4], "whole epochs are passed over unread"


def test_a_null_in_a_stream_is_an_empty_text(folder, tmp_path, caplog):
    lines = [{"text": f"how bread is made {number}" if number > 3 and number % 4 else None} for number in range(16)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = stream_files([str(tmp_path / "texts.jsonl")], buffer=0)
    trainer = train(folder, tmp_path / "out", texts, per_device_train_batch_size=4, max_steps=5)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 5, "a step of empty texts only, and one of the second epoch"
    assert [entry["encoder_loss"] == 0 for entry in history] == [True, False, False, False, True]
    assert texts.without_text == 7
    said = [record.getMessage() for record in caplog.records if "no text" in record.getMessage()]
    assert said == ["Row 0 of the stream has no text in the column 'text'. It counts as empty, and so will others."]


class BreakAt(TrainerCallback):
    """Makes a weight infinite after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.backbone.get_output_embeddings().bias[3] = float("inf")


@pytest.mark.parametrize(
    ("step", "save_steps", "problem", "kept"),
    [
        (3, 2, "logits are not finite: encoder_loss, decoder_loss at step 4", ["checkpoint-2"]),
        (3, 100, "logits are not finite: encoder_loss, decoder_loss at step 5", []),
        (4, 2, "weights are not finite: some of them at step 4", ["checkpoint-2"]),
        (5, 100, "weights are not finite: some of them at step 5", []),
    ],
)
def test_nothing_that_is_no_number_is_saved(step, save_steps, problem, kept, collection, folder, tmp_path):
    """Seen also between logs, before a checkpoint and at the end."""
    settings = {"max_steps": 5, "logging_steps": 100, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "no"} if save_steps == 100 else {"save_strategy": "steps", "save_steps": save_steps}
    with pytest.raises(InputError, match=problem):
        train(folder, tmp_path / "out", collection.corpus, callbacks=[BreakAt(step)], decoder_layers=1, **settings)
    assert sorted(path.name for path in tmp_path.glob("out/checkpoint-*")) == kept


def test_the_last_losses_are_logged_however_few_the_steps(collection, folder, tmp_path):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2}
    trainer = train(folder, tmp_path / "out", collection.corpus, logging_steps=2, **settings)
    often = train(folder, tmp_path / "often", collection.corpus, **settings)
    for name in ("encoder_loss", "decoder_loss"):
        found = [entry[name] for entry in trainer.state.log_history if name in entry]
        each = [entry[name] for entry in often.state.log_history if name in entry]
        assert found == pytest.approx([sum(each[:2]) / 2, each[2]])


def test_bad_input(collection, folder, tmp_path):
    from datasets import IterableDataset

    with pytest.raises(InputError, match="do not fill one batch"):
        train(folder, tmp_path / "out", collection.corpus, per_device_train_batch_size=1000)
    with pytest.raises(InputError, match="max_steps"):
        train(folder, tmp_path / "out", stream_of(collection), max_steps=-1)
    with pytest.raises(InputError, match="decoder_rate is 0.1"):
        train(folder, tmp_path / "out", collection.corpus, decoder_rate=0.1)

    broken = LexMAEForPreTraining.from_pretrained(folder, passage_length=32)
    with torch.no_grad():
        broken.backbone.get_output_embeddings().bias[3] = float("nan")
    with pytest.raises(InputError, match="logits are not finite: encoder_loss, decoder_loss at step 1"):
        LexMAEPretrainer(broken, arguments(tmp_path / "out"), collection.corpus).train()

    for rows, problem in (
        ([{"body": "text"}], "row 0 of the stream: no text in the column 'text'.*'body'"),
        ([{"text": 3}], "no text in the column 'text'"),
        ([], "no rows"),
    ):
        with pytest.raises(InputError, match=problem):
            StreamedTexts(IterableDataset.from_generator(partial(iter, rows)), "{text}", buffer=0)
