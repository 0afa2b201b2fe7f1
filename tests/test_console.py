"""Tables on narrow and wide screens."""

from __future__ import annotations

import pytest

from hf_distill import console


NAME = "ance_tele-comparison-medquad_student_no_teacher"
OTHER = "ance_tele-comparison-medquad_student_with_[teacher]"
TEXT = "what are the treatments for a disease with a name of several words"
COLUMNS = ("query", "system", "against", "its value", "text")
ROW = ("q-1", NAME, OTHER, 0.1234, TEXT)


def shown(capsys, monkeypatch, width: int, columns=COLUMNS, row=ROW) -> tuple[int, list[list[str]]]:
    """The width of a printed table of one row, and the lines of each of that row's cells."""
    monkeypatch.setattr(console, "_PAGE_WIDTH", width)
    console.print_table("A title", columns, [row])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    body = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    return max(map(len, lines)), [[part.strip() for part in parts] for parts in zip(*body)]


@pytest.mark.parametrize("width", [200, 160, 120, 90, 60, 20])
def test_nothing_is_cut_off(width, capsys, monkeypatch):
    _, cells = shown(capsys, monkeypatch, width)
    assert [[part for part in cell if part] for cell in (cells[0], cells[3])] == [["q-1"], ["0.1234"]]
    assert ("".join(cells[1]), "".join(cells[2])) == (NAME, OTHER)
    assert " ".join(cells[4]).split() == TEXT.split()


def test_free_text_gives_way_before_names(capsys, monkeypatch):
    full, cells = shown(capsys, monkeypatch, 300)
    assert [len(cell) for cell in cells] == [1] * 5
    width, cells = shown(capsys, monkeypatch, full - 30)
    assert width == full - 30 and cells[1] == [NAME, ""] and all(cells[4])
    width, cells = shown(capsys, monkeypatch, full - 70)
    assert width == full - 70 and cells[1][1]


def test_numbers_stay_whole_on_a_screen_that_is_too_narrow(capsys, monkeypatch):
    numbers = tuple(f"{one:.4f}" for one in range(12))
    width, cells = shown(capsys, monkeypatch, 60, [f"n{number}" for number in range(12)], numbers)
    assert width > 60 and [cell[0] for cell in cells] == list(numbers)
