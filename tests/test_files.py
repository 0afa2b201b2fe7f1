"""Files and folders that are complete or absent."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_distill.files import atomic_path


def write_folder(target: Path, number: int, files: int = 20) -> None:
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for file in range(files):
            (temporary / str(file)).write_text(str(number))


def test_many_write_one_folder_and_one_of_them_is_there_whole(tmp_path):
    target = tmp_path / "rows"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_folder(target, number), range(200)))
    assert len({file.read_text() for file in target.iterdir()}) == 1
    assert len(list(target.iterdir())) == 20
    assert list(tmp_path.iterdir()) == [target], "nothing is left behind"


@pytest.mark.parametrize("before", ["nothing", "a file", "an empty folder", "a folder"])
def test_a_folder_takes_the_place_of(tmp_path, before):
    target = tmp_path / "rows"
    if before == "a file":
        target.touch()
    elif before != "nothing":
        target.mkdir()
        if before == "a folder":
            (target / "old").touch()
    write_folder(target, 1, files=1)
    assert [path.name for path in target.iterdir()] == ["0"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, folder):
    target = tmp_path / "result"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        if folder:
            temporary.mkdir()
        else:
            temporary.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "rows").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "rows", 1, files=1)
    assert (tmp_path / "rows").is_symlink() and (tmp_path / "real" / "0").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "rows"}


def test_what_was_there_comes_back_if_the_new_folder_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "rows"
    write_folder(target, 1, files=1)
    replace = os.replace

    def interrupted(source, place):
        if Path(place) == target and len(list(Path(source).iterdir())) == 2:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr("hf_distill.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(target, 2, files=2)
    assert [file.read_text() for file in target.iterdir()] == ["1"]
    assert list(tmp_path.iterdir()) == [target]
