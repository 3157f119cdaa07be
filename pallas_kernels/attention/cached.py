"""Inside a Triton kernel: columns and entries of a cache's stack, whatever it is stored as.

A stack is an array `[L, B, ..., S, H]`, or a `QuantizedArray` of int8 with a scale for every entry. It reaches a kernel
as the same type, with references in place of arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

from ..linear import stored
from ..quantized import QuantizedArray
from ..triton_call import LEAST

_F32, _I32 = jnp.float32, jnp.int32


def refuse(stack: Any) -> str | None:
    """Why the functions here cannot serve a stack; None if they can."""
    if not isinstance(stack, QuantizedArray):
        return None
    if stack.scales.ndim != stack.values.ndim or stack.scales.shape[-1] != 1:
        return f"scales of shape {stack.scales.shape}, not one for each entry"
    return stored.refuse(stack)


def columns(stack: Any, lead: tuple, column: Any, there: Any, component: Any, real: Any, dtype: Any):
    """Entries `[columns, components]` of `stack[lead]` in `dtype`, and their scales `[columns]` (None without)."""
    values = stack.values if isinstance(stack, QuantizedArray) else stack
    shape = column.shape[0], component.shape[0]
    at = *(jnp.broadcast_to(i, shape) for i in lead), column[:, None], component[None, :]
    block = pltriton.load(values.at[at], mask=there[:, None] & real[None, :], other=0)
    if values is stack:
        return block, None
    at = *(jnp.broadcast_to(i, column.shape) for i in lead), column, jnp.zeros_like(column)
    return block.astype(dtype), pltriton.load(stack.scales.at[at], mask=there, other=0.0)


def as_stored(stack: Any, entry: jax.Array, dtype: Any) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, Any]]:
    """What the stack keeps of a new entry `[1, H]` in float32, part by part, and what `columns` would read of it.

    The latter is a block of `LEAST` columns, the least that a product takes, each of which is the entry.
    """
    tile = lambda x: jnp.broadcast_to(x.astype(dtype), (LEAST, x.shape[1]))
    if not isinstance(stack, QuantizedArray):
        return (entry.astype(stack.dtype),), (tile(entry), None)
    # what is not finite poisons the scale: a maximum does not see NaN on a GPU
    scale = jnp.max(jnp.abs(entry), axis=1) / 127 + jnp.sum(entry * 0, axis=1)
    divisor = jnp.where(scale < jnp.finfo(_F32).tiny, jnp.inf, scale)
    # added to 1.5 * 2^23, numbers lose what is behind the point, half to even
    bits = lax.bitcast_convert_type(entry / divisor[:, None] + 12582912.0, _I32) - 0x4B400000
    return (bits.astype(jnp.int8), scale), (tile(bits.astype(_F32)), jnp.broadcast_to(scale, (LEAST,)))


def write(stack: Any, parts: tuple, lead: tuple, column: Any, component: Any, real: Any) -> None:
    """Put the parts of an entry into `column` of `stack[lead]`."""
    values = stack.values if isinstance(stack, QuantizedArray) else stack
    at = *(jnp.full((1, component.shape[0]), i, _I32) for i in (*lead, column)), component[None, :]
    pltriton.store(values.at[at], parts[0], mask=real[None, :])
    if values is not stack:
        at = *(jnp.full((1,), i, _I32) for i in (*lead, column)), jnp.zeros((1,), _I32)
        pltriton.store(stack.scales.at[at], parts[1])
