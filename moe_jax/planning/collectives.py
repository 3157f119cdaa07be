"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re

import numpy as np

from ..benchmarks.hlo import Instruction, array_bytes, parse
from .walk import Visit, walk

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
    program = parse(text)
    blocks, found = program.computations, []
    for visit in walk(program, lambda one: one.opcode.removesuffix("-done") in KINDS):
        if not _goes_on(visit.one, blocks[visit.block]):
            found.append(_collective(visit, blocks[visit.block], devices))
    return [one for one in found if len(one.devices) > 1]


def _goes_on(one: Instruction, block: dict[str, Instruction]) -> bool:
    """Whether it only stands for one that began elsewhere: on TPUs, in each fusion from its start to its end."""
    begins = (i for i in block.values() if "AsyncCollectiveStart" in i.text)
    return "chain_id=" in one.text and not any(one.name in i.operands for i in begins)


def _collective(visit: Visit, block: dict[str, Instruction], devices: int) -> Collective:
    one = visit.one
    start = block[one.operands[0]] if one.opcode.endswith("-done") else one
    kind, group = one.opcode.removesuffix("-done"), _group(start.text, devices)
    nbytes = sum(array_bytes(*array) for array in one.arrays)
    if kind == "ragged-all-to-all":  # buffers for the worst case: no more moves than fits in either
        nbytes = min(nbytes, block[start.operands[0]].nbytes)
    if visit.block.startswith("all-reduce-scatter"):  # a TPU's fusion of both, which moves no more than the latter
        kind, nbytes = "reduce-scatter", nbytes // len(group)
    return Collective(kind, nbytes, group, visit.times, visit.branch, visit.counted)


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
