"""The KV cache: an explicit pytree, preallocated, passed in, returned and donated."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .block_config import Architecture, AttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of earlier tokens.

    `entries`: `{"k": [L, B, K, S, H], "v": [L, B, K, S, Hv]}`, or for latent attention `{"latent": [L, B, S, Z],
    "k_rotary": [L, B, S, rotary]}`; heads come before columns, since attention's products run head by head and any
    other order would be transposed at every step. `valid [B, S]`: columns that hold a real token. `positions [B, S]`:
    the token's position in its row, padding not counted. `used`: columns written so far, the same for all rows.
    """

    entries: dict[str, Array]
    valid: Bool[Array, "B S"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


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
        valid=jnp.zeros((batch, length), bool),
        positions=jnp.zeros((batch, length), jnp.int32),
        used=jnp.zeros((), jnp.int32),
    )


def admit(cache: KVCache, mask: Bool[Array, "B T"], positions: Int[Array, "B T"]) -> KVCache:
    """Mark the next `T` columns as holding the tokens of `mask` at `positions`; their entries follow per layer."""
    start = (0, cache.used)
    return dataclasses.replace(
        cache,
        valid=jax.lax.dynamic_update_slice(cache.valid, mask, start),
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        used=cache.used + mask.shape[1],
    )


def write_entries(entries: dict[str, Array], new: dict[str, Array], layer, column) -> dict[str, Array]:
    """Put one layer's `new` entries `[B, K, T, H]` (latent: `[B, T, Z]`) at `column` of the stacks."""
    return {
        name: jax.lax.dynamic_update_slice(
            stack, new[name][None].astype(stack.dtype), (layer, *[0] * (stack.ndim - 3), column, 0)
        )
        for name, stack in entries.items()
    }


def read_entries(entries: dict[str, Array], layer) -> dict[str, Array]:
    """One layer's entries, `[B, K, S, H]` (latent: `[B, S, Z]`)."""
    return {name: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for name, stack in entries.items()}
