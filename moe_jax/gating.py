"""DeepSpeed's top-1, top-2 and top-k gates: choices of experts under a capacity, as pure functions of the logits.

A gate ranks the choices that meet in an expert and keeps the best `capacity` of them. The three gates differ in that
ranking, in whether the kept weights are renormalised and in what is sampled; all of it is data, a `GateRule`. Nothing
here has the size `[G, E, C]`: choices are ranked among the `G * A`. Everything is float32.

A token without a softmax (a logit is NaN or plus infinity, or all are minus infinity) takes the experts 0 to k-1 with
NaN weights, ranks behind every other token and sits in the slots behind theirs: no other token has another result for
it. The losses, means over all tokens, are NaN then.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dims import Array as AnyArray

from .routing import GateRule, Routing, gate_capacity, losses, rank_within

# Guards the division where every kept probability underflows, as DeepSpeed does.
_EPSILON = float(np.finfo(np.float32).eps)


def top1_gating(
    logits: Float[AnyArray, "G E"] | Sequence[Sequence[float]],
    capacity_factor: float,
    min_capacity: int,
    used_token: AnyArray | None = None,
    drop_tokens: bool = True,
    use_rts: bool = False,
    noisy_gate_policy: str | None = None,
    key: AnyArray | None = None,
) -> Routing:
    """DeepSpeed's top-1 gate on logits `[G, E]`: one expert per token, weighed by its softmax probability.

    An expert keeps the earliest tokens, or with `use_rts` a random selection of them (random token selection), in the
    order of the tokens. Capacity is `ceil(G / E * capacity_factor)`, at least `min_capacity` and one, and may exceed
    `G`; without `drop_tokens` there is none. `used_token [G]`: 0 for tokens that take no expert (they count in the
    capacity and in the loss's means all the same). `noisy_gate_policy`: "RSample" adds Gumbel noise to the logits for
    the choice; "Jitter" is noise on the gate's input, before there are logits, and does nothing here. `key`: random
    key for these two, apart from which nothing is random.

    Raises `ValueError` for shapes, names and numbers out of range, and for a missing key. The static arguments under
    `jit` are those from `capacity_factor` to `noisy_gate_policy` but `used_token`. Method: Switch Transformers
    (arXiv:2101.03961).

    >>> routing = top1_gating([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], capacity_factor=0.5, min_capacity=1)
    >>> routing.ids.ravel().tolist(), routing.keep.ravel().tolist(), routing.capacity, routing.counts.tolist()
    ([0, 0, 1], [True, False, True], 1, [2, 1])
    >>> [f"{w:.3f}" for w in routing.weights.ravel()]
    ['0.881', '0.000', '0.953']
    """
    rule = GateRule.top1(capacity_factor, min_capacity, drop_tokens, use_rts, noisy_gate_policy)
    return gate(logits, rule, used_token, key, count_unused=True)


def top2_gating(
    logits: Float[AnyArray, "G E"] | Sequence[Sequence[float]],
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    second_expert_sampling: bool = False,
    key: AnyArray | None = None,
) -> Routing:
    """DeepSpeed's top-2 gate on logits `[G, E]`: two experts per token, weights renormalised over the kept ones.

    The first choices of all tokens, dropped or not, come before the second ones in an expert, and earlier tokens
    before later ones. Capacity is `ceil(G / E * (2 * capacity_factor))`, else as in `top1_gating`. `aux_loss` counts
    first choices only. `second_expert_sampling` adds Gumbel noise (random `key`) for the choice of the second expert.

    Raises `ValueError` as `top1_gating` does. Method: GShard (arXiv:2006.16668).

    >>> routing = top2_gating([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, -1.0]], capacity_factor=1.0, min_capacity=1)
    >>> routing.ids.tolist(), routing.position.tolist(), routing.capacity
    ([[0, 1], [0, 1], [1, 0]], [[0, 1], [1, 2], [0, 2]], 2)
    >>> [[f"{w:.2f}" for w in row] for row in routing.weights]
    [['0.73', '0.27'], ['1.00', '0.00'], ['1.00', '0.00']]
    """
    rule = GateRule.top2(capacity_factor, min_capacity, drop_tokens, second_expert_sampling)
    return gate(logits, rule, None, key)


def topk_gating(
    logits: Float[AnyArray, "G E"] | Sequence[Sequence[float]],
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    drop_policy: str = "probs",
) -> Routing:
    """DeepSpeed's top-k gate on logits `[G, E]`: `k` experts per token, weights renormalised over the kept ones.

    Capacity is `ceil(G / E * (k * capacity_factor))`, else as in `top1_gating`. An expert with more choices keeps,
    by `drop_policy`, always in slots in the order of the tokens:

    - `position`: the earliest tokens.
    - `probs`: those with the highest logits.
    - `probs_upstream`: `probs` as DeepSpeed 0.16.5 computes it, where tokens that did not choose the expert compete
      with a logit of 0: a negative logit may be dropped though there is room.
    - `gate`: those with the highest probabilities, which is what later versions of DeepSpeed call "probs".

    Raises `ValueError` as `top1_gating` does.

    >>> logits = [[1.0, -1.0, -5.0], [2.0, -5.0, -1.0], [3.0, -5.0, -1.0]]
    >>> topk_gating(logits, 2, 0.5, 1, drop_policy="probs").keep.tolist()
    [[False, True], [False, True], [True, False]]
    >>> topk_gating(logits, 2, 0.5, 1, drop_policy="probs_upstream").keep.tolist()
    [[False, False], [False, False], [True, False]]
    """
    return gate(logits, GateRule.topk(k, capacity_factor, min_capacity, drop_tokens, drop_policy))


def gate(
    logits: Float[AnyArray, "G E"] | Sequence[Sequence[float]],
    rule: GateRule,
    used: AnyArray | None = None,
    key: AnyArray | None = None,
    count_unused: bool = False,
    forced: Int[AnyArray, "G A"] | None = None,
) -> Routing:
    """Any gate on logits `[G, E]`; under `jit`, `rule` and `count_unused` are static.

    `used [G]`: false for tokens that take no expert: ids -1, no slot, not in `counts`. They have no part in the
    capacity and the losses either, so that padding changes nothing for the others: `Routing.capacity`, which shapes
    depend on, is then that of all `G` tokens, and choices beyond the used tokens' own capacity are not kept.
    `count_unused` counts them in the capacity and in the losses' means. `key`: a random key where the rule samples.
    `forced`: different experts that a token takes, in any order, as if they were its best; -1 leaves a choice to the
    gate. They are weighed by their logits, and dropped as the rule says.

    Returns a `Routing`; a dropped choice has its expert's id, weight 0 and a position of `capacity` or more. Raises
    `ValueError` for shapes and dtypes, for more experts per token than there are, and for a missing key.

    >>> logits, padding = [[2.0, 1.0], [3.0, 0.0], [1.0, 0.0]], jnp.array([True, False, True])
    >>> routing = gate(logits, GateRule.of(1, 1.0, 1), padding)
    >>> routing.ids.ravel().tolist(), routing.keep.ravel().tolist(), routing.capacity
    ([0, -1, 0], [True, False, False], 2)
    """
    given = _checked(logits, rule)
    tokens, num = given.shape
    counted = taking = jnp.ones(tokens, bool)
    capacity = limit = gate_capacity(rule, tokens, num) if rule.drop_tokens else None
    if used is not None:
        taking = _mask(used, tokens)
    if used is not None and not count_unused:
        counted = taking
        if rule.drop_tokens:
            # Looked up, as compilers turn float32 quotients by a constant into products.
            limit = jnp.asarray(gate_capacity(rule, np.arange(tokens + 1), num))[counted.sum()]
    # The capacity has done its part: without it in the rule one program serves them all.
    ranking = dataclasses.replace(rule, capacity_factor=1.0, min_capacity=0)
    routing = _run(ranking, given, taking, counted, _keys(rule, key), limit, forced)
    if capacity is None:
        return routing
    position = jnp.where(routing.keep, routing.position, capacity + routing.position)
    return dataclasses.replace(routing, position=position, capacity=capacity)


@functools.partial(jax.jit, static_argnums=0)
def _run(rule, logits, taking, counted, keys, limit, forced) -> Routing:
    """All but the capacity; positions of dropped choices count from 0."""
    # Whatever stands in padding, its gradient must be 0 and not 0 * NaN.
    logits = jnp.where(counted[:, None], logits, 0)
    chances = jax.nn.softmax(logits, axis=-1)
    broken = jnp.isnan(chances[:, 0])  # a softmax is NaN as a whole or nowhere
    choosing = jnp.where(broken[:, None], 0, logits)
    ids = _choose(rule, choosing, keys[0], forced)
    weights = jnp.take_along_axis(chances, ids, axis=-1)
    score = _score(rule, jnp.take_along_axis(choosing, ids, axis=-1), weights, keys[1])
    ids = jnp.where(taking[:, None], ids, -1)
    num, tokens = logits.shape[1], counted.sum()
    keep, position, counts = _place(rule, ids, score, broken, tokens, num, limit)
    weights = jnp.where(keep, weights, 0)
    if rule.renormalize:
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), _EPSILON)
    balanced = _count(ids[:, 0], num) if rule.first_balance else counts / rule.k
    aux_loss, z_loss = losses(chances, logits, balanced / jnp.maximum(tokens, 1), counted)
    return Routing(ids, weights, keep, position, counts, aux_loss, z_loss)


def _checked(logits, rule):
    logits = jnp.asarray(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape [G, E], got {logits.shape}")
    if not (jnp.issubdtype(logits.dtype, jnp.floating) or jnp.issubdtype(logits.dtype, jnp.integer)):
        raise ValueError(f"logits: dtype {logits.dtype}, expected floating")
    if rule.k > logits.shape[1]:
        raise ValueError(f"k: {rule.k} experts per token out of {logits.shape[1]}")
    return logits.astype(jnp.float32)


def _mask(used, tokens):
    used = jnp.asarray(used)
    if used.shape != (tokens,):
        raise ValueError(f"used_token: shape {used.shape}, expected {(tokens,)}")
    return used != 0


def _keys(rule, key):
    """One key for the choice and one for what is kept."""
    selects = rule.drop_tokens and rule.policy == "random"
    if key is None and (rule.noise or selects):
        reason = {"all": "RSample", "second": "sampling the second expert"}.get(rule.noise, "random token selection")
        raise ValueError(f"key: None, but {reason} needs a random key")
    return (None, None) if key is None else jax.random.split(key)


def _choose(rule, logits, key, forced) -> Int[Array, "G A"]:
    """The experts of each token, best first; logits without NaN."""
    if forced is None:
        return _own_choice(rule, logits, key)
    asked = (forced[:, :, None] == jnp.arange(logits.shape[1])).any(1)
    ids = _own_choice(rule, jnp.where(asked, jnp.inf, logits), key)
    if rule.k == 1:
        return ids
    _, order = jax.lax.top_k(jnp.take_along_axis(logits, ids, axis=-1), rule.k)
    return jnp.take_along_axis(ids, order, axis=-1)


def _own_choice(rule, logits, key) -> Int[Array, "G A"]:
    if rule.noise is None:
        return _best(logits, rule.k)
    noisy = logits + jax.random.gumbel(key, logits.shape, jnp.float32)
    if rule.noise == "all":
        return _best(noisy, rule.k)
    first = _best(logits, 1)
    # Even an expert with logit -inf is another one than the first.
    others = jnp.maximum(noisy, jnp.finfo(jnp.float32).min)
    others = jnp.where(jnp.arange(logits.shape[1]) == first, -jnp.inf, others)
    return jnp.concatenate([first, _best(others, 1)], axis=-1)


def _best(scores, k) -> Int[Array, "G A"]:
    """The k highest, the first among equals: of one a maximum, which is cheaper than a sort."""
    return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32) if k == 1 else jax.lax.top_k(scores, k)[1]


def _score(rule, logits, chances, key) -> Float[Array, "G A"] | None:
    """What an expert ranks its choices by; None where their order decides."""
    if not rule.drop_tokens or rule.policy in ("position", "choice"):
        return None
    if rule.policy == "random":
        return jax.random.uniform(key, logits.shape, jnp.float32)
    return chances if rule.policy == "gate" else logits


def _count(ids, num):
    return jnp.zeros(num, jnp.int32).at[jnp.where(ids < 0, num, ids)].add(1, mode="drop")


def _place(
    rule, ids, score, broken, tokens, num, limit
) -> tuple[Bool[Array, "G A"], Int[Array, "G A"], Int[Array, " E"]]:
    """Which choices are kept, their slots (those of dropped ones count from 0 by themselves), and counts `[E]`."""
    by_choice = rule.policy == "choice"

    def flat(a):
        a = jnp.broadcast_to(a, ids.shape)
        return (a.T if by_choice else a).reshape(-1)

    def unflat(a):
        return a.reshape(ids.shape[::-1]).T if by_choice else a.reshape(ids.shape)

    bucket, last = flat(jnp.where(ids < 0, num, ids)), flat(broken[:, None]).astype(jnp.int32)
    score = None if score is None else jnp.where(last > 0, jnp.nan, flat(score))
    rank, counts = rank_within(bucket, num, last if score is None else -score)
    if limit is None:
        return unflat(bucket < num), unflat(rank), counts
    ahead = rank
    if rule.policy == "probs_upstream":
        elsewhere = tokens - jnp.zeros(num + 1, jnp.int32).at[bucket].add(1 - last)[bucket]
        ahead = jnp.where(score >= 0, rank, rank + elsewhere - last)
    keep = (bucket < num) & (ahead < limit)
    if score is None:
        slot = jnp.where(keep, rank, jnp.maximum(rank - limit, 0))
    else:  # the kept ones in the order of the tokens, and so the dropped ones
        slot, _ = rank_within(jnp.where(keep, bucket, bucket + num + 1), 2 * (num + 1), last)
    return unflat(keep), unflat(slot), counts
