"""The opcodes of pickles that build plain data, each as a step of the machine in `torch_pickle`.

Left out on purpose, and so refused: INST, OBJ and NEWOBJ_EX (calls), EXT1 to EXT4 (names by number), PERSID, buffers
out of band, integers of any length, and the text forms of protocol 0, which torch never writes.
Format: the comments of `pickletools` in Python's standard library.
"""

import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

Step = Callable[[Any], Any]


def _push(value: Step) -> Step:
    """A step that puts a value on the stack."""

    def step(m: Any) -> None:
        result = value(m)  # first of all: it may leave another stack
        m.stack.append(result)

    return step


def _mark(m: Any) -> None:
    m.outer.append(m.stack)
    m.stack = []


def _pop(m: Any) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.unmark()


def _last(m: Any, count: int) -> tuple[Any, ...]:
    """The last `count` values, taken off the stack."""
    if count > len(m.stack):
        m.refuse("malformed pickle: too few values on the stack")
    items = m.stack[len(m.stack) - count :]
    del m.stack[len(m.stack) - count :]
    return tuple(items)


def _extend(m: Any, values: Iterable[Any]) -> None:
    if type(m.stack[-1]) is not list:
        m.refuse(f"the pickle appends to a {type(m.stack[-1]).__name__}")
    m.stack[-1].extend(values)


def _update(m: Any, items: list[Any] | tuple[Any, ...]) -> None:
    if type(m.stack[-1]) not in (dict, OrderedDict):
        m.refuse(f"the pickle sets items of a {type(m.stack[-1]).__name__}")
    m.stack[-1].update(zip(m.keys(items[::2]), items[1::2], strict=True))


def _add(m: Any, items: list[Any]) -> None:
    if type(m.stack[-1]) is not set:
        m.refuse(f"the pickle adds members to a {type(m.stack[-1]).__name__}")
    m.stack[-1].update(m.keys(items))


def _put(m: Any, index: int) -> None:
    m.memo[index] = m.stack[-1]


def _dict(m: Any) -> dict[Any, Any]:
    items = m.unmark()
    return dict(zip(m.keys(items[::2]), items[1::2], strict=True))


def _long(m: Any) -> int:
    return m.number(m.number(1), signed=True)


_BY_NAME: dict[str, Step] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda m: m.unmark(),
    "DUP": _push(lambda m: m.stack[-1]),
    "NONE": _push(lambda m: None),
    "NEWTRUE": _push(lambda m: True),
    "NEWFALSE": _push(lambda m: False),
    "BININT": _push(lambda m: m.number(4, signed=True)),
    "BININT1": _push(lambda m: m.number(1)),
    "BININT2": _push(lambda m: m.number(2)),
    "LONG1": _push(_long),
    "BINFLOAT": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    "SHORT_BINUNICODE": _push(lambda m: m.take(m.number(1)).decode("utf-8", "surrogatepass")),
    "BINUNICODE": _push(lambda m: m.take(m.number(4)).decode("utf-8", "surrogatepass")),
    "BINUNICODE8": _push(lambda m: m.take(m.number(8)).decode("utf-8", "surrogatepass")),
    "SHORT_BINBYTES": _push(lambda m: m.take(m.number(1))),
    "BINBYTES": _push(lambda m: m.take(m.number(4))),
    "BINBYTES8": _push(lambda m: m.take(m.number(8))),
    "EMPTY_LIST": _push(lambda m: []),
    "LIST": _push(lambda m: m.unmark()),
    "APPEND": lambda m: _extend(m, _last(m, 1)),
    "APPENDS": lambda m: _extend(m, m.unmark()),
    "EMPTY_TUPLE": _push(lambda m: ()),
    "TUPLE": _push(lambda m: tuple(m.unmark())),
    "TUPLE1": _push(lambda m: _last(m, 1)),
    "TUPLE2": _push(lambda m: _last(m, 2)),
    "TUPLE3": _push(lambda m: _last(m, 3)),
    "EMPTY_DICT": _push(lambda m: {}),
    "DICT": _push(_dict),
    "SETITEM": lambda m: _update(m, _last(m, 2)),
    "SETITEMS": lambda m: _update(m, m.unmark()),
    "EMPTY_SET": _push(lambda m: set()),
    "ADDITEMS": lambda m: _add(m, m.unmark()),
    "FROZENSET": _push(lambda m: frozenset(m.keys(m.unmark()))),
    "BINGET": _push(lambda m: m.memo[m.number(1)]),
    "LONG_BINGET": _push(lambda m: m.memo[m.number(4)]),
    "BINPUT": lambda m: _put(m, m.number(1)),
    "LONG_BINPUT": lambda m: _put(m, m.number(4)),
    "MEMOIZE": lambda m: _put(m, len(m.memo)),
    "GLOBAL": _push(lambda m: m.name(m.line(), m.line())),
    "STACK_GLOBAL": _push(lambda m: m.name(*_last(m, 2))),
    "REDUCE": _push(lambda m: m.call()),
    "NEWOBJ": _push(lambda m: m.new()),
    "BUILD": lambda m: m.state(),
    "BINPERSID": _push(lambda m: m.storage()),
}

#: What is done for an opcode, by its byte.
STEPS = {ord(op.code): _BY_NAME[op.name] for op in pickletools.opcodes if op.name in _BY_NAME}
