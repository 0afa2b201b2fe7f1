"""The only place that knows how many processes train together.

Processes, launching and gradient averaging are accelerate's. What is left to us is one gather (every process sees all
rows, and the gradient of a row flows back in the process that computed it), weights that an engine has divided put
together again, and a look at whether the processes that were launched are what was asked for.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .console import launched_processes
from .errors import InputError


# How other launchers than torchrun tell a process how many there are.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def wait_for_everyone() -> None:
    """Waits until all processes are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


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


def max_over_processes(value: int, device: torch.device) -> int:
    """The largest of the numbers that the processes bring."""
    if world_size() == 1:
        return value
    from accelerate.utils import gather

    return int(gather(torch.tensor([value], device=device)).max())


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


def join() -> None:
    """Joins the processes that a launcher started: on their GPUs, or on CPUs where there is no GPU.

    Raises:
        InputError: As `check_launcher` does.
    """
    from accelerate import PartialState

    check_launcher()
    if launched_processes() > 1:
        PartialState(cpu=not torch.accelerator.is_available())


def check_launcher() -> None:
    """Raises [`InputError`] in the single process that accelerate starts where several were asked for.

    Without a GPU, or with `--cpu`, `accelerate launch --num_processes 2` starts one process and does not say so. It
    then sets the address of a main process, and no rank.
    """
    started = {"WORLD_SIZE", *_MPI_SIZES} & set(os.environ)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not started:
        raise InputError(
            "accelerate was asked for several processes and started this one only",
            where="launch",
            cure="Type hf-distill --launch cpu:2 VERB ..., or accelerate launch --multi_gpu --num_processes 2 ... "
            "--use_cpu true; if one process is meant, --num_processes 1 without MASTER_ADDR in the environment",
        )


def check_launch(args: Any) -> None:
    """Looks whether the processes that were launched will train together, and in the way that was asked for.

    Args:
        args: The [`~transformers.TrainingArguments`].

    Raises:
        InputError: If a process would silently train alone, or with another engine, or if nothing could be exported.
    """
    check_launcher()
    launched = launched_processes()
    if launched > 1 and args.world_size == 1:
        # Without a GPU and without this flag every process would train a model of its own, and nobody would say.
        raise InputError(
            f"{launched} processes were launched, but each would train alone: there is no GPU to train on",
            where="launch",
            cure="Add --use_cpu true (use_cpu=True in Python) to train on CPUs together, or type "
            f"hf-distill --launch cpu:{launched} VERB ...",
        )
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs; it would split every batch over copies of the model",
            where="launch",
            cure="Type hf-distill --launch multi_gpu VERB ... (or gpu, to use one of them)",
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        _check_fsdp(args)
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args.deepspeed_plugin)


def _check_deepspeed(plugin: Any) -> None:
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise InputError(
            "with ACCELERATE_USE_CPU (use_cpu in a configuration) accelerate would leave out DeepSpeed and not say so",
            where="launch",
            cure=f"Type hf-distill --launch zero{plugin.zero_stage}:{max(launched_processes(), 2)} VERB ...",
        )
    if plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise InputError(
            "ZeRO-3 would leave the weights in pieces, and no model could be saved",
            where="launch",
            cure="Set stage3_gather_16bit_weights_on_model_save (zero3_save_16bit_model in a configuration of "
            "accelerate) to true, or type hf-distill --launch zero3 VERB ...",
        )
    if not torch.distributed.is_initialized():
        raise InputError(
            "DeepSpeed needs a launcher, also for one process",
            where="launch",
            cure=f"Type hf-distill --launch zero{plugin.zero_stage}:1 VERB ..., or torchrun --nproc_per_node 1 ...",
        )


def _check_fsdp(args: Any) -> None:
    if args.device.type == "cpu":
        raise InputError(
            "FSDP divides weights over GPUs; on CPUs accelerate would train with plain DDP and not say so",
            where="launch",
            cure=f"Type hf-distill --launch cpu:{max(launched_processes(), 2)} VERB ... (or zero3:2, which can)",
        )
    given: Mapping[str, Any] = args.fsdp_plugin_args or {}
    kind = str(given.get("state_dict_type", os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")))
    if "FULL" not in kind.upper():
        raise InputError(
            f"FSDP's {kind} leaves the weights in pieces, and no model could be saved",
            where="launch",
            cure="Set fsdp_state_dict_type: FULL_STATE_DICT, or type hf-distill --launch fsdp2 VERB ...",
        )


def engine_of(args: Any) -> str | None:
    """What shards a training, `"zero2"`, `"zero3"` or `"fsdp"`; None for one process and for DDP.

    Checkpoints of different engines cannot be resumed from one another.
    """
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "fsdp" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else None


def check_engine(folder: str | os.PathLike, args: Any) -> None:
    """Raises [`InputError`] if a training cannot go on from a checkpoint because another engine wrote it."""
    folder = Path(folder)
    wrote = None
    if any(folder.glob("global_step*")):
        wrote = "zero3" if any(folder.glob("global_step*/zero_pp_rank_*model_states.pt")) else "zero2"
    elif any(folder.glob("pytorch_model_fsdp*")):
        wrote = "fsdp"
    now = engine_of(args)
    alike = wrote == now or {wrote, now} <= {"zero0", "zero1", "zero2"}
    if not alike and folder.is_dir():
        raise InputError(
            f"the checkpoint was written under {wrote or 'DDP or one process'}, this training runs under "
            f"{now or 'DDP or in one process'}, which cannot read the optimizer's state",
            where=str(folder),
            cure="Launch it as before, or begin a new run with this folder as the model",
        )


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process holds only parts of the parameters (ZeRO-3, FSDP2)."""
    return any(hasattr(one, "ds_id") or hasattr(one, "full_tensor") for one in model.parameters())


def all_finite(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether all parameters are numbers, also where they are divided over processes.

    All processes must come here together.

    Args:
        model: The model.
        device: Where this process talks to the others; an engine may keep the parameters elsewhere.
    """
    parts = (getattr(one, "ds_tensor", one).detach() for one in model.parameters())
    local = (one.to_local() if hasattr(one, "to_local") else one for one in parts)
    broken = sum((~torch.isfinite(one)).any().long() for one in local)
    return not sum_over_processes(broken.to(device)).item()


def skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model without its weights, which stand on the device `meta` until they are assigned."""
    weights = {
        id(one): torch.nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad)
        for one in model.parameters()
    }
    return copy.deepcopy(model, weights)


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model whose parameters are divided over processes, whole in every process.

    All processes must come here together.
    """
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(tensor, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([tensor]):
                state[name] = tensor.detach().clone()
        else:
            state[name] = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return state


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
