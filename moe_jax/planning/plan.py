"""`make_plan`: the programs of a job on a mesh, compiled, and what they need."""

import dataclasses
import time
from collections.abc import Callable

from ..sharding.mesh import make_mesh as mesh_of
from .collectives import Collective, collectives
from .costs import Roofline, cache_bytes, roofline, work
from .devices import Topology
from .kernels import Kernel, kernels
from .programs import Job, Memory, Stage, abstract_weights, compile_stage, device_bytes

STAGES: tuple[Stage, ...] = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One program. `memory` None: its compiler found too little, and said `refusal`. `seconds`: to compile it."""

    stage: Stage
    memory: Memory | None
    refusal: str
    sent: list[Collective]
    kernels: list[Kernel]
    roofline: Roofline
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job needs on each device of a mesh, in bytes and seconds.

    `weights` and `cache`: as they are stored; a compiler may lay them out with gaps, which is in the programs'
    `memory`. `seconds`: all in all, compiling and the rest.
    """

    job: Job
    topology: Topology
    sizes: dict[str, int]
    weights: int
    cache: int
    stages: tuple[StagePlan, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether every program finds enough memory."""
        return all(self.fits_in(stage) for stage in self.stages)

    def fits_in(self, stage: StagePlan) -> bool:
        """Whether one does."""
        return stage.memory is not None and stage.memory.total <= self.topology.device.memory


def make_plan(
    job: Job, topology: Topology, sizes: dict[str, int], tell: Callable[[str], None] = lambda line: None
) -> Plan:
    """Compile the prefill and a decode step for a mesh of these sizes, see `make_mesh`; `tell` hears of progress.

    No weight is made. Raises `ValueError` for meshes that the topology or the model does not go with.
    """
    begin = time.perf_counter()
    mesh = mesh_of(**sizes, devices=topology.devices)
    sharding = job.sharding(mesh)
    weights = abstract_weights(job, sharding)
    stages = []
    for stage in STAGES:
        tell(f"compiling {stage} for {mesh.size} devices ...")
        made = compile_stage(job, sharding, stage, weights)
        tell(f"compiled {stage} in {made.seconds:.1f} s")
        sent = collectives(made.text, mesh.size) if made.memory else []
        own = kernels(made.text) if made.memory else []
        limits = roofline(work(job, sharding, stage, weights), sent, topology.device)
        stages.append(StagePlan(stage, made.memory, made.refusal, sent, own, limits, made.seconds))
    return Plan(
        job=job,
        topology=topology,
        sizes=dict(mesh.shape),
        weights=device_bytes(weights),
        cache=cache_bytes(job, sharding),
        stages=tuple(stages),
        seconds=time.perf_counter() - begin,
    )
