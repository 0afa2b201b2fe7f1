"""Output folders that two runs want, whose data changed, or whose disk is full: one sentence, and nothing is lost."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_distill.cli.folders import KEY_FILE, claim_output
from hf_distill.cli.main import main
from hf_distill.data import load_collection
from hf_distill.evaluation import update_metrics
from hf_distill.files import full_disk, readable_size, staged_files
from hf_distill.locking import lock_folder, unlock_folder

from .model_zoo import save_tiny


SMALL = ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--num_negatives", "3", "--report_to", "none"]
SMALL += ["--max_steps", "4", "--save_steps", "2", "--eval_strategy", "no", "--mine_depth", "20"]
SMALL += ["--mine_negatives", "8"]

CLAIM = """
import sys, time
from hf_distill.cli.folders import claim_output
from hf_distill.errors import InputError
folder, seed, go = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
try:
    claim_output(folder, {"seed": int(seed)})
except InputError as error:
    print(f"refused: {error}", flush=True)
else:
    print("mine", flush=True)
sys.stdin.readline()
"""


def refusal(capsys, *argv: object) -> str:
    """The sentence that a bad command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_of_two_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    """Real processes with different settings; the loser leaves the winner's key alone, and names the winner."""
    folder = tmp_path / "out"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(folder), str(seed), "go"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in started]
    winner, loser = (0, 1) if answers[0] == "mine\n" else (1, 0)
    assert answers[winner] == "mine\n"
    assert f"another process is working on this: process {started[winner].pid} on {platform.node()}" in answers[loser]
    assert "choose another --output_dir" in answers[loser] and str(folder) in answers[loser]
    assert json.loads((folder / KEY_FILE).read_text()) == {"seed": winner + 1}
    started[winner].kill()  # the lock of a process that was killed is nobody's
    for process in started:
        process.communicate()
    claim_output(folder, {"seed": winner + 1})
    unlock_folder(folder)


def test_a_lock_beside_a_folder_that_is_replaced(tmp_path):
    lock_folder(tmp_path / "rows", beside=True)
    assert not (tmp_path / "rows").exists()
    code = f"from hf_distill.locking import lock_folder; lock_folder({str(tmp_path / 'rows')!r}, beside=True)"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"process {os.getpid()} on" in second.stderr
    unlock_folder(tmp_path / "rows", beside=True)
    assert not list(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluations_that_share_a_folder_lose_no_figures(tmp_path):
    path = tmp_path / "metrics.json"

    def add(number: int) -> None:
        for system in range(5):
            update_metrics(path, "toy/test", f"{number}.{system}", {"nDCG@10": 0.5})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert len(json.loads(path.read_text())["toy/test"]) == 40


def test_a_run_whose_data_changed_is_not_resumed(micro, tiny_bert, tmp_path, capsys):
    data, out = shutil.copytree(micro, tmp_path / "data"), tmp_path / "out"
    command = ["train", "--data", data, "--model", tiny_bert, "--output_dir", out, *SMALL]
    main([str(word) for word in command])
    unlock_folder(out)
    corpus = (data / "corpus.jsonl").read_text()
    (data / "corpus.jsonl").write_text(corpus.replace("the", "teh", 1))
    message = refusal(capsys, *command)
    assert f"{out}: holds a run that was begun with other data: the corpus changed since" in message
    (data / "corpus.jsonl").write_text(corpus)
    with (data / "qrels" / "dev.tsv").open("a") as file:
        judged = {tuple(line.split("\t")[:2]) for line in (data / "qrels" / "dev.tsv").read_text().splitlines()}
        query = next(iter(judged - {("query-id", "corpus-id")}))[0]
        free = next(d for d in load_collection(micro).corpus.ids if (query, d) not in judged)
        file.write(f"{query}\t{free}\t1\n")
    assert "the judgements of dev changed since" in refusal(capsys, *command)
    shutil.rmtree(data)
    shutil.copytree(micro, data)
    # The start of training is content too, whatever it is called.
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_bert / "model.safetensors")
    save_file({name: value + 0.01 * torch.ones_like(value) for name, value in weights.items()},
              tiny_bert / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    assert "the weights to start from changed since" in refusal(capsys, *command)


def test_a_pretraining_whose_texts_changed_is_not_resumed(tiny_tokenizer, tmp_path, capsys):
    model = save_tiny(tmp_path / "masked", "bert", tiny_tokenizer, head="MaskedLM", layers=1)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "passage {number}"}}\n' for number in range(40)))
    command = ["pretrain", "--stream", texts, "--model", model, "--output_dir", tmp_path / "out", "--max_steps", "1"]
    command += ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--report_to", "none"]
    main([str(word) for word in command])
    unlock_folder(tmp_path / "out")
    texts.write_text(texts.read_text().replace("passage 7", "passage seven"))
    assert "begun with other data: the files changed since" in refusal(capsys, *command)


def test_a_checkpoint_of_other_rows_is_refused(micro, tiny_bert, tmp_path):
    """Also in Python, where no output folder is claimed."""
    from hf_distill import RetrievalTrainer, RetrievalTrainingArguments, load_model, mine
    from hf_distill.errors import InputError

    data = load_collection(micro)
    rows = mine("bm25", data, "train", depth=20, num_negatives=5)
    args = RetrievalTrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, num_negatives=3, max_steps=2, save_steps=2,
        save_strategy="steps", report_to="none", use_cpu=True,
    )  # fmt: skip
    RetrievalTrainer(load_model(tiny_bert), args, rows=rows).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    other = RetrievalTrainer(load_model(tiny_bert), args, rows=rows.select(range(20)))
    with pytest.raises(InputError, match="checkpoint-2: was written in a training on other data: the training rows"):
        other.train(resume_from_checkpoint=str(checkpoint))
    RetrievalTrainer(load_model(tiny_bert), args, rows=rows).train(resume_from_checkpoint=str(checkpoint))


# ---- Full disks ----
def test_staged_files_come_together_or_not_at_all(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "model").write_text("old")
    (tmp_path / ".files.123.0123abcd.tmp").mkdir()  # of a process that was killed
    with pytest.raises(RuntimeError), staged_files(tmp_path) as folder:
        (folder / "model").write_text("ne")
        raise RuntimeError
    assert (tmp_path / "model").read_text() == "old"
    with staged_files(tmp_path) as folder:
        (folder / "model").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text("new")
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"kept": "old", "model": "new", "sub/more": "new"}
    assert not list(tmp_path.glob(".*"))


def test_only_full_disks_are_full_disks(tmp_path):
    assert full_disk(OSError(2, "No such file"), tmp_path) is None
    assert full_disk(RuntimeError("shapes do not fit"), tmp_path) is None
    sentence = str(full_disk(OSError(28, "x"), tmp_path / "not" / "there"))
    assert "No space left on device; " in sentence and " are free" in sentence
    assert [readable_size(n) for n in (0, 1536, 3 * 2**40)] == ["0 bytes", "1.5 KiB", "3.0 TiB"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
from hf_distill.files import saying_full_disk, staged_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
folder = Path(sys.argv[1])

def numpy(path): np.save(open(path, "wb"), np.ones(2**17))
def torch_(path): torch.save({"a": torch.ones(2**17)}, path)
def safetensors(path):
    from safetensors.torch import save_file
    save_file({"a": torch.ones(2**17)}, path)
def arrow(path):
    import pyarrow as pa
    from hf_distill.data.arrow import write_arrow
    table = pa.table({"a": np.random.default_rng(0).random(2**17)})
    write_arrow(path, table.schema, [table])
def parquet(path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"a": np.random.default_rng(0).random(2**17)}), path)
def faiss(path):
    import faiss
    index = faiss.IndexFlatL2(64); index.add(np.ones((2**12, 64), np.float32)); faiss.write_index(index, str(path))
def python(path): path.write_text("a" * 2**17)

for write in (numpy, torch_, safetensors, arrow, parquet, faiss, python):
    try:
        with staged_files(folder) as temporary:
            write(temporary / "file")
    except Exception as error:
        print(write.__name__, type(error).__name__, error, flush=True)
    assert not list(folder.iterdir()), list(folder.iterdir())
"""


def test_every_library_says_that_nothing_more_fits(tmp_path):
    """A limit on the size of a file is refused as a full disk is, and needs no rights."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "numpy", "torch_", "safetensors", "arrow", "parquet", "faiss", "python",
    ]  # fmt: skip
    for line in lines:
        assert " InputError " in line and " are free" in line and str(tmp_path) in line, line


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount() -> bool:
    """Whether this account may mount a small file system for itself."""
    try:
        script = "mount -t tmpfs -o size=64k tmpfs /mnt"
        return subprocess.run([*NAMESPACE, "sh", "-c", script], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs a user namespace; the test before needs none")
def test_on_a_full_file_system_nothing_broken_is_left_and_the_same_command_goes_on(micro, tiny_bert, tmp_path):
    """A real one: Arrow builds, shards, checkpoints and the final model run out of room at different points."""
    script = Path(__file__).with_name("full_disk.py")
    words = [sys.executable, str(script), str(tmp_path), str(micro), str(tiny_bert)]
    done = subprocess.run([*NAMESPACE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("training", "caches"):
        *full, enough = result[name]
        refused = [one for one in full if one["code"]]
        assert len(refused) >= 3, [(one["free"], one["code"]) for one in full]
        for one in refused:
            assert one["code"] == 2 and re.search(r"\((No space left on device|the disk is full); ", one["said"]), one
            assert " are free)" in one["said"] and "start the same command again" in one["said"]
            assert "Traceback" not in one["said"]
        assert enough["code"] == 0, enough
        assert not [file for one in result[name] for file in one["broken"]]
    assert result["same weights"] and result["same run"]
