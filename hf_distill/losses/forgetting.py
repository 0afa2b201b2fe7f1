"""Learning without forgetting: the student stays near what it was when the stage began."""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError
from .kl import kl_loss
from .logit_mse import logit_mse_loss
from .numerics import full_precision


@full_precision
def lwf_loss(
    student_scores: Tensor,
    anchor_scores: Tensor,
    temperature: float = 4.0,
    scale_by_temperature: bool = True,
    distance: str = "kl",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Distance to the anchor: a frozen copy of the student, taken before the first step of the stage.

    Li and Hoiem, "Learning without Forgetting" (2016), on rankings as in PROD (Lin et al., 2023):

    $$L = \frac{T^2}{|Q|} \sum_i \mathrm{KL}\big(\mathrm{softmax}(o_i / T) \,\|\, \mathrm{softmax}(s_i / T)\big)$$

    where o are the anchor's scores of the same candidates. With `distance="logit_mse"` (PROD's companion of logit
    distillation) it is half the mean square of the difference of the scores.

    Args:
        student_scores: Float[Q, C].
        anchor_scores: Float[Q, C], without gradient.
        temperature: T; not used by `"logit_mse"`.
        scale_by_temperature: Multiply by T²; not used by `"logit_mse"`.
        distance: `"kl"` or `"logit_mse"`.
        mask: Bool[Q, C], True keeps a candidate.

    Returns:
        A scalar.

    Raises:
        InputError: For another distance.
    """
    if distance == "kl":
        return kl_loss(student_scores, anchor_scores.detach(), temperature, scale_by_temperature, mask=mask)
    if distance == "logit_mse":
        return logit_mse_loss(student_scores, anchor_scores.detach(), mask=mask)
    raise InputError(f"unknown distance {distance!r}", where="loss 'lwf'", cure="Choose kl or logit_mse")
