"""Usual sets of losses by name, so that methods can be compared with one switch."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def method_losses(
    method: str, candidates: str, joint: bool = False, layer_calibration: str = "none"
) -> list[dict[str, Any]]:
    """The loss terms of a method.

    - `response`: KL from the teacher's ranking, nothing else
    - `none`: the contrastive loss alone, no distillation
    - `labelled_response`: contrastive and KL, LEAD's objective without its layers
    - `embedding`: contrastive, and the mean squared distance to the teacher's embeddings
    - `attention`: contrastive, KL, and the token interaction maps of paired layers (VIRT)
    - `lead`: contrastive, KL, and the rankings of paired layers, the teacher's better layers weighing more
    - `lead_uniform`: the same with all pairs alike

    Args:
        method: One of these.
        candidates: Which passages a query is compared with, by every term.
        joint: Whether the teacher is trained along: then it has a contrastive loss too, and follows the student's
            ranking as the student follows its.
        layer_calibration: How layers' scores are scaled on both sides, see [`calibrate`]; none in the original.

    Raises:
        InputError: For an unknown method.
    """
    contrastive: dict[str, Any] = {"name": "contrastive", "candidates": candidates}
    response: dict[str, Any] = {"name": "kl", "candidates": candidates}
    labelled = [contrastive, response]
    if joint:
        labelled = [contrastive, contrastive | {"learner": "teacher"}, response, response | {"learner": "teacher"}]
    layers: dict[str, Any] = {"name": "layer_alignment", "candidates": candidates}
    if layer_calibration != "none":
        layers |= {"calibration": layer_calibration, "calibrate_student": True}
    methods: dict[str, list[dict[str, Any]]] = {
        "response": [response],
        "none": [contrastive],
        "labelled_response": labelled,
        "embedding": [contrastive, {"name": "embedding_mse"}],
        "attention": [
            *labelled,
            {"name": "interaction_maps", "candidates": "own" if candidates == "own" else "in_batch"},
        ],
        "lead": [*labelled, layers],
        "lead_uniform": [*labelled, layers | {"reweight": False}],
    }
    if method not in methods:
        raise InputError(f"unknown method {method!r}", where="method", cure=f"Choose one of {', '.join(methods)}")
    return methods[method]
