"""Sharded jobs: complete or absent, refused where foreign."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.retrieval.shards import ShardedJob, default_shard_rows, digest, working_folder, write_array


def job_of(folder, shards=4, **key) -> ShardedJob:
    return ShardedJob(folder, {"size": 3, "prompt": "q: ", **key}, shards)


def write_number(shard, path):
    write_array(path, np.full(3, shard))


def test_missing_shards_are_written_and_finished_ones_are_left_alone(tmp_path):
    job = job_of(tmp_path / "job")
    assert job.missing() == [0, 1, 2, 3] and not job.is_complete()
    job.run(write_number, "test")
    assert job.is_complete() and [np.load(path)[0] for path in job.paths()] == [0, 1, 2, 3]
    job.path(2).unlink()
    seen = []
    job_of(tmp_path / "job").run(lambda shard, path: (seen.append(shard), write_number(shard, path)), "test")
    assert seen == [2] and job.is_complete()


def test_an_error_in_a_shard_keeps_the_others_and_leaves_no_rubbish(tmp_path):
    def fail_at_two(shard, path):
        write_number(shard, path)
        if shard == 2:
            raise RuntimeError("stop")

    job = job_of(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        job.run(fail_at_two, "test")
    assert job.missing() == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-00000.npy", "shard-00001.npy"]


def test_what_a_killed_process_left_is_removed_at_the_end(tmp_path):
    (tmp_path / ".shard-00001.npy.99999.abcdef01.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    job_of(tmp_path).run(write_number, "test")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert (tmp_path / "notes.txt").exists()


def test_a_foreign_manifest_is_refused_with_the_differing_fields(tmp_path):
    job_of(tmp_path).run(write_number, "test")
    with pytest.raises(InputError, match=r"prompt is 'q: ' there and 'passage: ' here") as error:
        job_of(tmp_path, prompt="passage: ").run(write_number, "test")
    assert "size" not in str(error.value) and "manifest.json" in str(error.value)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="unreadable"):
        job_of(tmp_path).run(write_number, "test")


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    def full(shard, path):
        if shard == 1:
            raise OSError(28, "No space left on device")
        write_number(shard, path)

    job = job_of(tmp_path)
    with pytest.raises(InputError, match=r"cannot be written to \(No space left on device; .* of .* are free\)"):
        job.run(full, "test")
    assert job.missing() == [1, 2, 3]


def test_the_manifest_tells_what_the_bytes_depend_on(tmp_path):
    job_of(tmp_path).run(write_number, "test")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["key"] == {"size": 3, "prompt": "q: ", "num_shards": 4}
    assert {"torch", "threads", "cpu_capability"} <= set(manifest["made_with"])


def test_another_run_may_have_finished_the_shard_first(tmp_path):
    job = job_of(tmp_path, shards=1)

    def overtaken(shard, path):
        write_number(shard, job.path(shard))  # the other run
        raise FileNotFoundError(2, "tidied up by the other run")

    job.run(overtaken, "test")
    assert job.is_complete()


def test_preparing_runs_ahead_in_order(tmp_path):
    prepared, written = [], []

    def prepare(shard):
        prepared.append(shard)
        return shard * 10

    def write(shard, path, value):
        written.append((shard, value))
        write_number(shard, path)

    job_of(tmp_path).run(write, "test", prepare=prepare, sizes=[5] * 4)
    assert written == [(0, 0), (1, 10), (2, 20), (3, 30)] and prepared == [0, 1, 2, 3]


def test_cache_folders_are_named_by_the_key(tmp_path):
    one = ShardedJob.cached("embeddings", {"a": 1}, 2, tmp_path)
    assert one.folder == ShardedJob.cached("embeddings", {"a": 1}, 2, tmp_path).folder
    assert one.folder != ShardedJob.cached("embeddings", {"a": 2}, 2, tmp_path).folder
    assert one.folder.parent == tmp_path / "embeddings"


def test_a_working_folder_disappears(tmp_path):
    with working_folder(tmp_path, keep=False) as folder:
        assert folder.parent == tmp_path and folder.is_dir()
    assert not folder.exists()
    with working_folder(tmp_path, keep=True) as folder:
        assert folder == tmp_path


@given(st.integers(1, 10**9))
def test_shards_are_bounded_and_shared(rows):
    size = default_shard_rows(rows)
    assert 256 <= size <= 8192
    assert rows < 256 * 16 or -(-rows // size) >= 15


def test_digests_see_type_shape_and_content():
    array = np.arange(6)
    assert digest(array) == digest(np.arange(6))
    others = [array.astype(np.int32), array.reshape(2, 3), array[::-1], array.astype(float)]
    assert len({digest(other) for other in others} | {digest(array)}) == 5
    assert digest(array, array) != digest(array)
