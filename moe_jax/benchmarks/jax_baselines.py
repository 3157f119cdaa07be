"""Blocks over grouped products that others wrote in JAX, in the usual form: sort, gather, three products, unsort."""

import importlib
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_kernels

from .shapes import MoEShape

#: Beyond this many bytes of temporaries `jax.lax.ragged_dot`, which XLA expands to `[R, E * D]`, is left out.
_TEMPORARIES = 24e9
_MGPU = "jax.experimental.pallas.ops.gpu.ragged_dot_mgpu"
_TOKAMAX = "tokamax"


def blocks(shape: MoEShape, tokens: int) -> dict[str, Callable | str]:
    """Blocks `f(x, router, experts)` by name; for one that cannot be run, the reason."""
    found: dict[str, Callable | str] = {name: _own(shape, name) for name in ("xla_tiles", "xla_ragged")}
    temporaries = 2 * tokens * shape.top_k * shape.experts * shape.width
    if temporaries > _TEMPORARIES:
        found["xla_ragged"] = f"left out: {temporaries / 1e9:.0f} GB of temporaries"
    if not shape.plain:
        return found
    for rows in (64, 128):
        found[f"Pallas ragged_dot_mgpu {rows}x128x64"] = _or_reason(shape, _MGPU, lambda m, rows=rows: _mgpu(m, rows))
    found["tokamax ragged_dot mosaic"] = _or_reason(shape, _TOKAMAX, _tokamax)
    return found


def _own(shape: MoEShape, name: str) -> Callable:
    return lambda x, router, experts: pallas_kernels.moe_block(
        x, router, experts, shape.top_k, score=shape.score, renormalize=shape.renormalize, implementation=name
    )


def _or_reason(shape: MoEShape, module: str, make: Callable) -> Callable | str:
    """The block over the product that `make` takes from a module, or why that module cannot be had."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"{module}: not installed"
        return grouped_block(shape, make(importlib.import_module(module)))
    except Exception as error:  # whatever a foreign module does when it is imported
        return f"{module}: {type(error).__name__}: {error}"


def _mgpu(module, rows: int) -> Callable:
    def product(lhs, rhs, counts):
        padded = jnp.pad(lhs, ((0, max(0, rows - lhs.shape[0])), (0, 0)))
        y = module.ragged_dot(
            padded,
            rhs,
            group_sizes=counts,
            block_m=rows,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=1,
        )
        return y[: lhs.shape[0]]

    return product


def _tokamax(module) -> Callable:
    return lambda lhs, rhs, counts: module.ragged_dot(lhs, rhs, counts, implementation="mosaic")


def grouped_block(shape: MoEShape, product: Callable) -> Callable:
    """The block over `product(rows [R, K], kernels [E, K, N], counts [E]) -> [R, N]`, rows sorted by expert."""

    def block(x, router, experts):
        logits = jnp.matmul(x, router, preferred_element_type=jnp.float32)
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits), shape.top_k)
        if shape.renormalize:
            weights = weights / weights.sum(1, keepdims=True)
        flat = ids.reshape(-1)
        order = jnp.argsort(flat)
        counts = jnp.bincount(flat, length=shape.experts).astype(jnp.int32)
        rows = x[order // shape.top_k]
        gate, up = (product(rows, kernel, counts).astype(jnp.float32) for kernel in (experts.gate, experts.up))
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        out = product(hidden, experts.down, counts)[jnp.argsort(order)].reshape(*ids.shape, -1)
        return (out.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)

    return block
