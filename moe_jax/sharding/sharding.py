"""`Sharding`: a mesh and a table of axes, and what they make of a model's arrays and programs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.quantized import is_quantized

from ..axes import RULES, Axes
from ..block_config import Architecture
from ..placement import Placement
from ..weights import nested
from .shares import Share, local, shares

#: Names of the arrays that a placement adds to the weights.
TABLES = "moe.slots", "moe.copies"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where a model lies: `mesh`, the mesh axes of each logical axis, and how tokens meet other devices' experts.

    `exchange`: a name of `moe_jax.exchange`, None to choose by size. `unit`, `placement`: see `shares`. A mesh whose
    axes are of another type than `AxisType.Auto`, as `jax.make_mesh` makes them, is taken as if they were. Raises
    `ValueError` for what is no mesh, table or placement, and for axes that the mesh does not have.
    """

    mesh: Mesh
    axes: Axes = RULES
    exchange: str | None = None
    unit: int = 1
    placement: Placement | None = None

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise ValueError(f"mesh: {self.mesh!r} is no jax.sharding.Mesh; moe_jax.make_mesh makes one")
        if not isinstance(self.axes, Axes):
            raise ValueError(f"rules: {self.axes!r} is no moe_jax.Axes; moe_jax.axes.NAMED has some by name")
        if not isinstance(self.placement, Placement | None):
            raise ValueError(f"placement: {self.placement!r} is no moe_jax.Placement; moe_jax.balance makes one")
        if missing := sorted(self.axes.names() - set(self.mesh.axis_names)):
            raise ValueError(f"mesh: has axes {self.mesh.axis_names}, not {', '.join(missing)}")
        types = (AxisType.Auto,) * len(self.mesh.axis_names)
        if self.mesh.axis_types != types:
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=types))

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis."""
        return dict(self.mesh.shape)

    @property
    def rows(self) -> int:
        """In how many parts a batch is cut."""
        return math.prod(self.sizes[name] for name in self.axes.batch)

    @property
    def batch(self) -> PartitionSpec:
        """The spec of an array whose first axis is the batch."""
        return PartitionSpec(self.axes.batch or None)

    def shares(self, architecture: Architecture) -> dict[str, Share]:
        """How every parameter lies."""
        return shares(architecture, self.axes, self.sizes, self.unit, self.placement)

    def tables(self) -> dict[str, jax.Array]:
        """What a router's choices are looked up in where experts are placed, on every device; nothing without."""
        if self.placement is None:
            return {}
        return dict(zip(TABLES, map(self.put, self.placement.table()), strict=True))

    def put(self, x: np.ndarray, spec: PartitionSpec | None = None) -> jax.Array:
        """An array that every process has, on the devices: by `spec`, or all of it on each."""
        lies = NamedSharding(self.mesh, spec or PartitionSpec())
        return jax.make_array_from_callback(x.shape, lies, lambda index: x[index])

    def local(self, architecture: Architecture) -> Architecture:
        """What one device computes."""
        return local(architecture, self.axes, self.sizes, self.unit, self.exchange)

    def specs(self, architecture: Architecture) -> dict[str, Any]:
        """The partition specs of weights, nested as they are; those of a quantised kernel are its `leaf_specs`."""
        found = {name: share.spec for name, share in self.shares(architecture).items()}
        return nested(found | ({} if self.placement is None else dict.fromkeys(TABLES, PartitionSpec())))

    def map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` of one device's parts as a function of whole arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sharding_of(
    mesh: Mesh | None,
    rules: Axes = RULES,
    exchange: str | None = None,
    unit: int = 1,
    placement: Placement | None = None,
) -> Sharding | None:
    """The `Sharding` of a mesh, or None without one; `ValueError` for rules or a placement that would mean nothing."""
    if mesh is not None:
        return Sharding(mesh, rules, exchange, unit, placement)
    if placement is not None:
        raise ValueError("placement: of experts on ranks, but mesh is None")
    if rules != RULES:
        raise ValueError(f"rules: {rules!r} say what lies where on a mesh, but mesh is None")
    return None


def fetched(x: jax.Array) -> np.ndarray:
    """An array on the host, whatever devices of whatever processes hold it; all of them have to ask."""
    if not x.is_fully_addressable:
        lies: Any = x.sharding
        x = _everywhere(NamedSharding(lies.mesh, PartitionSpec()))(x)
    return np.asarray(x)


@functools.cache
def _everywhere(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=where)


def leaf_specs(weights: Mapping[str, Any], specs: Mapping[str, Any]) -> Any:
    """Specs for every array of `weights`, nested alike: those of a kernel for all that it is stored as."""

    def one(kernel, spec):
        if not is_quantized(kernel):
            return spec
        return jax.tree.map(lambda leaf: _fitted(spec, kernel, leaf), kernel)

    return jax.tree.map(one, dict(weights), dict(specs), is_leaf=is_quantized)


def _fitted(spec: PartitionSpec, kernel: Any, leaf: Any) -> PartitionSpec:
    """The spec of an array that a kernel is stored as, of which one number may be for all inputs."""
    parts = [*spec, *[None] * (kernel.ndim - len(spec))]
    return PartitionSpec(*parts[:-1], parts[-1] if leaf.shape[-1] > 1 else None)
