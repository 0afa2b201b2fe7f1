"""What a run leaves beside the model: figures of every system, plots, card and manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import get_logger, is_main_process
from ..data import RowSet, Run
from ..evaluation import parse_measure
from .steps import Data


if TYPE_CHECKING:
    from ..models.base import RetrievalModel
    from ..trainers.base import BaseTrainer

logger = get_logger(__name__)

_SPEED_SAMPLE = 256


class Report:
    """Measures systems on the test split and writes about them.

    Args:
        folder: The output folder; None to print only.
        data: The opened collection.
        encode: Keyword arguments of encoding.
        measures: Comma-separated measures.
        depth: Passages retrieved for a query; what a cross-encoder re-ranks.
        index: `"Flat"` or a FAISS factory string.
        relevance: The lowest relevant grade.

    Raises:
        InputError: For an unknown measure.
    """

    def __init__(
        self,
        folder: str | Path | None,
        data: Data,
        encode: Mapping[str, Any],
        *,
        measures: str = "nDCG@10,RR@10,R@100",
        depth: int = 100,
        index: str = "Flat",
        relevance: int = 1,
    ):
        self.folder = None if folder is None else Path(folder)
        self.data, self.encode = data, dict(encode)
        self.measures = [name.strip() for name in measures.split(",")]
        for measure in self.measures:
            parse_measure(measure)  # before anything is measured
        self.depth, self.index, self.relevance = depth, index, relevance
        self.results: dict[str, dict[str, Any]] = {}
        self._bm25: Run | None = None

    @classmethod
    def of_training(cls, data: Data, encode: Mapping[str, Any], args: Any, index: str) -> Report:
        """As a trainer's arguments say."""
        return cls(args.output_dir, data, encode, measures=args.eval_measures, depth=args.eval_depth, index=index)

    @property
    def dataset(self) -> str:
        """The key of the results in `metrics.json`."""
        return f"{self.data.collection.name}/{self.data.test}"

    @property
    def queries(self) -> np.ndarray:
        """Positions of the test queries."""
        return self.data.collection.qrels[self.data.test].query_positions(self.relevance)

    def bm25_run(self) -> Run:
        """BM25's results for the test queries."""
        if self._bm25 is None:
            from ..retrieval import bm25_search

            self._bm25 = bm25_search(self.data.collection, self.queries, self.depth, cache_dir=self.data.cache_dir)
        return self._bm25

    def bm25(self) -> None:
        """Measures BM25."""
        if self.data.test is not None:
            self.run("bm25", self.bm25_run())

    def model(self, name: str, model: RetrievalModel, rerank: Run | None = None) -> None:
        """Measures a model: a bi-encoder searches, a cross-encoder re-ranks `rerank` (by default BM25's results)."""
        if self.data.test is None:
            return
        from ..retrieval import rerank as rerank_run
        from ..retrieval import search

        if model.representation == "pair":
            candidates = (rerank if rerank is not None else self.bm25_run()).cut(self.depth)
            run = rerank_run(model, candidates, self.data.collection, **self._score_settings())
            figures = model_figures(model)
        else:
            run = search(model, self.data.collection, self.queries, self.depth, factory=self.index, **self.encode)
            figures = {**model_figures(model), "passages_per_second": self.speed(model)}
            figures["index_bytes"] = self._index_bytes(model)
        self.run(name, run, figures)

    def _index_bytes(self, model: RetrievalModel) -> int:
        """Size of what a search goes through: all vectors, token vectors, or a lexical model's postings."""
        from ..retrieval import encode_table
        from ..retrieval.searching import build_index

        if model.representation == "sparse":
            vectors = encode_table(model, self.data.collection.corpus, "passage", **self.encode)
            return build_index(vectors, model, self.index, cache_dir=self.encode.get("cache_dir")).num_bytes
        if model.representation == "tokens":
            settings = {**self.encode, "storage": "float16"}
            tokens = encode_table(model, self.data.collection.corpus, "passage", **settings)
            return 2 * int(tokens.offsets[-1]) * tokens.dim
        width = {"float16": 2}.get(self.encode.get("storage", ""), 4)
        return len(self.data.collection.corpus) * model.embedding_size * width

    def _score_settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.encode.items() if name != "storage"}

    def speed(self, model: RetrievalModel) -> float:
        """Passages encoded a second on this machine: a fixed sample of the corpus, best of two passes."""
        from ..retrieval import encode_texts

        corpus = self.data.collection.corpus
        sample = np.random.default_rng(0).permutation(len(corpus))[:_SPEED_SAMPLE]
        texts = corpus.texts(np.sort(sample), model.config.template)
        settings = {name: self.encode[name] for name in ("dtype", "token_budget") if name in self.encode}
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            encode_texts(model, texts, "passage", **settings)
            seconds.append(time.perf_counter() - start)
        return len(texts) / min(seconds)

    def run(self, name: str, run: Run, figures: Mapping[str, Any] | None = None) -> None:
        """Measures a run under the name of a system."""
        from ..evaluation import evaluate_system

        result = evaluate_system(
            name,
            run,
            self.data.collection,
            self.data.test,
            self.folder,
            measures=self.measures,
            relevance_threshold=self.relevance,
            figures=figures,
        )
        self.results[name] = {**result.means, **(figures or {})}
        shown = ", ".join(f"{measure} {result.means[measure]:.4f}" for measure in self.measures)
        logger.info("%s on %s: %s", name, self.dataset, shown)

    def show(self) -> None:
        """Prints the table and draws the plots."""
        if not is_main_process() or not self.results:
            return
        from ..evaluation import plot_report, print_summary

        print_summary({self.dataset: self.results}, self.measures)
        if self.folder is None:
            return
        history = self.folder / "history.json"
        from ..files import read_json

        plot_report(
            self.folder, measure=self.measures[0], log_history=read_json(history) if history.is_file() else None
        )

    def finish(
        self,
        trainer: BaseTrainer,
        model: RetrievalModel,
        rows: RowSet,
        *,
        system: str,
        summary: str,
        settings: Mapping[str, Any],
        base_models: Sequence[str],
        teachers: Sequence[Mapping[str, Any]] = (),
        reading: str = "",
    ) -> None:
        """Writes plots, manifest and card of a training run, and prints the table.

        Args:
            trainer: Has trained.
            model: What came of it, whole.
            rows: On what.
            system: Its name in the table.
            summary: One sentence for the card.
            settings: The run's.
            base_models: What it started from.
            teachers: What they say of themselves.
            reading: A sentence on how to read the table.
        """
        self.show()
        if not is_main_process():
            return
        from ..evaluation import markdown_table
        from ..hub.cards import bibtex, write_model_card
        from ..hub.manifest import write_manifest

        collection = self.data.collection
        measured = self.results.get(system, {})
        write_model_card(
            self.folder,
            title=self.folder.name,
            summary=summary,
            kind=getattr(model, "representation", "dense"),
            results=f"On `{self.dataset}`:\n\n{markdown_table(self.results, self.measures)}"
            if measured
            else "Nothing.",
            reading=reading,
            training=self._training(trainer, rows, teachers),
            template=trainer._card,
            base_models=base_models,
            teachers=[str(teacher["model"]) for teacher in teachers if teacher.get("model")],
            datasets=[collection.source],
            tags=trainer._tags,
            measured={name: measured[name] for name in self.measures if name in measured},
            collection=collection.name,
            split=self.data.test,
            citation=bibtex(trainer._paper),
            dataset_revision=collection.revision,
            model_id=trainer.hub_model_id,
        )
        write_manifest(
            self.folder,
            settings=settings,
            data={
                **self.data.facts(),
                "rows": {"number": len(rows), "fingerprint": rows.fingerprint, "provenance": rows.metadata},
            },
            models={
                "start": list(base_models),
                "student": {"weights": model.weights_fingerprint(), **model_figures(model)},
                "teachers": list(teachers),
            },
            training=_steps(trainer),
            metrics={self.dataset: self.results} if self.results else {},
        )

    def _training(self, trainer: BaseTrainer, rows: RowSet, teachers: Sequence[Mapping[str, Any]]) -> str:
        """What the card says of the training, as a list."""
        terms = ", ".join(
            f"{label} (weight {term.weight:g}, {term.candidates.replace('_', '-')} candidates)"
            for label, term in trainer.terms.items()
        )
        batch = trainer.args.per_device_train_batch_size * trainer.args.world_size
        return "\n".join(
            [
                f"- {len(rows):,} rows of *{self.data.collection.name}*, split `{self.data.train}`",
                *(f"- Teacher: {teacher.get('model') or teacher.get('column') or teacher}" for teacher in teachers),
                f"- Losses: {terms}",
                f"- {trainer.state.global_step:,} steps of {batch} queries with {1 + trainer.args.num_negatives} "
                f"passages each, learning rate {trainer.args.learning_rate:g}, seed {trainer.args.seed}",
                "- Everything else, versions and hardware included: `run_manifest.json`",
            ]
        )


def _steps(trainer: BaseTrainer) -> dict[str, Any]:
    """What the manifest says of the training."""
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "losses": {label: term.__dict__ for label, term in trainer.terms.items()},
    }


def model_figures(model: RetrievalModel) -> dict[str, int]:
    """Layers and parameters of a model as it is served."""
    from ..models.backbones import block_list

    served = list(model.towers.values())
    return {
        "layers": len(block_list(served[0])[1]),
        "parameters": sum(parameter.numel() for tower in served for parameter in tower.parameters()),
    }
