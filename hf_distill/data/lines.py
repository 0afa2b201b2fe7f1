"""Text files as lines: plain or gzip, UTF-8, ended by `\\n` or `\\r\\n` and nothing else."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError


# Large enough for vectorised work, small enough to be copied a few times.
_BLOCK_BYTES = 4 * 2**20

# A file without line ends is no text; its bytes should not fill the memory before that is said.
_LONGEST_LINE = 256 * 2**20

_BOM = b"\xef\xbb\xbf"


def read_lines(path: str | Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and decoded lines without their line ends; blank lines only where `blank` is true.

    Only `\\n` and `\\r\\n` end a line, so that a text may hold other Unicode line separators.
    """
    path = Path(path)
    with _Opened(path) as opened:
        for number, line in enumerate(opened.stream, start=1):
            opened.line = number
            text = decode_line(line, number, path).rstrip("\r\n")
            if text or blank:
                yield number, text


@dataclass
class Lines:
    """Lines that follow one another in a file, none of them blank.

    Attributes:
        texts: The lines without their ends, an Arrow array of strings.
        first: The number of the first line, from 1.
        numbers: All line numbers, where they do not simply count on from `first`.
    """

    texts: pa.StringArray
    first: int
    numbers: Sequence[int] | None

    def number(self, index: int) -> int:
        """The line number of the line at `index`."""
        return self.first + index if self.numbers is None else int(self.numbers[index])


def line_blocks(path: str | Path, size: int | None = None) -> Iterator[Lines]:
    """The lines of `read_lines`, about `size` bytes (4 MiB) at a time and without an object of Python for each."""
    path = Path(path)
    with _Opened(path) as opened:
        for number, data in _whole_lines(opened, size or _BLOCK_BYTES):
            block = _split(data, number, path)
            if len(block.texts):
                yield block


def _whole_lines(opened: _Opened, size: int) -> Iterator[tuple[int, bytes]]:
    """The number of the first line, and bytes that end where a line does."""
    number, kept, length = 1, [], 0
    while True:
        chunk = opened.stream.read(size)
        cut = chunk.rfind(b"\n") + 1
        if chunk and not cut:
            kept.append(chunk)
            length += len(chunk)
            if length > _LONGEST_LINE:
                raise InputError(
                    f"a line of more than {_LONGEST_LINE // 2**20} MiB",
                    where=f"{opened.path}, line {number}",
                    cure="Check that this is a text file",
                )
            continue
        data = b"".join((*kept, memoryview(chunk)[:cut]))
        if data:
            yield number, data
        if not chunk:
            return
        number += data.count(b"\n")
        opened.line = number - 1
        kept, length = [chunk[cut:]], len(chunk) - cut


def _split(data: bytes, number: int, path: Path) -> Lines:
    if number == 1:
        data = data.removeprefix(_BOM)
    offsets = pa.py_buffer(np.array([0, len(data) - data.endswith(b"\n")], dtype=np.int32))
    whole = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(data))
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:
        for count, line in enumerate(data.split(b"\n")):
            decode_line(line, number + count, path)
        raise
    texts = pc.split_pattern(whole, "\n").values
    if b"\r" in data:
        texts = pc.utf8_rtrim(texts, "\r")
    filled = pc.not_equal(texts, "")
    if pc.all(filled).as_py():
        return Lines(texts, number, None)
    numbers = np.flatnonzero(filled.to_numpy(zero_copy_only=False)) + number
    return Lines(texts.filter(filled), int(numbers[0]) if len(numbers) else number, numbers)


def decode_line(line: bytes, number: int, path: Path | str) -> str:
    """The text of one line; `InputError` names file and line where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start + 1} of the line ({line[error.start : error.start + 1]!r}) is not UTF-8",
            where=f"{path}, line {number}",
            cure="Convert the file to UTF-8, for example with iconv -f latin1 -t utf-8",
        ) from None


class _Opened:
    """A plain or compressed file; what goes wrong while it is read becomes an `InputError`."""

    stream: BinaryIO

    def __init__(self, path: Path):
        self.path, self.line = path, 0

    def __enter__(self) -> _Opened:
        try:
            self._plain = open(self.path, "rb")
        except OSError as error:
            raise self._unreadable(error) from None
        compressed = self._plain.read(2) == b"\x1f\x8b"
        self._plain.seek(0)
        self.stream = gzip.GzipFile(fileobj=self._plain) if compressed else self._plain
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._plain.close()
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            detail = "the compressed file ends too early" if isinstance(error, EOFError) else f"broken gzip ({error})"
            raise InputError(
                f"{detail} after line {self.line}",
                where=str(self.path),
                cure="Copy or download the file again; it is incomplete",
            ) from None
        if isinstance(error, OSError):
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"cannot be read ({error.strerror or error})", where=str(self.path), cure="Check the path")
