"""Latent attention of one new token per row in plain JAX."""

import jax.numpy as jnp

from .decode_xla import prepare, read, write
from .xla import MASKED, softmax


def decode_latent_attention(absorbed, q, new, latents, rotaries, lengths, layer, scale, norm, rotary):
    """See `latent.decode_latent_attention`."""
    rank, turned = latents.shape[-1], rotaries.shape[-1]
    latent = prepare(new[:, None, :rank], None if norm is None else (norm.scale[layer], norm.epsilon), None)
    k_rotary = prepare(new[:, None, rank:], None, rotary)
    q_rotary = prepare(q[..., q.shape[-1] - turned :], None, rotary)
    latents, rotaries = (
        write(stack, e[:, 0], layer, lengths) for stack, e in ((latents, latent), (rotaries, k_rotary))
    )
    mine, theirs = (read(stack, layer) for stack in (latents, rotaries))
    scores = jnp.einsum("bnz,bsz->bns", absorbed, mine, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bnr,bsr->bns", q_rotary, theirs, preferred_element_type=jnp.float32)
    visible = jnp.arange(mine.shape[1]) <= lengths[:, None]
    chances = softmax(jnp.where(visible[:, None], scores * scale, MASKED))
    return jnp.einsum("bns,bsz->bnz", chances.astype(mine.dtype), mine).astype(q.dtype), latents, rotaries
