"""Steps that several verbs share: opening data, claiming an output folder, making rows, training, measuring."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger, is_main_process
from ..data import Collection, RowSet, Run, StreamedRows, load_collection, open_row_set
from ..distributed import wait_for_everyone
from ..errors import InputError
from ..files import read_json, remove_leftovers, write_json
from ..hub.manifest import without_secrets
from ..locking import lock_folder, unlock_folder
from ..provenance import note_source
from ..settings import NOT_OF_THE_RUN
from ..trainers.checkpoints import last_complete_checkpoint
from .options import CollectionOptions, DataOptions, EncodeOptions, ModelOptions, PoolOptions, RowOptions


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..retrieval import MiningOptions
    from ..trainers.base import BaseTrainer

logger = get_logger(__name__)

KEY_FILE = "run_key.json"

# A row set on the Hub, as an option names it: user/repository, and perhaps :name.
HUB_ROWS = re.compile(r"^[\w.\-]+/[\w.\-]+(:[^:/]+)?$")


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
        for split in (data.eval, data.test):
            if split is not None and not len(collection.qrels[split].query_positions()):
                raise InputError(
                    "no query has a relevant document, so nothing can be measured",
                    where=f"{collection.name}, judgements {split!r}",
                    cure="Give another split (--eval_split, --test_split), or mend the grades",
                )
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


def settings_of(*options: Any, **facts: Any) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON: option objects without what has no effect on the result.

    A trainer's arguments bring the number of processes and their engine along.
    """
    from ..distributed import engine_of

    settings: dict[str, Any] = {}
    for option in options:
        if hasattr(option, "world_size"):
            settings |= {"processes": option.world_size, "engine": engine_of(option)}
        fields = option.to_dict() if hasattr(option, "to_dict") else asdict(option) if is_dataclass(option) else option
        settings.update({name: value for name, value in fields.items() if name not in NOT_OF_THE_RUN})
    return json.loads(json.dumps(without_secrets({**settings, **facts}), default=str, sort_keys=True))


def claim_output(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Makes `folder` the output of the run with these settings until this process ends; all processes must call it.

    Raises:
        InputError: If it is another run's, naming what differs, holds files that are no run's, or another process
            works in it now.
    """
    folder = Path(folder)
    if is_main_process():
        key = folder / KEY_FILE
        if not key.is_file() and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(
                "is not empty and holds no run of this command",
                where=str(folder),
                cure="Choose another --output_dir, or remove that folder",
            )
        # First the lock, then the key: of two runs that start at once only one may write it.
        lock_folder(folder)
        try:
            _claim(folder, settings)
        except InputError:
            unlock_folder(folder)
            raise
    wait_for_everyone()
    return folder


# What a run was begun with, in words; `data_fingerprint` says so part by part.
_INPUTS = {
    "rows_fingerprint": "the training rows",
    "start_weights": "the weights to start from",
    "student_weights": "the weights to start from",
    "teacher_weights": "a teacher's weights",
}


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    key = folder / KEY_FILE
    if not key.is_file():
        write_json(key, settings)
        return
    theirs = read_json(key)
    begun = any(entry != key and not entry.name.startswith(".") for entry in folder.iterdir())
    differing = sorted(name for name in {*theirs, *settings} if theirs.get(name) != settings.get(name))
    if not differing:
        if begun:
            logger.info("%s holds this run already: going on where it stopped.", folder)
    elif not begun:
        write_json(key, settings)  # the other run ended before it left anything, at bad input for example
    elif inputs := [what for name in differing for what in _changed_inputs(name, theirs, settings)]:
        raise InputError(
            f"holds a run that was begun with other data: {', '.join(inputs)} changed since",
            where=str(folder),
            cure="Bring back what it was, choose another --output_dir, or remove that folder to start anew",
        )
    else:
        shown = "; ".join(f"{name}: {theirs.get(name)!r}, now {settings.get(name)!r}" for name in differing[:5])
        raise InputError(
            f"holds another run ({shown})",
            where=str(folder),
            cure="Choose another --output_dir, or remove that folder",
        )


def _changed_inputs(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs in a setting that stands for content, in words; nothing for other settings.

    A run of other data by name (another `--data`, another teacher) is another run, and is told as that.
    """
    if any(theirs.get(option) != ours.get(option) for option in ("data", "rows", "model", "teacher", "student")):
        return []
    before, now = theirs.get(name), ours.get(name)
    if name == "data_fingerprint" and isinstance(before, Mapping) and isinstance(now, Mapping):
        return [f"the {part}" for part in sorted({*before, *now}) if before.get(part) != now.get(part)]
    return [_INPUTS[name]] if name in _INPUTS else []


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
        load_model,
        student_from,
    )

    archetypes = {
        "dense": DenseRetriever,
        "lexical": LexicalRetriever,
        "multi_vector": MultiVectorRetriever,
        "cross_encoder": CrossEncoderRanker,
    }
    if kind is None:
        opened = type(load_model(name, revision=revision))
        kind = next((one for one, archetype in archetypes.items() if archetype is opened), "dense")
    archetype = archetypes[kind]
    set_seed(seed)
    model = archetype.from_pretrained(name, revision=revision, **model_overrides(options, kind == "cross_encoder"))
    return model if layers is None else student_from(f"layers:{layers}", model)


def named_rows(data: Data, name: str, revision: str | None = None, streaming: bool = False) -> RowSet | StreamedRows:
    """A row set by its name in the collection, its folder or file, or its Hub id."""
    collection = data.collection
    if name in collection.row_sets:
        rows = collection.stream(name) if streaming else collection.rows(name)
        note_source("rows", name, lambda: {"fingerprint": rows.fingerprint})
        return rows
    if not Path(name).exists() and not HUB_ROWS.match(name):
        raise InputError(
            f"there is no row set {name!r}",
            where="--rows",
            cure=f"Give a folder, a Hub id such as user/rows, or one of: "
            f"{', '.join(collection.row_sets) or '(the collection has none)'}; hf-distill mine makes one",
        )
    source, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    opened = open_row_set(source, config or None, revision=revision, cache_dir=data.cache_dir)
    kind = StreamedRows if streaming else RowSet
    rows = kind.from_source(*opened, collection.queries, collection.corpus, cache_dir=data.cache_dir)
    note_source("rows", name, lambda: {"fingerprint": rows.fingerprint}, opened[0].revision)
    return rows


def wanted_rows(data: Data, options: RowOptions, seed: int) -> RowSet | StreamedRows:
    """The row set that was named, opened once; a sample of it where that was asked for."""
    key = (options.rows, options.rows_revision, options.streaming)
    if key not in data.opened_rows:
        data.opened_rows[key] = named_rows(data, *key)
    rows = data.opened_rows[key]
    return rows if options.streaming else sample_rows(rows, options.max_queries, seed)


def check_streaming(options: RowOptions) -> None:
    """Raises [`InputError`] for wishes that streamed rows cannot meet."""
    if options.streaming and options.rows is None:
        raise InputError(
            "rows are streamed from a row set, and none is named",
            where="--streaming",
            cure="Name one with --rows, or leave --streaming out: the rows are then mined",
        )
    if options.streaming and options.max_queries is not None:
        raise InputError(
            "no sample can be drawn from rows that are streamed",
            where="--max_queries",
            cure="Limit the training with --max_steps, or leave --streaming out",
        )


def rows_fingerprint(data: Data, options: RowOptions) -> str | None:
    """Identifies the content of the row set that was named; None where rows are mined from the data."""
    return None if options.rows is None else wanted_rows(data, replace(options, max_queries=None), 0).fingerprint


def parse_window(text: str | None, depth: int) -> tuple[int, int]:
    """`"1,200"` as first and last rank; None is everything that is retrieved.

    Raises:
        InputError: If it is anything else.
    """
    try:
        first, last = (int(part) for part in text.split(",")) if text is not None else (1, depth)
    except ValueError:
        first = last = 0
    if not 1 <= first <= last:
        raise InputError(f"{text!r} is not a window of ranks", where="--mine_window", cure="Write for example '1,200'")
    return first, last


def candidates_run(
    source: str | RetrievalModel, data: Data, queries: np.ndarray, depth: int, settings: Mapping[str, Any], index: str
) -> Run:
    """The best `depth` passages of each query, by BM25 or by a model."""
    from ..retrieval import bm25_search, search

    if source == "bm25":
        return bm25_search(data.collection, queries, depth, cache_dir=data.cache_dir)
    return search(source, data.collection, queries, depth, factory=index, **settings)


def sample_rows(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    """At most `limit` rows, a seeded sample in the order of the rows."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False)))


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
    from ..evaluation import parse_measure
    from ..retrieval.searching import check_factory
    from ..trainers.base import check_batch, read_losses, read_sources
    from ..trainers.retrieval import check_terms

    mining_options(row_options, args.seed)
    check_streaming(row_options)
    if row_options.rows is not None:
        number = len(wanted_rows(data, row_options, args.seed))
    else:
        number = len(data.collection.split(data.train).query_positions())
    check_batch(number if row_options.max_queries is None else min(number, row_options.max_queries), args)
    read_sources(args)
    if args.losses is not None:
        check_terms(read_losses(args.losses), representation=model.representation, teachers=teachers or {})
    for measure in args.eval_measures.split(","):
        parse_measure(measure)
    check_factory(model, index)
    model.check_export()


def mining_options(options: PoolOptions, seed: int, **more: Any) -> MiningOptions:
    """The person's wishes about mining; `more` are further fields."""
    from ..retrieval import MiningOptions

    return MiningOptions(
        depth=options.mine_depth,
        window=parse_window(options.mine_window, options.mine_depth),
        num_negatives=options.mine_negatives,
        margin=options.mine_margin,
        relative_margin=options.mine_relative_margin,
        sampling=options.mine_sampling,
        seed=seed,
        **more,
    )


def sampled_queries(data: Data, limit: int | None, seed: int) -> np.ndarray | None:
    """Positions of at most `limit` training queries, a seeded sample; None for all."""
    if limit is None:
        return None
    queries = data.collection.split(data.train).query_positions()
    if limit >= len(queries):
        return queries
    return np.sort(np.random.default_rng(seed).choice(queries, limit, replace=False))


def mined_rows(
    retriever: str | RetrievalModel | Run,
    data: Data,
    options: PoolOptions,
    settings: Mapping[str, Any],
    *,
    index: str = "Flat",
    seed: int = 42,
    include_unlabelled: bool = False,
    **more: Any,
) -> RowSet:
    """Mines training rows as `options` say.

    Args:
        retriever: `"bm25"`, a bi-encoder, or a run.
        data: The opened collection.
        options: The person's wishes.
        settings: Keyword arguments of encoding.
        index: `"Flat"` or a FAISS factory string.
        seed: Of all samples.
        include_unlabelled: Also make rows for queries without a positive.
        more: Further arguments of [`mine`].
    """
    from ..retrieval import mine

    queries = sampled_queries(data, options.max_queries, seed)
    return mine(
        retriever,
        data.collection,
        data.train,
        options=mining_options(options, seed, include_unlabelled=include_unlabelled),
        query_positions=queries,
        factory=index,
        **settings,
        **more,
    )


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


def row_folder(data: Data, output_dir: str | None, name: str) -> Path:
    """Where a row set goes: `output_dir`, else into the collection's own folder."""
    if output_dir is not None:
        return Path(output_dir)
    source = Path(data.collection.source)
    if (source / "README.md").is_file() and (source / "corpus").is_dir():
        return source / Path(name).name
    raise InputError(
        f"{data.collection.source} is no folder in this project's layout, so rows cannot be added to it",
        where="--output_dir",
        cure="Say where the rows should go",
    )


def claim_rows(folder: Path) -> Path:
    """Makes this run the only one that writes the row set `folder`; all processes must call it."""
    if is_main_process():
        lock_folder(folder, beside=True)
        remove_leftovers(folder)
    wait_for_everyone()
    return folder


def save_rows(rows: RowSet, data: Data, folder: Path, name: str) -> None:
    """Writes a row set with its manifest, and tells the collection's card about it if it lies in the collection."""
    from ..data import add_row_set
    from ..hub.manifest import write_manifest

    if not is_main_process():
        return
    if folder.parent == Path(data.collection.source):
        add_row_set(folder.parent, folder.name, rows)
    else:
        rows.save(folder)
    facts = {"number": len(rows), "fingerprint": rows.fingerprint, "provenance": rows.metadata}
    write_manifest(folder, data={**data.facts(), "rows": facts})


def warn_of_scores(rows: RowSet, column: str) -> None:
    """Says when a teacher's scores look flat or saturated."""
    import torch

    from ..losses import check_teacher_scores

    width = int(rows.lengths.max())
    sample = np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)
    scores, keep = torch.zeros(len(sample), width), torch.zeros(len(sample), width, dtype=torch.bool)
    for line, row in enumerate(sample):
        values = torch.from_numpy(np.array(rows.values_at(column, int(row)), np.float32))
        scores[line, : len(values)], keep[line, : len(values)] = values, True
    for warning in check_teacher_scores(scores, keep):
        logger.warning("%s: %s", column, warning)
