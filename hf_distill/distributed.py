"""The only place that knows how many processes train together.

Processes, launching and gradient averaging are accelerate's. What is left to us is one gather: every process sees all
rows, and the gradient of a row flows back in the process that computed it.
"""

from __future__ import annotations

import torch


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Stacks the rows of all processes in the order of their ranks.

    Every process must bring a tensor of the same shape `[n, ...]`; the result is `[world_size * n, ...]`. The gradient
    of the result flows to the local rows only, so a loss that every process computes alike has to be multiplied by the
    world size before the processes' gradients are averaged: see [`scale_gradient`].
    """
    if world_size() == 1:
        return tensor
    from accelerate.utils import gather

    parts = list(gather(tensor.detach().contiguous()).chunk(world_size()))
    parts[rank()] = tensor
    return torch.cat(parts)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    from accelerate.utils import reduce

    return reduce(tensor.detach().clone(), reduction="sum")


def scale_gradient(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """A scalar with the value of `loss` and `factor` times its gradient."""
    if factor == 1:
        return loss
    return loss.detach() + factor * (loss - loss.detach())


def leave() -> None:
    """Waits for the other processes and leaves the process group, at the end of a program.

    A process that exits while another one still talks to it can be aborted by the communication library.
    """
    if not torch.distributed.is_initialized():
        return
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
