"""Routing in plain XLA."""

import jax
import jax.numpy as jnp


def route(logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced):
    """See `api.route`."""
    logits = jnp.asarray(logits).astype(jnp.float32)
    if score == "sparsemixer":
        ids, weights = _sparsemixer(logits, jitter, forced)
    else:
        scores = jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)
        ranked = scores if bias is None else scores + bias.astype(jnp.float32)
        if groups > 1:
            ranked = _keep_best_groups(ranked, groups, top_groups, best=1 if score == "softmax" else 2)
        ids = jax.lax.top_k(ranked, k)[1] if forced is None else _fill(ranked, k, forced)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if renormalize:
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), _TINY)
        weights = weights * scale
    return ids, weights, count(ids, logits.shape[1])


def weigh(logits, ids, score, renormalize, scale):
    """The weights of choices `ids`: what of `route` has a derivative, for kernels that have none of their own."""
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)
    # no gather: its derivative is a scatter
    chosen = jnp.where(ids[:, :, None] == jnp.arange(scores.shape[1]), scores[:, None], 0).sum(-1)
    if renormalize:
        chosen = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), _TINY)
    return chosen * scale


def count(ids, experts):
    """Choices per expert."""
    return jnp.zeros(experts, jnp.int32).at[ids.reshape(-1)].add(1)


# Guards the division where every chosen score underflows; far below any sum that can be told from zero.
_TINY = 1e-20


def _fill(ranked, k, forced):
    """`forced` with the best of the other experts in place of negative ids."""
    taken = (forced[:, :, None] == jnp.arange(ranked.shape[1])).any(1)
    _, best = jax.lax.top_k(jnp.where(taken, -jnp.inf, ranked), k)
    free = forced < 0
    return jnp.where(free, jnp.take_along_axis(best, jnp.maximum(jnp.cumsum(free, 1) - 1, 0), axis=1), forced)


def _keep_best_groups(ranked, groups, top_groups, best):
    """Minus infinity outside the `top_groups` groups whose `best` highest entries sum highest."""
    grouped = ranked.reshape(ranked.shape[0], groups, ranked.shape[1] // groups)
    group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
    _, kept = jax.lax.top_k(group_scores, top_groups)
    keep = jnp.zeros(group_scores.shape, bool).at[jnp.arange(ranked.shape[0])[:, None], kept].set(True)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def _sparsemixer(logits, jitter, forced):
    """Two passes of: take the best, weigh it by a softmax over those not much worse; then take it out."""
    ids, weights, left, experts = [], [], logits, jnp.arange(logits.shape[1])
    if forced is not None:  # the better one is weighed first, in whatever order a record holds the two
        order = jnp.argsort(-jnp.take_along_axis(logits, jnp.maximum(forced, 0), axis=-1), axis=-1)
        both = (forced >= 0).all(-1, keepdims=True)
        forced = jnp.where(both, jnp.take_along_axis(forced, order, axis=-1), forced)
    for turn in range(2):
        best = left.max(-1, keepdims=True)
        chosen = left.argmax(-1)[:, None]
        if forced is not None:
            free = jnp.where((forced[:, :, None] == experts).any(1), -jnp.inf, left)
            chosen = free.argmax(-1)[:, None]
            chosen = jnp.where(forced[:, turn, None] >= 0, forced[:, turn, None], chosen)
        margin = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        near = jnp.where(margin > 2 * jitter, -jnp.inf, left)
        ids.append(chosen)
        weights.append(jnp.take_along_axis(jax.nn.softmax(near, axis=-1), chosen, axis=-1))
        left = jnp.where(experts == chosen, -jnp.inf, left)
    return jnp.concatenate(ids, -1).astype(jnp.int32), jnp.concatenate(weights, -1)
