"""`hf-distill pretrain`: LexMAE, or plain masked language modelling, on a corpus or a stream of texts."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from ..console import is_main_process
from ..errors import InputError
from ..provenance import note_source
from ..settings import option
from .options import CollectionOptions, PretrainHelp
from .parsing import Verb, require


@dataclass
class PretrainOptions:
    """What to pre-train, and on which texts."""

    _argument_group_name = "pre-training"

    model: str | None = option(None, "Hub id or folder of a masked language model.")
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    fresh: bool = option(False, "Start all weights anew; only configuration and tokenizer are read.")
    new_head: str | None = option(
        None, "How to start a masked-LM head that the checkpoint lacks.", choices=["identity", "random"]
    )
    decoder_layers: int = option(2, "Layers of the decoder; 0 for plain masked language modelling.")
    bottleneck: str = option(
        "softmax", "What the decoder is given of a text.", choices=["softmax", "saturated", "cls"]
    )
    passage_length: int | None = option(None, "Longest text, in tokens. Default: 144, or what the model reads.")
    template: str | None = option(None, "How title and text become one string. Default: '{title} {text}'.")
    stream: str | None = option(
        None, "Read texts in order, not a collection: a data set of the Hub, or files (*.jsonl, *.parquet, *.txt)."
    )
    stream_revision: str | None = option(None, "The data set's branch, tag or commit.")
    stream_config: str | None = option(None, "The data set's configuration.")
    stream_split: str = option("train", "The data set's split.")
    stream_column: str = option("text", "The column of texts; a column title is read too.")
    stream_buffer: int = option(10_000, "Streamed texts that are shuffled together.")


def _arguments() -> tuple[type, ...]:
    from .training_arguments import PretrainArguments

    return (CollectionOptions, PretrainOptions, PretrainArguments)


def run(data_options: CollectionOptions, options: PretrainOptions, args: Any) -> None:
    """Pre-trains and writes an ordinary masked-LM checkpoint with its card."""
    require(
        "pretrain",
        model=(options.model, "a masked language model, a Hub id or folder"),
        output_dir=(args.output_dir, "where the model goes"),
    )
    if (data_options.data is None) == (options.stream is None):
        raise InputError(
            "hf-distill pretrain needs either --data (a collection) or --stream (a data set that is read in order)",
            cure="See hf-distill pretrain --help",
        )
    from transformers import set_seed

    from ..models import LexMAEForPreTraining
    from ..trainers import LexMAEPretrainer
    from . import folders, publishing, steps

    set_seed(args.seed)
    model = LexMAEForPreTraining.from_pretrained(
        options.model,
        revision=options.model_revision,
        new_head=options.new_head,
        fresh=options.fresh,
        decoder_layers=options.decoder_layers,
        bottleneck=options.bottleneck,
        passage_length=options.passage_length,
        template=options.template,
    )
    data = facts = None
    if options.stream is None:
        data = steps.Data.open(data_options)
        texts: Any = data.collection.corpus
        facts = {"corpus": texts.fingerprint}
    else:
        texts, facts = _stream(options, model.config.template, args.seed)
    settings = folders.settings_of(
        data_options,
        options,
        args,
        data_fingerprint=facts,
        start_weights=model.weights_fingerprint(),
    )
    folder = folders.claim_output(args.output_dir, settings)
    publishing.check_push(args)
    trainer = LexMAEPretrainer(model, args, texts)
    trainer.about = _about(options, data)
    trained = steps.finish_training(trainer)
    if is_main_process():
        _describe(folder, trainer, trained, options, settings, data)
    publishing.publish(trainer)


def _stream(options: PretrainOptions, template: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The texts of a data set, read in order, and what identifies them."""
    from datasets import load_dataset

    from ..data.masking import StreamedTexts
    from ..data.sources import content_hash, folder_hashes, is_hub_id, resolve_revision

    suffix = Path(options.stream).suffix.lower()
    builder = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".gz": "json"}.get(suffix)
    facts: dict[str, Any] = {"stream": options.stream}
    if builder:
        source = {"path": builder, "data_files": options.stream}
        facts["files"] = {path: content_hash(Path(path)) for path in sorted(glob(options.stream))}
        for path, content in facts["files"].items():
            note_source("file", path, lambda content=content: {"fingerprint": content})
    elif is_hub_id(options.stream) and not Path(options.stream).exists():
        facts["revision"] = resolve_revision(options.stream, options.stream_revision)
        source = {"path": options.stream, "revision": facts["revision"]}
        note_source("data", options.stream, dict, facts["revision"])
    else:
        source = {"path": options.stream}
        note_source("folder", options.stream, lambda: {"files": folder_hashes(Path(options.stream))})
    try:
        stream = load_dataset(**source, name=options.stream_config, split=options.stream_split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot be streamed ({str(error).splitlines()[0]})",
            where=f"--stream {options.stream}",
            cure="Give a data set of the Hub, or files ending in .jsonl, .jsonl.gz, .parquet or .txt",
        ) from None
    texts = StreamedTexts(stream, template, column=options.stream_column, seed=seed, buffer=options.stream_buffer)
    return texts, facts


def _about(options: PretrainOptions, data: Any) -> Any:
    """What the card says from the beginning."""
    from ..data.sources import is_hub_id
    from ..trainers.publishing import About

    start = f"`{options.model}`, pre-trained further"
    if options.fresh:
        start = f"A new model of the architecture of `{options.model}`, pre-trained"
    elif options.new_head:
        start = f"`{options.model}`, with a new head (`{options.new_head}`) if it had none, pre-trained further"
    how = "by masked language modelling" if options.decoder_layers == 0 else "with LexMAE"
    source = options.stream or data.collection.source
    return About(
        f"{start} {how} for lexical retrieval. Fine-tune it with `hf-distill train --kind lexical`.",
        [] if options.fresh else [options.model],
        [source] if is_hub_id(source) and not Path(source).exists() else [],
    )


def _describe(
    folder: Path, trainer: Any, model: Any, options: PretrainOptions, settings: dict[str, Any], data: Any
) -> None:
    """Card and manifest."""
    from ..hub.cards import bibtex, write_model_card
    from ..hub.manifest import write_manifest

    args, state, about = trainer.args, trainer.state, trainer.about
    losses = [entry for entry in state.log_history if "encoder_loss" in entry]
    last = {name: losses[-1][name] for name in ("encoder_loss", "decoder_loss") if losses and name in losses[-1]}
    plain = options.decoder_layers == 0
    source = options.stream or data.collection.name
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    masks = f"{args.encoder_rate:.0%} of the tokens masked for the encoder"
    if not plain:
        masks += f", {args.decoder_rate:.0%} ({args.decoder_masking}) for a decoder of {options.decoder_layers} layers"
    training = [
        f"- {trainer._name} on the texts of *{source}*, {masks}",
        f"- {state.global_step:,} steps of {batch} texts of at most {model.config.passage_length} tokens, "
        f"learning rate {args.learning_rate:g}, seed {args.seed}",
        "- Everything else, versions and hardware included: `run_manifest.json`",
    ]
    nulls = getattr(trainer.train_dataset, "without_text", 0)
    results = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in last.items())
    write_model_card(
        folder,
        title=folder.name,
        summary=about.summary,
        kind="masked_lm",
        template="student" if plain else "lexmae",
        results=f"At the end of training: {results}." if results else "Nothing.",
        training="\n".join(training),
        base_models=about.base_models,
        datasets=about.datasets,
        tags=trainer._tags,
        citation=bibtex(trainer._paper),
        model_id=trainer.hub_model_id,
    )
    write_manifest(
        folder,
        settings=settings,
        data={} if data is None else data.facts(),
        models={"start": [options.model], "student": {"weights": model.weights_fingerprint()}},
        training={
            "steps": state.global_step,
            "epochs": state.epoch,
            **last,
            **({"rows_without_text": nulls} if nulls else {}),
        },
    )


VERB = Verb(
    "pretrain",
    "Pre-train a masked language model for lexical retrieval (LexMAE) on the texts of a collection or a stream.",
    (CollectionOptions, PretrainOptions, PretrainHelp),
    run,
    _arguments,
    "hf-distill pretrain --data my_collection --model google-bert/bert-base-uncased --output_dir outputs/lexmae",
)
