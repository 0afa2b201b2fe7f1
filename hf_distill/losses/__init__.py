"""The maths of every loss, as plain functions of tensors: scores in, a scalar out.

Shared conventions: `Q` queries, `C` candidates; a boolean `mask` is True for candidates that count; everything is
computed in float32 at least, also under autocast; the mean runs over queries unless the paper says otherwise.
"""

from __future__ import annotations

from .calibration import CALIBRATIONS, calibrate, check_teacher_scores, fit_temperature
from .combine import ANCHOR, CANDIDATES, LOSSES, Loss, LossTerm, combine, parse_terms
from .contrastive import contrastive_loss
from .dkd import dkd_loss
from .embedding_mse import embedding_mse_loss
from .false_negatives import known_negatives_mask
from .flops import flops_loss, sparsity_loss
from .forgetting import lwf_loss
from .interaction_maps import interaction_map_loss, interaction_maps
from .kl import kl_loss
from .layer_alignment import layer_alignment_loss
from .listwise import listnet_loss, pairwise_margin_mse_loss
from .logit_mse import logit_mse_loss
from .margin_mse import margin_mse_loss
from .maxsim import maxsim, own_maxsim
from .probability import probability_loss
from .rank_consistency import rank_consistency_loss
from .several_teachers import mean_teacher


__all__ = [
    "ANCHOR",
    "CALIBRATIONS",
    "CANDIDATES",
    "LOSSES",
    "Loss",
    "LossTerm",
    "calibrate",
    "check_teacher_scores",
    "combine",
    "contrastive_loss",
    "dkd_loss",
    "embedding_mse_loss",
    "fit_temperature",
    "flops_loss",
    "interaction_map_loss",
    "interaction_maps",
    "kl_loss",
    "known_negatives_mask",
    "layer_alignment_loss",
    "listnet_loss",
    "logit_mse_loss",
    "lwf_loss",
    "margin_mse_loss",
    "maxsim",
    "own_maxsim",
    "mean_teacher",
    "pairwise_margin_mse_loss",
    "parse_terms",
    "probability_loss",
    "rank_consistency_loss",
    "sparsity_loss",
]
