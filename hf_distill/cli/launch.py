"""`hf-distill --launch NAME VERB ...`: `accelerate launch` of the same verb with a configuration shipped along."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError


CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = {
    "cpu": "one process on the CPU",
    "multi_cpu": "several processes on the CPU of this machine; cpu:4 means multi_cpu:4",
    "gpu": "one process on one GPU",
    "multi_gpu": "a process for each GPU of this machine",
    "multi_node": "a process for each GPU of several machines",
    "zero2": "DeepSpeed ZeRO-2: optimizer states and gradients divided over the processes",
    "zero3": "DeepSpeed ZeRO-3: weights divided too",
    "fsdp2": "PyTorch's FSDP2: weights, gradients and optimizer states divided",
}
_PORT = 29500
_OPTIONS = "--num_machines 2 --machine_rank 0 --main_process_ip ADDRESS"


@dataclass
class Launch:
    """What is to be started, read from the command line.

    Args:
        name: A key of `NAMES`, or the path of a configuration of accelerate.
        processes: How many processes were asked for behind the name.
        options: Options of `accelerate launch`.
        verb: What the processes do.
        arguments: The verb's own command line.
    """

    name: str
    processes: int | None = None
    options: list[str] = field(default_factory=list)
    verb: str = ""
    arguments: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """How it was typed."""
        return f"--launch {self.name}" + (f":{self.processes}" if self.processes is not None else "")

    def path(self) -> Path:
        """The configuration file.

        Raises:
            InputError: If there is none of this name.
        """
        if self.name in NAMES:
            return CONFIGS / f"{self.name}.yaml"
        path = Path(self.name)
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            return path
        raise InputError(
            f"there is no launch configuration {self.name!r}",
            where="--launch",
            cure=f"Choose one of {', '.join(NAMES)}, or give the path of a configuration of accelerate",
        )


def table() -> str:
    """The names, each with what it starts and where its configuration lies."""
    lines = "\n".join(f"  {name:<12}{what}\n{'':14}{CONFIGS / name}.yaml" for name, what in NAMES.items())
    return (
        "usage: hf-distill --launch NAME[:PROCESSES] [options of accelerate launch] VERB ...\n\n"
        f"{lines}\n\nNAME may also be the path of a configuration that `accelerate config` wrote.\n"
    )


def read_launch(argv: Sequence[str], shared: Sequence[str], verbs: Sequence[str]) -> Launch:
    """Reads `NAME[:PROCESSES] [options] VERB ...`.

    Args:
        argv: What stands behind `--launch`.
        shared: The verbs whose work several processes share.
        verbs: All verbs.

    Raises:
        InputError: If the name or the verb is missing or wrong.
    """
    if not argv or argv[0].startswith("-") or argv[0] in verbs:
        raise InputError("needs a name", where="--launch", cure=f"Choose one of {', '.join(NAMES)}")
    name, colon, count = argv[0].rpartition(":")
    if not colon or not count.isdigit():
        name, count = argv[0], ""
    if count and int(count) < 1:
        raise InputError("needs at least one process", where=f"--launch {argv[0]}", cure=f"Write --launch {name}:2")
    launch = Launch(name, int(count) if count else None)
    if name == "cpu" and launch.processes not in (None, 1):
        launch.name = "multi_cpu"
    elif name == "multi_cpu" and launch.processes == 1:
        launch.name = "cpu"
    launch.path()
    for position, word in enumerate(argv[1:], start=1):
        if word in verbs:
            launch.options, launch.verb = list(argv[1:position]), word
            launch.arguments = list(argv[position + 1 :])
            check_shared(word, shared)
            return launch
    raise InputError(
        f"there is no verb behind it{f' (found {argv[1]!r})' if len(argv) > 1 else ''}",
        where=launch.words,
        cure=f"Put one of {', '.join(shared)} there",
    )


def check_shared(verb: str, shared: Sequence[str]) -> None:
    """Raises [`InputError`] for a verb that several processes would each do alone."""
    if verb not in shared:
        raise InputError(
            f"hf-distill {verb} runs in one process",
            where="launch",
            cure=f"Type it without a launcher; {', '.join(shared)} share their work",
        )


def prepare(launch: Launch, gpus: int) -> tuple[Any, dict[str, str]]:
    """Turns a launch into arguments of `accelerate launch` and the environment that they need.

    Args:
        launch: What is to be started.
        gpus: Number of GPUs of this machine.

    Raises:
        InputError: If this machine cannot do it, or if what was asked for would silently become something else.
    """
    from accelerate.commands.launch import launch_command_parser

    config = _read_config(launch)
    command = ["--config_file", str(launch.path()), *launch.options, "--module", "hf_distill", launch.verb]
    args = _parse(launch_command_parser(), [*command, *launch.arguments], launch)
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "DeepSpeed is not installed", where=launch.words, cure="Type pip install 'hf_distill[deepspeed]'"
        )
    on_cpu = bool(config.get("use_cpu", False)) or (kind == "DEEPSPEED" and not gpus)
    machines = _count_machines(launch, args, config)
    args.num_processes = _count_processes(launch, args, config, 0 if on_cpu else gpus, machines, on_cpu)
    environment = {"HF_DISTILL_LAUNCH": " ".join([launch.words, *launch.options])}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # What the launcher leaves out where it starts several processes: each would train a model of its own. With
        # the variable accelerate leaves out DeepSpeed, with the flag it does not.
        if kind != "DEEPSPEED":
            environment["ACCELERATE_USE_CPU"] = "true"
        else:
            environment["DS_ACCELERATOR"] = "cpu"
            if importlib.import_module(f"hf_distill.cli.{launch.verb}").VERB.arguments is not None:
                args.training_script_args += ["--use_cpu", "true"]
    return args, environment


def _count_machines(launch: Launch, args: Any, config: Mapping[str, Any]) -> int:
    """The number of machines; they must be able to find each other."""
    machines = args.num_machines or int(config.get("num_machines", 1))
    if machines > 1 and (args.main_process_ip or config.get("main_process_ip")) is None:
        raise InputError(
            f"{machines} machines need to find each other",
            where=launch.words,
            cure=f"On each machine type hf-distill {launch.words} {_OPTIONS} {launch.verb} ..., with its own rank",
        )
    if machines > 1 and not (args.main_process_port or config.get("main_process_port")):
        args.main_process_port = _PORT  # no machine can know a port that another one draws
    return machines


def _count_processes(
    launch: Launch, args: Any, config: Mapping[str, Any], gpus: int, machines: int, on_cpu: bool
) -> int:
    """The number of processes on all machines, as many as asked for; it must be what accelerate will start."""
    kind = str(config.get("distributed_type", "NO"))
    wanted = launch.processes or args.num_processes or config.get("num_processes")
    again = f"Type hf-distill --launch {{}} {launch.verb} ..."
    if args.cpu:
        raise InputError("--cpu starts a single process", where=launch.words, cure=again.format("cpu:2"))
    if not on_cpu and not gpus:
        raise InputError(
            "FSDP divides weights over GPUs, and here is none: accelerate would train with plain DDP and not say so"
            if kind == "FSDP"
            else "there is no GPU here",
            where=launch.words,
            cure=again.format(f"cpu:{wanted or 2}"),
        )
    processes = int(wanted or (2 if on_cpu else gpus * machines))
    if kind in ("NO", "MULTI_CPU") and processes > 1 and not args.multi_gpu and not args.mpirun_hostfile:
        raise InputError(
            f"{processes} processes were asked for, but accelerate starts one for distributed_type {kind}",
            where=launch.words,
            cure=again.format(f"{'cpu' if on_cpu else 'multi_gpu'}:{processes}"),
        )
    if not on_cpu and processes // machines > gpus:
        raise InputError(
            f"{processes // machines} processes were asked for, but this machine has {gpus} GPU{'s' * (gpus > 1)}",
            where=launch.words,
            cure=again.format(f"{launch.name}:{gpus * machines}"),
        )
    return processes


def _read_config(launch: Launch) -> Mapping[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(launch.path().read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not readable as YAML: {' '.join(str(error).split())}", where=launch.name) from error
    if not isinstance(config, Mapping) or "distributed_type" not in config:
        raise InputError(
            "is no configuration of accelerate: it says no distributed_type",
            where=launch.name,
            cure="Write one with `accelerate config --config_file FILE.yaml`",
        )
    return config


def _parse(parser: Any, argv: list[str], launch: Launch) -> Any:
    def error(message: str) -> NoReturn:
        raise InputError(message, where=launch.words, cure="See accelerate launch --help for the options")

    parser.error = error
    return parser.parse_args(argv)


def run_launch(launch: Launch) -> NoReturn:
    """Starts the processes, waits for them, and ends with their exit code.

    Raises:
        InputError: As `prepare` does.
    """
    import torch

    args, environment = prepare(launch, torch.cuda.device_count())
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ |= environment
    # The processes have said what is wrong; how the launcher ended the others is of no interest.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode > 0 else 1) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, 3):  # with these a process has said itself what is wrong
            sys.stderr.write(f"error: process {rank} {_ending(failure.exitcode)}; all others were ended.\n")
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (ValueError, ImportError, AssertionError, ConnectionError) as error:
        raise InputError(" ".join(str(error).split()), where=launch.words) from error
    raise SystemExit(0)


def _ending(exit_code: int) -> str:
    if exit_code == -9:
        return "was killed (signal 9), perhaps for want of memory"
    return f"was ended by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}, see above"
