"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from ..benchmarks.hlo import Instruction, Program, array_bytes, parse

#: Operations between devices, by XLA's names; in asynchronous form they are `-start` and `-done`.
KINDS = tuple("all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute".split())


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices, `times` times.

    `nbytes`: of what each device has afterwards. `devices`: those of the first group that takes part, as the mesh
    counts them. `branch`: it stands in a conditional, and may not run at all. `counted`: the loop around it has a
    number of turns that the program says; where not, one turn is counted.
    """

    kind: str
    nbytes: int
    devices: tuple[int, ...]
    times: int = 1
    branch: bool = False
    counted: bool = True

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all, by the algorithms that send the least.

        >>> Collective("all-reduce", 800, (0, 1, 2, 3)).sent, Collective("reduce-scatter", 200, (0, 1, 2, 3)).sent
        (1200.0, 600)
        """
        n = len(self.devices)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}
        return self.times * self.nbytes * share.get(self.kind, (n - 1) / n)


def collectives(text: str, devices: int) -> list[Collective]:
    """All that a program over `devices` devices sends, from `compiled.as_text()`.

    What stands in a loop counts as often as the loop turns.

    >>> head, argument = "ENTRY %main (a: f32[4]) -> f32[4] {", "  %a = f32[4]{0} parameter(0)"
    >>> body = "  ROOT %sum = f32[4]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add"
    >>> [(one.kind, one.sent) for one in collectives("\\n".join([head, argument, body]), 2)]
    [('all-reduce', 16.0)]
    """
    reader = _Reader(parse(text), devices)
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    return [one for one in reader.read(entry[1]) if len(one.devices) > 1]


class _Reader:
    def __init__(self, program: Program, devices: int):
        self.blocks, self.devices = program.computations, devices
        self._sending: dict[str, bool] = {}

    def read(self, block: str) -> Iterator[Collective]:
        """Those of a computation, and of all that it calls."""
        for one in self.blocks[block].values():
            if one.opcode.removesuffix("-done") in KINDS and not self._goes_on(one, block):
                start = self.blocks[block][one.operands[0]] if one.opcode.endswith("-done") else one
                yield self._collective(one, start, block)
            for inner in _called(one):
                if not self._sends(inner):
                    continue
                found = self.read(inner)
                if one.opcode == "while":
                    turns = _turns(self.blocks, block, one)
                    found = (_repeated(c, turns) for c in found)
                elif one.opcode == "conditional":
                    found = (dataclasses.replace(c, branch=True) for c in found)
                yield from found

    def _sends(self, block: str) -> bool:
        """Whether a computation, or one that it calls, has any."""
        if block not in self._sending:
            self._sending[block] = any(
                one.opcode.removesuffix("-done") in KINDS or any(map(self._sends, _called(one)))
                for one in self.blocks.get(block, {}).values()
            )
        return self._sending[block]

    def _goes_on(self, one: Instruction, block: str) -> bool:
        """Whether it only stands for one that began elsewhere: on TPUs, in each fusion from its start to its end."""
        begins = (i for i in self.blocks[block].values() if "AsyncCollectiveStart" in i.text)
        return "chain_id=" in one.text and not any(one.name in i.operands for i in begins)

    def _collective(self, one: Instruction, start: Instruction, block: str) -> Collective:
        kind, devices = one.opcode.removesuffix("-done"), _group(start.text, self.devices)
        nbytes = sum(array_bytes(*array) for array in one.arrays)
        if kind == "ragged-all-to-all":  # buffers for the worst case: no more moves than fits in either
            nbytes = min(nbytes, self.blocks[block][start.operands[0]].nbytes)
        if block.startswith("all-reduce-scatter"):  # a TPU's fusion of both, which moves no more than the latter
            kind, nbytes = "reduce-scatter", nbytes // len(devices)
        return Collective(kind, nbytes, devices)


def _called(one: Instruction) -> list[str]:
    """The computations that an instruction runs; those that reductions apply to elements are none."""
    if one.opcode in ("reduce", "all-reduce", "all-reduce-start", "reduce-scatter", "scatter", "sort", "map"):
        return []
    single = re.findall(
        r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", one.text
    )
    several = re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", one.text)
    return single + [name for group in several for name in re.findall(r"[\w.\-]+", group)]


def _repeated(one: Collective, turns: int | None) -> Collective:
    if turns is None:
        return dataclasses.replace(one, counted=False)
    return dataclasses.replace(one, times=one.times * turns)


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first of the groups that take part: `replica_groups` in one of its spellings, or pairs of a permutation.

    >>> _group("%x), replica_groups={{0,2},{1,3}}, dimensions={0}", 4)
    (0, 2)
    >>> _group("%x), replica_groups=[2,4]<=[4,2]T(1,0)", 8)
    (0, 2, 4, 6)
    >>> _group("%x), replica_groups=mesh['data'=2,'expert'=2,'model'=2] {'data','model'}, dimensions={0}", 8)
    (0, 1, 4, 5)
    """
    if found := re.search(r"source_target_pairs=\{\{([\d,]+)\}", text):
        pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
        return _cycle([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, shape[-1])
        return tuple(ids[0].tolist())
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return mesh_group(sizes, tuple(re.findall(r"'([^']+)'", found[2])))
    return tuple(range(devices))


def mesh_group(sizes: dict[str, int], names: tuple[str, ...]) -> tuple[int, ...]:
    """The first group of devices along the axes `names` of a mesh, as `make_mesh` counts devices.

    >>> mesh_group({"data": 2, "expert": 2, "model": 2}, ("expert",))
    (0, 2)
    """
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return tuple(ids[tuple(slice(None) if name in names else 0 for name in sizes)].ravel().tolist())


def _cycle(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Those among whom a permutation of devices moves what the first one has.

    >>> _cycle([(0, 2), (2, 0), (1, 3), (3, 1)])
    (0, 2)
    """
    onward, found = {pair[0]: pair[1] for pair in pairs}, [pairs[0][0]]
    while (after := onward.get(found[-1])) is not None and after not in found:
        found.append(after)
    return tuple(found)


def _turns(blocks: dict[str, dict[str, Instruction]], block: str, loop: Instruction) -> int | None:
    """How often a loop runs its body: as XLA notes it, or by the constants that it counts from and to; else None."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    condition = blocks[re.search(r"condition=%?([\w.\-]+)", loop.text)[1]]
    root = next(one for one in condition.values() if one.root)
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    counter, limit = (condition.get(name) for name in root.operands)
    if counter is None or counter.opcode != "get-tuple-element" or (most := _constant(limit)) is None:
        return None
    carry = blocks[block][loop.operands[0]]
    start = blocks[block].get(carry.operands[_index(counter)]) if carry.opcode == "tuple" else None
    while start is not None and start.opcode in ("copy", "bitcast"):
        start = blocks[block].get(start.operands[0])
    # JAX counts from 0 where it is not seen: XLA moves constants into the loops around
    return most - (_constant(start) or 0)


def _constant(one: Instruction | None) -> int | None:
    found = re.match(r"(-?\d+)\)", one.text) if one is not None and one.opcode == "constant" else None
    return int(found[1]) if found else None


def _index(one: Instruction) -> int:
    return int(re.search(r"index=(\d+)", one.text)[1])
