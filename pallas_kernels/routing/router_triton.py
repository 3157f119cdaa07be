"""Router product and routing of few tokens on a GPU, in two kernels of the Pallas Triton backend.

The first multiplies: each program a part of the contraction, so that the router's weight is read by many SMs at once.
The second adds the parts up and chooses (`triton.moe_jax_routing_topk`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import call_triton
from . import triton, xla

#: Tokens up to which the product is all latency; beyond, XLA's products are as fast.
MAX_TOKENS = 64
_DEPTH, _COLUMNS, _ROWS = 64, 64, 16  # of a step of the product: contraction, most experts, least tokens
_SUM = 4096  # terms that a program of one warp adds up


def refuse(x, router_weight, k, score, renormalize, bias, groups, top_groups, scale) -> str | None:
    """Why this call is not supported, None if it is."""
    if x.shape[0] > MAX_TOKENS:
        return f"{x.shape[0]} tokens, at most {MAX_TOKENS}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or router_weight.dtype != x.dtype:
        return f"x and router_weight must both be bfloat16 or both float16, got {x.dtype} and {router_weight.dtype}"
    logits = jax.ShapeDtypeStruct((x.shape[0], router_weight.shape[1]), jnp.float32)
    return triton.refuse(logits, k, score, renormalize, bias, groups, top_groups, scale, 0.0, None)


def route_tokens(x, router_weight, k, score, renormalize, bias, groups, top_groups, scale, *, interpret=False):
    """See `api.route_tokens`."""
    (tokens, width), experts = x.shape, router_weight.shape[1]
    if tokens == 0:
        logits = jnp.zeros((0, experts))
        return triton.route(logits, k, score, renormalize, bias, groups, top_groups, scale, 0.0, None)
    # Two steps a part, so that loads are all on their way at once; fewer parts where they were many to add up.
    most = max(1, _SUM // pl.next_power_of_2(experts) // 2)
    depth = max(2, pl.cdiv(pl.cdiv(width, most), _DEPTH)) * _DEPTH
    rule = triton.Rule(
        k, score, bool(renormalize), groups, top_groups, float(scale), 1, 1, interpret, pl.cdiv(width, depth)
    )
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    ids, weights = _multiply_and_choose(rule, depth, x, router_weight, bias)
    return ids, weights, xla.count(ids, experts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _multiply_and_choose(rule, depth, x, router_weight, bias):
    (logits,) = call_triton(
        functools.partial(moe_jax_routing_product, depth=depth),
        "moe_jax_routing_product",
        rule.parts * pl.cdiv(router_weight.shape[1], _COLUMNS),
        [((rule.parts, x.shape[0], router_weight.shape[1]), jnp.float32)],
        4,
        rule.interpret,
        [x, router_weight],
    )
    return triton.choose(rule, logits, bias)


@_multiply_and_choose.defjvp
def _derivative(rule, depth, primals, tangents):
    ids, weights = _multiply_and_choose(rule, depth, *primals)
    again = lambda x, w: triton.weigh(rule, jnp.matmul(x, w, preferred_element_type=jnp.float32), ids)
    tangent = jax.jvp(again, primals[:2], tangents[:2])[1]
    return (ids, weights), (np.zeros(ids.shape, jax.dtypes.float0), tangent)


interpreted = functools.partial(route_tokens, interpret=True)


def moe_jax_routing_product(x_ref, weight_ref, out_ref, *, depth):
    """One program: a part `[tokens, experts]` of the logits, from `depth` of the width, for some of the experts."""
    (tokens, width), experts = x_ref.shape, weight_ref.shape[1]
    row = lax.iota(jnp.int32, max(_ROWS, pl.next_power_of_2(tokens)))
    strips, size = pl.cdiv(experts, _COLUMNS), max(_ROWS, min(_COLUMNS, pl.next_power_of_2(experts)))
    part, strip = lax.div(pl.program_id(0), jnp.int32(strips)), lax.rem(pl.program_id(0), jnp.int32(strips))
    column = strip * size + lax.iota(jnp.int32, size)
    total = jnp.zeros((row.shape[0], size), jnp.float32)
    for step in range(depth // _DEPTH):
        at = part * depth + step * _DEPTH + lax.iota(jnp.int32, _DEPTH)
        there = at < width
        x = pltriton.load(x_ref.at[row[:, None], at[None, :]], mask=(row < tokens)[:, None] & there[None, :], other=0.0)
        real = there[:, None] & (column < experts)[None, :]
        total += pltriton.dot(x, pltriton.load(weight_ref.at[at[:, None], column[None, :]], mask=real, other=0.0))
    real = (row < tokens)[:, None] & (column < experts)[None, :]
    where = jnp.full(total.shape, part, jnp.int32), row[:, None], column[None, :]
    pltriton.store(out_ref.at[where], total, mask=real)
