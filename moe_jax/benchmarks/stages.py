"""Which stage of the flow a kernel belongs to, by its name and the compiled program that it comes from."""

import collections
import re
from collections.abc import Sequence

from .hlo import Instruction, Program

#: Stages in the order of the flow; "block": norms and residual sums, where a kernel does nothing else.
STAGES = (
    "embedding block attention router plan expert_mlp combine shared mlp logits sample copies other".split()
)  # fmt: skip
_SCOPES = {name: name for name in STAGES} | {"moe": "block", "decode_attention": "attention"}
#: Our kernels by the beginning of their names, the longest first; those of linear layers serve several stages.
_OURS = {
    "moe_jax_routing_count": "plan",
    "moe_jax_routing_place": "plan",
    "moe_jax_routing": "router",
    "moe_jax_expert": "expert_mlp",
    "moe_jax_attention": "attention",
}
_COPY = re.compile(r"memcpy|memset", re.IGNORECASE)


def stage_of_scope(op_name: str) -> str | None:
    """The innermost scope of an instruction's `op_name` that is a stage.

    >>> stage_of_scope("jit(decode)/while/body/moe/expert_mlp/cond/combine/add"), stage_of_scope("jit(decode)/add")
    ('combine', None)
    """
    parts = op_name.split("/")
    if parts[-1] == "gather" and not any(part in _SCOPES for part in parts):
        return "embedding"
    for part in reversed(parts):
        kernel = next((stage for name, stage in _OURS.items() if part.startswith(name)), None)
        if stage := kernel or _SCOPES.get(part):
            return stage
    return None


class Stages:
    """From kernels' names, as a profiler shows them, to stages.

    XLA names a kernel after its fusion; one kernel may serve several fusions, and then the kernels around it decide.
    """

    def __init__(self, program: Program):
        self._by_kernel: dict[str, set[str]] = collections.defaultdict(set)
        for _, one in program.launched():
            stage = _stage(program, one)
            shared = re.search(r'deduplicated_name="([^"]+)"', one.text)
            for name in (one.name, *(shared.groups() if shared else ())):
                if stage:
                    self._by_kernel[_kernel_name(name)].add(stage)
            ours = re.search(r"(moe_jax_\w+)/", one.op_name + "/")
            if ours and stage:
                self._by_kernel[ours[1]].add(stage)

    def candidates(self, kernel: str, instruction: str = "") -> set[str]:
        """The stages that a kernel of this name may belong to; `instruction`: its own, where a profiler knows it.

        In a recorded sequence of kernels it may be that of the whole sequence, which says nothing.
        """
        if _COPY.match(kernel):
            return {"copies"}
        if found := self._by_kernel.get(_kernel_name(instruction)):
            return found
        if stage := next((stage for name, stage in _OURS.items() if kernel.startswith(name)), None):
            return {stage}
        if kernel.startswith("moe_jax_"):
            return set().union(*(s for name, s in self._by_kernel.items() if kernel.startswith(name)))
        return self._by_kernel.get(_kernel_name(kernel), set())

    def of(self, kernels: Sequence[tuple[str, str]]) -> list[str]:
        """The stage of each of a sequence of kernels (name and instruction), in the order in which they ran.

        Where there is a choice, the stage of the kernel before it, else of the one after it; what the program does
        not name (a library's product) belongs to the stage on both sides of it, if they are one.
        """
        choices = [self.candidates(*kernel) for kernel in kernels]
        stages = [next(iter(found)) if len(found) == 1 else None for found in choices]
        for place, left, right in _around(stages):
            if stages[place] is None and choices[place]:
                near = [side for side in (left, right) if side in choices[place]]
                stages[place] = near[0] if near else min(choices[place], key=STAGES.index)
        return [
            stage or (left if left == right else None) or "other"
            for stage, (_, left, right) in zip(stages, _around(stages), strict=True)
        ]


def _around(stages: Sequence[str | None]) -> list[tuple[int, str | None, str | None]]:
    """Each place with the known stages before and after it; copies are none."""
    places = [stage if stage != "copies" else None for stage in stages]
    return list(zip(range(len(stages)), _carried(places), _carried(places[::-1])[::-1], strict=True))


def _carried(stages: Sequence[str | None]) -> list[str | None]:
    """The last stage that stood before each place."""
    last: str | None = None
    found: list[str | None] = []
    for stage in stages:
        found.append(last)
        last = stage or last
    return found


def _kernel_name(name: str) -> str:
    return re.sub(r"[^\w]", "_", name)


def _stage(program: Program, one: Instruction) -> str | None:
    """The stage of most of what a kernel computes; norms and sums count where there is nothing else."""
    inner = [stage_of_scope(i.op_name) for i in program.within(one)]
    counts = collections.Counter(stage for stage in inner if stage)
    own = stage_of_scope(one.op_name)
    if own in (None, "block"):
        counts.pop("block", None)
        return counts.most_common(1)[0][0] if counts else own
    return own
