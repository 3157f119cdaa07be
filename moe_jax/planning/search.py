"""`search`: which mesh of all devices is likely the fastest that fits, by formula."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from ..axes import NAMED
from ..engine import _BYTES
from ..sharding import Sharding
from ..sharding.mesh import make_mesh as mesh_of
from .costs import cache_bytes, passes, ranks_of_tokens, roofline, work
from .devices import Topology
from .programs import Job, abstract_weights, device_bytes
from .wire import expected


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a mesh is likely to need: bytes on each device, and seconds of a prefill and of its last decode step.

    `rules`: the table of `axes.NAMED` that it goes with. `seconds`: of the whole job, if all of its steps take as long
    as the last.
    """

    sizes: dict[str, int]
    rules: str
    nbytes: float
    prefill: float
    step: float
    seconds: float


def search(job: Job, topology: Topology, rules: Sequence[str] = tuple(NAMED)) -> list[Estimate]:
    """Every mesh of all devices with each table of `rules`, those likely to fit first, the fastest of them first.

    Nothing is compiled, and the job's own table does not matter. Meshes that the model does not go with are left out;
    `ValueError` if that is all of them.
    """
    found, errors = [], []
    for sizes in meshes(len(topology.devices)):
        for name in rules if sizes["expert"] > 1 else rules[:1]:  # which differ in what lies along that axis
            try:
                found.append(estimate(dataclasses.replace(job, rules=name), topology, sizes))
            except ValueError as error:
                errors.append(str(error))
    if not found:
        raise ValueError(f"search: no mesh of {len(topology.devices)} devices goes with {job.name}: {errors[0]}")
    fits = lambda one: one.nbytes <= topology.device.memory
    return sorted(found, key=lambda one: (not fits(one), one.seconds if fits(one) else one.nbytes))


def meshes(devices: int) -> list[dict[str, int]]:
    """All sizes of the three axes whose product is `devices`.

    >>> len(meshes(8)), meshes(2)[0]
    (10, {'data': 1, 'expert': 1, 'model': 2})
    """
    of = lambda n: [i for i in range(1, n + 1) if n % i == 0]
    split = ((data, expert) for data in of(devices) for expert in of(devices // data))
    return [dict(data=data, expert=expert, model=devices // data // expert) for data, expert in split]


def estimate(job: Job, topology: Topology, sizes: dict[str, int]) -> Estimate:
    """What a mesh of these sizes needs, without compiling for it."""
    sharding = job.sharding(mesh_of(**sizes, devices=topology.devices))
    weights = abstract_weights(job, sharding)
    prefill, step = (
        roofline(work(job, sharding, stage, weights), expected(job, sharding, stage), topology.device).apart
        for stage in ("prefill", "decode")
    )
    nbytes = device_bytes(weights) + cache_bytes(job, sharding) + _temporaries(job, sharding)
    return Estimate(sizes, job.rules, nbytes, prefill, step, prefill + (job.new - 1) * step)


def _temporaries(job: Job, sharding: Sharding) -> float:
    """Bytes that a prefill is likely to need beside weights and cache.

    What layers make of as many tokens as run at once, and the rows of experts: three buffers of them were alive at once
    in the programs that were looked at (docs/planning.md). On TPUs those that even routing brings and a quarter more,
    elsewhere those of the worst routing.
    """
    architecture, run = job.config.architecture, passes(job, sharding, "prefill")
    if not architecture.moe_layers:
        return float(_BYTES)
    block, ranks = architecture.block, sharding.sizes["expert"]
    rows = float(run.tokens * ranks_of_tokens(sharding) * block.router.top_k)
    if sharding.mesh.devices.flat[0].platform == "tpu":
        rows = 1.25 * rows / ranks
    elif job.exchange == "ring":  # in all others a rank may get everyone's tokens
        rows /= ranks
    return _BYTES + 3.0 * rows * block.width * jnp.dtype(job.dtype).itemsize
