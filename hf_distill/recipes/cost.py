"""About how much work a recipe is: floating point operations of every stage, and what they take on this machine.

The figures follow from sizes alone (passages, tokens, layers, steps), before any model of the recipe exists: right
within a factor of two or so, which is what one wants to know before starting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from .loading import Recipe, Stage
from .records import Workspace


_SAMPLE = 500
_CHARACTERS_A_TOKEN = 4.3
_MEASURED_SECONDS = 0.3
# Of the fastest matrix product, what a whole model reaches.
_EFFICIENCY = 0.4
# Forward, and twice as much backward.
_TRAINING = 3
_DEFAULTS = {"per_device_train_batch_size": 32, "num_negatives": 7, "num_train_epochs": 1}
_MINED = {"mine_negatives": 30, "mine_depth": 200}
_RANKER_DEPTH = 100
_TRAININGS = ("train", "distill", "pretrain")
# Tokens that a pre-training predicts, and layers of its decoder.
_PREDICTED, _PREDICTED_AGAIN, _DECODER_LAYERS = 0.3, 0.5, 2


@dataclass(frozen=True)
class Sizes:
    """What is known of a collection: its passages, training and test queries, and tokens of a passage."""

    passages: int
    queries: int
    tests: int
    tokens: float


@dataclass(frozen=True)
class Model:
    """Operations of a forward per token, whether it reads pairs, its longest text if that is known, and of a token's
    forward what a layer and what the logits of the vocabulary take."""

    flops: float
    pairs: bool = False
    length: int | None = None
    layer: float = 0.0
    head: float = 0.0

    @classmethod
    def of_config(cls, config: Mapping[str, Any], layers: int | None) -> Model:
        width = config.get("hidden_size") or config.get("dim") or config.get("n_embd") or 768
        inner = config.get("intermediate_size") or config.get("hidden_dim") or 4 * width
        depth = layers or config.get("num_hidden_layers") or config.get("n_layers") or config.get("n_layer") or 12
        layer = 2.0 * (4 * width * width + 2 * width * inner)
        return cls(depth * layer, layer=layer, head=2.0 * width * config.get("vocab_size", 0))


class Cost:
    """Estimates stages; what cannot be known is None.

    Args:
        recipe: The recipe.
        workspace: Its folder, where results may lie already.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace):
        self.recipe, self.workspace = recipe, workspace
        self._sizes: dict[str, Sizes | None] = {}

    def flops(self, name: str) -> float | None:
        """Operations of a stage."""
        stage = self.recipe.stages[name]
        sizes = self._collection(stage.settings.get("data"))
        work = getattr(self, f"_{stage.kind.verb}", None)
        if work is None:
            return 0.0
        try:
            return None if sizes is None else work(stage, sizes)
        except (InputError, OSError, ValueError, KeyError, TypeError):
            return None

    # ---- stages ----
    def _mine(self, stage: Stage, sizes: Sizes) -> float:
        model = stage.settings.get("model")
        if model in (None, "bm25"):
            return 0.0
        return self._measuring(model, stage, sizes)

    def _score(self, stage: Stage, sizes: Sizes) -> float:
        if not self._model(stage.settings["model"]).pairs:
            return self._measuring(stage.settings["model"], stage, sizes)
        return self._pairs(stage, sizes, stage.settings["rows"]) * self._pair_flops(stage.settings["model"], sizes)

    def _train(self, stage: Stage, sizes: Sizes) -> float:
        kind, length = stage.settings.get("kind"), stage.settings.get("passage_length")
        model = self._model(stage.settings["model"], stage.settings.get("layers"), kind, length)
        readings = 1 if stage.stages_in(stage.settings["model"]) else 2
        return self._training(stage, sizes, model) + readings * self._reading(model, stage, sizes)

    def _pretrain(self, stage: Stage, sizes: Sizes) -> float:
        settings = stage.settings
        model = self._model(settings["model"], kind="dense", length=settings.get("passage_length"))
        layers = settings.get("decoder_layers", _DECODER_LAYERS)
        token = _TRAINING * (model.flops + _PREDICTED * model.head)
        if layers:
            # For the bottleneck, logits of every token are looked at once; the backward pass needs few of them.
            token += model.head + _TRAINING * (layers * model.layer + _PREDICTED_AGAIN * model.head)
        return self._rows_read(stage, sizes.passages) * self._tokens(model, sizes) * token

    def _distill(self, stage: Stage, sizes: Sizes) -> float:
        student = self._model(stage.settings["student"])
        flops = self._training(stage, sizes, student) * (2 if stage.settings.get("baseline", True) else 1)
        flops += self._measuring(stage.settings["student"], stage, sizes) + self._reading(student, stage, sizes)
        teachers = stage.settings["teacher"]
        for teacher in teachers if isinstance(teachers, list) else [teachers]:
            if teacher.startswith("column:"):
                continue
            model = self._model(teacher)
            flops += self._measuring(teacher, stage, sizes)
            if stage.settings.get("teacher_mode") in ("live", "joint"):
                passes = _TRAINING if stage.settings["teacher_mode"] == "joint" else 1
                flops += passes * self._texts(stage) * self._tokens(model, sizes) * model.flops
            elif model.pairs:
                flops += self._pairs(stage, sizes, stage.settings.get("rows")) * self._pair_flops(teacher, sizes)
        return flops

    def _evaluate(self, stage: Stage, sizes: Sizes) -> float:
        models = stage.settings["model"]
        return sum(
            self._measuring(model, stage, sizes)
            for model in (models if isinstance(models, list) else [models])
            if model != "bm25" and not model.endswith(".trec")
        )

    # ---- parts of stages ----
    def _measuring(self, origin: str, stage: Stage, sizes: Sizes) -> float:
        """Reading the corpus, or the candidates of the test queries; a stage's result was read at that stage's end,
        and the cache has it."""
        if stage.stages_in(origin):
            return 0.0
        return self._reading(self._model(origin), stage, sizes)

    def _reading(self, model: Model, stage: Stage, sizes: Sizes) -> float:
        depth = stage.settings.get("eval_depth") or stage.settings.get("depth") or _RANKER_DEPTH
        texts = sizes.tests * depth if model.pairs else sizes.passages
        return texts * self._tokens(model, sizes) * model.flops

    @staticmethod
    def _tokens(model: Model, sizes: Sizes) -> float:
        return min(sizes.tokens + 12 * model.pairs, model.length or 256)

    def _texts(self, stage: Stage) -> float:
        """Passages read in a training."""
        rows = self._rows_read(stage, self._collection(stage.settings.get("data")).queries)
        return rows * (1 + stage.settings.get("num_negatives", _DEFAULTS["num_negatives"]))

    @staticmethod
    def _rows_read(stage: Stage, rows: int) -> float:
        """How many rows all steps of a training take, of so many that there are."""
        value = {**_DEFAULTS, **stage.settings}
        steps = value.get("max_steps") or 0
        batch = value["per_device_train_batch_size"] * value.get("gradient_accumulation_steps", 1)
        if steps <= 0:
            steps = max(1, rows // batch) * float(value["num_train_epochs"])
        return steps * batch

    def _training(self, stage: Stage, sizes: Sizes, model: Model) -> float:
        return _TRAINING * self._texts(stage) * self._tokens(model, sizes) * model.flops

    def _pairs(self, stage: Stage, sizes: Sizes, rows: Any) -> float:
        """Pairs of a row set that is there, or will be."""
        settings: Mapping[str, Any] = {"rows": rows}
        while isinstance(settings.get("rows"), str) and stage.stages_in(settings["rows"]):
            settings = self.recipe.stages[stage.stages_in(settings["rows"])[0]].settings
        queries = min(sizes.queries, settings.get("max_queries") or sizes.queries)
        negatives = min(settings.get(name, default) for name, default in _MINED.items())
        return queries * (1 + negatives)

    def _pair_flops(self, model: Any, sizes: Sizes) -> float:
        ranker = self._model(model)
        return self._tokens(ranker, sizes) * ranker.flops

    # ---- what stages stand on ----
    def _model(self, origin: str, layers: Any = None, kind: str | None = None, length: int | None = None) -> Model:
        """The model that a field names, followed through the stages that make it; the last one says its kind."""
        layers = None if layers is None else _number_of_layers(str(layers))
        for name, stage in self.recipe.stages.items():
            if origin == f"${{{name}}}":
                settings = stage.settings
                kind = kind or settings.get("kind") or ("lexical" if stage.kind.verb == "pretrain" else None)
                below = settings.get("model") or settings["student"]
                length = length or settings.get("passage_length")
                return self._model(below, layers or settings.get("layers"), kind, length)
        from ..models.source import find_model

        source = find_model(origin)
        config, kind = read_json(source.folder / "config.json"), kind or source.kind
        if kind is None and "SequenceClassification" in str(config.get("architectures")):
            kind = "cross_encoder"
        model = Model.of_config(config, layers)
        flops = model.flops + model.head * (kind == "lexical")
        return replace(model, flops=flops, pairs=kind == "cross_encoder", length=length)

    def _collection(self, data: Any) -> Sizes | None:
        if data not in self._sizes:
            self._sizes[data] = self._measured_collection(data)
        return self._sizes[data]

    def _measured_collection(self, data: Any) -> Sizes | None:
        for name, stage in self.recipe.stages.items():
            if data == f"${{{name}}}":
                made = self.workspace.result(name)
                inputs = stage.settings.get("input") or [None]
                data = str(made) if made.is_dir() else inputs[0] if isinstance(inputs, list) else inputs
        if data is None:
            return None
        from ..data import load_collection

        try:
            collection = load_collection(data)
        except InputError:
            if Path(data).exists():
                raise
            return None
        import numpy as np

        places = np.linspace(0, len(collection.corpus) - 1, min(_SAMPLE, len(collection.corpus))).astype(int)
        characters = np.mean([len(text) for text in collection.corpus.texts(places)])
        counts = {name: len(qrels.query_positions()) for name, qrels in collection.qrels.items()}
        train = counts.get("train", len(collection.queries))
        tests = counts.get("test", counts.get("dev", 0))
        return Sizes(len(collection.corpus), train, tests, characters / _CHARACTERS_A_TOKEN + 2)


def _number_of_layers(text: str) -> int:
    """Of `"3"`, `"3:even"` or `"1,5,6"`."""
    first = text.removeprefix("layers:").partition(":")[0]
    return len(first.split(",")) if "," in first else int(first)


def machine_speed(bf16: bool) -> float:
    """Operations a second that a model reaches here, from a short measurement of matrix products.

    Args:
        bf16: In bfloat16 (on a GPU always), not float32.
    """
    import torch

    from ..models.products import product

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = bf16 or device == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    # One core by itself: beside other programs, several would wait for each other.
    threads = torch.get_num_threads()
    cores, size = (threads, 512) if device == "cpu" else (1, 4096)
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        best, begin = float("inf"), time.perf_counter()
        while time.perf_counter() - begin < _MEASURED_SECONDS:
            start = time.perf_counter()
            left @ right if half else product(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return _EFFICIENCY * cores * 2 * size**3 / best


def _in_bf16(stage: Stage) -> bool:
    """Whether a stage multiplies in bfloat16: a training says so, all else takes what is fast."""
    import torch

    from ..retrieval import choose_dtype

    if stage.kind.verb in _TRAININGS:
        return bool(stage.settings.get("bf16"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_dtype(stage.settings.get("dtype"), device) == "bfloat16"


def estimate(
    recipe: Recipe, names: Sequence[str], workspace: Workspace
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Operations of every stage, None where they cannot be known, and how many of them this machine does a second in
    the precision of the stage."""
    cost = Cost(recipe, workspace)
    bf16 = {name: _in_bf16(recipe.stages[name]) for name in names}
    speeds = {precision: machine_speed(precision) for precision in set(bf16.values())}
    return {name: cost.flops(name) for name in names}, {name: speeds[bf16[name]] for name in names}
