"""Attention of one new token per row in plain JAX."""

import jax
import jax.numpy as jnp

from ..compat import in_order
from ..quantized import dense, is_quantized, quantize
from .xla import MASKED, grouped_mix, grouped_scores, softmax, visible


def decode_attention(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen):
    """See `decode.decode_attention`."""
    take = lambda stack: read(stack, layer)
    q, k = (
        prepare(x, None if norm is None else (take(getattr(norm, n)), norm.epsilon), rotary)
        for n, x in (("q", q), ("k", k))
    )
    keys, values = (write(stack, new, layer, lengths) for stack, new in ((keys, k), (values, v)))
    mine, theirs = take(keys), take(values)
    column = jnp.arange(mine.shape[2], dtype=jnp.int32)
    mask = visible(lengths[:, None], column[None], seen.window, seen.chunk)
    scores = jnp.where(mask[:, None], grouped_scores(q[:, None], mine) * scale, MASKED)
    mixed = grouped_mix(softmax(scores, None if seen.sinks is None else take(seen.sinks)), theirs)
    return mixed[:, 0].astype(q.dtype), keys, values


def prepare(x, norm, rotary):
    """Norm (scale and epsilon) and rotation of `x [B, heads, H]`."""
    if norm is not None:
        scale, epsilon = norm
        wide = x.astype(jnp.float32)
        axes = (1, 2) if scale.ndim == 2 else 2
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + epsilon)
        x = (wide * scale.astype(jnp.float32)).astype(x.dtype)
    if rotary is None:
        return x
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    dim = 2 * cos.shape[-1]
    part = x[..., :dim].astype(jnp.float32)
    if rotary.interleaved:
        low, high = part[..., 0::2], part[..., 1::2]
        turned = jnp.stack([low * cos - high * sin, high * cos + low * sin], -1).reshape(part.shape)
    else:
        low, high = jnp.split(part, 2, axis=-1)
        turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., dim:]], -1)


def write(stack, new, layer, lengths):
    """Each row's new entry `[B, K, H]` at its own column of `stack [L, B, K, S, H]`; full rows keep what they have.

    Entries and stack may lack the axis of heads; one that is made up for them costs a copy of the stack.
    """
    new = quantize(new) if is_quantized(stack) else new.astype(stack.dtype)
    heads = stack.ndim - 4

    def put(stack, new):
        if len(new) > 1:
            return stack.at[places(stack, layer, lengths)].set(new, mode="drop", unique_indices=True)
        new, at = jnp.expand_dims(new[None], -2), (layer, 0, *[0] * heads, lengths[0], 0)
        new = jnp.where(lengths[0] < stack.shape[-2], new, jax.lax.dynamic_slice(stack, at, new.shape))
        return jax.lax.dynamic_update_slice(stack, new, at)

    leaves, structure = jax.tree.flatten(stack)
    pairs = zip(leaves, jax.tree.leaves(new), strict=True)
    return jax.tree.unflatten(structure, [in_order(put(*pair)) for pair in pairs])


def places(stack, layer, columns):
    """Indices of each row's and head's entry `[H]` in `stack [L, B, K, S, H]` (latent: without K) at its row's column.

    All axes but the last by number: a TPU would lay the whole stack out anew for entries `[K, H]` of one row.
    """
    rows = jnp.arange(len(columns))
    if stack.ndim == 4:
        return layer, rows, columns
    return layer, rows[:, None], jnp.arange(stack.shape[2]), columns[:, None]


def read(stack, layer):
    """One layer of a stack, as wide as it stands for."""
    return dense(jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), stack))
