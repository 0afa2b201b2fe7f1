"""What the verbs can be told. Imports nothing heavy: these classes are what `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field


def _option(default, help_text: str, **metadata):
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class CollectionOptions:
    """Which collection."""

    _argument_group_name = "data"

    data: str | None = _option(
        None, "The collection: a folder or Hub id in this project's layout, or in that of BEIR or MTEB."
    )
    data_revision: str | None = _option(None, "Branch, tag or commit of a collection on the Hub.")
    cache_dir: str | None = _option(
        None, "Where embeddings, scores and indexes are kept. Default: $HF_DISTILL_CACHE or ~/.cache/hf_distill."
    )


@dataclass
class DataOptions(CollectionOptions):
    """Which collection, and which parts of it."""

    train_split: str = _option("train", "Judgements to train on.")
    eval_split: str | None = _option(
        None, "Judgements for evaluation during training. Default: dev where there is one."
    )
    test_split: str | None = _option(None, "Judgements for the final table. Default: test where there is one.")


@dataclass
class PoolOptions:
    """How candidates become training rows."""

    _argument_group_name = "training rows"

    mine_depth: int = _option(200, "Passages retrieved for each query.")
    mine_negatives: int = _option(30, "Negatives kept for each query.")
    mine_window: str | None = _option(
        None, "First and last rank that negatives are taken from, '10,100' say. Default: all that are retrieved."
    )
    mine_margin: float | None = _option(
        None, "Drop candidates that score above the positive minus this margin (false negatives, probably)."
    )
    mine_relative_margin: float | None = _option(
        None, "Drop candidates that score above the positive times (1 - margin), 0.05 say."
    )
    mine_sampling: str = _option("top", "Take the best of the window or a seeded sample.", choices=["top", "random"])
    max_queries: int | None = _option(None, "Use this many training queries, a seeded sample. Default: all.")


@dataclass
class RowOptions(PoolOptions):
    """The training rows, and how to make them where there are none."""

    rows: str | None = _option(
        None,
        "A row set: a name in the collection, a folder, a file, or a Hub id (id:NAME where it holds several). "
        "Default: mined now, as the options here say.",
    )
    rows_revision: str | None = _option(None, "Branch, tag or commit of a row set on the Hub.")
    streaming: bool = _option(
        False,
        "Read the row set from its parquet or JSON lines files while training, here or on the Hub, without a copy.",
    )
    mine_with: str = _option(
        "auto",
        "Who finds the candidates: auto (a bi-encoder teacher, else bm25), bm25, teacher, student, "
        "or a model id or folder.",
    )


@dataclass
class ModelOptions:
    """How a model reads and compares texts. Default: as its checkpoint says."""

    _argument_group_name = "model"

    pooling: str | None = _option(None, "How token vectors become one vector: cls, mean or last.")
    normalize: bool | None = _option(None, "Scale embeddings to length 1.")
    similarity: str | None = _option(None, "Dot product or cosine: dot, cosine.")
    temperature: float | None = _option(
        None, "Scores are divided by it in training. Default: 0.05 for cosine and unit vectors, else 1."
    )
    query_prompt: str | None = _option(None, "Text put before every query.")
    passage_prompt: str | None = _option(None, "Text put before every passage.")
    query_length: int | None = _option(None, "Longest query, in tokens.")
    passage_length: int | None = _option(None, "Longest passage (for a ranker: pair), in tokens.")
    template: str | None = _option(None, "How title and text become one string. Default: '{title} {text}'.")
    projection_dim: int | None = _option(None, "Size of a projection after pooling. Default: none.")
    tied: bool | None = _option(None, "One tower for queries and passages (true) or two (false).")
    pooled_tokens: str | None = _option(
        None, "Of a lexical model: whose terms count, all tokens', text (no special ones') or inner (not the ends')."
    )
    query_terms: int | None = _option(None, "Of a lexical model: keep this many of a query's heaviest terms.")
    passage_terms: int | None = _option(None, "Of a lexical model: keep this many of a passage's heaviest terms.")
    head: str | None = _option(
        None, "Of a new cross-encoder: full, its architecture's head, or linear, one layer on the first token."
    )
    new_head: str | None = _option(
        None, "Of a lexical model: how to start a masked-LM head that the checkpoint lacks, identity or random."
    )
    query_expansion: int | None = _option(
        None, "Of a multi-vector model: fill queries up to this width with [MASK] tokens. Default: query_length."
    )
    skip_punctuation: bool | None = _option(
        None, "Of a multi-vector model: leave punctuation out of passages. Default: as the checkpoint says."
    )


@dataclass
class TrainOptions:
    """What to train."""

    _argument_group_name = "what to train"

    model: str | None = _option(None, "Hub id or folder to start from.")
    model_revision: str | None = _option(None, "Its branch, tag or commit.")
    kind: str | None = _option(
        None,
        "What is trained. Default: what the checkpoint is.",
        choices=["dense", "lexical", "multi_vector", "cross_encoder"],
    )
    layers: str | None = _option(
        None, "Keep only these layers: N (the first), N:last, N:even, or their numbers from 1. Default: all."
    )


@dataclass
class StudentOptions:
    """Who teaches whom."""

    _argument_group_name = "teacher and student"

    teacher: list[str] | None = _option(
        None, "One teacher or several: Hub ids or folders of bi-encoders or cross-encoders; column:NAME of the rows."
    )
    teacher_revision: str | None = _option(None, "Branch, tag or commit of the (first) teacher.")
    teacher_mode: str = _option(
        "cached",
        "cached: embeddings or scores are computed once; live: the teacher reads every batch; joint: it is trained "
        "along with the student, and saved in teacher/ beside it.",
        choices=["cached", "live", "joint"],
    )
    teacher_dtype: str = _option("auto", "Precision of the teacher.", choices=["auto", "float32", "bfloat16"])
    student: str | None = _option(
        None,
        "layers:N, layers:N:last, layers:N:even or layers:1,5,6 of the first bi-encoder teacher, or any Hub id.",
    )
    student_revision: str | None = _option(None, "Its branch, tag or commit.")
    baseline: bool = _option(
        True, "Also train the student on the same rows and steps without a teacher: only the difference counts."
    )
    plan_only: bool = _option(False, "Print the plan and its estimate, and stop.")


@dataclass
class ProgressiveOptions:
    """The student, and the phases of its training."""

    _argument_group_name = "student and phases"

    student: str | None = _option(None, "A Hub id or folder.")
    student_revision: str | None = _option(None, "Its branch, tag or commit.")
    phases: str | None = _option(
        None,
        "The phases in their order, a list in YAML or JSON: each has a name, a teacher, and whatever it sets "
        "otherwise than the run, any field of distill: rows, mine_with, losses, max_steps, learning_rate ...",
    )


@dataclass
class EncodeOptions:
    """How models are run outside training."""

    _argument_group_name = "encoding and scoring"

    dtype: str = _option(
        "auto", "auto is bfloat16 where the hardware is fast at it.", choices=["auto", "float32", "bfloat16"]
    )
    storage: str = _option("float32", "Precision of stored embeddings.", choices=["float32", "float16"])
    token_budget: int | None = _option(None, "Tokens of a batch. Default: what suits the device.")


@dataclass
class IndexOptions(EncodeOptions):
    """How models are run outside training, and how passages are found."""

    index: str = _option(
        "Flat", "Flat (exact) or any FAISS factory string, search options after a semicolon: 'IVF1024,Flat;nprobe=32'."
    )


@dataclass
class PushToOptions:
    """Whether a row set also goes to the Hub."""

    push_to: str | None = _option(
        None, "Push the rows to this data repository, you/name: with their texts, as sentence-transformers reads them."
    )
    private: bool | None = _option(None, "Whether a new repository is private. Default: as the account is set up.")


@dataclass
class PushOptions:
    """What to push, and where."""

    _argument_group_name = "push"

    folder: str | None = _option(None, "What to push (may stand first, without the flag).")
    repo_id: str | None = _option(None, "The repository: you/name.")
    repo_type: str | None = _option(
        None,
        "Push all files as they are into such a repository. Default: what the folder holds decides.",
        choices=["model", "dataset", "space"],
    )
    private: bool | None = _option(None, "Whether a new repository is private. Default: as the account is set up.")
    revision: str | None = _option(None, "The branch; it is made if there is none. Default: main.")
    message: str | None = _option(None, "Of the commit.")
    overwrite: bool = _option(False, "Replace the files of another run in the repository.")
    data: str | None = _option(
        None, "For rows: the collection that they belong to. Default: what their manifest names, or the folder around."
    )
    data_revision: str | None = _option(None, "Its branch, tag or commit on the Hub.")
    name: str | None = _option(None, "For rows: the name of the full row set. Default: the source of its negatives.")
    num_negatives: int | None = _option(
        None, "For rows: negatives of each row in the config 'train'. Default: what nine tenths of the rows have."
    )
    template: str | None = _option(
        None, "For rows: how title and text of a passage become one string. Default: as the retriever read them."
    )
    cache_dir: str | None = _option(
        None, "Where prepared data is kept. Default: $HF_DISTILL_CACHE or ~/.cache/hf_distill."
    )


@dataclass
class MineOptions(PushToOptions):
    """What to mine with, and where the rows go."""

    _argument_group_name = "mining"

    model: str | None = _option(None, "Who finds the candidates: a Hub id or folder of a bi-encoder, or bm25.")
    model_revision: str | None = _option(None, "Its branch, tag or commit.")
    run: str | None = _option(None, "Take the candidates of this TREC run instead.")
    train_split: str = _option("train", "Judgements whose queries get rows.")
    include_unlabelled: bool = _option(False, "Also make rows for queries without a positive.")
    filter_teacher: str | None = _option(
        None, "A model whose scores the margin refers to instead of the retriever's: false negatives are found by it."
    )
    name: str | None = _option(None, "Name of the row set. Default: the model's.")
    seed: int = _option(42, "Of sampling.")
    output_dir: str | None = _option(
        None, "Folder of the row set. Default: inside the collection, if that is a folder in this project's layout."
    )


@dataclass
class PoolsOfEpisodesOptions:
    """How the pools of episodes are made."""

    _argument_group_name = "pools"

    depth: int = _option(200, "Passages retrieved for each query, and for each positive.")
    pool_depth: int | None = _option(None, "Draw from the first so many without positives. Default: from all.")
    query_negatives: int = _option(30, "Drawn from the neighbours of the query.")
    positive_negatives: int = _option(30, "Drawn from the neighbours of its first positive (lookahead).")
    momentum: bool = _option(True, "Keep the pool of the episode before.")
    keep_queries: str = _option(
        "previous", "Whose queries and positives a pool with momentum has.", choices=["previous", "now"]
    )
    answers: str | None = _option(
        None, 'JSON lines {"query_id": ..., "answers": [...]}: passages with an answer are no negatives.'
    )
    max_queries: int | None = _option(None, "Use this many training queries, a seeded sample. Default: all.")


@dataclass
class EpisodeMiningOptions(PoolsOfEpisodesOptions, PushToOptions):
    """Which episode, with what, and where the pool goes."""

    _argument_group_name = "episode"

    model: str | None = _option(
        None, "The miner: the model of the episode before, in the first one the pretrained model; or bm25."
    )
    model_revision: str | None = _option(None, "Its branch, tag or commit.")
    episode: int = _option(1, "Its number, from 1.")
    previous: str | None = _option(None, "The pool of the episode before, a row set's name or folder, for momentum.")
    train_split: str = _option("train", "Judgements whose queries get rows.")
    seed: int = _option(42, "Of the draws.")
    output_dir: str | None = _option(None, "Folder of the pool.")


@dataclass
class ForgettingOptions:
    """What to compare."""

    _argument_group_name = "episodes"

    rows: list[str] | None = _option(None, "The pools of the episodes in order, as hf-distill episode wrote them.")
    model: str | None = _option(None, "The model that was trained on the last pool.")
    twin: str | None = _option(
        None, "The same model from another seed: what differs between the two is the noise that forgetting has."
    )
    split: str = _option("train", "Judgements of the pools' queries.")
    depth: int = _option(100, "Ranks below count as not found.")
    output_dir: str | None = _option(None, "Folder for metrics.json, ranks of each query, and plots.")


@dataclass
class ScoreOptions(PushToOptions):
    """Whose scores, and of which rows."""

    _argument_group_name = "scoring"

    model: str | None = _option(None, "The teacher: a Hub id or folder of a bi-encoder or cross-encoder.")
    model_revision: str | None = _option(None, "Its branch, tag or commit.")
    run: str | None = _option(None, "Take the scores from this TREC run instead.")
    rows: str | None = _option(None, "The row set: a name in the collection, or a folder.")
    column: str = _option("scores", "Column to write: scores (the primary teacher's) or scores_NAME.")
    layers: str | None = _option(
        None,
        "Also write the scores of these layers, all or numbers from 1 such as 2,4,6, as the column layer_scores_NAME "
        "(layer_scores_teacher of the primary teacher).",
    )
    max_queries: int | None = _option(None, "Score the rows of so many queries, a seeded sample. Default: all.")
    seed: int = _option(42, "Of the sample.")
    length: int | None = _option(
        None, "Longest pair (of a bi-encoder: passage) that the teacher reads. Default: as it was trained."
    )
    plan_only: bool = _option(False, "Say how many pairs there are and how long they take, and stop.")
    output_dir: str | None = _option(None, "Folder for the scored rows. Default: the row set's own.")


@dataclass
class SelectOptions:
    """Which queries are kept."""

    _argument_group_name = "selection"

    rows: str | None = _option(
        None, "The student's results with a teacher's scores: a row set's name in the collection, or a folder."
    )
    rule: str = _option(
        "2 <= student <= 15 and teacher == 1",
        "Condition on the ranks of the first positive in the order of student and teacher (`scores_NAME`: NAME).",
    )
    teacher_column: str | None = _option(
        None, "The only column of scores the rule speaks of, as teacher. Default: scores is teacher, scores_NAME NAME."
    )
    keep_negatives: int = _option(100, "Negatives kept for each query, the student's best first; 0 means all.")
    answers: str | None = _option(
        None, 'JSON lines {"query_id", "answers"}: passages that hold an answer count as positives in the ranks.'
    )
    fewest: int = _option(1, "Fewer queries than this are an error.")
    output_dir: str | None = _option(None, "Folder for the selected rows.")


@dataclass
class EvaluateOptions:
    """What to measure."""

    _argument_group_name = "evaluation"

    model: list[str] | None = _option(
        None, "Hub ids or folders of bi-encoders and cross-encoders, bm25, or TREC runs (*.trec)."
    )
    names: list[str] | None = _option(None, "Their names in the table. Default: made from the ids.")
    split: str = _option("test", "Judgements to use.")
    measures: str = _option("nDCG@10,RR@10,R@100", "nDCG, RR, AP and R at any cut-off.")
    depth: int = _option(100, "Passages retrieved for each query.")
    rerank: str = _option("bm25", "Whose passages a cross-encoder re-ranks: bm25, or a model id or folder.")
    relevance: int = _option(1, "Lowest grade that counts as relevant.")
    output_dir: str | None = _option(None, "Folder for metrics.json, runs, per-query figures and plots.")


@dataclass
class CompareOptions:
    """What to compare, and how."""

    _argument_group_name = "comparison"

    systems: list[str] | None = _option(
        None,
        "TREC runs, output folders, folder:system, or files of per_query/ (may stand first, without the flag). A "
        "folder alone stands for all of its systems, one of several for its student.",
    )
    names: list[str] | None = _option(
        None, "Names in the table; name@1 and name@2 are two seeds of one system. Default: made from the files."
    )
    split: str | None = _option(None, "Judgements to use. Default: those in the files' names, else test.")
    measures: str | None = _option(
        None, "Default: nDCG@10,RR@10,R@100 with --data, else the measures that all systems have."
    )
    baseline: str | None = _option(None, "The system that the others are compared with. Default: the first.")
    all_pairs: bool = _option(False, "Compare every two systems instead.")
    correction: str = _option(
        "holm", "For several comparisons on one measure.", choices=["holm", "bonferroni", "none"]
    )
    alpha: float = _option(0.05, "Chance of a false claim that is accepted.")
    samples: int = _option(100_000, "Random swaps of the randomisation test, which is exact for few queries.")
    seed: int = _option(0, "Of these swaps.")
    changed: int = _option(5, "Queries to show that changed most, for each comparison.")
    relevance: int = _option(1, "Lowest grade that counts as relevant, where runs are measured.")
    output_dir: str | None = _option(None, "Folder for comparison.md and comparison.json.")


@dataclass
class ReproduceOptions:
    """Which run, and what to do about it."""

    _argument_group_name = "reproduction"

    target: str | None = _option(
        None, "An output folder, its run_manifest.json, or a Hub repository, also repo@revision (may stand first)."
    )
    run: bool = _option(False, "Run the command in a fresh folder and compare the results; else it is only printed.")
    output_dir: str | None = _option(None, "That folder. Default: outputs/NAME-again, after the original's name.")
    replace: list[str] | None = _option(
        None, "Where folders are now that have moved, as recorded=present, for example my_data=/data/my_data."
    )
    force: bool = _option(False, "Go on although data or weights differ.")
    reuse_cache: bool = _option(False, "Take cached embeddings and scores, instead of making them anew.")


@dataclass
class SearchOptions:
    """What to look for."""

    _argument_group_name = "search"

    model: str | None = _option(None, "Hub id or folder of a bi-encoder, or bm25.")
    query: str | None = _option(None, "The question. Without it, questions are read line by line.")
    top: int = _option(5, "Passages to show, 1 or more.")
    width: int = _option(300, "Characters of each passage to show.")


@dataclass
class DemoOptions:
    """The size of the demonstration."""

    _argument_group_name = "demonstration"

    output_dir: str = _option("outputs/demo", "Folder for the collection, the student and the figures.")
    num_passages: int = _option(8000, "Functions and classes whose documentation is collected.")
    seed: int = _option(13, "Of the collection and of training.")
    teacher: str = _option("sentence-transformers/all-MiniLM-L6-v2", "The teacher.")
    student: str = _option("layers:1,5,6", "The student: here layers 1, 5 and 6 of the six of the teacher.")


@dataclass
class RecipeOptions:
    """Which recipe, and how much of it."""

    _argument_group_name = "recipe"

    recipe: str | None = _option(
        None, "A YAML file, or the name of a recipe that comes with the package. May stand first, without the flag."
    )
    profile: str | None = _option(None, "One of the recipe's profiles, small say.")
    set: list[str] | None = _option(
        None, "Overrides: variable=value or stage.field=value, the value as YAML; the flag may be repeated."
    )
    from_stage: str | None = _option(None, "Begin with this stage; those before it must be done. Short: --from.")
    until_stage: str | None = _option(None, "End with this stage. Short: --until.")
    dry_run: bool = _option(False, "Check everything, print the plan with its estimate, and stop.")
    output_dir: str | None = _option(None, "Folder of the run. Default: outputs/NAME-PROFILE.")
    push_to: str | None = _option(
        None, "Push every finished stage to this Hub repository, a branch each; what is no model to a dataset."
    )
    pull_from: str | None = _option(None, "Take finished stages from this Hub repository instead of doing them.")


@dataclass
class ConvertOptions:
    """What to convert, and into which folder."""

    _argument_group_name = "conversion"

    input: list[str] | None = _option(
        None,
        "Files, folders or Hub ids. Where a file does not show what it is, say it: corpus=FILE, titles=FILE, "
        "queries=FILE, qrels:dev=FILE, negatives:bm25=FILE, triples=FILE, run=FILE, scores=FILE.",
    )
    output_dir: str | None = _option(None, "A new or empty folder.")
    format: str = _option("auto", "What inputs are that do not say so, tevatron or hard_negatives for example.")
    revision: str | None = _option(None, "Branch, tag or commit of inputs on the Hub.")
    name: str | None = _option(None, "The collection's name. Default: after the input.")
    corpus_columns: str | None = _option(
        None, "The fields of a file of passages without a header: 'document_id,text,title'. Default: by their number."
    )
    unknown_ids: str = _option(
        "error", "Judgements and rows of unknown queries or documents: stop, or leave them out.",
        choices=["error", "drop"],
    )  # fmt: skip
    allow_pickle: bool = _option(
        False, "Read pickles of scores or negatives. Nothing in them is run: all but numbers and strings is refused."
    )
    cache_dir: str | None = _option(
        None, "Where scores and lines that have to be ordered are kept. Default: beside the output, until it is done."
    )


@dataclass
class PretrainOptions:
    """What to pre-train, and on which texts."""

    _argument_group_name = "pre-training"

    model: str | None = _option(None, "Hub id or folder of a masked language model.")
    model_revision: str | None = _option(None, "Its branch, tag or commit.")
    fresh: bool = _option(False, "Start all weights anew; only configuration and tokenizer are read.")
    new_head: str | None = _option(
        None, "How to start a masked-LM head that the checkpoint lacks.", choices=["identity", "random"]
    )
    decoder_layers: int = _option(2, "Layers of the decoder; 0 for plain masked language modelling.")
    bottleneck: str = _option(
        "softmax", "What the decoder is given of a text.", choices=["softmax", "saturated", "cls"]
    )
    passage_length: int | None = _option(None, "Longest text, in tokens. Default: 144, or what the model reads.")
    template: str | None = _option(None, "How title and text become one string. Default: '{title} {text}'.")
    stream: str | None = _option(
        None, "Read texts in order, not a collection: a data set of the Hub, or files (*.jsonl, *.parquet, *.txt)."
    )
    stream_config: str | None = _option(None, "The data set's configuration.")
    stream_split: str = _option("train", "The data set's split.")
    stream_column: str = _option("text", "The column of texts; a column title is read too.")
    stream_buffer: int = _option(10_000, "Streamed texts that are shuffled together.")


@dataclass
class PoolsOptions:
    """Row sets whose negatives are put one after another."""

    _argument_group_name = "row sets"

    rows: list[str] | None = _option(None, "Names or folders of row sets; queries and positives are the first one's.")
    duplicates: bool = _option(
        True, "Keep a negative once for each source that has it, so that it is drawn that much more often."
    )
    name: str | None = _option(None, "Name of the row set. Default: that of its folder.")
    output_dir: str | None = _option(None, "Folder of the row set.")


@dataclass
class ExplainOptions:
    """What a lexical model sees in texts."""

    _argument_group_name = "explanation"

    model: str | None = _option(None, "Hub id or folder of a lexical model.")
    query: str | None = _option(None, "The question.")
    passage: str | None = _option(None, "A passage. Default: the best of the collection (--data).")
    top: int = _option(15, "Terms to show of each.")
    output_dir: str | None = _option(None, "Folder for terms.png and terms.json.")


@dataclass
class ExportOptions:
    """An index for another engine."""

    _argument_group_name = "export"

    model: str | None = _option(None, "Hub id or folder of a lexical model.")
    format: str = _option(
        "anserini",
        "anserini (JSON vectors and topics, also Pyserini) or ciff (PISA, JASS, ...).",
        choices=["anserini", "ciff"],
    )
    scale: int = _option(100, "What weights are multiplied by before they are rounded.")
    output_dir: str | None = _option(None, "Folder of the files.")
