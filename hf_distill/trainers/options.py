"""What can be set about training, apart from [`~transformers.TrainingArguments`]. Imports nothing heavy: it is also
what `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import option


@dataclass
class CommonOptions:
    """Options of every trainer."""

    _argument_group_name = "training"

    dropout: float | None = option(None, "Dropout of the trained model. Default: the checkpoint's own.")
    freeze_embeddings: bool = option(
        False,
        "Do not train the word embeddings, which are most of a small model's weights.",
    )
    stop_after: int | None = option(None, "Stop after this many steps; the learning rates are those of the whole run.")


@dataclass
class RetrievalOptions(CommonOptions):
    """Options of the trainers on rows of queries and passages.

    > Parameters that control the candidates of a query

    > Parameters that control the loss

    > Parameters that control evaluation during training
    """

    _argument_group_name = "training on rows of queries and candidate passages"

    num_negatives: int = option(7, "Negatives of each query in a batch, drawn from the row's pool.")
    negative_sampling: str = option(
        "random",
        "How negatives are drawn from the pool: random, hardest (the first), or window (in turn, shuffled once).",
        choices=["random", "hardest", "window"],
    )
    positive_sampling: str = option(
        "first", "Which positive of a row is used in an epoch.", choices=["first", "random", "rotate"]
    )
    negative_sources: str | None = option(
        None,
        'Weights of the pool\'s sources as JSON, for example \'{"bm25": 1, "dense": 2}\'; sources that are not named '
        "are not drawn from. Default: every document alike.",
    )
    shuffle_buffer: int = option(
        10_000, "Streamed rows that are shuffled together. 0: rows in the order of their files."
    )
    losses: str | None = option(
        None,
        "The loss terms as JSON or YAML: names or mappings with name, weight, candidates (own, in_batch, global), "
        "teacher, calibration, mask_false_negatives and the loss's own options. Default: contrastive, or kl with a "
        "teacher; for lexical models also flops.",
    )
    deduplicate: bool = option(
        True, "Encode a text that is in a batch several times only once. Dropout then is the same for all copies."
    )
    passage_chunks: int | None = option(
        None, "Length-sorted chunks a batch's passages are encoded in. Default: 4 on a CPU, 1 on a GPU."
    )
    gradient_cache_size: int | None = option(
        None,
        "Encode at most this many texts at a time and recompute their activations in the backward pass: "
        "any batch size in constant memory, with the same loss and gradients.",
    )
    eval_measures: str = option("nDCG@10,RR@10,R@100", "Measures of the evaluation during training.")
    eval_depth: int = option(100, "Passages retrieved (or re-ranked) for a query in an evaluation.")
    eval_corpus_size: int | None = option(
        None, "Evaluate during training on this many passages: all relevant ones and a seeded sample. Default: all."
    )
    eval_queries: int | None = option(
        None, "Evaluate during training on this many queries, a seeded sample. Default: all."
    )
    track_forgetting: bool = option(
        False, "Log the share of queries that each evaluation ranks better or worse than the last, and keep all ranks."
    )


@dataclass
class DistillOptions(RetrievalOptions):
    """Options of [`DistillTrainer`]; see [`RetrievalOptions`] for the rest."""

    method: str | None = option(
        None,
        "A usual set of losses, where losses names none: response (KL to the teacher), none (contrastive alone), "
        "labelled_response, embedding, attention, lead, lead_uniform. Default: response; lead in joint training.",
        choices=["response", "none", "labelled_response", "embedding", "attention", "lead", "lead_uniform"],
    )
    layer_pairing: str = option(
        "random",
        "Which layers a layer_alignment term compares: random (ordered pairs, drawn anew now and then), last, skip, "
        "even, or pairs student:teacher such as 2:4,6:12, numbered from 1.",
    )
    layer_calibration: str = option(
        "none",
        "What a method does to layers' scores on both sides first: none is LEAD's own, z_norm tames raw MaxSim.",
        choices=["none", "z_norm", "min_max", "rank"],
    )
    num_layer_pairs: int | None = option(None, "Pairs of layers at a time. Default: 5, or all of a smaller model.")
    layer_resample_every: int = option(10, "Optimiser steps between two draws of random pairs.")
    teacher_learning_rate: float | None = option(
        None, "Learning rate of a teacher that is trained along. Default: the student's."
    )
    teacher_warmup_steps: float | None = option(
        None, "Its linear warm-up: a number of steps, or below 1 a share of all steps. Default: the student's."
    )
    teacher_lr_scheduler_type: str | None = option(
        None,
        "Its schedule, for example linear. Default: the student's, with the same lr_scheduler_kwargs.",
    )
    calibration_rows: int = option(
        1024, "Rows whose teacher scores are looked at before training: for warnings and for fitted temperatures."
    )


@dataclass
class TeleOptions(RetrievalOptions):
    """Options of [`TeleTrainer`]; see [`RetrievalOptions`] for the rest."""

    episodes: int = option(3, "Episodes of mining and training.")
    episode_negatives: str | None = option(
        None, "Negatives of a query in a batch, by episode: '15,31,31'. Default: num_negatives in all."
    )
    negative_sampling: str = option(
        "window", "How negatives are drawn from the pool.", choices=["random", "hardest", "window"]
    )
    positive_sampling: str = option(
        "rotate", "Which positive of a row is used in an epoch.", choices=["first", "random", "rotate"]
    )


@dataclass
class LexMAEOptions(CommonOptions):
    """Options of [`LexMAEPretrainer`]."""

    _argument_group_name = "masking"

    encoder_rate: float = option(0.3, "Share of a text's tokens that the encoder has to predict, exactly.")
    decoder_rate: float = option(0.5, "Share that the decoder has to predict, on average.")
    decoder_masking: str = option(
        "inclusive",
        "Whether the decoder's tokens include the encoder's, exclude them, or are drawn apart from them.",
        choices=["inclusive", "random", "exclusive"],
    )
