"""LexMAE against plain masked language modelling: tokens per second with the same encoder, texts and masks."""

from __future__ import annotations

from typing import Any

from .common import (
    MODEL,
    PeakMemory,
    Report,
    alternate,
    arguments,
    data_name,
    mebibytes,
    open_collection,
    ratios,
    say,
    scratch_folder,
    spread,
)
from .steps import run_trainer


LEXMAE, PLAIN = "LexMAE", "plain MLM"


def operations(model: Any, length: int, encoder_rate: float, decoder_rate: float) -> dict[str, float]:
    """Multiplications of a forward pass per token, of the encoder's part and of the decoder's."""
    config = model.backbone.config
    width, inner, terms = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = 4 * width**2 + 2 * width * inner + 2 * length * width
    encoder = config.num_hidden_layers * layer + encoder_rate * terms * width
    # The bottleneck needs the logits of every token; the bag of words is one product a text.
    decoder = terms * width + terms * width / length + 2 * layer + decoder_rate * terms * width
    return {"encoder": encoder, "decoder": decoder}


def main() -> None:
    args = arguments(
        __doc__,
        steps=(2, "steps of a round"),
        rounds=(5, "rounds of the sides in turn"),
        batch=(32, "texts of a batch"),
        length=(128, "tokens of a text at the most"),
        dtype=("bfloat16", "precision"),
    )
    import torch

    from hf_distill.models import LexMAEForPreTraining
    from hf_distill.trainers import LexMAEPretrainer, LexMAETrainingArguments

    collection = open_collection("medquad", args.data)
    tokens: dict[str, float] = {}
    peaks: dict[str, int] = {}
    report = Report(args, "Pre-training", ["objective", "tokens/s", "memory"])

    def run(name: str, folder: Any) -> float:
        torch.manual_seed(0)
        model = LexMAEForPreTraining.from_pretrained(
            MODEL, new_head="identity", passage_length=args.length, decoder_layers=2 if name == LEXMAE else 0
        )
        settings = LexMAETrainingArguments(
            output_dir=str(folder),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            bf16=args.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=7,
        )
        trainer = LexMAEPretrainer(model, settings, collection.corpus)
        if name not in tokens:
            batches = trainer.get_train_dataloader()
            first = next(iter(batches))["tokens"]["student"]["attention_mask"]
            tokens[name] = float(first.sum()) * args.steps
        with PeakMemory() as memory:
            seconds, _ = run_trainer(trainer)
        peaks[name] = max(peaks.get(name, 0), memory.bytes)
        return seconds

    with scratch_folder("pretraining") as folder:
        say("pre-training")
        for name in (LEXMAE, PLAIN):
            run(name, folder)
        seconds = alternate({name: lambda name=name: run(name, folder) for name in (LEXMAE, PLAIN)}, args.rounds)
    for name in (LEXMAE, PLAIN):
        rates = [tokens[name] / value for value in seconds[name]]
        report.row(name, spread(rates), mebibytes(peaks[name]))
    model = LexMAEForPreTraining.from_pretrained(MODEL, new_head="identity", passage_length=args.length)
    share = operations(model, args.length, 0.3, 0.5)
    expected = (share["encoder"] + share["decoder"]) / share["encoder"]
    what = "plain steps in the time of a LexMAE step, times the ratio of multiplications"
    report.claim(what, [expected * value for value in ratios(seconds[LEXMAE], seconds[PLAIN])], 1.0)
    report.finish(
        f"Both on batches of {args.batch} passages of {data_name(collection)}, at most {args.length} "
        f"tokens, {args.dtype} autocast, tokenising and masking included; encoder: `{MODEL}` with a new head. "
        f"By its multiplications a LexMAE step should take {expected:.2f} times as long as a plain one."
    )


if __name__ == "__main__":
    main()
