"""The library's own kernels in a program that is compiled for TPUs, read from its text."""

import dataclasses
import re

from ..benchmarks.hlo import parse
from .devices import Device
from .walk import walk

_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_MEMORY = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Calls of a kernel with equal operands, `times` in all.

    Of one call: `vmem`, bytes of a core's memory that it takes, by the compiler; `nbytes` that it moves and `flops`, as
    the kernel itself says of even routing. `branch`, `counted`: see `Visit`.
    """

    name: str
    vmem: int
    nbytes: int
    flops: int
    times: int
    branch: bool = False
    counted: bool = True

    def seconds(self, device: Device) -> float:
        """The least time that one call takes."""
        return max(self.nbytes / device.bandwidth, self.flops / device.flops)

    def limit(self, device: Device) -> str:
        """What holds it back."""
        return "memory" if self.nbytes / device.bandwidth >= self.flops / device.flops else "compute"


def kernels(text: str) -> list[Kernel]:
    """All calls of `moe_jax_*` kernels for TPUs in `compiled.as_text()`, those that are alike together."""
    found: dict[Kernel, int] = {}
    for visit in walk(parse(text), lambda one: 'custom_call_target="tpu_custom_call"' in one.text):
        name = re.match(r"(moe_jax_\w+?)(\.[\w.]+)?$", visit.one.name)
        if name is None:
            continue
        cost, memory = _COST.search(visit.one.text), _MEMORY.search(visit.one.text)
        flops, nbytes = map(int, cost.groups()) if cost else (0, 0)
        vmem = max((int(size) for size in re.findall(r'"size":"(\d+)"', memory[1])), default=0) if memory else 0
        alike = Kernel(name[1], vmem, nbytes, flops, 0, visit.branch, visit.counted)
        found[alike] = found.get(alike, 0) + visit.times
    return [dataclasses.replace(alike, times=times) for alike, times in found.items()]
