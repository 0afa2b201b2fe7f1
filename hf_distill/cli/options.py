"""What several verbs can be told; what one verb alone can be told stands beside it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import option
from ..trainers.options import DistillOptions, LexMAEOptions, RetrievalOptions, TeleOptions


@dataclass
class CollectionOptions:
    """Which collection."""

    _argument_group_name = "data"

    data: str | None = option(
        None,
        "The collection: a folder or Hub id in this project's layout, that of BEIR or MTEB, or any format that "
        "hf-distill convert reads.",
    )
    data_revision: str | None = option(None, "Branch, tag or commit of a collection on the Hub.")
    cache_dir: str | None = option(
        None, "Where embeddings, scores and indexes are kept. Default: $HF_DISTILL_CACHE or ~/.cache/hf_distill."
    )


@dataclass
class DataOptions(CollectionOptions):
    """Which collection, and which parts of it."""

    train_split: str = option("train", "Judgements to train on.")
    eval_split: str | None = option(
        None, "Judgements for evaluation during training. Default: dev where there is one."
    )
    test_split: str | None = option(None, "Judgements for the final table. Default: test where there is one.")


@dataclass
class PoolOptions:
    """How candidates become training rows."""

    _argument_group_name = "training rows"

    mine_depth: int = option(200, "Passages retrieved for each query.")
    mine_negatives: int = option(30, "Negatives kept for each query.")
    mine_window: str | None = option(
        None, "First and last rank that negatives are taken from, for example '10,100'. Default: all ranks."
    )
    mine_margin: float | None = option(
        None, "Drop candidates that score above the positive minus this margin: they may be false negatives."
    )
    mine_relative_margin: float | None = option(
        None, "Drop candidates that score above the positive times (1 - margin), for example 0.05."
    )
    mine_sampling: str = option("top", "Take the best of the window or a seeded sample.", choices=["top", "random"])
    max_queries: int | None = option(None, "Use this many training queries, a seeded sample. Default: all.")


@dataclass
class RowOptions(PoolOptions):
    """The training rows, and how to make them where there are none."""

    rows: str | None = option(
        None,
        "A row set: a name in the collection, a folder, a file, or a Hub id (id:NAME where it holds several). "
        "Default: mined now, with the options of this group.",
    )
    rows_revision: str | None = option(None, "Branch, tag or commit of a row set on the Hub.")
    streaming: bool = option(
        False,
        "Read the row set from its parquet or JSON lines files while training, here or on the Hub, without a copy.",
    )
    mine_with: str = option(
        "auto",
        "What finds the candidates: auto (a bi-encoder teacher, else bm25), bm25, teacher, student, "
        "or a model id or folder.",
    )


@dataclass
class ModelOptions:
    """How a model reads and compares texts. Default: as its checkpoint says."""

    _argument_group_name = "model"

    pooling: str | None = option(None, "How token vectors become one vector: cls, mean or last.")
    normalize: bool | None = option(None, "Scale embeddings to length 1.")
    similarity: str | None = option(None, "Dot product or cosine: dot, cosine.")
    temperature: float | None = option(
        None, "Scores are divided by it in training. Default: 0.05 for cosine and unit vectors, else 1."
    )
    query_prompt: str | None = option(None, "Text put before every query.")
    passage_prompt: str | None = option(None, "Text put before every passage.")
    query_length: int | None = option(None, "Longest query, in tokens.")
    passage_length: int | None = option(None, "Longest passage (for a ranker: pair), in tokens.")
    template: str | None = option(None, "How title and text become one string. Default: '{title} {text}'.")
    projection_dim: int | None = option(None, "Size of a projection after pooling. Default: none.")
    tied: bool | None = option(None, "One tower for queries and passages (true) or two (false).")
    pooled_tokens: str | None = option(
        None, "Lexical models: which tokens count: all, text (no special tokens) or inner (not the first and last)."
    )
    query_terms: int | None = option(None, "Lexical models: keep only this many terms of a query, the largest.")
    passage_terms: int | None = option(None, "Lexical models: keep only this many terms of a passage, the largest.")
    head: str | None = option(
        None, "New cross-encoders: full (the head of the architecture) or linear (one layer on the first token)."
    )
    new_head: str | None = option(
        None, "Lexical models: how to start a masked-LM head that the checkpoint lacks, identity or random."
    )
    query_expansion: int | None = option(
        None, "Multi-vector models: fill queries up to this length with [MASK] tokens. Default: query_length."
    )
    skip_punctuation: bool | None = option(
        None, "Multi-vector models: leave punctuation out of passages. Default: as the checkpoint says."
    )


@dataclass
class TrainOptions:
    """What to train."""

    _argument_group_name = "what to train"

    model: str | None = option(None, "Hub id or folder to start from.")
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    kind: str | None = option(
        None,
        "What is trained. Default: what the checkpoint is.",
        choices=["dense", "lexical", "multi_vector", "cross_encoder"],
    )
    layers: str | None = option(
        None, "Keep only these layers: N (the first), N:last, N:even, or their numbers from 1. Default: all."
    )


@dataclass
class StudentOptions:
    """Who teaches whom."""

    _argument_group_name = "teacher and student"

    teacher: list[str] | None = option(
        None,
        "One teacher or several: Hub ids or folders of bi-encoders or cross-encoders, or column:NAME for scores that "
        "stand in the rows.",
    )
    teacher_revision: str | None = option(None, "Branch, tag or commit of the (first) teacher.")
    teacher_mode: str = option(
        "cached",
        "cached: embeddings or scores are computed once; live: the teacher reads every batch; joint: it is trained "
        "along with the student, and saved in teacher/ beside it.",
        choices=["cached", "live", "joint"],
    )
    teacher_dtype: str = option(
        "auto",
        "Precision of a frozen teacher, cached or live; auto: bfloat16 where the hardware is fast at it.",
        choices=["auto", "float32", "bfloat16"],
    )
    student: str | None = option(
        None,
        "layers:N, layers:N:last, layers:N:even or layers:1,5,6: these layers of the first bi-encoder teacher. Or the "
        "Hub id or folder of any bi-encoder.",
    )
    student_revision: str | None = option(None, "Its branch, tag or commit.")
    baseline: bool = option(
        True, "Also train the student on the same rows and steps without a teacher, to see what the teacher brings."
    )
    plan_only: bool = option(False, "Print the plan and its estimate, and stop.")


@dataclass
class EncodeOptions:
    """How models are run outside training."""

    _argument_group_name = "encoding and scoring"

    dtype: str = option(
        "auto", "auto is bfloat16 where the hardware is fast at it.", choices=["auto", "float32", "bfloat16"]
    )
    storage: str = option("float32", "Precision of stored embeddings.", choices=["float32", "float16"])
    token_budget: int | None = option(None, "Tokens of a batch. Default: what suits the device.")


@dataclass
class IndexOptions(EncodeOptions):
    """How models are run outside training, and how passages are found."""

    index: str = option(
        "Flat",
        "Flat (exact), or any FAISS factory string, search options after a semicolon: 'IVF1024,Flat;nprobe=32'. For a "
        "lexical model Flat, Impact (weights as whole numbers) or Pisa (the same, searched by PISA); for a "
        "multi-vector model FAISS, or PLAID ('Plaid;n_ivf_probe=32'), finds the candidates for MaxSim.",
    )


@dataclass
class PushToOptions:
    """Whether a row set also goes to the Hub."""

    push_to: str | None = option(
        None, "Push the rows to this data repository, you/name: with their texts, as sentence-transformers reads them."
    )
    private: bool | None = option(None, "Whether a new repository is private. Default: as the account is set up.")


@dataclass
class PoolsOfEpisodesOptions:
    """How the pools of episodes are made."""

    _argument_group_name = "pools"

    depth: int = option(200, "Passages retrieved for each query, and for each positive.")
    pool_depth: int | None = option(None, "Draw from the first N results that are no positives. Default: from all.")
    query_negatives: int = option(30, "Drawn from the neighbours of the query.")
    positive_negatives: int = option(30, "Drawn from the neighbours of its first positive (lookahead).")
    momentum: bool = option(True, "Keep the pool of the episode before.")
    keep_queries: str = option(
        "previous", "Whose queries and positives a pool with momentum has.", choices=["previous", "now"]
    )
    answers: str | None = option(
        None, 'JSON lines {"query_id": ..., "answers": [...]}: passages with an answer are no negatives.'
    )
    max_queries: int | None = option(None, "Use this many training queries, a seeded sample. Default: all.")


@dataclass
class EpisodeMiningOptions(PoolsOfEpisodesOptions, PushToOptions):
    """Which episode, with what, and where the pool goes."""

    _argument_group_name = "episode"

    model: str | None = option(
        None, "What mines: the model of the episode before (for the first episode the pretrained model), or bm25."
    )
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    episode: int = option(1, "Number of the episode, from 1.")
    previous: str | None = option(None, "The pool of the episode before, a row set's name or folder, for momentum.")
    train_split: str = option("train", "Judgements whose queries get rows.")
    seed: int = option(42, "Seed of the draws.")
    output_dir: str | None = option(None, "Folder of the pool.")


@dataclass
class PretrainFlags:
    """Fields of `TrainingArguments` that nearly every pre-training sets, with the defaults of the command line."""

    _argument_group_name = "training"

    output_dir: str | None = option(None, "Folder for everything that comes of it.")
    num_train_epochs: float = option(1.0, "Passes over the texts or training rows.")
    save_strategy: str = option("steps", "Save checkpoints: steps, epoch or no.")
    save_steps: float = option(0.25, "How often: steps, or below 1 a share of all.")


@dataclass
class TrainingFlags(PretrainFlags):
    """The same for every other training: evaluate, keep the best."""

    save_strategy: str = option("steps", "Save checkpoints: steps, epoch, best or no.")
    learning_rate: float = option(1e-4, "The peak learning rate.")
    eval_strategy: str = option("steps", "Evaluate during training: steps, epoch, or no (also without a dev split).")
    eval_steps: float | None = option(0.25, "How often: steps, or below 1 a share of all.")
    load_best_model_at_end: bool | None = option(
        None, "End with the best checkpoint on dev. Default: true with evaluation."
    )
    eval_corpus_size: int | None = option(5000, "Passages searched in an evaluation during training; 0 means all.")


# What `--help` shows of the trainers' own options.
@dataclass
class TrainHelp(TrainingFlags, RetrievalOptions):
    """Of `hf-distill train`."""


@dataclass
class DistillHelp(TrainingFlags, DistillOptions):
    """Of `hf-distill distill` and `progressive`."""


@dataclass
class TeleHelp(TrainingFlags, TeleOptions):
    """Of `hf-distill tele`."""


@dataclass
class PretrainHelp(PretrainFlags, LexMAEOptions):
    """Of `hf-distill pretrain`."""
