"""Routing on a GPU: one kernel of the Pallas Triton backend, a few tokens per program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import call_triton
from . import xla
from .ranking import OUTSIDE, TAKEN, as_rank, as_score
from .xla import _TINY, count

#: Columns, padded to powers of two, that one warp still holds in its registers.
MAX_COLUMNS = 1024
MAX_GROUPS = 32
MAX_CHOICES = 32


@dataclasses.dataclass(frozen=True)
class Rule:
    """A gate rule, and the block that a program works on: `tokens` rows (a power of two) by `warps` warps.

    `parts`: if not 0, logits come as so many terms `[parts, G, E]`, to be added up (`router_triton`).
    """

    k: int
    score: str
    renormalize: bool
    groups: int
    top_groups: int
    scale: float
    tokens: int
    warps: int
    interpret: bool
    parts: int = 0


def refuse(logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced) -> str | None:
    """Why this call is not supported, None if it is."""
    if score not in ("softmax", "sigmoid"):
        return f"score {score!r}, only softmax and sigmoid"
    if forced is not None:
        return "forced ids"
    columns = _columns(logits.shape[1], groups)
    if k > MAX_CHOICES or groups > MAX_GROUPS or columns > MAX_COLUMNS:
        most = f"k={MAX_CHOICES}, {MAX_GROUPS} groups, {MAX_COLUMNS} experts with the groups padded to powers of two"
        return f"k={k}, {groups} groups, {logits.shape[1]} experts; at most {most}"
    return None


def route(
    logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced, *, interpret=False, block=None
):
    """See `api.route`. `block`: tokens per program (a power of two) and warps, chosen if None."""
    logits = jnp.asarray(logits)
    if logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        logits = logits.astype(jnp.float32)
    num_tokens, experts = logits.shape
    if num_tokens == 0:
        return jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32), jnp.zeros(experts, jnp.int32)
    tokens, warps = block or default_block(num_tokens, _columns(experts, groups))
    rule = Rule(k, score, bool(renormalize), groups, top_groups, float(scale), tokens, warps, interpret)
    ids, weights = choose(rule, logits, None if bias is None else jnp.asarray(bias, jnp.float32))
    # Outside the kernel, so that XLA drops it where nobody reads it.
    return ids, weights, count(ids, experts)


#: Runs anywhere, slowly, to test the kernel.
interpreted = functools.partial(route, interpret=True)


def default_block(num_tokens: int, columns: int) -> tuple[int, int]:
    """Tokens per program and warps: programs for every multiprocessor before tokens, at most 16 scores a thread.

    A warp reads up to 128 columns at once; more warps than rows of that width would share a row and meet at barriers.

    >>> default_block(32, 128), default_block(16384, 128), default_block(16384, 512), default_block(16384, 8)
    ((1, 1), (16, 4), (1, 1), (128, 4))
    """
    most = min(128, 2048 // columns) if columns <= 128 else max(1, 512 // columns)
    tokens = min(most, pl.next_power_of_2(pl.cdiv(num_tokens, 128)))
    return tokens, min(4, max(1, tokens * columns // 256)) if columns <= 128 else 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def choose(rule, logits, bias):
    """Ids and weights of `logits [G, E]`, or of their parts."""
    num_tokens = logits.shape[-2]
    shape = (num_tokens, rule.k)
    return tuple(
        call_triton(
            functools.partial(moe_jax_routing_topk, rule=rule),
            "moe_jax_routing_topk",
            pl.cdiv(num_tokens, rule.tokens),
            [(shape, jnp.int32), (shape, jnp.float32)],
            rule.warps,
            rule.interpret,
            [logits] if bias is None else [logits, bias],
        )
    )


@choose.defjvp
def choose_jvp(rule, primals, tangents):
    """The choice has no derivative; the weights' is taken through plain JAX, the choice given."""
    ids, weights = choose(rule, *primals)
    tangent = jax.jvp(lambda logits: weigh(rule, logits, ids), primals[:1], tangents[:1])[1]
    return (ids, weights), (np.zeros(ids.shape, jax.dtypes.float0), tangent)


def weigh(rule, logits, ids):
    """The weights of choices `ids` in plain JAX."""
    return xla.weigh(logits, ids, rule.score, rule.renormalize, rule.scale)


# ---------------------------------------------------------------- inside the kernel


def moe_jax_routing_topk(logits_ref, *refs, rule):
    """One program: the choices of `rule.tokens` tokens. `refs`: bias if there is one, then ids and weights."""
    *bias_ref, ids_ref, weights_ref = refs
    num_tokens, experts = logits_ref.shape[-2:]
    token = pl.program_id(0) * rule.tokens + lax.iota(jnp.int32, rule.tokens)
    there = token < num_tokens
    expert, real = _experts_of_columns(experts, rule.groups)
    mask = there[:, None] & real[None, :]
    if not rule.parts:
        logits = pltriton.load(logits_ref.at[token[:, None], expert[None, :]], mask=mask, other=-jnp.inf)
        logits = logits.astype(jnp.float32)
    else:
        logits = jnp.where(mask, _add_parts(logits_ref, token, expert, mask, rule.parts), -jnp.inf)

    if rule.score == "softmax":
        best = jnp.max(logits, axis=1)
        # A reciprocal per token, and the NaN of one expert reaches the whole row, as in a softmax.
        share = 1 / jnp.sum(jnp.exp(logits - best[:, None]), axis=1)
        score = lambda x: jnp.exp(x - best[:, None]) * share[:, None]
    else:
        score = lambda x: 1 / (1 + jnp.exp(-x))
    ranked = score(logits)
    if bias_ref:
        bias = pltriton.load(bias_ref[0].at[expert], mask=real, other=0.0)
        ranked = ranked + bias[None, :]
    rank = jnp.where(real[None, :], as_rank(ranked), TAKEN)
    if rule.groups > 1:
        rank = _keep_best_groups(rank, rule)

    expert = jnp.broadcast_to(expert[None, :], rank.shape)
    ids, chosen = _take(rank, rule.k, expert, logits if rule.parts else None)
    choice = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    mine = there[:, None] & (choice < rule.k)
    if chosen is None:  # the chosen logits again, from the cache: cheaper than carrying them through k reductions
        chosen = pltriton.load(logits_ref.at[token[:, None], ids], mask=mine, other=0.0).astype(jnp.float32)
    weights = score(chosen)
    if rule.renormalize:
        total = jnp.sum(jnp.where(choice < rule.k, weights, 0), axis=1)
        weights = weights / jnp.where(total < _TINY, _TINY, total)[:, None]  # a NaN stays, unlike in a maximum
    pltriton.store(ids_ref.at[token[:, None], choice], ids, mask=mine)
    pltriton.store(weights_ref.at[token[:, None], choice], weights * rule.scale, mask=mine)


def _add_parts(logits_ref, token, expert, mask, parts):
    """Logits `[tokens, columns]`, whose `parts` are added up in one order for every token."""
    part = lax.iota(jnp.int32, pl.next_power_of_2(parts))[:, None, None]
    at = jnp.broadcast_to(part, (part.shape[0], *mask.shape)), token[None, :, None], expert[None, None, :]
    return jnp.sum(pltriton.load(logits_ref.at[at], mask=mask[None] & (part < parts), other=0.0), axis=0)


def _take(rank, k, expert, logits):
    """Ids `[tokens, k padded]` of the `k` highest ranks, the lowest id first among equals; their logits if given."""
    ids = jnp.zeros((rank.shape[0], _padded(k)), jnp.int32)
    chosen = None if logits is None else jnp.zeros(ids.shape, jnp.float32)
    choice = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    for turn in range(k):
        best = jnp.max(rank, axis=1)
        first = jnp.min(jnp.where(rank == best[:, None], expert, jnp.iinfo(jnp.int32).max), axis=1)
        hit = expert == first[:, None]
        own = hit & (rank == best[:, None])  # a column of padding may go by the number of an expert of another group
        rank = jnp.where(hit, TAKEN, rank)
        ids = jnp.where(choice == turn, first[:, None], ids)
        if logits is not None:
            value = jnp.sum(jnp.where(own, logits, 0), axis=1)
            chosen = jnp.where(choice == turn, value[:, None], chosen)
    return ids, chosen


def _keep_best_groups(rank, rule):
    """`OUTSIDE` for the experts outside the best groups, ranked as in `xla._keep_best_groups`."""
    tokens, columns = rank.shape
    groups = pl.next_power_of_2(rule.groups)
    rank = rank.reshape(tokens, groups, columns // groups)
    strength = jnp.max(rank, axis=2)
    if rule.score == "sigmoid":  # the sum of the best two
        member = lax.broadcasted_iota(jnp.int32, rank.shape, 2)
        first = jnp.min(jnp.where(rank == strength[:, :, None], member, columns), axis=2)
        second = jnp.max(jnp.where(member == first[:, :, None], TAKEN, rank), axis=2)
        strength = as_rank(as_score(strength) + as_score(second))
    group = lax.iota(jnp.int32, groups)
    strength = jnp.where((group < rule.groups)[None, :], strength, TAKEN)
    other, mine = strength[:, None, :], strength[:, :, None]
    before = (group[None, :] < group[:, None])[None]
    beaten = jnp.sum(((other > mine) | ((other == mine) & before)).astype(jnp.int32), axis=2, dtype=jnp.int32)
    keep = (beaten < rule.top_groups)[:, :, None]
    return jnp.where(keep | (rank == TAKEN), rank, OUTSIDE).reshape(tokens, columns)


def _experts_of_columns(experts, groups):
    """The expert of each column, and whether it is one: groups and their sizes are padded to powers of two."""
    column = lax.iota(jnp.int32, _columns(experts, groups))
    size = experts // groups
    if groups == 1 or size == _padded(size):
        return column, column < experts
    group, member = lax.div(column, jnp.int32(_padded(size))), lax.rem(column, jnp.int32(_padded(size)))
    return group * size + member, (group < groups) & (member < size)


def _columns(experts, groups):
    return pl.next_power_of_2(groups) * _padded(experts // groups)


def _padded(n):
    """The next power of two, at least 2."""
    return max(2, pl.next_power_of_2(n))


interpreted = functools.partial(route, interpret=True)
