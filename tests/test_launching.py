"""`hf-distill --launch`: what it starts, what it refuses, and how launched processes end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_distill.cli import launch as launching
from hf_distill.cli.launch import CONFIGS, NAMES, Launch, prepare, read_launch
from hf_distill.cli.main import SHARED, VERBS, main
from hf_distill.distributed import check_engine, check_launch, check_launcher, engine_of
from hf_distill.errors import InputError


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LAUNCHER_VARIABLES = ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU",
                      "ACCELERATE_USE_FSDP", "FSDP_STATE_DICT_TYPE")  # fmt: skip


@pytest.fixture()
def environment(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def read(text: str) -> Launch:
    return read_launch(text.split(), SHARED, list(VERBS))


def arguments(**changes) -> SimpleNamespace:
    """What `check_launch` looks at, as it is in one process without an engine."""
    usual = {"world_size": 1, "n_gpu": 0, "fsdp": False, "fsdp_plugin_args": None, "deepspeed_plugin": None}
    return SimpleNamespace(**usual | {"device": torch.device("cpu")} | changes)


# ---- What is typed ----
def test_a_launch_is_read_to_its_parts():
    launch = read("zero3:4 --num_machines 2 --machine_rank 1 train --data x --launch y")
    assert (launch.name, launch.processes, launch.verb) == ("zero3", 4, "train")
    assert launch.options == ["--num_machines", "2", "--machine_rank", "1"]
    assert launch.arguments == ["--data", "x", "--launch", "y"]
    assert (read("cpu:1 mine").name, read("cpu mine").name) == ("cpu", "cpu")
    assert (read("cpu:3 mine").name, read("multi_cpu:1 mine").name) == ("multi_cpu", "cpu")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "Choose one of cpu,"),
        ("train --data x", "needs a name"),
        ("zero4 train", "there is no launch configuration 'zero4'"),
        ("missing.yaml train", "there is no launch configuration 'missing.yaml'"),
        ("cpu:0 train", "Write --launch cpu:2"),
        ("cpu:2", "there is no verb behind it"),
        ("cpu:2 trane --data x", "found 'trane'"),
        ("cpu:2 search --data x", "hf-distill search runs in one process"),
    ],
)
def test_what_cannot_be_read_says_what_to_type(typed, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--launch", *typed.split()])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--launch", "list"], ["--launch=list"], ["--launch", "--help"]])
def test_the_names_are_listed_with_their_files(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{name}.yaml" in shown for name in NAMES)


# ---- What is started ----
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_one_of_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert str(config.distributed_type.value) in ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
    assert set(NAMES) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    ("typed", "gpus", "processes"),
    [
        ("cpu", 0, 1), ("cpu", 4, 1), ("cpu:3", 0, 3), ("multi_cpu", 2, 2), ("gpu", 4, 1), ("multi_gpu", 4, 4),
        ("multi_gpu:2", 4, 2), ("multi_gpu --num_processes 3", 4, 3), ("zero2", 4, 4), ("fsdp2:2", 4, 2),
        ("multi_node --machine_rank 1 --main_process_ip 10.0.0.1", 8, 16),
        ("zero3 --num_machines 4 --machine_rank 0 --main_process_ip 10.0.0.1", 8, 32),
    ],
)  # fmt: skip
def test_processes_are_as_many_as_asked_for_or_as_there_are_gpus(typed, gpus, processes):
    args, environment = prepare(read(f"{typed} train --data x"), gpus)
    assert args.num_processes == processes
    assert args.training_script_args == ["train", "--data", "x"]
    assert (args.training_script, args.module) == ("hf_distill", True)
    assert environment["HF_DISTILL_LAUNCH"] == f"--launch {typed}".replace("cpu:3", "multi_cpu:3")
    on_cpu = "cpu" in typed
    assert (environment.get("ACCELERATE_USE_CPU"), environment.get("CUDA_VISIBLE_DEVICES")) == (
        ("true", "") if on_cpu else (None, None)
    )


def test_several_machines_need_a_port_that_all_know():
    several = "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1"
    assert prepare(read(f"zero3 {several} train"), 8)[0].main_process_port == 29500
    assert prepare(read(f"zero3 {several} --main_process_port 4711 train"), 8)[0].main_process_port == 4711
    assert prepare(read("zero3 train"), 8)[0].main_process_port is None  # the configuration's 0 is any free one


def test_deepspeed_without_a_gpu_runs_on_cpus_by_the_flag_that_keeps_it(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: object())
    args, environment = prepare(read("zero2:2 train --data x"), 0)
    assert args.training_script_args == ["train", "--data", "x", "--use_cpu", "true"]
    assert environment["DS_ACCELERATOR"] == "cpu" and "ACCELERATE_USE_CPU" not in environment
    assert prepare(read("zero2:2 mine --data x"), 0)[0].training_script_args == ["mine", "--data", "x"]


@pytest.mark.parametrize(
    ("typed", "gpus", "message"),
    [
        ("multi_gpu", 0, "there is no GPU here. Type hf-distill --launch cpu:2 train"),
        ("fsdp2:4", 0, "plain DDP and not say so. Type hf-distill --launch cpu:4 train"),
        ("multi_gpu:8", 2, "has 2 GPUs. Type hf-distill --launch multi_gpu:2 train"),
        ("gpu:2", 2, "accelerate starts one for distributed_type NO. Type hf-distill --launch multi_gpu:2 train"),
        ("cpu --num_processes 2", 0, "Type hf-distill --launch cpu:2 train"),
        ("multi_cpu --cpu", 0, "--cpu starts a single process"),
        ("multi_node", 8, "--num_machines 2 --machine_rank 0 --main_process_ip ADDRESS train"),
        ("multi_gpu --num_procs 2", 2, "See accelerate launch --help"),
    ],
)
def test_what_would_become_something_else_is_refused(typed, gpus, message):
    with pytest.raises(InputError) as error:
        prepare(read(f"{typed} train --data x"), gpus)
    assert message in str(error.value)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf_distill\[deepspeed\]'"):
        prepare(read("zero3 train"), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true", "accelerate starts one"),
        ("distributed_type: [", "not readable as YAML"),
        ("learning_rate: 1", "is no configuration of accelerate"),
    ],
)
def test_a_configuration_of_ones_own_is_checked_too(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        prepare(read(f"{path} train"), 0)


def test_a_configuration_of_ones_own_is_used(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 3\nuse_cpu: true")
    assert prepare(read(f"{path} train"), 0)[0].num_processes == 3
    assert prepare(read(f"{path}:2 train"), 0)[0].num_processes == 2


# ---- What a process finds when it has been started ----
def test_one_process_where_several_were_asked_for_is_refused(environment):
    check_launcher()
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launcher()
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="--launch cpu:2"):
        check_launcher()
    environment.setenv("WORLD_SIZE", "2")
    check_launcher()


@pytest.mark.parametrize(
    ("changes", "variables", "message"),
    [
        ({}, {"WORLD_SIZE": "2"}, "Add --use_cpu true"),
        ({"n_gpu": 2}, {}, "--launch multi_gpu"),
        ({"fsdp": True}, {}, "plain DDP and not say so"),
        ({"world_size": 2}, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "plain DDP and not say so"),
        ({"fsdp": True, "device": torch.device("cuda")}, {}, "fsdp_state_dict_type: FULL_STATE_DICT"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3, zero3_save_16bit_model=False)}, {},
         "stage3_gather_16bit_weights_on_model_save"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, {"ACCELERATE_USE_CPU": "true"}, "--launch zero2:2"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, {}, "DeepSpeed needs a launcher"),
    ],
)  # fmt: skip
def test_a_training_that_would_silently_be_another_one_is_refused(changes, variables, message, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(InputError) as error:
        check_launch(arguments(**changes))
    assert message in str(error.value)


def test_good_launches_pass(environment):
    zero3 = SimpleNamespace(zero_stage=3, zero3_save_16bit_model=True)
    check_launch(arguments())
    environment.setattr(torch.distributed, "is_initialized", lambda: True)
    check_launch(arguments(deepspeed_plugin=zero3, world_size=2))
    full = {"state_dict_type": "FULL_STATE_DICT"}
    check_launch(arguments(fsdp=True, device=torch.device("cuda"), fsdp_plugin_args=full))
    assert [engine_of(arguments()), engine_of(arguments(deepspeed_plugin=zero3))] == [None, "zero3"]
    assert engine_of(arguments(fsdp=True)) == "fsdp"


def test_a_checkpoint_of_another_engine_is_refused(environment, tmp_path):
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    plain.mkdir()
    (divided / "global_step2").mkdir(parents=True)
    zero2 = arguments(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    check_engine(plain, arguments())
    check_engine(divided, zero2)
    for folder, args in ((plain, zero2), (divided, arguments())):
        with pytest.raises(InputError, match="Launch it as before"):
            check_engine(folder, args)
    (divided / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(InputError, match="written under zero3, this training runs under zero2"):
        check_engine(divided, zero2)


def test_a_verb_that_nobody_shares_is_refused_in_several_processes(environment, capsys):
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["search", "--data", "x"])
    assert "runs in one process" in capsys.readouterr().err


# ---- Real processes ----
def run(*words: object, check: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.distributed
def test_bad_input_is_said_once_and_ends_with_its_code(tmp_path):
    done = run("-m", "hf_distill", "--launch", "cpu:2", "mine", "--data", tmp_path / "nowhere", "--model", "bm25")
    assert done.returncode == 2
    assert done.stderr.count("error") == 1 and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_processes_of_torchrun_join_and_bad_input_of_one_ends_them(tmp_path):
    """Without a GPU and without any flag: verbs without the Trainer's arguments have none for CPUs."""
    script = tmp_path / "one.py"
    script.write_text(
        "from hf_distill.cli.parsing import exit_with\n"
        "from hf_distill.distributed import join, rank, wait_for_everyone, world_size\n"
        "from hf_distill.errors import InputError\n"
        "join()\n"
        "if rank() == 1:\n"
        "    exit_with(InputError(f'one of {world_size()} disks is full', cure='Make room'))\n"
        "wait_for_everyone()\n"
    )
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script)
    assert done.returncode != 0
    assert done.stderr.count("error in process 1: one of 2 disks is full. Make room.") == 1


@pytest.mark.distributed
def test_accelerate_that_starts_one_process_for_two_is_refused(tmp_path, micro):
    """The trap itself, as accelerate sets it: the command is right by its documentation and trains on one process."""
    script = ROOT / "run_scripts" / "run_mine.py"
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = run(*words, script, "--data", micro, "--model", "bm25", "--output_dir", tmp_path / "rows")
    assert "accelerate was asked for several processes and started this one only" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "rows").exists()
