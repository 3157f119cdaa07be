"""The KV cache: an explicit pytree, preallocated, passed in, returned and donated."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.decode_xla import places
from pallas_kernels.compat import in_order
from pallas_kernels.quantized import QuantizedArray, dense, is_quantized, quantize

from .block_config import Architecture, AttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of earlier tokens; a row's tokens fill its first columns, so column and position are one.

    `entries`: `{"k": [L, B, K, S, H], "v": [L, B, K, S, Hv]}`, or for latent attention `{"latent": [L, B, S, Z],
    "k_rotary": [L, B, S, rotary]}`; heads come before columns, since attention's products run head by head and any
    other order would be transposed at every step. `lengths [B]`: tokens in each row, and the column of its next one;
    what lies in later columns means nothing. A stack may be a `QuantizedArray`: int8 with a float32 scale for every
    token's head, `[..., S, 1]`, made when the token is written.
    """

    entries: dict[str, Any]
    lengths: Int[Array, " B"]


def entry_shapes(config: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one token's entry in one layer."""
    if config.latent is not None:
        return {"latent": (config.latent.rank,), "k_rotary": (config.latent.rotary_dim,)}
    return {"k": (config.num_kv_heads, config.head_dim), "v": (config.num_kv_heads, config.value_dim)}


def make_cache(
    architecture: Architecture, batch: int, length: int, dtype: Any, stored: Literal["int8"] | None = None
) -> KVCache:
    """An empty cache for `batch` rows of `length` columns, in `dtype`, or in int8 in its place.

    >>> from .model import tiny_config
    >>> make_cache(tiny_config().architecture, 1, 16, "bfloat16", "int8").entries["k"].values.dtype.name
    'int8'
    """

    def empty(lead, width):
        if stored is None:
            return jnp.zeros((*lead, width), dtype)
        return QuantizedArray(jnp.zeros((*lead, width), stored), jnp.zeros((*lead, 1), jnp.float32), jnp.dtype(dtype))

    layers = len(architecture.layers)
    shapes = entry_shapes(architecture.block.attention)
    return KVCache(
        entries={name: empty((layers, batch, *shape[:-1], length), shape[-1]) for name, shape in shapes.items()},
        lengths=jnp.zeros(batch, jnp.int32),
    )


class Corner(NamedTuple):
    """The first row and column of entries that fill several columns of some of the rows."""

    row: Any
    column: Any


def write_entries(entries: dict[str, Any], new: dict[str, Array], layer: Any, column: Any) -> dict[str, Any]:
    """Put one layer's `new` entries `[B, K, T, H]` (latent: `[B, T, Z]`) into the stacks, in place.

    `column`: an integer, the first of T columns in every row; a `Corner`, if `new` holds some of the rows only; or
    int32 `[B]`, one column per row (T = 1; rows whose column is behind the last keep what they have).
    """
    together = isinstance(column, Corner) or jnp.ndim(column) == 0 or column.shape[0] == 1
    row, first = column if isinstance(column, Corner) else (0, jnp.reshape(column, ()) if together else None)

    def put(stack, new):
        new = new.astype(stack.dtype)
        if together:
            at = layer, row, *[0] * (stack.ndim - 4), first, 0
            return jax.lax.dynamic_update_slice(stack, new[None], at)
        at = places(stack, layer, column)
        return stack.at[at].set(jnp.squeeze(new, -2), mode="drop", unique_indices=True)

    found = {}
    for name, stack in entries.items():
        one = quantize(new[name]) if is_quantized(stack) else new[name]
        leaves, structure = jax.tree.flatten(stack)
        pairs = zip(leaves, jax.tree.leaves(one), strict=True)
        found[name] = jax.tree.unflatten(structure, [in_order(put(*pair)) for pair in pairs])
    return found


def read_entries(entries: dict[str, Any], layer: Any, column: Any = None, rows: int | None = None) -> dict[str, Array]:
    """One layer's entries, `[B, K, S, H]` (latent: `[B, S, Z]`), as wide as they stand for.

    Of a `Corner`'s `rows` only, if `column` is one.
    """

    def take(stack):
        if not isinstance(column, Corner):
            return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        at, size = (layer, column.row, *[0] * (stack.ndim - 2)), (1, rows, *stack.shape[2:])
        return jax.lax.dynamic_slice(stack, at, size)[0]

    return {name: dense(jax.tree.map(take, stack)) for name, stack in entries.items()}


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with `length` columns. Array by array, each deleted once it is copied, so that two exist but of one."""

    def longer(stack):
        found = _longer(stack, length)
        stack.delete()
        return found

    return dataclasses.replace(cache, entries=jax.tree.map(longer, cache.entries))


@functools.partial(jax.jit, static_argnums=1)
def _longer(stack, length):
    return jnp.pad(stack, [(0, 0)] * (stack.ndim - 2) + [(0, length - stack.shape[-2]), (0, 0)])
