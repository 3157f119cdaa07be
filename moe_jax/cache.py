"""The KV cache: an explicit pytree, preallocated, passed in, returned and donated."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .block_config import Architecture, AttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of earlier tokens; a row's tokens fill its first columns, so column and position are one.

    `entries`: `{"k": [L, B, K, S, H], "v": [L, B, K, S, Hv]}`, or for latent attention `{"latent": [L, B, S, Z],
    "k_rotary": [L, B, S, rotary]}`; heads come before columns, since attention's products run head by head and any
    other order would be transposed at every step. `lengths [B]`: tokens in each row, and the column of its next one;
    what lies in later columns means nothing.
    """

    entries: dict[str, Array]
    lengths: Int[Array, " B"]


def entry_shapes(config: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one token's entry in one layer."""
    if config.latent is not None:
        return {"latent": (config.latent.rank,), "k_rotary": (config.latent.rotary_dim,)}
    return {"k": (config.num_kv_heads, config.head_dim), "v": (config.num_kv_heads, config.value_dim)}


def make_cache(architecture: Architecture, batch: int, length: int, dtype) -> KVCache:
    """An empty cache for `batch` rows of `length` columns."""
    layers = len(architecture.layers)
    shapes = entry_shapes(architecture.block.attention)
    return KVCache(
        entries={
            name: jnp.zeros((layers, batch, *shape[:-1], length, shape[-1]), dtype) for name, shape in shapes.items()
        },
        lengths=jnp.zeros(batch, jnp.int32),
    )


class Corner(NamedTuple):
    """The first row and column of entries that fill several columns of some of the rows."""

    row: Any
    column: Any


def write_entries(entries: dict[str, Array], new: dict[str, Array], layer: Any, column: Any) -> dict[str, Array]:
    """Put one layer's `new` entries `[B, K, T, H]` (latent: `[B, T, Z]`) into the stacks, in place.

    `column`: an integer, the first of T columns in every row; a `Corner`, if `new` holds some of the rows only; or
    int32 `[B]`, one column per row (T = 1; rows whose column is behind the last keep what they have).
    """
    if isinstance(column, Corner) or jnp.ndim(column) == 0 or column.shape[0] == 1:
        row, column = column if isinstance(column, Corner) else (0, jnp.reshape(column, ()))
        return {
            name: jax.lax.dynamic_update_slice(
                stack, new[name][None].astype(stack.dtype), (layer, row, *[0] * (stack.ndim - 4), column, 0)
            )
            for name, stack in entries.items()
        }
    rows = jnp.arange(column.shape[0])
    found = {}
    for name, stack in entries.items():
        at = (layer, rows, *[slice(None)] * (stack.ndim - 4), column)
        one = jnp.squeeze(new[name], -2).astype(stack.dtype)
        found[name] = stack.at[at].set(one, mode="drop", unique_indices=True)
    return found


def read_entries(entries: dict[str, Array], layer: Any, column: Any = None, rows: int | None = None):
    """One layer's entries, `[B, K, S, H]` (latent: `[B, S, Z]`); of a `Corner`'s `rows` only, if `column` is one."""
    if not isinstance(column, Corner):
        return {name: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for name, stack in entries.items()}
    return {
        name: jax.lax.dynamic_slice(stack, (layer, column.row, *[0] * (stack.ndim - 2)), (1, rows, *stack.shape[2:]))[0]
        for name, stack in entries.items()
    }


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with `length` columns. Stack by stack, each deleted once it is copied, so that two exist but of one."""
    entries = {}
    for name, stack in cache.entries.items():
        entries[name] = _longer(stack, length)
        stack.delete()
    return dataclasses.replace(cache, entries=entries)


@functools.partial(jax.jit, static_argnums=1)
def _longer(stack, length):
    return jnp.pad(stack, [(0, 0)] * (stack.ndim - 2) + [(0, length - stack.shape[-2]), (0, 0)])
