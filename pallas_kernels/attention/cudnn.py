"""Flash attention of cuDNN, by way of `jax.nn.dot_product_attention`.

JAX asks for cuDNN's version while it traces such a call and fails where its CUDA plugin is not installed, whatever the
program is made for; so without the plugin these implementations refuse, and XLA's runs.
"""

import functools

import jax
import jax.numpy as jnp

from .. import compat
from .xla import in_blocks, visible

_attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
#: (query, key) pairs whose mask is held at once: cuDNN takes it as numbers, 256 MB of them.
_PAIRS = 1 << 27


def refuse_masked(q, k, v, lengths, start, scale, window, chunk, sinks) -> str | None:
    """Why cuDNN cannot serve the call with a mask that is computed; None if it can."""
    del lengths, start, window, chunk
    kinds = {str(a.dtype) for a in (q, k, v)}
    if kinds not in ({"bfloat16"}, {"float16"}):
        return f"q, k and v must all be bfloat16 or all float16, got {', '.join(sorted(kinds))}"
    head, value = q.shape[3], v.shape[3]
    if head != value or head > 128 or head % 8:
        return f"heads of {head} and {value}; it takes equal ones, multiples of 8 up to 128"
    if sinks is not None:
        return "it knows no sinks, and JAX returns its sums rounded to the working dtype"
    if isinstance(scale, jax.Array):
        return "scale must be a Python number"
    return compat.no_cudnn()


def refuse(q, k, v, lengths, start, scale, window, chunk, sinks) -> str | None:
    """Why cuDNN's causal mask cannot serve the call; None if it can."""
    if not isinstance(start, int) or start or k.shape[2] != q.shape[1]:
        return "its causal mask begins with the first key: start must be the integer 0, with as many keys as queries"
    if chunk is not None or isinstance(window, jax.Array):
        return "chunk must be None and window an integer or None"
    return refuse_masked(q, k, v, lengths, start, scale, window, chunk, sinks)


def prefill_attention(q, k, v, lengths, start, scale, window, chunk, sinks):
    """See `api.prefill_attention`."""
    del start, chunk, sinks
    own = lengths.astype(jnp.int32)
    options = {"query_seq_lengths": own, "key_value_seq_lengths": own}
    if window is not None:
        options["local_window_size"] = (window - 1, 0)
    return _attention(q, _tokens(k), _tokens(v), scale=scale, is_causal=True, **options)


def masked(q, k, v, lengths, start, scale, window, chunk, sinks):
    """See `api.prefill_attention`; the mask is computed for a block of queries at a time."""
    del sinks
    k, v, columns = _tokens(k), _tokens(v), jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    ends = jnp.minimum(lengths, start + q.shape[1]).astype(jnp.int32)

    def run(q, positions):
        mask = visible(positions, columns, window, chunk)[:, None]
        return _attention(q, k, v, mask=mask, scale=scale, key_value_seq_lengths=ends)

    positions = start + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return in_blocks(run, max(1, _PAIRS // k.shape[1]), q, positions)


def _tokens(x):
    return jnp.swapaxes(x, 1, 2)
