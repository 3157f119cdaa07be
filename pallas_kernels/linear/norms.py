"""The norms that may stand before a product."""

import dataclasses
from typing import Any

import jax

from ..dims import check_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """RMSNorm (arXiv:1910.07467) before a product: `scale [K]`, or a stack `[L, K]` of which `layer` is taken."""

    scale: Any
    epsilon: float = dataclasses.field(metadata={"static": True})
    layer: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """LayerNorm (arXiv:1607.06450) before a product: `scale` and `bias` `[K]`, or stacks `[L, K]` as for `RMSNorm`."""

    scale: Any
    bias: Any
    epsilon: float = dataclasses.field(metadata={"static": True})
    layer: Any = None


def check_norm(norm: RMSNorm | LayerNorm, x: Any) -> None:
    """`ValueError` unless a norm fits rows `x [G, K]`."""
    parts = {"scale": norm.scale} | ({"bias": norm.bias} if isinstance(norm, LayerNorm) else {})
    axes = 1 if norm.layer is None else 2
    for name, part in parts.items():
        if (part.ndim, part.shape[-1]) != (axes, x.shape[-1]) or part.shape != norm.scale.shape:
            raise ValueError(f"norm: {name} of shape {part.shape} for x of {x.shape}, layer {norm.layer}")
    check_layer(norm.layer, norm.scale.shape[0])
