"""Dictionaries out of pickles without running anything in them.

A pickle is a program: unpickling calls whatever it names. Here nothing is ever called. A small machine understands
the few instructions that dictionaries, lists, numbers and strings are made of (and NumPy's scalars, whose bytes are
read directly) and refuses every other. It hands on the entries of the outermost dictionary as they come and forgets
them, so that memory does not grow with the file.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import InputError


_SUFFIXES = (".pkl", ".pickle", ".pkl.gz", ".pickle.gz")
PICKLES = tuple(f"*{suffix}" for suffix in _SUFFIXES)

CURE = (
    "A pickle can run any program when it is read. If you trust where it comes from, convert it once: "
    "hf-distill convert --input FILE --allow_pickle true --output_dir FOLDER"
)

_MARK = object()
_LONGEST = 64 * 2**20


class _Global:
    """A name in a pickle, which stands for itself: nothing is imported."""


# The names that a NumPy scalar needs (`encode` in protocol 2).
_SCALAR, _DTYPE, _ENCODE = _Global(), _Global(), _Global()
_GLOBALS = {
    ("_codecs", "encode"): _ENCODE,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy", "dtype"): _DTYPE,
}

# NumPy's types as those of `struct`.
_FORMS = {
    **{"f2": "e", "f4": "f", "f8": "d", "b1": "?"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}


def is_pickle(path: str | Path) -> bool:
    """Whether a file is a pickle by its name."""
    return Path(path).name.lower().endswith(_SUFFIXES)


class Refused(ValueError):
    """An instruction that is not understood on purpose."""


def read_pickled_items(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The keys and values of the dictionary in a pickle, plain or gzip, in order.

    Memory holds the entries of one instruction (1,000 in what `pickle` writes) and the strings that stand in the
    file, as these may be referred to again.

    Protocols 2 to 5 are read, all that Python 3 writes unless told otherwise.

    Raises:
        InputError: Anything but a dictionary of strings, numbers, lists and dictionaries; a broken file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            stream = io.BufferedReader(gzip.GzipFile(fileobj=plain), 2**20) if compressed else plain
            yield from _Machine(stream).items()
    except Refused as error:
        raise InputError(
            f"the pickle is refused: {error}",
            where=str(path),
            cure="Only dictionaries of strings, numbers and lists are read; write it as JSON lines where it was made",
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, IndexError) as error:
        raise InputError(
            f"not a complete pickle ({type(error).__name__}: {error})",
            where=str(path),
            cure="Copy or download the file again",
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", where=str(path), cure="Check the path"
        ) from None


class _Dtype:
    """A type of NumPy's numbers."""

    def __init__(self, form: str):
        self.unpack = struct.Struct("<" + form).unpack
        self.form = form

    def swap(self) -> None:
        """Bytes in the other order."""
        self.unpack = struct.Struct(">" + self.form).unpack


# What later entries may refer to; the rest is forgotten once it is handed on.
_LASTING = (str, _Dtype, _Global)


class _Machine:
    """Runs the allowed instructions of a pickle over a stack."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.stack: list[Any] = []
        # What may be referred to: for good (strings and types), and until the next entries are handed on.
        self.memo: dict[int, Any] = {}
        self.brief: dict[int, Any] = {}
        self.noted = 0
        self.outer: dict | None = None
        self.ready: list[tuple[Any, Any]] = []

    def items(self) -> Iterator[tuple[Any, Any]]:
        read, operations = self.stream.read, _OPERATIONS
        while True:
            code = read(1)
            if not code:
                raise EOFError("the file ends before the pickle does")
            if code == pickle.STOP:
                break
            operation = operations.get(code)
            if operation is None:
                raise Refused(f"instruction {_name(code)} at byte {self._position()}")
            operation(self)
            if self.ready:
                yield from self.ready
                self.ready = []
                self.brief.clear()
        if len(self.stack) != 1 or self.stack[0] is not self.outer or self.outer is None:
            raise Refused("it is no dictionary")

    def _position(self) -> int:
        return self.stream.tell() - 1

    def exactly(self, count: int) -> bytes:
        # A length in a broken or hostile file may be anything; what is really there is read piece by piece.
        if count > _LONGEST:
            raise Refused(f"a string of {count} bytes")
        data = self.stream.read(min(count, 2**20))
        if len(data) == count:
            return data
        parts, left = [data], count - len(data)
        while left:
            part = self.stream.read(min(left, 2**20))
            if not part:
                raise EOFError(f"{left} bytes are missing")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.exactly(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        line = self.stream.readline(2**20)
        if not line.endswith(b"\n"):
            raise EOFError("a line is missing")
        return line[:-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("a misplaced mark")
        return value

    def to_mark(self) -> list[Any]:
        values: list[Any] = []
        while True:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)

    def keep(self, slot: int) -> None:
        value = self.stack[-1]
        (self.memo if type(value) in _LASTING or value is self.outer else self.brief)[slot] = value
        if slot >= self.noted:
            self.noted = slot + 1

    def recall(self, slot: int) -> None:
        if slot not in self.memo and slot not in self.brief:
            raise Refused(f"it refers back to an entry that was read before (number {slot} of {self.noted})")
        self.push(self.memo[slot] if slot in self.memo else self.brief[slot])

    def dictionary(self) -> None:
        made: dict[Any, Any] = {}
        if self.outer is None:
            if self.stack:
                raise Refused("it is no dictionary")
            self.outer = made
        self.push(made)

    def fill(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise Refused("entries without a dictionary")
        pairs = list(zip(values[::2], values[1::2]))
        for key, value in pairs:
            if type(key) not in (str, int, float, bool):
                raise Refused(f"a key of type {type(key).__name__}")
            _check_value(value)
            if value is self.outer:
                raise Refused("a dictionary that holds itself")
        if target is self.outer:
            if len(self.stack) != 1:
                raise Refused("a dictionary that holds itself")
            self.ready += pairs
        else:
            target.update(pairs)

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("items without a list")
        for value in values:
            _check_value(value)
        target.extend(values)

    def find_global(self, module: str, name: str) -> None:
        if (module, name) not in _GLOBALS:
            raise Refused(f"it asks for {module}.{name}")
        self.push(_GLOBALS[module, name])

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise Refused("a call without arguments")
        if function is _DTYPE and arguments and isinstance(arguments[0], str):
            kind = arguments[0].lstrip("<=|")
            if kind not in _FORMS:
                raise Refused(f"NumPy's type {arguments[0]!r}")
            self.push(_Dtype(_FORMS[kind]))
        elif function is _SCALAR and len(arguments) == 2 and type(arguments[0]) is _Dtype:
            try:
                self.push(arguments[0].unpack(arguments[1])[0])
            except (struct.error, TypeError):
                raise Refused("a NumPy scalar that is none") from None
        elif function is _ENCODE and len(arguments) == 2 and arguments[1] == "latin1" and type(arguments[0]) is str:
            self.push(arguments[0].encode("latin1"))
        else:
            raise Refused("a call")

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is not _Dtype or type(state) is not tuple or state[1:2] not in (("<",), (">",), ("|",)):
            raise Refused("an object with a state")
        if state[1] == ">":
            target.swap()


def _check_value(value: Any) -> None:
    if type(value) not in (str, int, float, bool, list, dict):
        raise Refused(f"a value of type {type(value).__name__.strip('_')}")


def _name(code: bytes) -> str:
    import pickletools

    known = {operation.code: operation.name for operation in pickletools.opcodes}
    return known.get(code.decode("latin1"), repr(code))


def _long(machine: _Machine, count: int) -> int:
    if not 0 <= count <= 64:
        raise Refused("a number of more than 64 bytes")
    return int.from_bytes(machine.exactly(count), "little", signed=True)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.push(tuple(machine.pop() for _ in range(count))[::-1])

    return operation


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Refused("a name that is no string")
    machine.find_global(module, name)


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: m.exactly(1) and None,
    pickle.FRAME: lambda m: m.exactly(8) and None,
    pickle.MARK: lambda m: m.push(_MARK),
    pickle.POP: lambda m: m.pop() and None,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.exactly(1)[0]),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(_long(m, m.exactly(1)[0])),
    pickle.LONG4: lambda m: m.push(_long(m, m.number("<i"))),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.exactly(m.exactly(1)[0]).decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE: lambda m: m.push(m.exactly(m.number("<I")).decode("utf-8", "surrogatepass")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.exactly(m.exactly(1)[0])),
    pickle.BINBYTES: lambda m: m.push(m.exactly(m.number("<I"))),
    pickle.EMPTY_DICT: lambda m: m.dictionary(),
    pickle.SETITEM: lambda m: m.fill([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.fill(m.to_mark()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.to_mark()),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.to_mark())),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.BINPUT: lambda m: m.keep(m.exactly(1)[0]),
    pickle.LONG_BINPUT: lambda m: m.keep(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.keep(m.noted),
    pickle.BINGET: lambda m: m.recall(m.exactly(1)[0]),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
    pickle.GLOBAL: lambda m: m.find_global(m.line().decode(), m.line().decode()),
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: lambda m: m.reduce(),
    pickle.BUILD: lambda m: m.build(),
}
