"""The backward pass of the expert MLP on Hopper, by grouped products over the plan of the forward pass.

    rows of d_y, as the plan lays them out
    d_hidden rows  = d_y rows @ down.T
    d_weights      = hidden row . d_hidden row (+ bias . d_y row), of each choice
    d_gate, d_up   = activation backwards, weight * d_hidden           (from gate and up, which the forward pass kept)
    d_x            = sum over a of d_gate row @ gate.T + d_up row @ up.T
    kernels        = x rows.T @ d_gate, x rows.T @ d_up, (weight * hidden rows).T @ d_y rows, of each expert

Nothing is multiplied a second time, and the experts' output rows are not kept: their products with d_y are those of
hidden rows with d_hidden (SonicMoE, arXiv:2512.14080). All sums have one order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import compat
from ..plan import Plan
from .combine import combine
from .mosaic_kernel import Product, grouped_product
from .mosaic_tilings import BackwardTilings, choose_backward, trained_rows
from .mosaic_weight_gradient import STEP, Contraction, spans_of, weight_gradient
from .mosaic_weights import Plain


class Saved(NamedTuple):
    """What the forward pass keeps. `products`: rows `[rows, F]` of gate (if there is one) and up, biases added."""

    x: Any
    weights: Any
    experts: Any
    layer: Any
    plan: Plan
    products: Any


def refuse(ids, experts) -> str | None:
    """Why these kernels cannot give the gradients of a call that the forward pass takes; None if they can."""
    if experts.quantized:
        return "quantised kernels have no gradients"
    if trained_rows(ids.shape[0], ids.size / experts.num_experts) is None:
        return f"{ids.shape[0]} tokens are computed in place"
    return None


def suits(plan: Plan | None) -> bool:
    """Whether the gradients can be taken over this plan."""
    return plan is not None and not plan.in_place and plan.tile_rows % STEP == 0


def gradients(saved: Saved, d_y, interpret: Any = False, tilings: BackwardTilings | None = None):
    """Cotangents of x, weights and experts. `tilings`: instead of the table's."""
    x, weights, experts, layer, plan, products = saved
    if tilings is None:
        tokens, choices = weights.shape
        tilings = choose_backward(tokens, choices, experts, plan.tile_rows)
    gathers = tilings.gathers and not interpret
    run = _Products(experts, layer, plan, weights, gathers, interpret)
    with jax.named_scope("expert_mlp_backward"):
        real = (plan.row_choice < weights.size)[:, None]
        weight = weights.reshape(-1).at[plan.row_choice].get(mode="fill", fill_value=0)[:, None].astype(jnp.float32)
        d_rows = run.rows(d_y)
        source, d_taken, taken = ("gathered", d_y, x) if gathers else ("tiled", d_rows, run.rows(x))
        d_hidden = run.back("hidden", tilings.hidden, [d_taken], [experts.down], source)
        d_products, hidden, d_weight = _through_activation(experts.activation, products, d_hidden, weight, real)
        kernels = [kernel for kernel in (experts.gate, experts.up) if kernel is not None]
        d_x = run.back("x", tilings.x, d_products, kernels)
        d_kernels = [run.kernel("in", tilings, taken, d) for d in d_products]
        d_weight += run.times_bias(d_rows, experts.down_bias)
        d_weight = jax.lax.optimization_barrier(d_weight)  # XLA would add a row up again for every reader
        d_weights = d_weight.at[plan.slot].get(mode="fill", fill_value=0).astype(weights.dtype)
        given = dict(
            gate=d_kernels[0] if experts.gate is not None else None,
            up=d_kernels[-1],
            down=run.kernel("out", tilings, hidden, d_taken),
            gate_bias=run.bias(experts.gate_bias, d_products[0]),
            up_bias=run.bias(experts.up_bias, d_products[-1]),
            down_bias=run.bias(experts.down_bias, d_rows, weight),
        )
        placed = {name: _placed(d, getattr(experts, name), layer) for name, d in given.items()}
        d_x = combine(d_x, plan.slot, jnp.ones(plan.slot.shape, jnp.float32), x.dtype)
        return d_x, d_weights, type(experts)(**placed, activation=experts.activation, layout=experts.layout)


def _through_activation(activation, products, d_hidden, weight, real):
    """Rows of the gradients before the activation, of weight * hidden, and `[rows]` of hidden . d_hidden.

    Rows of padding hold anything before, and zeros after this.
    """
    dtype, clean = d_hidden.dtype, lambda rows: jnp.where(real, rows, 0).astype(jnp.float32)
    d_hidden, products = clean(d_hidden), [clean(rows) for rows in products]
    apply = lambda *products: activation(products[0] if len(products) == 2 else None, products[-1])
    hidden, pull = jax.vjp(apply, *products)
    d_products = [d.astype(dtype) for d in pull(weight * d_hidden)]
    return d_products, (weight * hidden).astype(dtype), (hidden * d_hidden).sum(1)


class _Products:
    """The products of one backward pass."""

    def __init__(self, experts, layer, plan, weights, gathers, interpret):
        self.experts, self.plan, self.gathers, self.interpret = experts, plan, gathers, interpret
        self.layer = jnp.zeros(1, jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
        self.choices, self.total = weights.shape[1], weights.size
        self.num_sms = 3 if interpret else compat.num_sms()

    def rows(self, tokens):
        """Tokens' rows as the plan lays them out, zeros for padding."""
        return tokens.at[self.plan.row_choice // self.choices].get(mode="fill", fill_value=0)

    def back(self, name, tiling, rows, kernels, source="tiled"):
        """Sum of rows times kernels, the other way round than in the forward pass."""
        product = Product(
            f"moe_jax_expert_d_{name}",
            tiling,
            None,
            source,
            choices=self.choices,
            weights=Plain(self.experts.layout == "in_out"),
            experts=self.experts.num_experts,
            overlap=False,
            num_sms=self.num_sms,
            interpret=self.interpret,
            added=True,
        )
        kernels = [kernel.reshape(-1, *kernel.shape[-2:]) for kernel in kernels]
        return grouped_product(product, rows, kernels, [], self.plan, self.layer)

    def kernel(self, name, tilings, inputs, outputs):
        """`[E, ...]`, the gradient of kernels that make rows `outputs` of rows `inputs`, as they are stored."""
        swapped = self.experts.layout == "out_in"
        a, b = (outputs, inputs) if swapped else (inputs, outputs)
        in_fd = (name == "in") == swapped  # and then b comes from tokens, else a
        tiling, gathered = (tilings.fd, 1) if in_fd else (tilings.df, 0)
        gathered = gathered if self.gathers else None
        call = Contraction(
            f"moe_jax_expert_d_{name}_kernel", tiling, gathered, self.choices, self.num_sms, self.interpret
        )
        spans = spans_of(self.plan, self.total, self.experts.num_experts, tiling.depth)
        return weight_gradient(call, a, b, spans, self.plan.row_choice)

    def times_bias(self, rows, bias):
        """`[rows]`, each row times its expert's bias."""
        if bias is None:
            return 0.0
        plan, bias = self.plan, bias.reshape(-1, bias.shape[-1])
        of_tile = bias[plan.tile_expert + self.layer * self.experts.num_experts].astype(jnp.float32)
        rows = rows.reshape(plan.max_tiles, plan.tile_rows, -1).astype(jnp.float32)
        return (rows * of_tile[:, None]).sum(2).reshape(-1)

    def bias(self, bias, rows, weight=1.0):
        """`[E, ...]`, sums of each expert's rows; None where there is no bias. Tile after tile, so that a NaN stays
        with its expert and the order is one."""
        if bias is None:
            return None
        plan, num = self.plan, self.experts.num_experts
        of_tile = (rows.astype(jnp.float32) * weight).reshape(plan.max_tiles, plan.tile_rows, -1).sum(1)
        used = jnp.arange(plan.max_tiles) < plan.num_tiles
        tiles = ((plan.tile_expert == jnp.arange(num)[:, None]) & used).sum(1, dtype=jnp.int32)
        first = jnp.cumsum(tiles, dtype=jnp.int32) - tiles
        add = lambda t, total: total + jnp.where((t < tiles)[:, None], of_tile.at[first + t].get(mode="clip"), 0)
        return jax.lax.fori_loop(0, tiles.max(), add, jnp.zeros((num, of_tile.shape[1]), jnp.float32))


def _placed(d, array, layer):
    """A layer's gradient as that of the whole stack that it lies in; the only layer's without a copy."""
    if d is None:
        return None
    d = d.astype(array.dtype)
    if array.ndim == d.ndim:
        return d
    if array.shape[0] == 1:
        return d[None]
    return jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(array), d, layer, 0)
