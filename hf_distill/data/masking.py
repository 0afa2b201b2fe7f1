"""From raw texts to the masked batches of LexMAE or of plain masked language modelling.

Every draw is a function of *(seed, epoch, text)*, so that batches are the same on any number of processes or loader
workers, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..console import get_logger
from ..errors import InputError
from ..passages import render_passage
from .negatives import random_stream
from .streaming import ahead


if TYPE_CHECKING:
    from ..models.processing import TextProcessor
    from .tables import Corpus

logger = get_logger(__name__)

IGNORED = -100
DECODER_MASKINGS = ("inclusive", "random", "exclusive")
# Of the chosen tokens: this share becomes the mask token, from there to the second a random token, the rest stays.
_MASKED, _CHANGED = 0.8, 0.9
_ENCODER, _DECODER = 10, 11
# Texts of a stream that are read together, while those before are used.
_READ_TEXTS = 1024


class TextExample(NamedTuple):
    """A text to pre-train on.

    Attributes:
        number: Its position in the corpus, or its number in a stream.
        epoch: The epoch it is drawn for.
        text: The rendered passage.
    """

    number: int
    epoch: int
    text: str


def choose_exactly(maskable: np.ndarray, rate: float, uniform: np.ndarray) -> np.ndarray:
    """Chooses ceil(rate · n) of the n maskable tokens: those with the smallest `uniform`.

    Args:
        maskable: Bool[L].
        rate: Share of tokens.
        uniform: Float[L], random numbers from 0 to 1.

    Returns:
        Bool[L].
    """
    places = np.flatnonzero(maskable)
    chosen = np.zeros(len(maskable), bool)
    # Rounded first, since 0.3 · 10 is a little more than 3.
    chosen[places[np.argsort(uniform[places], kind="stable")[: math.ceil(round(rate * len(places), 9))]]] = True
    return chosen


def choose_for_decoder(
    maskable: np.ndarray, encoder: np.ndarray, rates: tuple[float, float], how: str, uniform: np.ndarray
) -> np.ndarray:
    """Chooses the tokens that the decoder has to predict, each on its own.

    Args:
        maskable: Bool[L].
        encoder: Bool[L], the encoder's choice.
        rates: The shares of encoder and decoder, p and q.
        how: `"inclusive"`: the encoder's and of the others (q - p)/(1 - p), q in all; `"exclusive"`: q/(1 - p) of the
            others alone; `"random"`: q of all, whatever the encoder's.
        uniform: Float[L], random numbers from 0 to 1.

    Returns:
        Bool[L].
    """
    first, second = rates
    if how == "random":
        return maskable & (uniform < second)
    if how == "exclusive":
        return maskable & ~encoder & (uniform < second / (1 - first))
    return encoder | (maskable & (uniform < (second - first) / (1 - first)))


def corrupt(
    ids: np.ndarray, chosen: np.ndarray, split: np.ndarray, random_ids: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a model reads and what it has to predict.

    Args:
        ids: Int[L].
        chosen: Bool[L].
        split: Float[L] from 0 to 1: of the chosen tokens 80 % are masked, 10 % become another token, 10 % stay.
        random_ids: Int[L], the other tokens.
        mask_id: The mask token.

    Returns:
        The ids that are read, and the labels: the original at chosen places, -100 elsewhere.
    """
    read = np.where(chosen & (split < _MASKED), mask_id, ids)
    read = np.where(chosen & (split >= _MASKED) & (split < _CHANGED), random_ids, read)
    return read, np.where(chosen, ids, IGNORED)


class MaskingCollator:
    """Tokenises, masks and pads a batch of [`TextExample`].

    Args:
        processor: How the model reads passages.
        encoder_rate: Share of the tokens that the encoder has to predict, exactly (rounded up).
        decoder_rate: Share that the decoder has to predict, on average; None without a decoder.
        decoder_masking: See [`choose_for_decoder`].
        seed: Of all draws.

    The batch holds `tokens`: `{name: {...}}` with `input_ids`, `attention_mask`, `labels` and, with a decoder,
    `decoder_ids` and `decoder_labels`, all `int64[B, L]`.
    """

    def __init__(
        self,
        name: str,
        processor: TextProcessor,
        *,
        encoder_rate: float = 0.3,
        decoder_rate: float | None = 0.5,
        decoder_masking: str = "inclusive",
        seed: int = 0,
    ):
        tokenizer = processor.tokenizer
        check_masking(encoder_rate, decoder_rate, decoder_masking)
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token", where="pretraining", cure="Give a masked-LM model")
        if processor.padding_side != "right":
            raise InputError("the tokenizer pads on the left", where="pretraining", cure="Give an encoder")
        self.name, self.processor, self.seed = name, processor, seed
        self.encoder_rate, self.decoder_rate, self.decoder_masking = encoder_rate, decoder_rate, decoder_masking
        self._special = np.array([one for one in (tokenizer.cls_token_id, tokenizer.sep_token_id) if one is not None])
        self._vocabulary = len(tokenizer)

    def __call__(self, examples: Sequence[TextExample]) -> dict[str, Any]:
        rows = [
            self._mask(example, np.array(ids))
            for example, ids in zip(examples, self.processor.passages([example.text for example in examples]))
        ]
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.processor.pad_token_id, "decoder_ids": self.processor.pad_token_id}
        batch = {}
        for field in rows[0]:
            default = fill.get(field, 0 if field == "attention_mask" else IGNORED)
            padded = np.full((len(rows), width), default, np.int64)
            for line, row in zip(padded, rows):
                line[: len(row[field])] = row[field]
            batch[field] = torch.from_numpy(padded)
        return {"tokens": {self.name: batch}}

    def _mask(self, example: TextExample, ids: np.ndarray) -> dict[str, np.ndarray]:
        maskable = ~np.isin(ids, self._special)
        draws = random_stream(self.seed, example.epoch, example.number, _ENCODER)
        chosen = choose_exactly(maskable, self.encoder_rate, draws.random(len(ids)))
        read, labels = self._corrupt(ids, chosen, draws)
        row = {"input_ids": read, "attention_mask": np.ones_like(ids), "labels": labels}
        if self.decoder_rate is not None:
            draws = random_stream(self.seed, example.epoch, example.number, _DECODER)
            rates = (self.encoder_rate, self.decoder_rate)
            chosen = choose_for_decoder(maskable, chosen, rates, self.decoder_masking, draws.random(len(ids)))
            row["decoder_ids"], row["decoder_labels"] = self._corrupt(ids, chosen, draws)
        return row

    def _corrupt(self, ids: np.ndarray, chosen: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, ...]:
        split, other = draws.random(len(ids)), draws.integers(self._vocabulary, size=len(ids))
        return corrupt(ids, chosen, split, other, self.processor.tokenizer.mask_token_id)


def check_masking(encoder_rate: float, decoder_rate: float | None, how: str) -> None:
    """Raises [`InputError`] for shares that cannot be."""
    if not 0 < encoder_rate < 1:
        raise InputError(f"encoder_rate is {encoder_rate}", where="masking", cure="Give a share between 0 and 1")
    if how not in DECODER_MASKINGS:
        raise InputError(f"{how!r} is no masking", where="masking", cure=f"Use {', '.join(DECODER_MASKINGS)}")
    if decoder_rate is None:
        return
    least, most = {"inclusive": (encoder_rate, 1.0), "exclusive": (0.0, 1 - encoder_rate)}.get(how, (0.0, 1.0))
    if not least <= decoder_rate <= most or decoder_rate == 0:
        raise InputError(
            f"decoder_rate is {decoder_rate} with {how} masking and encoder_rate {encoder_rate}",
            where="masking",
            cure=f"Give a share from {least} to {most}",
        )


class CorpusTexts(torch.utils.data.Dataset):
    """A corpus as texts: `texts[row, epoch]` is a [`TextExample`].

    Args:
        corpus: The corpus.
        template: How title and text become one passage.
    """

    def __init__(self, corpus: Corpus, template: str):
        self.corpus, self.template = corpus, template

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, key: tuple[int, int]) -> TextExample:
        row, epoch = key
        return TextExample(int(row), int(epoch), self.corpus.texts(np.array([row]), template=self.template)[0])


class StreamedTexts(torch.utils.data.Dataset):
    """Texts without an end, from a data set that is read in order: epoch after epoch, each in another order.

    Texts cannot be asked for by number: [`TextSampler`] reads them, in the process that trains, and hands out finished
    examples, which this data set passes on. Loader workers thus never read, they only tokenise and mask.

    Args:
        stream: A streamed data set of `datasets` with a column `text` (or `column`), perhaps `title`.
        template: How title and text become one passage.
        column: The column of texts.
        seed: Of the order.
        buffer: Texts that are shuffled together; 0 leaves their order.

    Attributes:
        without_text: Rows whose text is null, of those that were read in the first epoch. They count as empty.

    Raises:
        InputError: If there are no rows, or the first one has no such column.
    """

    def __init__(self, stream: Any, template: str, *, column: str = "text", seed: int = 0, buffer: int = 10_000):
        self.stream = stream.shuffle(seed=seed, buffer_size=buffer) if buffer else stream
        self.template, self.column, self.without_text = template, column, 0
        first = next(iter(stream), None)
        if first is None:
            raise InputError("the stream has no rows", where="pretraining", cure="Give a data set with texts")
        if column not in first:
            raise self._no_texts(first, 0)
        self._render(first, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # what loader workers need of it: nothing

    def examples(self, start: int = 0) -> Iterator[TextExample]:
        """The texts from number `start` on, one after the other."""
        epoch = number = 0
        while True:
            self.stream.set_epoch(epoch)
            before = number
            for row in self.stream:
                if epoch == 0 and row.get(self.column) is None:
                    self._note_without_text(number)
                if number >= start:
                    yield TextExample(number, epoch, self._render(row, number))
                number += 1
            rows = number - before
            # Every epoch has as many rows, so those that are passed over as a whole need not be read.
            whole = max(start - number, 0) // rows
            epoch, number = epoch + 1 + whole, number + whole * rows

    def __getitem__(self, example: TextExample | None) -> TextExample:
        if example is None:
            raise RuntimeError("a text of another process, or one that was to be skipped, was asked for")
        return example

    def _render(self, row: Mapping[str, Any], number: int) -> str:
        title, text = row.get("title"), row.get(self.column)
        if not isinstance(text, str | None):
            raise self._no_texts(row, number)
        return render_passage(title if isinstance(title, str) else None, text or "", self.template)

    def _no_texts(self, row: Mapping[str, Any], number: int) -> InputError:
        return InputError(
            f"no text in the column {self.column!r}",
            where=f"row {number} of the stream",
            cure=f"Name the column of texts; there are: {', '.join(map(repr, row))}",
        )

    def _note_without_text(self, number: int) -> None:
        self.without_text += 1
        if self.without_text == 1:
            logger.warning(
                "Row %d of the stream has no text in the column %r. It counts as empty, and so will others.",
                number,
                self.column,
            )


class TextSampler(torch.utils.data.Sampler):
    """Takes the texts of a training from a stream; the counterpart of [`~hf_distill.data.streaming.StreamSampler`].

    Every process reads the same texts in the same order. The sampler yields those of this process, and None for the
    others', in the order of the joint batches: what accelerate's `BatchSamplerShard` expects of a sampler that all
    processes share.

    Args:
        dataset: What to read.
        batch_size: Texts of a batch on each process.
        batches: Joint batches that are taken.
        processes: Number of processes.
        rank: Number of this one.
    """

    def __init__(self, dataset: StreamedTexts, batch_size: int, batches: int, *, processes: int = 1, rank: int = 0):
        self.dataset, self.joint, self._length = dataset, batch_size * processes, batch_size * processes * batches
        self._own, self._skipped = range(rank * batch_size, (rank + 1) * batch_size), 0

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: all batches are one epoch for a trainer; a stream counts its own."""

    def skip_next(self, batches: int) -> None:
        """Lets the next iteration begin with so many joint batches of None, for somebody who passes over them."""
        self._skipped = batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TextExample | None]:
        start, self._skipped = min(self._skipped * self.joint, self._length), 0
        yield from repeat(None, start)
        examples = islice(self.dataset.examples(start), self._length - start)
        own = (example if example.number % self.joint in self._own else None for example in examples)
        with ThreadPoolExecutor(1, thread_name_prefix="texts") as threads:
            some = iter(lambda: list(islice(own, _READ_TEXTS)), [])
            yield from chain.from_iterable(ahead(some, threads))
