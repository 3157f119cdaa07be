"""An interpreter for the pickles inside torch archives that can only build data.

A pickle is a program: its opcodes import what they name and call it. Here no opcode can (`torch_opcodes`), and the few
names that plain checkpoints use stand in a table with what they mean (`torch_values`). Every other name or opcode is
refused before it has any effect. What a pickle builds is bounded: its length, its steps, what single steps copy, and
how deep the result nests.
"""

import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .torch_opcodes import STEPS
from .torch_values import CALLS, SCALARS, STORAGES, LazyTensor, Name, Record, Storage, meaning

MAX_BYTES = 16 << 20
_MAX_STEPS = 4 << 20
_MAX_COPIED = 16 << 20
_MAX_DEPTH = 64


class _RefusedError(Exception):
    """Why a pickle is not read; becomes an `OSError` with the file's name."""


def load(raw: bytes, path: Path, tensor: Callable[..., LazyTensor]) -> Any:
    """What the pickle in `raw` holds; `tensor(storage, offset, shape, strides)` makes its tensors.

    Raises `OSError`, naming `path`, for anything but tensors and plain containers.
    """
    machine = Machine(raw, tensor)
    try:
        content = machine.run()
        _check_nesting(content)
        return content
    except _RefusedError as refusal:
        raise OSError(f"{path}: {refusal}") from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error) as error:
        raise OSError(f"{path}: malformed pickle at byte {machine.at} ({type(error).__name__})") from error


class Machine:
    """One run over a pickle. The stack, the memo and all values are plain data."""

    def __init__(self, raw: bytes, tensor: Callable[..., LazyTensor]):
        self.raw, self.at, self.copied = raw, 0, 0
        self.tensor = tensor
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute up to STOP and return the one value left."""
        for _ in range(_MAX_STEPS):
            code = self.take(1)[0]
            if code == ord("."):
                if len(self.stack) != 1 or self.outer:
                    self.refuse("malformed pickle: not one value at its end")
                return self.stack[0]
            step = STEPS.get(code)
            if step is None:
                self.refuse(_strange(code, self.raw, self.at))
            step(self)
        self.refuse(f"the pickle takes more than {_MAX_STEPS} steps")

    def refuse(self, why: str) -> NoReturn:
        """Stop here."""
        raise _RefusedError(why)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.raw) - self.at:
            self.refuse(f"the pickle ends early: {count} bytes wanted at {self.at} of {len(self.raw)}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, width: int, signed: bool = False) -> int:
        """The next integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> str:
        """Text up to the next line break."""
        end = self.raw.find(b"\n", self.at)
        text = self.take((len(self.raw) if end < 0 else end) + 1 - self.at)
        return text[:-1].decode("utf-8")

    def spend(self, value: Any) -> Any:
        """`value`, whose length a single opcode is about to copy."""
        self.copied += len(value)
        if self.copied > _MAX_COPIED:
            self.refuse(f"the pickle copies more than {_MAX_COPIED} values")
        return value

    def unmark(self) -> list[Any]:
        """The values since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def key(self, value: Any) -> Any:
        """`value` as a key: nested tuples are not, their hashes can take forever."""
        if type(value) is tuple:
            self.spend(value)
        if not _is_scalar(value) and not (type(value) is tuple and all(map(_is_scalar, value))):
            self.refuse(f"a {type(value).__name__} as a key or a set's member")
        return value

    def keys(self, values: Iterable[Any]) -> list[Any]:
        """`values` as keys."""
        return [self.key(value) for value in values]

    def name(self, module: str, name: str) -> Any:
        """What stands for a name of the pickle, if it is one of the few that plain checkpoints have."""
        if type(module) is not str or type(name) is not str:
            self.refuse("a global that is not named by text")
        found = meaning(module, name)
        if found is None:
            self.refuse(
                f"the pickle names {f'{module}.{name}'[:200]!r}; only tensors and plain containers are read, "
                "and nothing that a file names is imported or called"
            )
        return found

    def call(self) -> Any:
        """REDUCE: only names with a meaning in the table, and what stands there is ours."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple or (name.module, name.name) not in CALLS:
            self.refuse(f"the pickle calls {name if type(name) is Name else f'a {type(name).__name__}'}")
        return CALLS[name.module, name.name](self, *args)

    def new(self) -> Record:
        """NEWOBJ: an inert record in the place of an `argparse.Namespace`."""
        args, name = self.stack.pop(), self.stack.pop()
        if name != Name("argparse", "Namespace") or args != ():
            self.refuse(f"the pickle builds {name if type(name) is Name else f'a {type(name).__name__}'}")
        return Record(str(name))

    def storage(self) -> Storage:
        """BINPERSID: torch's way to refer to an entry of the archive."""
        value = self.stack.pop()
        if type(value) is not tuple or len(value) != 5 or value[0] != "storage" or type(value[1]) is not Name:
            self.refuse("a persistent id that is not a storage of torch")
        _, kind, key, _, count = value
        if kind.module != "torch" or kind.name not in STORAGES:
            self.refuse(f"a storage of type {kind}, which is not supported")
        if type(key) is not str or not (key.isascii() and key.isdigit()) or type(count) is not int or count < 0:
            self.refuse("a storage without a plain number as its key, or without a length")
        return Storage(np.dtype(STORAGES[kind.name]), key, count)

    def state(self) -> None:
        """BUILD: fields of a record; torch hangs its metadata on an OrderedDict, which is dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record and target.kind == "argparse.Namespace" and type(state) is dict:
            if any(type(key) is not str for key in self.spend(state)):
                self.refuse("a field of argparse.Namespace whose name is not text")
            target.update(state)
        elif type(target) is OrderedDict and type(state) is dict:
            pass
        elif not (type(target) is Record and target.kind.startswith("numpy.") and type(state) is tuple):
            self.refuse(f"the pickle sets the state of a {type(target).__name__}")


def _is_scalar(value: Any) -> bool:
    return type(value) in SCALARS


def _strange(code: int, raw: bytes, at: int) -> str:
    """What is said about an opcode that is not in the table."""
    opcode = next((op for op in pickletools.opcodes if ord(op.code) == code), None)
    if opcode is None:
        return f"malformed pickle: byte {code:#x} at {at - 1} is no opcode"
    named = raw[at : at + 200].split(b"\n")[:2] if opcode.name == "INST" else []
    what = f" for {b'.'.join(named).decode('utf-8', 'replace')!r}" if named else ""
    return f"the pickle uses {opcode.name}{what}, which nothing in a plain checkpoint needs; it is not executed"


def _check_nesting(root: Any) -> None:
    """Refuse what contains itself, or nests so deep that walking it would be a trap.

    A container may hang in many places: each is walked once and its height kept.
    """
    heights: dict[int, int] = {}
    path: list[tuple[Any, Any]] = []
    tops = [0]
    pending = iter((root,))
    while True:
        value = next(pending, path)  # `path` itself marks the end
        if value is path:
            if not path:
                return
            parent, pending = path.pop()
            heights[id(parent)] = height = tops.pop()
            tops[-1] = max(tops[-1], height + 1)
        elif isinstance(value, (dict, list, tuple)):
            known = heights.get(id(value))
            if len(path) + (known or 0) >= _MAX_DEPTH:
                raise _RefusedError(f"containers in it nest more than {_MAX_DEPTH} deep, or contain themselves")
            if known is not None:
                tops[-1] = max(tops[-1], known + 1)
                continue
            path.append((value, pending))
            tops.append(0)
            pending = iter(value.values() if isinstance(value, dict) else value)
