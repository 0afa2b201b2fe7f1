"""Imported once by the process that stages are forked from, so that a stage starts in a moment.

Nothing is computed here: a process that has started threads or a GPU must not be forked.
"""

from __future__ import annotations

import contextlib
import importlib


# What nearly every verb imports, heaviest first.
for _name in (
    "torch",
    "transformers.trainer",
    "transformers.hf_argparser",
    "datasets",
    "pandas",
    "hf_distill.cli.main",
    "hf_distill.cli.distillation",
    "hf_distill.cli.training_arguments",
    "hf_distill.models.dense",
    "hf_distill.models.cross_encoder",
    "hf_distill.models.student",
    "hf_distill.retrieval.mining",
    "hf_distill.retrieval.searching",
    "hf_distill.evaluation.plots",
    "hf_distill.hub.cards",
    "hf_distill.trainers.distill",
    "transformers.models.bert.modeling_bert",
):
    # What cannot be imported fails again in the stage that needs it, which can say so.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
