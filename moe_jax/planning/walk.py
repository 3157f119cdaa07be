"""A compiled program's instructions in loops and branches, and how often each runs."""

import dataclasses
import re
from collections.abc import Callable, Iterator

from ..benchmarks.hlo import Instruction, Program


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction of computation `block`, which runs `times` times.

    `branch`: it stands in a conditional, and may not run at all. `counted`: the loops around it have numbers of turns
    that the program says; where one has not, one turn is counted.
    """

    one: Instruction
    block: str
    times: int = 1
    branch: bool = False
    counted: bool = True


def walk(program: Program, sought: Callable[[Instruction], bool]) -> Iterator[Visit]:
    """All instructions that are `sought`, from the entry on, once for each place that calls their computation."""
    return _Walker(program.computations, sought).visits(program.entry)


class _Walker:
    def __init__(self, blocks: dict[str, dict[str, Instruction]], sought: Callable[[Instruction], bool]):
        self.blocks, self.sought = blocks, sought
        self._known: dict[str, bool] = {}

    def visits(self, block: str) -> Iterator[Visit]:
        """Those of a computation, and of all that it calls."""
        for one in self.blocks[block].values():
            if self.sought(one):
                yield Visit(one, block)
            for inner in _called(one):
                if not self._holds(inner):
                    continue
                found = self.visits(inner)
                if one.opcode == "while":
                    turns = _turns(self.blocks, block, one)
                    found = (_repeated(visit, turns) for visit in found)
                elif one.opcode == "conditional":
                    found = (dataclasses.replace(visit, branch=True) for visit in found)
                yield from found

    def _holds(self, block: str) -> bool:
        """Whether a computation, or one that it calls, has any."""
        if block not in self._known:
            self._known[block] = any(
                self.sought(one) or any(map(self._holds, _called(one))) for one in self.blocks.get(block, {}).values()
            )
        return self._known[block]


def _repeated(visit: Visit, turns: int | None) -> Visit:
    if turns is None:
        return dataclasses.replace(visit, counted=False)
    return dataclasses.replace(visit, times=visit.times * turns)


def _called(one: Instruction) -> list[str]:
    """The computations that an instruction runs; those that reductions apply to elements are none."""
    if one.opcode in ("reduce", "all-reduce", "all-reduce-start", "reduce-scatter", "scatter", "sort", "map"):
        return []
    single = re.findall(
        r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", one.text
    )
    several = re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", one.text)
    return single + [name for group in several for name in re.findall(r"[\w.\-]+", group)]


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
