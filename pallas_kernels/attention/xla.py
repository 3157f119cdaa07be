"""Attention in plain JAX, in blocks of queries; its parts serve attention of other kinds too."""

import jax
import jax.numpy as jnp

#: Stands for minus infinity in masked scores: a row without any key gives finite nonsense, not NaN.
MASKED = -1e30
#: Scores of one block of queries, 128 MB in float32.
BLOCK = 1 << 25


def prefill_attention(q, k, v, lengths, start, scale, window, chunk, sinks):
    """See `api.prefill_attention`."""
    del lengths  # a causal mask hides what is behind a row's end from what is before
    (batch, queries, heads, _), keys = q.shape, k.shape[2]
    columns = jnp.arange(keys, dtype=jnp.int32)[None]

    def run(q, positions):
        mask = visible(positions, columns, window, chunk)
        scores = jnp.where(mask[:, None], grouped_scores(q, k) * scale, MASKED)
        return grouped_mix(softmax(scores, sinks), v)

    positions = jnp.broadcast_to(start + jnp.arange(queries, dtype=jnp.int32), (batch, queries))
    return in_blocks(run, block_size(batch * heads * keys), q, positions)


def block_size(row: int) -> int:
    """How many queries go at once if each has `row` scores in all rows and heads."""
    return max(1, BLOCK // row)


def in_blocks(run, size, *operands):
    """`run(*operands)` for `size` queries at a time; operands (None for none) and result have them along axis 1."""
    batch, total = operands[0].shape[:2]
    if total <= size:
        return run(*operands)
    blocks = -(-total // size)
    size = -(-total // blocks)

    def cut(t):
        t = jnp.pad(t, [(0, 0), (0, blocks * size - total)] + [(0, 0)] * (t.ndim - 2))
        return jnp.moveaxis(t.reshape(t.shape[0], blocks, size, *t.shape[2:]), 1, 0)

    mixed = jnp.moveaxis(jax.lax.map(lambda parts: run(*parts), jax.tree.map(cut, operands)), 0, 1)
    return mixed.reshape(batch, blocks * size, *mixed.shape[3:])[:, :total]


def visible(query, key, window=None, chunk=None, causal=True):
    """Which keys at positions `key [B or 1, S]` each query at `query [B, T]` sees, `[B, T, S]`."""
    query, key = query[:, :, None], key[:, None, :]
    mask = key <= query if causal else jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
    if window is not None:
        mask &= query - key < window
    if chunk is not None:
        mask &= query // chunk == key // chunk
    return mask


def softmax(scores, sinks=None):
    """Softmax of float32 `scores [B, N, T, S]` over keys, less the share of `sinks [N]`."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32)[:, None, None]
    top = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    powers = jnp.exp(scores - top)
    return powers / (powers.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def heads_first(x):
    """`[B, T, N, H]` as `[B, N, T, H]`, laid out so before any product sees it: faster than reading the transpose."""
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], x.shape[2], 1, x.shape[3])
    return jax.lax.optimization_barrier(jnp.swapaxes(x, 1, 2))


def tokens_first(x):
    """The reverse of `heads_first`."""
    if x.shape[2] == 1:
        return x.reshape(x.shape[0], 1, x.shape[1], x.shape[3])
    return jnp.swapaxes(jax.lax.optimization_barrier(x), 1, 2)


def grouped_scores(q, k):
    """Products of queries `[B, T, N, H]` and the keys `[B, K, S, H]` of their group, `[B, N, T, S]` in float32."""
    (batch, count, heads, head), kv_heads = q.shape, k.shape[1]
    q = heads_first(q).reshape(batch, kv_heads, -1, head)
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, count, -1)


def grouped_mix(chances, v):
    """Values `[B, K, S, Hv]` weighed by their group's `chances [B, N, T, S]`, `[B, T, N, Hv]`."""
    batch, heads, count, keys = chances.shape
    chances = chances.astype(v.dtype).reshape(batch, v.shape[1], -1, keys)
    mixed = jnp.einsum("bkms,bksv->bkmv", chances, v)
    return tokens_first(mixed.reshape(batch, heads, count, -1))
