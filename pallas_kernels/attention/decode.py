"""Attention of one new token per row over a cache: signature, checks and choice of implementation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..dims import check_layer
from ..quantized import is_quantized
from ..registry import Implementation, Operation
from . import decode_triton, decode_xla

OPERATION = Operation(
    "decode_attention",
    {
        "triton": Implementation(decode_triton.decode_attention, decode_triton.refuse, platform="cuda"),
        "xla": Implementation(decode_xla.decode_attention),
        "triton_interpreted": Implementation(decode_triton.interpreted, decode_triton.refuse, by_choice=False),
    },
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QKNorm:
    """RMSNorm of queries and keys: scales `q [L, H]` and `k [L, H]` norm each head, `[L, N, H]` and `[L, K, H]` all of
    them together."""

    q: Any
    k: Any
    epsilon: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (arXiv:2104.09864) of the new tokens: `cos` and `sin` `[B, half]` in float32, for the first `2 *
    half` components of a head; pairs are neighbours if `interleaved`, else halves."""

    cos: Any
    sin: Any
    interleaved: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a token sees beside itself: of the earlier ones, those less than `window` back, and those of its own `chunk`
    of consecutive positions (None: all). `sinks [L, N]`: a logit per head that takes part in the softmax and is then
    left out."""

    window: Any = None
    chunk: Any = None
    sinks: Any = None


def decode_attention(
    q: Float[AnyArray, "B N H"],
    k: Float[AnyArray, "B K H"],
    v: Float[AnyArray, "B K Hv"],
    cache: Mapping[str, Any],
    lengths: Int[AnyArray, " B"],
    *,
    layer: int | Int[AnyArray, ""],
    scale: float,
    norm: QKNorm | None = None,
    rotary: Rotary | None = None,
    seen: Seen = Seen(),
    implementation: str | None = None,
) -> tuple[Float[Array, "B N Hv"], dict[str, Any]]:
    """Attention of one new token per row, which is written to the cache, over itself and the tokens before it.

    Args: `q`, `k`, `v` of the new tokens as they come from their products; `cache`: `{"k": [L, B, K, S, H], "v": [L, B,
    K, S, Hv]}`, of which column s holds position s; `lengths`: tokens in the cache, and the new one's position (a row
    with all S columns full computes nonsense and writes nothing); `layer` in `[0, L)`, which may be traced; `scale`
    of the scores; `norm` and then `rotary` are applied to q and k, in float32, rounded to their dtype after each.
    A stack may be a `QuantizedArray` with a scale for every entry: the new one is quantised, and seen as it is stored.
    `implementation`: `triton` (CUDA, bfloat16 and float16) or `xla`.
    Returns `[B, N, Hv]` in q's dtype and the cache with the new entries, in the same memory where it was donated.
    Raises `ValueError` for shapes that do not fit each other.

    >>> import jax.numpy as jnp
    >>> one, cache = jnp.ones((1, 1, 2)), {name: jnp.zeros((1, 1, 1, 4, 2)) for name in "kv"}
    >>> y, cache = decode_attention(one, one, 3 * one, cache, jnp.array([1]), layer=0, scale=0.0)
    >>> y.tolist(), cache["v"][0, 0, 0].tolist()
    ([[[1.5, 1.5]]], [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    """
    q, k, v, lengths = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths, jnp.int32)
    for name, new in (("k", k), ("v", v)):
        stack = cache[name]
        if stack.ndim != 5 or (*stack.shape[1:3], stack.shape[4]) != new.shape:
            raise ValueError(f"cache: {name} of shape {stack.shape}, expected [L, B, K, S, H] for new {new.shape}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: shape {q.shape} does not fit keys of shape {k.shape}")
    if k.shape[:2] != v.shape[:2] or cache["k"].shape[3] != cache["v"].shape[3]:
        raise ValueError(f"v: new {v.shape} and cached {cache['v'].shape} beside k {k.shape} and {cache['k'].shape}")
    check_places(lengths, rotary, q.shape[0], q.shape[2])
    check_layer(layer, cache["k"].shape[0])
    layers, heads, kv_heads, size = cache["k"].shape[0], q.shape[1], k.shape[1], q.shape[2]
    for name, scale_of, count in () if norm is None else (("q", norm.q, heads), ("k", norm.k, kv_heads)):
        if scale_of.shape not in ((layers, size), (layers, count, size)):
            either = f"{(layers, size)} or {(layers, count, size)}"
            raise ValueError(f"norm: {name} of shape {scale_of.shape}, expected {either}")
    if seen.sinks is not None and seen.sinks.shape != (layers, heads):
        raise ValueError(f"sinks: shape {seen.sinks.shape}, expected {(layers, heads)}")
    with jax.named_scope("decode_attention"):
        layer = jnp.asarray(layer, jnp.int32)
        keys, values = (w if is_quantized(w) else jnp.asarray(w) for w in (cache["k"], cache["v"]))
        y, keys, values = OPERATION.run(
            implementation, q, k, v, keys, values, lengths, layer, float(scale), norm, rotary, seen
        )
        return y, {**cache, "k": keys, "v": values}


def check_places(lengths: Any, rotary: Rotary | None, batch: int, size: int) -> None:
    """`ValueError` unless there are lengths and angles for each of `batch` rows, the latter for heads of `size`."""
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: shape {lengths.shape}, expected ({batch},)")
    if rotary is None:
        return
    half = rotary.cos.shape[-1]
    if rotary.cos.shape != (batch, half) or rotary.sin.shape != rotary.cos.shape or not 0 < 2 * half <= size:
        shapes = f"{rotary.cos.shape} and {rotary.sin.shape}"
        raise ValueError(f"rotary: angles of shapes {shapes} for {batch} rows and heads of {size}")
