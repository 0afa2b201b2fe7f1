"""Run by the tests of retrieval, in one process, under a launcher, or to be killed: does one job after another.

python tests/retrieval_run.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from accelerate import PartialState


state = PartialState(cpu=True)

from hf_distill.data import Run, load_collection  # noqa: E402
from hf_distill.distributed import leave  # noqa: E402
from hf_distill.models import CrossEncoderRanker, DenseRetriever  # noqa: E402
from hf_distill.retrieval import bm25_search, encode_table, mine, rerank, score_rows, search  # noqa: E402
from hf_distill.retrieval.inference import InferenceModel  # noqa: E402


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text())
    output = Path(settings["output"])
    assert state.num_processes == settings["processes"], state
    if settings.get("pause"):
        slow_down(settings["pause"])
    collection = load_collection(settings["collection"])
    dense = DenseRetriever.from_pretrained(settings["dense"])
    ranker = CrossEncoderRanker.from_pretrained(settings["ranker"])
    model = InferenceModel(dense, dtype="float32", token_budget=64)
    encode_table(model, collection.corpus, "passage", shard_rows=7)
    (output / f"started-{state.process_index}").touch()
    run = search(model, collection, collection.qrels["train"].query_positions(), 20)
    lexical = bm25_search(collection, None, 20)
    rows = mine(
        model, collection, "train", depth=30, num_negatives=6, sampling="random", margin=0.0,
        filter_teacher=InferenceModel(ranker, dtype="float32", token_budget=256), max_score=5.0,
    )  # fmt: skip
    rows = score_rows(model, rows, column="scores_dense")
    rows = score_rows(ranker, rows, column="scores_ranker", dtype="bfloat16")
    best = rerank(ranker, Run(lexical.query, lexical.documents, lexical.scores), collection, dtype="float32")
    if state.is_main_process:
        rows.save(output / "rows")
        for name, one in (("dense", run), ("bm25", lexical), ("reranked", best)):
            one.save(output / name, collection.queries, collection.corpus, "test")
        (output / "world_size").write_text(str(state.num_processes))
    leave()


def slow_down(seconds: float) -> None:
    """Makes every batch of this process take a while, so that a kill hits the middle of the work."""
    outputs = InferenceModel.outputs

    def slow(self, features, token_types, forward):
        def forward_slowly(chunk):
            time.sleep(seconds)
            return forward(chunk)

        return outputs(self, features, token_types, forward_slowly)

    if outputs.__name__ != "slow":
        InferenceModel.outputs = slow


if __name__ == "__main__":
    main(sys.argv[1])
