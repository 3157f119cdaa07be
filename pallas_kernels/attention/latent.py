"""Latent attention (MLA) of one new token per row over a cache: signature, checks and choice of implementation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..dims import check_layer
from ..linear import RMSNorm
from ..quantized import is_quantized
from ..registry import Implementation, Operation
from . import latent_triton, latent_xla
from .decode import Rotary, check_places

OPERATION = Operation(
    "decode_latent_attention",
    {
        "triton": Implementation(latent_triton.decode_latent_attention, latent_triton.refuse, platform="cuda"),
        "xla": Implementation(latent_xla.decode_latent_attention),
        "triton_interpreted": Implementation(latent_triton.interpreted, latent_triton.refuse, by_choice=False),
    },
)


def decode_latent_attention(
    absorbed: Float[AnyArray, "B N Z"],
    q: Float[AnyArray, "B N H"],
    new: Float[AnyArray, "B _"],
    cache: Mapping[str, Any],
    lengths: Int[AnyArray, " B"],
    *,
    layer: int | Int[AnyArray, ""],
    scale: float,
    norm: RMSNorm | None = None,
    rotary: Rotary | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N Z"], dict[str, Any]]:
    """Attention in DeepSeek-V2's absorbed form (arXiv:2405.04434): all heads share one key, the latent and R rotary
    components, and one value, the latent.

    Args: `absorbed`: the plain part of the queries times the key half of the up projection (`latent_products.absorb`);
    `q`: query heads, of which the last R components are used, before rotation; `new [B, Z + R]`: the new tokens'
    latents and rotary keys as they come from their product; `cache`: `{"latent": [L, B, S, Z], "k_rotary": [L, B, S,
    R]}`, of which column s holds position s, arrays or `QuantizedArray`s with a scale for every entry; `lengths`:
    tokens in the cache, and the new one's position (a row with all S columns full computes nonsense and writes
    nothing); `layer` in `[0, L)`, which may be traced; `scale` of the scores; `norm` (its scale a stack `[L, Z]`, its
    layer this one) of the new latents and `rotary` of the last R components of q and `new`: both in float32, rounded
    to their dtype. `implementation`: `triton` (CUDA, bfloat16 and float16) or `xla`.
    Returns each head's mix of latents `[B, N, Z]` in q's dtype and the cache with the new entries, in the same memory
    where it was donated. Raises `ValueError` for shapes that do not fit each other.

    >>> import jax.numpy as jnp
    >>> cache = {"latent": jnp.zeros((1, 1, 4, 2)), "k_rotary": jnp.zeros((1, 1, 4, 2))}
    >>> ones, new = jnp.ones((1, 1, 2)), jnp.full((1, 4), 3.0)
    >>> y, cache = decode_latent_attention(ones, ones, new, cache, jnp.array([1]), layer=0, scale=0.0)
    >>> y.tolist(), cache["latent"][0, 0].tolist()
    ([[[1.5, 1.5]]], [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    """
    absorbed, q, new, lengths = (*map(jnp.asarray, (absorbed, q, new)), jnp.asarray(lengths, jnp.int32))
    names = "latent", "k_rotary"
    stacks = [cache[name] if is_quantized(cache[name]) else jnp.asarray(cache[name]) for name in names]
    (batch, heads, rank), turned = absorbed.shape, stacks[1].shape[-1]
    for name, stack, width in zip(names, stacks, (rank, turned), strict=True):
        if stack.ndim != 4 or (stack.shape[1], stack.shape[3]) != (batch, width):
            raise ValueError(f"cache: {name} of shape {stack.shape} does not fit absorbed queries {absorbed.shape}")
    if q.shape[:2] != (batch, heads) or q.shape[2] < turned:
        raise ValueError(f"q: shape {q.shape} does not fit {absorbed.shape} and {turned} rotary components")
    if new.shape != (batch, rank + turned):
        raise ValueError(f"new: shape {new.shape}, expected {(batch, rank + turned)}")
    if norm is not None and (norm.scale.ndim, norm.scale.shape[-1]) != (2, rank):
        raise ValueError(f"norm: scale of shape {norm.scale.shape}, expected [L, {rank}]")
    check_places(lengths, rotary, batch, turned)
    check_layer(layer, stacks[0].shape[0])
    with jax.named_scope("decode_latent_attention"):
        layer = jnp.asarray(layer, jnp.int32)
        given = absorbed, q, new, *stacks, lengths, layer, float(scale), norm, rotary
        y, *stacks = OPERATION.run(implementation, *given)
        return y, {**cache, **dict(zip(names, stacks, strict=True))}
