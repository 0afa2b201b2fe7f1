"""From a row set, held or streamed, to the examples of a training; and the same rows again after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..console import get_logger
from ..data.masking import CorpusTexts, StreamedTexts, TextSampler
from ..data.negatives import EpochSampler, TrainingRows
from ..data.rows import RowSet
from ..data.streaming import StreamedRows, StreamedTrainingRows, StreamSampler
from ..errors import InputError
from ..files import read_json, write_json
from .arguments import RetrievalTrainingArguments


logger = get_logger(__name__)

ROWS_FILE = "training_rows.json"


def data_seed(args: RetrievalTrainingArguments) -> int:
    """The seed of orders and draws."""
    return args.data_seed if args.data_seed is not None else args.seed


def make_dataset(
    rows: RowSet | StreamedRows,
    args: RetrievalTrainingArguments,
    sources: Mapping[str, float] | None,
    score_columns: Sequence[str],
) -> TrainingRows | StreamedTrainingRows:
    """The examples that the rows give."""
    kind = StreamedTrainingRows if isinstance(rows, StreamedRows) else TrainingRows
    dataset = kind(
        rows,
        num_negatives=args.num_negatives,
        sampling=args.negative_sampling,
        positive=args.positive_sampling,
        seed=data_seed(args),
        sources=sources,
        score_columns=score_columns,
    )
    if isinstance(dataset, TrainingRows) and dataset.repeated is not None:
        logger.warning("%s", dataset.repeated)
    return dataset


def make_sampler(
    dataset: TrainingRows | StreamedTrainingRows | CorpusTexts | StreamedTexts, args: TrainingArguments
) -> EpochSampler | StreamSampler | TextSampler:
    """Their order, the same on every process."""
    if isinstance(dataset, (StreamedTrainingRows, StreamedTexts)):
        for name in ("dispatch_batches", "split_batches"):
            if getattr(args.accelerator_config, name):
                raise InputError(
                    "every process reads its own part of a stream",
                    where=f"accelerator_config, {name}",
                    cure="Leave it out",
                )
        part = {"processes": args.world_size, "rank": args.process_index}
        if isinstance(dataset, StreamedTexts):
            return TextSampler(
                dataset, args.train_batch_size, args.max_steps * args.gradient_accumulation_steps, **part
            )
        return StreamSampler(
            dataset, args.train_batch_size, seed=data_seed(args), shuffle_buffer=args.shuffle_buffer, **part
        )
    return EpochSampler(len(dataset), seed=data_seed(args))


class SkipUnread(TrainerCallback):
    """Spares a stream the rows or texts that a resumed training passes over.

    The Trainer takes the batches that were trained on already from the sampler and throws them away; told how many
    they are, the sampler does not draw them.
    """

    def __init__(self, sampler: StreamSampler | TextSampler):
        self.sampler = sampler

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """As many batches of this epoch are passed over as the Trainer's state says."""
        if not args.ignore_data_skip:
            steps = max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)
            self.sampler.skip_next(state.global_step % steps * args.gradient_accumulation_steps)


def write_rows_state(folder: Path, rows: RowSet | StreamedRows, args: RetrievalTrainingArguments) -> None:
    """Notes in a checkpoint on which rows it was trained and what decides their order."""
    write_json(folder / ROWS_FILE, _state(rows, args))


def check_rows_state(folder: Path, rows: RowSet | StreamedRows, args: RetrievalTrainingArguments) -> None:
    """Raises [`InputError`] if a training cannot go on from a checkpoint with these rows in the same order."""
    path = Path(folder) / ROWS_FILE
    if not path.is_file():
        return  # a checkpoint of another trainer, or of an earlier version
    before, now = read_json(path), _state(rows, args)
    # Rows change with the texts that they point to; the texts are then what to name.
    changed = [part for part in ("queries", "corpus") if before[part] != now[part]]
    if changed or before["training rows"] != now["training rows"]:
        raise InputError(
            f"was written in a training on other data: the {' and the '.join(changed) or 'training rows'} changed",
            where=str(folder),
            cure="Bring back what it was (on the Hub: the same revision), or start anew in another folder",
        )
    order = {name: (value, now["order"].get(name)) for name, value in before["order"].items()}
    changed = [f"{name} was {was} and is {here}" for name, (was, here) in order.items() if was != here]
    if isinstance(rows, StreamedRows) and changed:
        raise InputError(
            f"its rows came in another order: {'; '.join(changed)}",
            where=str(folder),
            cure="Go on with the settings of its start; the number of processes may change if the queries of all "
            "processes together stay as many",
        )


def _state(rows: RowSet | StreamedRows, args: RetrievalTrainingArguments) -> dict[str, Any]:
    order: dict[str, Any] = {"seed": data_seed(args), "streamed": isinstance(rows, StreamedRows)}
    if isinstance(rows, StreamedRows):
        order["shuffle_buffer"] = args.shuffle_buffer
        order["queries in a batch of all processes"] = args.train_batch_size * args.world_size
        order["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    return {
        "training rows": rows.fingerprint,
        "queries": rows.queries.fingerprint,
        "corpus": rows.corpus.fingerprint,
        "order": order,
    }
