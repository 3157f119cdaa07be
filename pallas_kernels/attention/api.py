"""Attention of a prompt's tokens over themselves and those before: signature, checks and choice of implementation."""

from typing import Any

from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..registry import Implementation, Operation
from . import cudnn, xla

OPERATION = Operation(
    "prefill_attention",
    {
        "cudnn": Implementation(cudnn.prefill_attention, cudnn.refuse, platform="cuda"),
        "cudnn_masked": Implementation(cudnn.masked, cudnn.refuse_masked, platform="cuda"),
        "xla": Implementation(xla.prefill_attention),
    },
)


def prefill_attention(
    q: Float[AnyArray, "B T N H"],
    k: Float[AnyArray, "B K S H"],
    v: Float[AnyArray, "B K S Hv"],
    lengths: Int[AnyArray, " B"],
    start: Int[AnyArray, ""] | int = 0,
    *,
    scale: Any,
    window: Any = None,
    chunk: Any = None,
    sinks: Float[AnyArray, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of queries at positions `start`, `start + 1`, ... over keys at positions 0, 1, ...

    Query head n meets key head `n // (N/K)`; keys come as the cache holds them. Scores are products times `scale`.
    A query sees keys that are not later than itself, less than `window` back, in the same `chunk` of consecutive
    positions (None: no such limit). `sinks`: a logit per head that takes part in the softmax and is then left out.
    `lengths`: how many tokens each row has, those of this call included; what comes out behind them is finite and
    means nothing. `start`, `scale`, `window` and `chunk` may be traced; a `start` of 0 and a `window` as Python
    integers are best, with keys of just the queries' tokens.

    Never holds scores of all pairs: `cudnn` (whole prompts) and `cudnn_masked` (CUDA, bfloat16 or float16) none,
    `xla` those of a block of queries. Raises `ValueError` for shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3)[None, :, None]
    >>> prefill_attention(x, *[x.swapaxes(1, 2)] * 2, jnp.array([3]), scale=0.0)[0, :, 0, 0].tolist()
    [1.0, 0.5, 0.333...]
    """
    (batch, queries, heads, head), (kv_heads, keys) = q.shape, k.shape[1:3]
    if k.shape != (batch, kv_heads, keys, head) or v.shape[:3] != k.shape[:3] or heads % kv_heads:
        raise ValueError(f"q, k, v: shapes {q.shape}, {k.shape}, {v.shape}; expected [B, T, N, H], [B, K, S, H] twice")
    if isinstance(start, int) and start + queries > keys:
        raise ValueError(f"start: {queries} queries from position {start} on, but {keys} keys")
    return OPERATION.run(implementation, q, k, v, lengths, start, scale, window, chunk, sinks)
