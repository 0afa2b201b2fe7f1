"""What a training of lexical models adds: the FLOPS regulariser of a batch, and a look at how sparse the model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..console import get_logger
from ..distributed import sum_over_processes, world_size
from ..errors import InputError
from ..losses.combine import LossTerm
from ..models.processing import tokenizer_fingerprint, vocabulary_fingerprint


logger = get_logger(__name__)


def sparsity(term: LossTerm, output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The regulariser of the joint batch of all processes; averaging processes averages its gradients rightly.

    Args:
        term: A term on `representations`.
        output: What the student's forward returned.
        batch: The collator's batch.
    """
    counts = {f"{kind}_counts": _counts(output, batch, kind) for kind in ("query", "passage")}
    if term.options.get("positives_apart"):
        layout = batch["passage_index"].view(len(batch["query_index"]), -1)
        columns = (layout[:, column] for column in (0, 1))
        counts |= {
            name: torch.bincount(column, minlength=len(output.passage))
            for name, column in zip(("passage_counts", "negative_counts"), columns)
        }
    return term.loss.function(output.query, output.passage, **term.options, **counts, reduce=mean_over_processes)


def check_apart(terms: Mapping[str, LossTerm], num_negatives: int) -> None:
    """Raises [`InputError`] if positives are to be kept apart from negatives and there are none."""
    if num_negatives < 1 and any(term.options.get("positives_apart") for term in terms.values()):
        raise InputError(
            "positives_apart compares positives with first negatives, and there are no negatives",
            where="loss 'flops'",
            cure="Give num_negatives 1 or more, or leave positives_apart out",
        )


def _counts(output: Any, batch: Mapping[str, Any], kind: str) -> torch.Tensor:
    """How often each distinct text stands in the batch."""
    return torch.bincount(batch[f"{kind}_index"], minlength=len(getattr(output, kind)))


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes, whose gradient flows into the local values as if each process had all of them.

    With m the mean of the processes' values m_r, a loss L(m) has the gradient L'(m)/W in each m_r. Here it is L'(m),
    and the averaging of the processes' gradients divides by W.
    """
    if world_size() == 1:
        return values
    return values + (sum_over_processes(values) / world_size() - values.detach())


def active_terms(output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """How sparse the representations of the joint batch are.

    Returns:
        `active_terms_query` and `active_terms_passage`, terms above 0 of a text on average, and `expected_flops`, the
        products that scoring a query with a passage takes on average if their terms were independent.
    """
    shares = []
    for kind in ("query", "passage"):
        counts = _counts(output, batch, kind).float()
        shares.append(mean_over_processes(counts @ (getattr(output, kind).detach() > 0).float() / counts.sum()))
    return {
        "active_terms_query": shares[0].sum(),
        "active_terms_passage": shares[1].sum(),
        "expected_flops": shares[0] @ shares[1],
    }


def look_at_sparsity(logs: Mapping[str, float], step: int) -> None:
    """Warns of a model without terms."""
    for kind in ("query", "passage"):
        if logs[f"active_terms_{kind}"] < 1:
            logger.warning(
                "step %d: a %s has %.2f active terms on average, so nothing can be found: lower the weight of the "
                "flops term, or let it grow more slowly (ramp_steps).",
                step,
                kind,
                logs[f"active_terms_{kind}"],
            )


def check_vocabulary(model: Any, teacher: Any) -> None:
    """Raises [`InputError`] if a lexical student cannot follow a teacher's vectors term by term.

    Args:
        model: The student.
        teacher: A teacher with embeddings. Its vocabulary is that of its tokenizer, or the one its cached vectors were
            made with.
    """
    tokenizer = model.tokenizer
    if teacher.processor is not None:
        same = teacher.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    else:
        same = all(_is_over(store, tokenizer) for store in teacher.vectors)
    if teacher.embedding_size != model.embedding_size or not same:
        raise InputError(
            f"the vectors of the teacher {teacher.name!r} are not over the student's vocabulary",
            where="losses",
            cure="Follow its scores (kl, margin_mse, rank_consistency), or give a lexical teacher of this vocabulary",
        )


def _is_over(store: Any, tokenizer: Any) -> bool:
    """Whether cached vectors are over a tokenizer's vocabulary, as far as their manifest says."""
    if "vocabulary" in store.info:
        return store.info["vocabulary"] == vocabulary_fingerprint(tokenizer)
    # An older manifest knows the tokenizer alone; vectors from elsewhere know nothing.
    ours = tokenizer_fingerprint(tokenizer)
    return store.key.get("processor_tokenizer", ours) == ours
