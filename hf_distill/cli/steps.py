"""Steps that several verbs share: opening data and models, checking wishes, training, measuring on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import Collection, Run, load_collection
from ..errors import InputError
from ..trainers.checkpoints import last_complete_checkpoint
from . import row_sets
from .options import CollectionOptions, DataOptions, EncodeOptions, ModelOptions, RowOptions


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..trainers.base import BaseTrainer


@dataclass
class Data:
    """An opened collection and the names of its splits."""

    collection: Collection
    train: str
    eval: str | None
    test: str | None
    cache_dir: str | None = None
    opened_rows: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, options: CollectionOptions) -> Data:
        """Loads and checks the collection; a split that was asked for must be there."""
        collection = load_collection(options.data, revision=options.data_revision, cache_dir=options.cache_dir)
        found = {name: name if name in collection.qrels else None for name in ("dev", "test")}
        data = cls(collection, "train", found["dev"], found["test"], cache_dir=options.cache_dir)
        if isinstance(options, DataOptions):
            check_split(collection, options.eval_split, "--eval_split")
            check_split(collection, options.test_split, "--test_split")
            data.train = options.train_split
            data.eval, data.test = options.eval_split or data.eval, options.test_split or data.test
            check_relevant(collection, data.eval, "--eval_split")
            check_relevant(collection, data.test, "--test_split")
        return data

    def facts(self) -> dict[str, Any]:
        """What a manifest says about it."""
        collection = self.collection
        return {
            "collection": collection.name,
            "source": collection.source,
            "revision": collection.revision,
            "fingerprint": collection.fingerprint,
            "splits": {"train": self.train, "eval": self.eval, "test": self.test},
        }


def check_split(collection: Collection, split: str | None, flag: str) -> None:
    """Raises [`InputError`] if a split was named that has no judgements."""
    if split is not None and split not in collection.qrels:
        raise InputError(
            f"{collection.name} has no judgements {split!r}",
            where=flag,
            cure=f"Its splits are: {', '.join(collection.qrels) or 'none'}",
        )


def check_relevant(collection: Collection, split: str | None, flag: str, relevance: int = 1) -> None:
    """Raises [`InputError`] if no query of a split has a document of at least that grade."""
    if split is not None and not len(collection.qrels[split].query_positions(relevance)):
        raise InputError(
            f"no query has a document of grade {relevance} or more",
            where=f"{collection.name}, judgements {split!r}",
            cure=f"Give another split ({flag}), or mend the grades",
        )


def finish_training(trainer: BaseTrainer) -> RetrievalModel:
    """Trains to the end, from the last complete checkpoint if there is one, and saves the native model.

    Without a checkpoint in the output folder, `--resume_from_checkpoint` names where to go on.

    Returns:
        The trained model, whole also where an engine has divided its weights over processes.
    """
    checkpoint = last_complete_checkpoint(trainer.args.output_dir) or trainer.args.resume_from_checkpoint
    from ..models.joint import student_of

    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # pushed when card and figures lie beside it
    trainer.write_history()
    return student_of(trainer.whole_model())


def encode_settings(options: EncodeOptions, data: CollectionOptions) -> dict[str, Any]:
    """Keyword arguments of [`encode_table`] and of what stands on it."""
    return {
        "dtype": options.dtype,
        "storage": options.storage,
        "token_budget": options.token_budget,
        "cache_dir": data.cache_dir,
    }


def model_overrides(options: ModelOptions, ranker: bool = False) -> dict[str, Any]:
    """The settings of a model that the person gave.

    Raises:
        InputError: If a cross-encoder is given settings that only bi-encoders have.
    """
    given = {name: value for name, value in asdict(options).items() if value is not None}
    if not ranker:
        return given
    if "passage_length" in given:
        given["max_length"] = given.pop("passage_length")
    foreign = sorted(set(given) - {"query_prompt", "max_length", "template", "head"})
    if foreign:
        raise InputError(
            "a cross-encoder has no such setting",
            where=", ".join(f"--{name}" for name in foreign),
            cure="It knows --passage_length (of the pair), --query_prompt, --template and --head",
        )
    return given


def open_model(
    name: str,
    kind: str | None,
    revision: str | None,
    options: ModelOptions,
    seed: int,
    *,
    layers: str | None = None,
) -> RetrievalModel:
    """Opens what is to be trained.

    Args:
        name: Hub id or folder.
        kind: `"dense"`, `"lexical"`, `"multi_vector"`, `"cross_encoder"`, or None for what the checkpoint is.
        revision: Branch, tag or commit.
        options: The person's wishes.
        seed: Of weights that the checkpoint lacks (a new head, a projection), so that every process and a later
            start of the same run begin with the same ones.
        layers: Which layers are kept, as in `"layers:..."` of [`student_from`]; None for all.
    """
    from transformers import set_seed

    from ..models import (
        CrossEncoderRanker,
        DenseRetriever,
        LexicalRetriever,
        MultiVectorRetriever,
        student_from,
    )

    archetypes = {
        "dense": DenseRetriever,
        "lexical": LexicalRetriever,
        "multi_vector": MultiVectorRetriever,
        "cross_encoder": CrossEncoderRanker,
    }
    if kind is None:
        opened = type(student_from(name, revision=revision))
        kind = next((one for one, archetype in archetypes.items() if archetype is opened), "dense")
    archetype = archetypes[kind]
    set_seed(seed)
    model = archetype.from_pretrained(name, revision=revision, **model_overrides(options, kind == "cross_encoder"))
    return model if layers is None else student_from(f"layers:{layers}", model)


def open_lexical(name: str) -> RetrievalModel:
    """Opens the lexical model of `--model`; [`InputError`] for another one."""
    from ..models import load_model

    model = load_model(name)
    if model.representation != "sparse":
        cure = "Give one, trained with --kind lexical say; write lexical: before the name of a bare SPLADE checkpoint"
        raise InputError("this is no lexical model", where="--model", cure=cure)
    return model


def candidates_run(
    source: str | RetrievalModel, data: Data, queries: np.ndarray, depth: int, settings: Mapping[str, Any], index: str
) -> Run:
    """The best `depth` passages of each query, by BM25 or by a model."""
    from ..retrieval import bm25_search, search

    if source == "bm25":
        return bm25_search(data.collection, queries, depth, cache_dir=data.cache_dir)
    return search(source, data.collection, queries, depth, factory=index, **settings)


def check_index(index: str, *models: RetrievalModel | str) -> None:
    """Raises [`InputError`] for an index that does not suit a model; `"bm25"` has its own."""
    from ..retrieval.searching import check_factory

    for model in models:
        if not isinstance(model, str):
            check_factory(model, index)


def check_training(
    data: Data,
    row_options: RowOptions,
    args: Any,
    model: RetrievalModel,
    *,
    index: str,
    teachers: Mapping[str, Any] | None = None,
) -> None:
    """Raises [`InputError`] for wishes about a training that cannot be met, before anything is begun.

    Args:
        data: The opened collection.
        row_options: The person's wishes about rows.
        args: Configuration of the trainer.
        model: What is to be trained.
        index: `"Flat"` or a FAISS factory string.
        teachers: By name, each with `candidate_sets` and `embedding_size`.
    """
    from ..data import TrainingRows
    from ..evaluation import parse_measure
    from ..losses import parse_terms
    from ..trainers.base import check_batch, read_losses, read_sources
    from ..trainers.retrieval import check_positives, check_terms
    from ..trainers.sparsity import check_apart

    row_sets.mining_options(row_options, args.seed)
    row_sets.check_streaming(row_options)
    terms = read_losses(args.losses) if args.losses is not None else None
    if row_options.rows is not None:
        rows = row_sets.wanted_rows(data, row_options, args.seed)
        number = len(rows)
        if terms is not None or not teachers:
            check_positives(terms or parse_terms(["contrastive"]), rows)
        if not row_options.streaming:  # refuses rows that no example can be made of
            pools = {"sampling": args.negative_sampling, "sources": read_sources(args)}
            TrainingRows(rows, num_negatives=args.num_negatives, **pools)
    else:
        number = len(data.collection.split(data.train).query_positions())
        check_relevant(data.collection, data.train, "--train_split")
    check_batch(number if row_options.max_queries is None else min(number, row_options.max_queries), args)
    read_sources(args)
    if terms is not None:
        check_terms(terms, representation=model.representation, teachers=teachers or {})
        check_apart(terms, args.num_negatives)
    for measure in args.eval_measures.split(","):
        parse_measure(measure)
    check_index(index, model)
    model.check_export()


def evaluation_for(data: Data, args: Any, model: RetrievalModel) -> Any:
    """The evaluation during training; without a dev split `args` are changed so that there is none."""
    from ..evaluation import RetrievalEvaluation
    from ..models import CrossEncoderRanker

    if data.eval is None or args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("no")
        args.load_best_model_at_end = False
        return None
    candidates = None
    if isinstance(model, CrossEncoderRanker):
        from ..retrieval import bm25_search

        queries = data.collection.qrels[data.eval].query_positions()
        candidates = bm25_search(data.collection, queries, args.eval_depth, cache_dir=data.cache_dir)
    return RetrievalEvaluation(
        data.collection,
        data.eval,
        measures=[name.strip() for name in args.eval_measures.split(",")],
        depth=args.eval_depth,
        corpus_size=args.eval_corpus_size or None,
        num_queries=args.eval_queries,
        candidates=candidates,
        seed=args.seed,
        cache_dir=data.cache_dir,
    )
