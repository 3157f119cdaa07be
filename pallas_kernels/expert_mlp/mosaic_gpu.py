"""The expert MLP on Hopper: two Mosaic GPU kernels over the plan, and a weighted sum that XLA fuses.

gate/up: rows of x, gathered on the way in -> activation -> hidden rows of the plan
down:    hidden rows -> output rows of the plan
combine: output rows, each times its router weight, added up in float32 in a fixed order

For gradients gate/up stores its products too, over tiles that `mosaic_backward` can sum up; few tokens and quantised
kernels have the gradients of the tile loop.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from .. import compat
from ..plan import Plan, make_plan
from . import mosaic_backward, mosaic_forms, xla_tiles
from .combine import combine
from .mosaic_kernel import Product, grouped_product
from .mosaic_tilings import TILE_ROWS, Tilings, choose, trained_rows

#: Shared memory is written in rows of 64 columns.
_WIDTH_STEP = 64
#: GPUs whose tensor cores have wgmma; Blackwell's have not.
_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def refuse(x, ids, weights, experts, plan, *others) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del ids, weights, others
    if reason := mosaic_forms.refuse(x, experts):
        return reason
    if experts.width % _WIDTH_STEP or experts.hidden % _WIDTH_STEP:
        return f"widths must be multiples of {_WIDTH_STEP}, got D={experts.width} and F={experts.hidden}"
    if plan is not None and plan.tile_rows not in TILE_ROWS:
        return f"tiles must have a multiple of 8 rows up to {TILE_ROWS[-1]}, the plan has {plan.tile_rows}"
    return unsuited_device()


def refuse_interpreted(*args) -> str | None:
    """The same of the interpreted kernels."""
    old = f"JAX's interpreter runs these kernels from 0.11 on, this is JAX {jax.__version__}"
    return refuse(*args) or (None if compat.INTERPRETS_GPU else old)


def unsuited_device() -> str | None:
    """Why the device that is traced for cannot run wgmma; None for Hopper, and where it is not known."""
    kind = compat.device_kind()
    if "NVIDIA" in kind and not _HOPPER.search(kind):
        return f"needs a Hopper GPU (H100, H200), the program is made for {kind}"
    return None


def routed_mlp(x, ids, weights, experts, plan, layer, *, tilings: Tilings | None = None, interpret: Any = False):
    """See `api.routed_mlp`. `tilings`: instead of the table's."""
    return _run(x, ids, weights, experts, plan, layer, tilings, interpret)


def interpreted(x, ids, weights, experts, plan, layer):
    """The same kernels in JAX's interpreter, on any platform, for tests; rows are gathered beforehand."""
    return _run(x, ids, weights, experts, plan, layer, None, compat.interpret_gpu())


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _run(x, ids, weights, experts, plan, layer, tilings, interpret):
    if tilings is None:
        tilings = choose(*ids.shape, experts, None if plan is None else plan.tile_rows)
    if plan is None:
        make = _plan_of_one if ids.shape[0] == 1 else make_plan
        plan = make(ids, experts.num_experts, tilings.up.rows)
    (hidden,), rows = _products(x, ids, experts, plan, layer, tilings, interpret)
    return combine(rows(hidden), plan.slot, weights, x.dtype)


def _plan_of_one(ids, num_experts, rows):
    """One token: a tile for each of its choices, in their order, so that there is nothing to compute."""
    choices = ids.shape[1]
    slot = jnp.where((ids >= 0) & (ids < num_experts), jnp.arange(choices, dtype=jnp.int32) * rows, choices * rows)
    tiles = jnp.asarray(choices, jnp.int32)
    return Plan(row_choice=ids[0], slot=slot, tile_expert=ids[0], num_tiles=tiles, tile_rows=rows, in_place=True)


def _products(x, ids, experts, plan, layer, tilings, interpret, *, keeps=False):
    """Hidden rows of the plan `[rows, F]`, and the function that makes output rows `[rows, D]` of them.

    `keeps`: behind the hidden rows come those of gate (if there is one) and up.
    """
    flat = experts.flat()
    layer = jnp.zeros(1, jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    # TMA takes x in blocks of 8 rows, or all of fewer
    source = "in_place" if plan.in_place and (len(x) < 8 or len(x) % 8 == 0) else "gathered"
    if interpret and source == "gathered":
        x, source = x.at[plan.row_choice // ids.shape[1]].get(mode="fill", fill_value=0), "tiled"
    shared = dict(
        choices=ids.shape[1],
        experts=experts.num_experts,
        num_sms=3 if interpret else compat.num_sms(),
        interpret=interpret,
    )
    forms = [mosaic_forms.form_of(kernel, experts.layout) for kernel in (flat.up, flat.down)]
    up = Product(
        *("moe_jax_expert_up", tilings.up, experts.activation, source),
        weights=forms[0],
        overlap=False,
        keeps=keeps,
        **shared,
    )
    down = Product(
        "moe_jax_expert_down", tilings.down, None, "tiled", weights=forms[1], overlap=not interpret, **shared
    )
    given = lambda *arrays: [a for a in arrays if a is not None]
    kernels, biases = given(flat.gate, flat.up), given(flat.gate_bias, flat.up_bias)
    if biases and len(biases) < len(kernels):
        biases = [jnp.zeros_like(biases[0]) if b is None else b for b in (flat.gate_bias, flat.up_bias)]
    hidden = grouped_product(up, x, kernels, biases, plan, layer, after=jax.tree.leaves(flat.down))
    hidden = hidden if keeps else [hidden]
    return hidden, lambda h: grouped_product(down, h, [flat.down], given(flat.down_bias), plan, layer)


def _forward(x, ids, weights, experts, plan, layer, tilings, interpret):
    if mosaic_backward.refuse(ids, experts):
        return _run(x, ids, weights, experts, plan, layer, tilings, interpret), (x, ids, weights, experts, layer)
    mean = ids.size / experts.num_experts
    if not mosaic_backward.suits(plan):
        plan = make_plan(ids, experts.num_experts, trained_rows(ids.shape[0], mean))
    if tilings is None or tilings.up.rows != plan.tile_rows:
        tilings = choose(*ids.shape, experts, plan.tile_rows)
    (hidden, *products), rows = _products(x, ids, experts, plan, layer, tilings, interpret, keeps=True)
    y = combine(rows(hidden), plan.slot, weights, x.dtype)
    return y, mosaic_backward.Saved(x, weights, experts, layer, plan, products)


def _backward(tilings, interpret, saved, d_y):
    del tilings
    if isinstance(saved, mosaic_backward.Saved):
        d_x, d_weights, d_experts = mosaic_backward.gradients(saved, d_y, interpret)
    else:
        d_x, d_weights, d_experts = xla_tiles.gradients(*saved, d_y)
    return d_x, None, d_weights, d_experts, None, None


_run.defvjp(_forward, _backward)
