"""Sampling: from logits and a key to the next token, as pure functions."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is drawn. Fields that are None are off; the others may change without compiling again.

    `temperature` None: the likeliest token. `top_k`: only the k likeliest. `top_p`: only the likeliest that together
    reach this probability (arXiv:1904.09751). `min_p`: only those at least `min_p` times as likely as the likeliest
    (arXiv:2407.01082). `repetition_penalty` r: logits of tokens already in the row are divided by r if positive,
    multiplied by r if negative (arXiv:1909.05858).
    """

    temperature: Float[Array, ""] | float | None = None
    top_p: Float[Array, ""] | float | None = None
    min_p: Float[Array, ""] | float | None = None
    repetition_penalty: Float[Array, ""] | float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})


def make_sampler(temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0) -> Sampler:
    """A `Sampler` from the usual arguments, checked; `ValueError` names the argument that is out of range.

    >>> make_sampler(temperature=0.0).temperature is None
    True
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: {temperature} is negative")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: {top_k!r} is not a positive integer")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}: {value} is not in (0, 1]")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty: {repetition_penalty} is not positive")
    return Sampler(
        temperature=float(temperature) if temperature else None,
        top_k=top_k,
        top_p=None if top_p in (None, 1) else float(top_p),
        min_p=None if min_p is None else float(min_p),
        repetition_penalty=None if repetition_penalty == 1 else float(repetition_penalty),
    )


def sample(
    sampler: Sampler,
    logits: Float[Array, "B V"],
    key: Array | None,
    seen: Bool[Array, "B V"] | None = None,
    first: Int[Array, ""] | int = 0,
) -> Int[Array, " B"]:
    """The next token of each row. Rows draw independently: a row's token does not depend on the batch around it.

    Args: `logits` float32 `[B, V]`, `key` (unused without temperature), `seen`: tokens that the penalty applies to,
    `first`: which of the batch's rows the first one is.
    """
    if sampler.repetition_penalty is not None and seen is not None:
        penalty = sampler.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampler.temperature is None:
        return logits.argmax(-1).astype(jnp.int32)
    logits = truncate(sampler, logits / sampler.temperature)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def truncate(sampler: Sampler, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Minus infinity for the tokens that top-k, top-p and min-p, in this order, leave out; the likeliest stays."""
    if sampler.top_k is not None and sampler.top_k < logits.shape[-1]:
        floor = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampler.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        chances = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        floor = jnp.min(jnp.where(before < sampler.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampler.min_p is not None:
        floor = logits.max(-1, keepdims=True) + jnp.log(sampler.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits
