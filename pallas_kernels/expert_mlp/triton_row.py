"""The expert MLP of one token on a GPU: two launches that read the chosen experts' kernels and nothing else.

up:   a program per choice and few hidden columns: the products, biases, activation
down: a program per output column: all choices' products, their weighted sum, residual

There is no plan and no combine. Reading the weights is all the time there is, see `linear.triton_row`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..activations import simple_erf
from ..linear import stored
from ..mxfp4 import MXFP4Array
from ..quantized import is_quantized
from ..triton_call import call_triton
from . import xla_tiles

# The best on an H100 (docs/benchmarks.md): inputs of a choice in a piece of the second product, and its warps.
_DOWN_STEP, _DOWN_WARPS = 256, 4
_HELD = 8192  # inputs of all choices together in one of its pieces, up to 64 choices


def refuse(x, ids, weights, experts, plan, *others) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del ids, weights, plan, others
    if x.shape[0] != 1:
        return f"{x.shape[0]} tokens, only one"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    if experts.layout != "out_in":
        return "kernels with the contraction first"
    kernels = [kernel for kernel in (experts.gate, experts.up, experts.down) if kernel is not None]
    if reason := next(filter(None, map(stored.refuse, kernels)), None):
        return reason
    if experts.gate is not None and not stored.alike(experts.gate, experts.up):
        return "gate and up stored in different ways"
    return None


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
    tile = _tile(flat.up)
    hidden = call(
        functools.partial(
            moe_jax_expert_up_row,
            activation=experts.activation,
            per_layer=experts.num_experts,
            place=functools.partial(stored.place, flat.down),
            tile=tile,
        ),
        "moe_jax_expert_up_row",
        choices * pl.cdiv(experts.hidden, tile.rows),
        [((choices, experts.hidden), x.dtype)],
        tile.warps,
        operands=(layer, stored.arranged(flat.up, x), ids, flat.gate, flat.gate_bias, flat.up, flat.up_bias),
    )[0]
    return call(
        functools.partial(moe_jax_expert_down_row, per_layer=experts.num_experts),
        "moe_jax_expert_down_row",
        experts.width,
        [(x.shape, x.dtype)],
        _DOWN_WARPS,
        operands=(layer, hidden, ids, weights, flat.down, flat.down_bias, residual),
    )[0]


def moe_jax_expert_up_row(layer, x, ids, gate, gate_bias, up, up_bias, out, *, activation, per_layer, place, tile):
    """One program: `tile.rows` hidden columns of one choice. `place`: where `down` looks for each."""
    choices, hidden = out.shape
    strips = pl.cdiv(hidden, tile.rows)
    choice = lax.div(pl.program_id(0), jnp.int32(strips))
    target = lax.rem(pl.program_id(0), jnp.int32(strips)) * tile.rows + lax.iota(jnp.int32, tile.rows)
    row = jnp.minimum(target, hidden - 1)
    first, expert = layer[0] * per_layer, pltriton.load(ids.at[jnp.zeros_like(choice), choice])

    @pl.when((expert >= 0) & (expert < per_layer))
    def _():
        matrix = first + expert

        kernels = [pair for pair in ((gate, gate_bias), (up, up_bias)) if pair[0] is not None]
        load = lambda *at: stored.load_row(x, 0, *at)[None, :]
        found = stored.row_products([kernel for kernel, _ in kernels], matrix, row, load, tile.step)
        for i, (_, bias) in enumerate(kernels):
            if bias is not None:
                found[i] += _load_bias(bias, matrix, row)
        y = activation(found[0] if gate is not None else None, found[-1], simple_erf).astype(out.dtype)
        pltriton.store(out.at[jnp.full(row.shape, choice, jnp.int32), place(target)], y, mask=target < hidden)


def moe_jax_expert_down_row(layer, hidden, ids, weights, down, bias, residual, out, *, per_layer):
    """One program: an output column, of all choices together, so that all of their reads are on their way at once."""
    column, choices = pl.program_id(0), ids.shape[1]
    choice = lax.iota(jnp.int32, pl.next_power_of_2(choices))
    at, there = (jnp.zeros_like(choice), choice), choice < choices
    expert = pltriton.load(ids.at[at], mask=there, other=-1)
    weight = pltriton.load(weights.at[at], mask=there, other=0.0).astype(jnp.float32)
    real = (expert >= 0) & (expert < per_layer)
    matrix, row = layer[0] * per_layer + jnp.where(real, expert, 0), jnp.full(choice.shape, column, jnp.int32)

    def load(columns, inside):
        shape = choice.shape[0], columns.shape[0]
        # the hidden row of a choice that is none was never written
        mask = jnp.broadcast_to(real[:, None] if inside is None else real[:, None] & inside[None, :], shape)
        at = hidden.at[jnp.broadcast_to(choice[:, None], shape), jnp.broadcast_to(columns[None, :], shape)]
        return pltriton.load(at, mask=mask, other=0.0).astype(jnp.float32)

    # what is added at the end is on its way first
    shift = None if bias is None else pltriton.load(bias.at[matrix, row], mask=real, other=0.0).astype(jnp.float32)
    at = jnp.zeros_like(column), column
    before = None if residual is None else pltriton.load(residual.at[at]).astype(jnp.float32)
    most = max(128, min(_DOWN_STEP, _HELD // choice.shape[0]))
    (y,) = stored.row_products([down], matrix, row, load, most, real)
    if bias is not None:
        y += shift
    total = jnp.sum(jnp.where(real, y * weight, 0))
    if residual is not None:
        total = total.astype(out.dtype).astype(jnp.float32) + before  # rounded first, as without a residual
    pltriton.store(out.at[at], total.astype(out.dtype))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Hidden columns per program of the first product, inputs of a piece of its rows, warps."""

    rows: int
    step: int
    warps: int


def _tile(kernel):
    """The best on an H100 (docs/benchmarks.md)."""
    if isinstance(kernel, MXFP4Array):
        return _Tile(8, 1024, 8)
    return _Tile(2, 1024, 4) if is_quantized(kernel) else _Tile(1, 2048, 4)


def _load_bias(bias, matrix, row):
    return pltriton.load(bias.at[jnp.full(row.shape, matrix, jnp.int32), row]).astype(jnp.float32)


def _forward(x, ids, weights, experts, layer, residual, interpret):
    return _run(x, ids, weights, experts, layer, residual, interpret), (x, ids, weights, experts, layer, residual)


def _backward(interpret, saved, d_y):
    del interpret
    x, ids, weights, experts, layer, residual = saved
    d_x, d_weights, d_experts = xla_tiles.gradients(x, ids, weights, experts, layer, d_y)
    return d_x, None, d_weights, d_experts, None, None if residual is None else d_y


_run.defvjp(_forward, _backward)
