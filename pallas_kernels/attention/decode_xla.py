"""Attention of one new token per row in plain JAX."""

import jax
import jax.numpy as jnp

from ..quantized import dense, is_quantized, quantize

#: Stands for minus infinity in masked scores.
MASKED = -1e30


def decode_attention(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen):
    """See `decode.decode_attention`."""
    take = lambda stack: read(stack, layer)
    q, k = (
        prepare(x, None if norm is None else (take(getattr(norm, n)), norm.epsilon), rotary)
        for n, x in (("q", q), ("k", k))
    )
    keys, values = (write(stack, new, layer, lengths) for stack, new in ((keys, k), (values, v)))
    mine, theirs = take(keys), take(values)
    batch, heads, head = q.shape
    scores = jnp.einsum(
        "bkgh,bksh->bkgs", q.reshape(batch, k.shape[1], -1, head), mine, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(batch, heads, -1) * scale
    column = jnp.arange(mine.shape[2])
    visible = (column <= lengths[:, None]) & (column >= first_seen(lengths, seen)[:, None])
    scores = jnp.where(visible[:, None], scores, MASKED)
    chances = softmax(scores, None if seen.sinks is None else take(seen.sinks))
    chances = chances.astype(v.dtype).reshape(batch, k.shape[1], -1, column.size)
    return jnp.einsum("bkgs,bksv->bkgv", chances, theirs).reshape(batch, heads, -1).astype(q.dtype), keys, values


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
    rows, heads = jnp.arange(len(lengths)), stack.ndim - 4

    def put(stack, new):
        if len(new) > 1:
            at = layer, rows, *[slice(None)] * heads, lengths
            return stack.at[at].set(new, mode="drop", unique_indices=True)
        new, at = jnp.expand_dims(new[None], -2), (layer, 0, *[0] * heads, lengths[0], 0)
        new = jnp.where(lengths[0] < stack.shape[-2], new, jax.lax.dynamic_slice(stack, at, new.shape))
        return jax.lax.dynamic_update_slice(stack, new, at)

    leaves, structure = jax.tree.flatten(stack)
    return jax.tree.unflatten(structure, [put(*pair) for pair in zip(leaves, jax.tree.leaves(new), strict=True)])


def read(stack, layer):
    """One layer of a stack, as wide as it stands for."""
    return dense(jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), stack))


def first_seen(lengths, seen):
    """The first column that a token at position `lengths` sees."""
    first = jnp.zeros_like(lengths)
    if seen.window is not None:
        first = jnp.maximum(first, lengths - (seen.window - 1))
    if seen.chunk is not None:
        first = jnp.maximum(first, lengths // seen.chunk * seen.chunk)
    return first


def softmax(scores, sinks):
    """Over the last axis of `[B, N, S]`, with the share of `sinks [N]` left out."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32)[:, None]
    top = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    powers = jnp.exp(scores - top)
    return powers / (powers.sum(-1, keepdims=True) + jnp.exp(sinks - top))
