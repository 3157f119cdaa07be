"""How every parameter is cut along a mesh: its stored shape, its partition spec, and what stands where.

Stored arrays are cut into equal parts. Where a model does not come out even, they hold more than the model: heads of
queries, hidden units, experts and words that are zero, and heads of keys and values more than once, so that each device
has those of its own queries. Biases that are added to a sum over devices stand on the first of these only.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from ..axes import Axes
from ..block_config import Architecture, AttentionConfig
from ..placement import Placement
from ..weights import Parameter, parameters


@dataclasses.dataclass(frozen=True)
class Share:
    """How one parameter lies on the mesh.

    `sources`: for each axis what stands at each place, an index into the model's parameter, -1 for zeros; None: the
    parameter's own indices; `[L, places]` where it differs from layer to layer. `axes`: the mesh axes that each axis is
    cut along.
    """

    sources: tuple[np.ndarray | None, ...]
    axes: tuple[tuple[str, ...], ...]

    @property
    def spec(self) -> PartitionSpec:
        """The partition spec of the stored array."""
        return PartitionSpec(*(names or None for names in self.axes))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is stored for a parameter of `shape`."""
        return tuple(n if s is None else s.shape[-1] for n, s in zip(shape, self.sources, strict=True))

    def plain(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of `shape` is stored as it is: nothing twice, nothing filled up, all in order."""
        pairs = zip(shape, self.sources, strict=True)
        return all(source is None or np.array_equal(source, np.arange(size)) for size, source in pairs)

    def of_stored(self, name: str, shape: tuple[int, ...], block: int | None, sizes: dict[str, int]) -> "Share":
        """The share of an array that a kernel of `shape` is stored as.

        `block`: inputs that one element of the array stands for, None for all. Raises `ValueError` where such inputs
        would come apart.
        """
        names, total, stored = self.axes[-1], shape[-1], self.stored_shape(shape)[-1]
        if block is None:
            return Share((*self.sources[:-1], None), (*self.axes[:-1], ()))
        part = stored // math.prod(sizes[n] for n in names)
        if names and part % block:
            raise ValueError(f"{name}: {part} of {total} inputs along {names}, no multiple of {block} with one scale")
        length, need = -(-total // block), -(-stored // block)
        last = None if need == length else np.concatenate([np.arange(length), np.full(need - length, -1)])
        return Share((*self.sources[:-1], last), self.axes)


def shares(
    architecture: Architecture,
    axes: Axes,
    sizes: dict[str, int],
    unit: int = 1,
    placement: Placement | None = None,
) -> dict[str, Share]:
    """The share of every parameter, for a table of axes and the sizes of the mesh.

    `unit`: inputs of a quantised kernel that are stored together, between which hidden widths are cut. `placement`: the
    experts of each layer's places, None for all in order.
    """
    ways = {f.name: math.prod(sizes[n] for n in getattr(axes, f.name)) for f in dataclasses.fields(axes)}
    check_experts(architecture, ways["experts"], placement)
    found = {}
    for name, parameter in parameters(architecture).items():
        sources, cuts = [], []
        for axis in range(len(parameter.shape)):
            source, logical = _axis(architecture, name, parameter, axis, ways, unit)
            if logical == "experts" and placement is not None:
                source = placement.slots
            sources.append(source)
            cuts.append(getattr(axes, logical) if logical else ())
        found[name] = Share(tuple(sources), tuple(cuts))
    return found


def check_experts(architecture: Architecture, ranks: int, placement: Placement | None) -> None:
    """`ValueError` where a pyramid's experts cannot be dealt out evenly, or a placement is for other ones."""
    if placement is not None:
        counts = set(architecture.expert_counts)
        found = len(placement.slots), {placement.num_experts}, placement.ranks
        if found != (len(architecture.moe_layers), counts, ranks):
            layers = f"{len(architecture.moe_layers)} layers of {sorted(counts)} experts on {ranks} ranks"
            raise ValueError(f"placement: of {found[0]} layers of {placement.num_experts} on {found[2]}, not {layers}")
    odd = sorted({count for count in architecture.expert_counts if count % ranks})
    if architecture.pyramid and odd:
        common = math.gcd(*architecture.expert_counts)
        fit = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(f"experts: layers with {odd} experts do not divide by {ranks} ranks; these would do: {fit}")


def _axis(architecture, name, parameter: Parameter, axis: int, ways, unit: int) -> tuple[Any, str | None]:
    """What stands along one axis of a parameter, and the logical axis that it is."""
    group, _, leaf = name.rpartition(".")
    size = parameter.shape[axis]
    last = axis == len(parameter.shape) - 1
    if name in ("embedding", "head.kernel", "head.bias"):
        return (_padded(size, ways["vocab"]), "vocab") if axis == 0 else (None, None)
    if group == "attention":
        return _attention_axis(architecture.block.attention, leaf, axis, size, ways["heads"])
    if group == "moe" and axis == (0 if parameter.counts else 1) and parameter.experts:
        if parameter.counts:
            return _dealt(parameter.counts, ways["experts"]), "experts"
        return _padded(size, ways["experts"]), "experts"
    if (group == "moe" and parameter.experts) or group in ("dense", "shared"):
        if leaf == "down_bias" and last:
            return _once(size, ways["hidden"]), "hidden"
        bias = leaf in ("up_bias", "gate_bias") and last
        if bias or (leaf == "down" and last) or (leaf in ("up", "gate") and axis == len(parameter.shape) - 2):
            return _padded(size, ways["hidden"], unit), "hidden"
    return None, None


def _attention_axis(config: AttentionConfig, leaf: str, axis: int, size: int, ways: int):
    if leaf == "o_bias" and axis == 1:
        return _once(size, ways), "heads"
    per_head = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "sinks", "q_up", "kv_up")
    full = config.qk_norm == "full" and leaf in ("q_norm", "k_norm")
    if not ((leaf in per_head or full) and axis == 1) and not (leaf == "o" and axis == 2):
        return None, None
    if leaf.removesuffix("_bias").removesuffix("_norm") in ("k", "v"):
        return kv_heads(config, ways), "heads"
    return _padded(size, ways, config.value_dim if leaf == "o" else 1), "heads"


def kv_heads(config: AttentionConfig, ways: int) -> np.ndarray:
    """The key and value head at each place: every device has those of its query heads, each for equally many of them.

    >>> c = AttentionConfig(num_heads=12, num_kv_heads=3, head_dim=4, value_dim=4, scale=1.0, rope=None)
    >>> kv_heads(c, 2).tolist(), kv_heads(c, 6).tolist()
    ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2])
    """
    group, own = config.num_heads // config.num_kv_heads, -(-config.num_heads // ways)
    query = np.arange(0, own * ways, math.gcd(group, own))
    return np.where(query < config.num_heads, query // group, -1)


def _padded(size: int, ways: int, unit: int = 1) -> np.ndarray | None:
    """All indices, and -1 up to a size that divides into `ways` equal parts of whole units."""
    part = size if ways == 1 else -(-size // (ways * unit)) * unit
    return None if part * ways == size else np.concatenate([np.arange(size), np.full(part * ways - size, -1)])


def _once(size: int, ways: int) -> np.ndarray | None:
    """All indices for the first of `ways` parts, none for the others."""
    return None if ways == 1 else np.concatenate([np.arange(size), np.full((ways - 1) * size, -1)])


def _dealt(counts: tuple[int, ...], ranks: int) -> np.ndarray:
    """Experts of all layers of a pyramid, rank by rank: of each layer an equal part."""
    firsts = np.cumsum((0, *counts[:-1]))
    return np.concatenate([
        np.arange(first + rank * count // ranks, first + (rank + 1) * count // ranks)
        for rank in range(ranks)
        for first, count in zip(firsts, counts, strict=True)
    ])  # fmt: skip


def local(
    architecture: Architecture, axes: Axes, sizes: dict[str, int], unit: int = 1, exchange: str | None = None
) -> Architecture:
    """The architecture of one device's share: fewer heads and hidden units, and sums over mesh axes."""
    axes = axes.within(sizes)
    ways = lambda names: math.prod(sizes[name] for name in names)
    block, a = architecture.block, architecture.block.attention
    heads = ways(axes.heads)
    if axes.heads:
        own = -(-a.num_heads // heads)
        kv = own if a.latent is not None else len(kv_heads(a, heads)) // heads
        a = dataclasses.replace(a, num_heads=own, num_kv_heads=kv, axes=axes.heads, all_heads=a.num_heads)
    hidden = {}
    for name in ("experts", "shared", "dense"):
        mlp = getattr(block, name)
        if mlp is not None:
            stored = _padded(mlp.hidden, ways(axes.hidden), unit)
            whole = mlp.hidden if stored is None else len(stored)
            hidden[name] = dataclasses.replace(mlp, hidden=whole // ways(axes.hidden))
    block = dataclasses.replace(block, attention=a, axes=axes, exchange=exchange, **hidden)
    return dataclasses.replace(architecture, block=block)
