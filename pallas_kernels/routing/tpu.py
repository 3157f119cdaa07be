"""Routing on a TPU: one kernel, a block of tokens a step; the best expert is taken and masked, k times."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import compat
from .ranking import OUTSIDE, TAKEN, as_rank, as_score
from .xla import _TINY, weigh

NAME = "moe_jax_routing_topk_tpu"
MAX_GROUPS = 16
#: Elements of a block: it and what is made of it stay well within a core's memory.
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Rule:
    """A gate rule, `tokens` of the last block of as many as `rows`, and how to run."""

    k: int
    score: str
    renormalize: bool
    groups: int
    top_groups: int
    scale: float
    tokens: int
    rows: int
    interpret: Any


def refuse(logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced) -> str | None:
    """Why this call is not supported, None if it is."""
    if score not in ("softmax", "sigmoid"):
        return f"score {score!r}, only softmax and sigmoid"
    if forced is not None:
        return "forced ids"
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        return f"logits of {logits.dtype}, only float32 and bfloat16"
    if groups > MAX_GROUPS:
        return f"{groups} groups, at most {MAX_GROUPS}"
    return None


def route(logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced, *, interpret=False):
    """See `api.route`."""
    tokens, experts = logits.shape
    if tokens == 0:
        return jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32), jnp.zeros(experts, jnp.int32)
    rows = max(32, _BLOCK // (-(-experts // 128) * 128) // 32 * 32)
    rule = Rule(k, score, bool(renormalize), groups, top_groups, float(scale), tokens, min(tokens, rows), interpret)
    return _choose(rule, logits, None if bias is None else jnp.asarray(bias, jnp.float32).reshape(1, -1))


def interpreted(*args):
    """The same kernel in JAX's simulation of a TPU, for tests."""
    return route(*args, interpret=compat.interpret_tpu())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _choose(rule, logits, bias):
    experts, whole = logits.shape[1], lambda step: (0, 0)
    block = lambda columns: pl.BlockSpec((rule.rows, columns), lambda step: (step, 0))
    given = [logits] if bias is None else [logits, bias]
    ids, weights, counts = pl.pallas_call(
        functools.partial(moe_jax_routing_topk_tpu, rule=rule),
        name=NAME,
        grid=(pl.cdiv(rule.tokens, rule.rows),),
        in_specs=[block(experts), *[pl.BlockSpec((1, experts), whole)] * (bias is not None)],
        out_specs=[block(rule.k), block(rule.k), pl.BlockSpec((1, experts), whole)],
        out_shape=[
            jax.ShapeDtypeStruct((rule.tokens, rule.k), jnp.int32),
            jax.ShapeDtypeStruct((rule.tokens, rule.k), jnp.float32),
            jax.ShapeDtypeStruct((1, experts), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=5 * rule.k * logits.size,  # a maximum, the first that is it, and three masks
            bytes_accessed=logits.size * logits.dtype.itemsize + 8 * rule.tokens * rule.k + 8 * experts,
            transcendentals=logits.size,
        ),
        interpret=rule.interpret,
    )(*given)
    return ids, weights, counts[0]


@_choose.defjvp
def _derivative(rule, primals, tangents):
    """The choice has no derivative; the weights' is taken through plain JAX, the choice given."""
    ids, weights, counts = _choose(rule, *primals)
    again = lambda logits: weigh(logits, ids, rule.score, rule.renormalize, rule.scale)
    tangent = jax.jvp(again, primals[:1], tangents[:1])[1]
    none = lambda a: np.zeros(a.shape, jax.dtypes.float0)
    return (ids, weights, counts), (none(ids), tangent, none(counts))


# ---------------------------------------------------------------- inside the kernel


def moe_jax_routing_topk_tpu(logits_ref, *refs, rule):
    """One step: the choices of a block of tokens, and their counts on top of the earlier ones'."""
    *bias_ref, ids_ref, weights_ref, counts_ref = refs
    logits = logits_ref[...].astype(jnp.float32)
    if rule.score == "softmax":
        raised = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        scores = raised / jnp.sum(raised, axis=1, keepdims=True)
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    rank = as_rank(scores + bias_ref[0][...] if bias_ref else scores)
    expert = lax.broadcasted_iota(jnp.int32, rank.shape, 1)
    if rule.groups > 1:
        rank = _keep_best_groups(rank, expert, rule)
    choice = lax.broadcasted_iota(jnp.int32, ids_ref.shape, 1)
    ids, weights = jnp.zeros(ids_ref.shape, jnp.int32), jnp.zeros(ids_ref.shape, jnp.float32)
    for turn in range(rule.k):
        hit = expert == _first(rank, expert)
        ids = jnp.where(choice == turn, jnp.sum(jnp.where(hit, expert, 0), axis=1, keepdims=True), ids)
        weights = jnp.where(choice == turn, jnp.sum(jnp.where(hit, scores, 0), axis=1, keepdims=True), weights)
        rank = jnp.where(hit, TAKEN, rank)
    if rule.renormalize:
        total = jnp.sum(weights, axis=1, keepdims=True)
        weights = weights / jnp.where(total < _TINY, _TINY, total)  # a NaN stays, unlike in a maximum
    ids_ref[...] = ids
    weights_ref[...] = weights * rule.scale

    @pl.when(pl.program_id(0) == 0)
    def _():
        counts_ref[...] = jnp.zeros_like(counts_ref)

    # the last block may hold more rows than there are tokens
    row = pl.program_id(0) * rule.rows + lax.broadcasted_iota(jnp.int32, rank.shape, 0)
    taken = jnp.where((rank == TAKEN) & (row < rule.tokens), 1, 0)
    counts_ref[...] += jnp.sum(taken, axis=0, keepdims=True)


def _first(rank, expert):
    """The expert of the highest rank, the lowest one among equals, `[rows, 1]`."""
    best = jnp.max(rank, axis=1, keepdims=True)
    return jnp.min(jnp.where(rank == best, expert, rank.shape[1]), axis=1, keepdims=True)


def _keep_best_groups(rank, expert, rule):
    """`OUTSIDE` for the experts outside the best groups, ranked as in `xla._keep_best_groups`."""
    size = rank.shape[1] // rule.groups
    member = [(expert >= group * size) & (expert < (group + 1) * size) for group in range(rule.groups)]
    strength = []
    for inside in member:
        own = jnp.where(inside, rank, TAKEN)
        best = jnp.max(own, axis=1, keepdims=True)
        if rule.score == "sigmoid":  # the sum of the best two
            others = jnp.where(expert == _first(own, expert), TAKEN, own)
            best = as_rank(as_score(best) + as_score(jnp.max(others, axis=1, keepdims=True)))
        strength.append(best)
    keep = jnp.zeros(rank.shape, jnp.bool_)
    for group, (inside, mine) in enumerate(zip(member, strength, strict=True)):
        ahead = [(s >= mine) if other < group else (s > mine) for other, s in enumerate(strength) if other != group]
        beaten = sum(jnp.where(one, 1, 0) for one in ahead)
        keep = keep | (inside & (beaten < rule.top_groups))
    return jnp.where(keep, rank, OUTSIDE)
