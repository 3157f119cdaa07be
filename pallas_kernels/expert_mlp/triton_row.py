"""The expert MLP of one token on a GPU: two launches that read the chosen experts' kernels and nothing else.

up:   a program per choice and few hidden columns: the products, biases, activation
down: a program per output column: all choices' products, their weighted sum, residual

There is no plan and no combine. Reading the weights is all the time there is, see `linear.triton_row`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..activations import simple_erf
from ..linear import stored
from ..triton_call import call_triton
from . import xla_tiles

#: Hidden or output columns per program, inputs read at once, warps: the best on an H100 (docs/benchmarks.md).
UP, DOWN = (2, 2048, 4), (1, 1024, 1)
#: Choices whose reads are all on their way at once; more go one by one.
_TOGETHER = 16


def refuse(x, ids, weights, experts, plan, layer, residual) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del ids, weights, plan, layer, residual
    if x.shape[0] != 1:
        return f"{x.shape[0]} tokens, only one"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    if experts.layout != "out_in":
        return "kernels with the contraction first"
    kernels = (experts.gate, experts.up, experts.down)
    return next(filter(None, (stored.refuse(kernel) for kernel in kernels if kernel is not None)), None)


def routed_mlp(x, ids, weights, experts, plan, layer, residual):
    """See `api.routed_mlp`."""
    del plan
    return _run(x, ids, weights, experts, layer, residual, False)


def interpreted(x, ids, weights, experts, plan, layer, residual):
    """The same kernels in the interpreter, on any platform, for tests."""
    del plan
    return _run(x, ids, weights, experts, layer, residual, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _run(x, ids, weights, experts, layer, residual, interpret):
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    flat, choices = experts.flat(), ids.shape[1]
    call = functools.partial(call_triton, interpret=interpret)
    hidden = call(
        functools.partial(moe_jax_expert_up_row, activation=experts.activation, per_layer=experts.num_experts),
        "moe_jax_expert_up_row",
        choices * pl.cdiv(experts.hidden, UP[0]),
        [((choices, experts.hidden), x.dtype)],
        UP[2],
        operands=(layer, x, ids, flat.gate, flat.gate_bias, flat.up, flat.up_bias),
    )[0]
    return call(
        functools.partial(moe_jax_expert_down_row, per_layer=experts.num_experts),
        "moe_jax_expert_down_row",
        pl.cdiv(experts.width, DOWN[0]),
        [(x.shape, x.dtype)],
        DOWN[2],
        operands=(layer, hidden, ids, weights, flat.down, flat.down_bias, residual),
    )[0]


def moe_jax_expert_up_row(layer, x, ids, gate, gate_bias, up, up_bias, out, *, activation, per_layer):
    """One program: `UP[0]` hidden columns of one choice."""
    choices, hidden = out.shape
    strips = pl.cdiv(hidden, UP[0])
    choice = lax.div(pl.program_id(0), jnp.int32(strips))
    target = lax.rem(pl.program_id(0), jnp.int32(strips)) * UP[0] + lax.iota(jnp.int32, UP[0])
    row = jnp.minimum(target, hidden - 1)
    expert = pltriton.load(ids.at[jnp.zeros_like(choice), choice])

    @pl.when((expert >= 0) & (expert < per_layer))
    def _():
        matrix = layer[0] * per_layer + expert

        def product(kernel, bias):
            if kernel is None:
                return None
            y = stored.row_products(kernel, matrix, row, functools.partial(_load_row, x, 0), UP[1])
            return y if bias is None else y + _load_bias(bias, matrix, row)

        y = activation(product(gate, gate_bias), product(up, up_bias), simple_erf).astype(out.dtype)
        pltriton.store(out.at[jnp.full(row.shape, choice, jnp.int32), target], y, mask=target < hidden)


def moe_jax_expert_down_row(layer, hidden, ids, weights, down, bias, residual, out, *, per_layer):
    """One program: `DOWN[0]` output columns."""
    choices, width = ids.shape[1], out.shape[1]
    target = pl.program_id(0) * DOWN[0] + lax.iota(jnp.int32, DOWN[0])
    row = jnp.minimum(target, width - 1)

    def add(choice, total):
        at = jnp.zeros_like(choice), choice
        expert, weight = pltriton.load(ids.at[at]), pltriton.load(weights.at[at]).astype(jnp.float32)
        real = (expert >= 0) & (expert < per_layer)
        matrix = layer[0] * per_layer + jnp.where(real, expert, 0)
        y = stored.row_products(down, matrix, row, functools.partial(_load_row, hidden, choice), DOWN[1])
        if bias is not None:
            y += _load_bias(bias, matrix, row)
        return total + jnp.where(real, y * weight, 0)  # the hidden row of a choice that is none was never written

    total = jnp.zeros(row.shape, jnp.float32)
    if choices <= _TOGETHER:
        for choice in range(choices):
            total = add(jnp.full((), choice, jnp.int32), total)
    else:
        total = lax.fori_loop(0, choices, lambda choice, total: add(jnp.int32(choice), total), total)
    if residual is not None:
        total = total.astype(out.dtype).astype(jnp.float32)  # rounded first, as without a residual
        total += pltriton.load(residual.at[jnp.zeros_like(row), row]).astype(jnp.float32)
    pltriton.store(out.at[jnp.zeros_like(row), target], total.astype(out.dtype), mask=target < width)


def _load_row(ref, row, column, there):
    at = ref.at[jnp.full(column.shape, row, jnp.int32), column]
    mask = {} if there is None else dict(mask=there, other=0.0)
    return pltriton.load(at, **mask).astype(jnp.float32)[None, :]


def _load_bias(bias, matrix, row):
    return pltriton.load(bias.at[jnp.full(row.shape, matrix, jnp.int32), row]).astype(jnp.float32)


def _forward(x, ids, weights, experts, layer, residual, interpret):
    return _run(x, ids, weights, experts, layer, residual, interpret), (x, ids, weights, experts, layer, residual)


def _backward(interpret, saved, d_y):
    """Through the tile loop, which recomputes the hidden rows."""
    del interpret
    x, ids, weights, experts, layer, residual = saved
    run = lambda x, weights, experts: xla_tiles.routed_mlp(x, ids, weights, experts, None, layer)
    d_x, d_weights, d_experts = jax.vjp(run, x, weights, experts)[1](d_y)
    return d_x, None, d_weights, d_experts, None, None if residual is None else d_y


_run.defvjp(_forward, _backward)
