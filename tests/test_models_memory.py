"""Freed memory returns to the system only where the process has grown."""

import pytest

from hf_distill.models import memory


@pytest.fixture
def heap(monkeypatch):
    """A process whose size the test sets, and which shrinks to 100 bytes when trimmed."""
    state = {"size": 100, "trims": 0}

    def trim(_):
        state["trims"] += 1
        state["size"] = 100
        return 1

    monkeypatch.setattr(memory, "_after_last", 0)
    monkeypatch.setattr(memory, "_resident_bytes", lambda: state["size"])
    monkeypatch.setattr(memory, "_malloc_trim", lambda: trim)
    return state


def test_trims_only_after_growth(heap):
    assert not memory.return_freed_memory(slack=50)
    heap["size"] = 149
    assert not memory.return_freed_memory(slack=50)
    heap["size"] = 150
    assert memory.return_freed_memory(slack=50)
    assert heap == {"size": 100, "trims": 1}
    assert not memory.return_freed_memory(slack=50)


def test_another_c_library_is_left_alone(heap, monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    heap["size"] = 10_000
    assert not memory.return_freed_memory(slack=1)


def test_the_real_functions_run():
    assert memory.return_freed_memory(slack=0) in (True, False)
