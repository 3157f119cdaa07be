"""Reading the text of a compiled XLA program: its instructions, and which of them only move bytes."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
#: What gives its operand in another place, layout or width.
_MOVES = frozenset("copy transpose convert slice dynamic-slice reverse reshape concatenate pad".split())
#: What gives its operand as it lies.
_SAME = frozenset("bitcast get-tuple-element opt-barrier".split())
_FUSED = frozenset(("fusion", "fusion-start"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program. `arrays`: dtype and shape of each array that it gives; `calls`: the computation inside."""

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    calls: str | None
    op_name: str
    root: bool
    text: str

    @property
    def nbytes(self) -> int:
        """Bytes of the largest of its arrays."""
        return max((array_bytes(*array) for array in self.arrays), default=0)


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array by XLA's name of its dtype.

    >>> array_bytes("bf16", (3, 4)), array_bytes("pred", (5,)), array_bytes("f8e4m3fn", ())
    (24, 5, 1)
    """
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return math.prod(shape) * max(1, int(bits[1]) // 8 if bits else 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """`computations` by name, instructions by name in each, in the program's order; `entry`: where it begins; `inside`:
    those of fusions.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @property
    def inside(self) -> frozenset[str]:
        """Computations that run within a kernel, whose intermediate arrays are never stored."""
        every = [i for block in self.computations.values() for i in block.values()]
        applied = (re.search(r"to_apply=%?([\w.\-]+)", i.text) for i in every if i.opcode != "call")
        fused = (i.calls for i in every if i.opcode in _FUSED)
        return frozenset((*filter(None, fused), *(found[1] for found in applied if found)))

    @functools.cached_property
    def _callers(self) -> dict[str, tuple[str, Instruction]]:
        """The loop or call that runs a computation, and the computation that this stands in."""
        found = {}
        for name, block in self.computations.items():
            for one in block.values():
                inner = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", one.text)
                if inner and one.opcode in ("while", "call"):
                    found[inner[1]] = name, one
        return found

    def origin(self, block: str, name: str) -> str:
        """What an array is called where it comes from, by way of loops that only hand it on: an argument, mostly."""
        index: list[int] = []  # places in the tuples that are still to be opened
        while name in self.computations[block]:
            one = self.computations[block][name]
            if one.opcode == "get-tuple-element":
                index.append(int(re.search(r"index=(\d+)", one.text)[1]))
            elif one.opcode == "tuple" and index:
                name = one.operands[index.pop()]
                continue
            elif one.opcode == "parameter" and block in self._callers:
                block, caller = self._callers[block]
                name = caller.operands[0 if caller.opcode == "while" else int(re.match(r"\d+", one.text)[0])]
                continue
            elif one.opcode not in ("bitcast", "while", "opt-barrier"):
                return one.op_name.replace("\\", "") if one.opcode == "parameter" and one.op_name else one.name
            name = one.operands[0]
        return name

    def launched(self) -> Iterator[tuple[str, Instruction]]:
        """Instructions outside of fusions, each with its computation: what a device runs, or what only names arrays."""
        inside = self.inside
        for name, block in self.computations.items():
            if name not in inside:
                yield from ((name, one) for one in block.values())

    def within(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions of a fusion, without parameters and constants; else the instruction itself."""
        block = self.computations.get(instruction.calls, {})
        found = tuple(i for i in block.values() if i.opcode not in ("parameter", "constant"))
        return found or (instruction,)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`.

    >>> import jax
    >>> program = parse(jax.jit(lambda x: x.T + 1).lower(jax.numpy.ones((2, 3))).compile().as_text())
    >>> [one.arrays for _, one in program.launched() if one.root]
    [(('f32', (3, 2)),)]
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found)
    return Program(computations, entry)


def _instruction(found: re.Match) -> Instruction:
    root, name, made, opcode, rest = found.groups()
    arrays = tuple(
        (dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", made)
    )
    calls = re.search(r"calls=%?([\w.\-]+)", rest)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0]))
    inner = calls[1] if calls else None
    return Instruction(name, opcode, arrays, operands, inner, op_name[1] if op_name else "", bool(root), rest)


@dataclasses.dataclass(frozen=True)
class Movement:
    """An instruction that stores `nbytes` which are elsewhere already; `kind`: the operation behind it.

    `source`: the array that is moved, by the name of the program's argument if it is one.
    """

    name: str
    kind: str
    array: str
    nbytes: int
    source: str
    op_name: str

    def __str__(self):
        return f"{self.name}: {self.kind} of {self.source} to {self.array}, {self.nbytes / 1e6:.3g} MB ({self.op_name})"


def weight_movements(text: str, smallest_bytes: int) -> list[Movement]:
    """What a program copies, transposes, slices or widens, in pieces of at least `smallest_bytes`.

    Such are plain instructions and fusions (asynchronous ones too, which a GPU runs as memory copies) of which an
    output is a parameter that was moved and nothing else, or int8 values times their scales. Reductions and products
    that read a slice or a widened block in passing are none.

    >>> import jax
    >>> stack = jax.numpy.ones((4, 64, 64))
    >>> sliced = jax.jit(lambda w, i: jax.lax.dynamic_index_in_dim(w, i)).lower(stack, 1).compile().as_text()
    >>> [m.kind for m in weight_movements(sliced, 64 * 64 * 4)], weight_movements(sliced, 5 * 64 * 64 * 4)
    (['dynamic-slice'], [])
    """
    program = parse(text)
    return [
        dataclasses.replace(moved, source=program.origin(block, moved.source))
        for block, one in program.launched()
        for moved in _movements(one, program.computations)
        if moved.nbytes >= smallest_bytes
    ]


def _movements(one: Instruction, computations: dict[str, dict[str, Instruction]]) -> Iterator[Movement]:
    if one.opcode in _FUSED and one.calls in computations:
        yield from _fused_movements(one, computations[one.calls])
    elif (kind := one.opcode.removesuffix("-start")) in _MOVES:
        # a copy's start gives the copy first, others their operands
        array = one.arrays[0 if kind in (one.opcode, "copy") else len(one.operands)]
        source = one.operands[0] if one.operands else ""
        yield Movement(one.name, kind, _shown(array), array_bytes(*array), source, one.op_name)


def _fused_movements(fusion: Instruction, block: dict[str, Instruction]) -> Iterator[Movement]:
    root = next(i for i in block.values() if i.root)
    for output in [block[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        kind, parameter = _moved(output, block)
        if kind and parameter is not None:
            index = int(re.match(r"(\d+)", parameter.text)[1])
            source = fusion.operands[index] if index < len(fusion.operands) else parameter.name
            array = output.arrays[0]
            yield Movement(fusion.name, kind, _shown(array), array_bytes(*array), source, fusion.op_name)


def _moved(one: Instruction, block: dict[str, Instruction]) -> tuple[str, Instruction | None]:
    """Which operation made `one` out of a parameter of its fusion by moves alone ("": none), and the parameter."""
    kind = ""
    while one.opcode != "parameter":
        if one.opcode == "multiply" and (narrow := _narrow(one, block)) is not None:
            return "dequantisation", narrow
        if one.opcode not in _MOVES | _SAME or not one.operands or one.operands[0] not in block:
            return "", None
        kind = kind if one.opcode in _SAME or kind else one.opcode
        one = block[one.operands[0]]
    return kind, one


def _narrow(product: Instruction, block: dict[str, Instruction]) -> Instruction | None:
    """The parameter of 8 bits a value that a product widens, if there is one."""
    for name in product.operands:
        one = block[name]
        while one.opcode in _MOVES | _SAME and one.operands and one.operands[0] in block:
            one = block[one.operands[0]]
        if one.opcode == "parameter" and one.arrays[0][0] in ("s8", "u8"):
            return one
    return None


def _shown(array: tuple[str, tuple[int, ...]]) -> str:
    return f"{array[0]}[{','.join(map(str, array[1]))}]"
