"""The expert MLP on TPUs: one fused kernel, in two forms.

In place, for few tokens: every active expert is visited once with all tokens, whose sums over experts stay on the core
until the end; nothing is permuted or written in between. Gathered, for many: XLA gathers rows by the plan, the kernel
runs tiles of one expert's rows, and XLA adds up each token's rows with their weights.
"""

import functools

import jax
import jax.numpy as jnp

from .. import compat
from ..plan import make_plan
from ..quantized import QuantizedArray, is_quantized
from . import tpu_tilings, xla_tiles
from .combine import combine
from .tpu_kernel import Call, expert_mlp

#: Tokens whose outputs are added up together.
_TOGETHER = 1024
#: Room for rows, as a multiple of those that are expected, beside half a tile for each expert, which its last may lack.
_SLACK = 1.25


def refuse(x, ids, weights, experts, plan, *others) -> str | None:
    """Why this kernel cannot serve the call; None if it can."""
    del ids, weights, others
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, x is {x.dtype}"
    for name in ("gate", "up", "down"):
        kernel = getattr(experts, name)
        if is_quantized(kernel):
            if not isinstance(kernel, QuantizedArray):
                return f"of quantised kernels takes int8, {name} is a {type(kernel).__name__}"
            if kernel.runs or kernel.scales.shape[-1] != 1:
                return f"takes int8 with one scale for each output, {name} has scales {kernel.scales.shape}"
        elif kernel is not None and kernel.dtype != x.dtype:
            return f"x and kernels must have one dtype, got {x.dtype} and {name} of {kernel.dtype}"
    least = tpu_tilings.sublanes(x.dtype)
    if plan is not None and not plan.in_place and plan.tile_rows % least:
        return f"gathered tiles must have a multiple of {least} rows in {x.dtype}, the plan has {plan.tile_rows}"
    return None


def routed_mlp(x, ids, weights, experts, plan, layer, expected=None):
    """See `api.routed_mlp`."""
    target = tpu_tilings.generation()
    tiling = _tiling(x, ids, experts, plan, expected, target)
    call = Call(tiling, target.cores, tpu_tilings.vmem_limit(target))
    return _run(x, ids, weights, experts, plan, layer, expected, call)


def interpreted(x, ids, weights, experts, plan, layer, expected=None, *, cores: int = 1):
    """The same kernel in JAX's simulation of a TPU, for tests: races are looked for, memory begins as NaN."""
    target = tpu_tilings.Generation(cores, 64 << 20, 240)
    tiling = _tiling(x, ids, experts, plan, expected, target)
    call = Call(tiling, cores, 64 << 20, compat.interpret_tpu(cores))
    return _run(x, ids, weights, experts, plan, layer, expected, call)


def _tiling(x, ids, experts, plan, expected, target):
    rows = None if plan is None else plan.tile_rows
    return tpu_tilings.choose(len(x), expected or ids.size, experts, x.dtype.itemsize, target, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _run(x, ids, weights, experts, plan, layer, expected, call):
    if call.tiling.in_place:
        return _in_place(call, x, ids, weights, experts, plan, layer, expected or ids.size)
    if plan is None:
        plan = make_plan(ids, experts.num_experts, call.tiling.rows)
    return _gathered(call, x, weights, experts, plan, layer, expected or ids.size)


def _in_place(call, x, ids, weights, experts, plan, layer, expected):
    tile_expert, num_tiles = (plan.tile_expert, plan.num_tiles) if plan else active(ids, experts.num_experts)
    tiles = tpu_tilings.active(expected, experts.num_experts)
    sums = expert_mlp(call, x, (ids, weights), tile_expert, num_tiles, experts, layer, tiles)
    return sums[0] if len(sums) == 1 else sums.sum(0).astype(x.dtype)


def _gathered(call, x, weights, experts, plan, layer, expected):
    """In one pass where the plan's rows are not many more than expected, else in as many as they turn out to need."""
    size, choices = plan.tile_rows, weights.shape[1]
    tiles = min(plan.max_tiles, 1 + int(_SLACK * expected) // size + experts.num_experts // 2)
    even = tpu_tilings.tiles_of(expected, experts.num_experts, size)

    def add(total, first, tile_expert, row_choice):
        """`total` and what rows of some tiles give, from the `first` on."""
        # the rows of no choice hold any token's: nobody reads what becomes of them
        rows = x.at[row_choice // choices].get(mode="clip")
        count = jnp.minimum(plan.num_tiles - first, len(tile_expert))
        out = expert_mlp(call, rows, None, tile_expert, count, experts, layer, float(min(even, len(tile_expert))))
        slot = plan.slot - first * size
        return _added(total, out, jnp.where(slot < 0, len(out), slot), weights)

    if tiles == plan.max_tiles:
        return add(jnp.zeros_like(x), 0, plan.tile_expert, plan.row_choice)
    short = -plan.max_tiles % tiles
    tile_expert = jnp.pad(plan.tile_expert, (0, short))
    row_choice = jnp.pad(plan.row_choice, (0, short * size))

    def turn(i, total):
        part = lambda a, n: jax.lax.dynamic_slice_in_dim(a, i * n, n)
        return add(total, i * tiles, part(tile_expert, tiles), part(row_choice, tiles * size))

    passes = jax.lax.div(plan.num_tiles + (tiles - 1), jnp.int32(tiles))
    return jax.lax.fori_loop(0, passes, turn, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _added(total, rows, slot, weights):
    """`total` and the sums of each token's rows; some tokens at a time, all of whose rows XLA gathers at once."""
    tokens = len(total)
    if tokens <= _TOGETHER:
        return total + combine(rows, slot, weights, total.dtype)
    short = ((0, -tokens % _TOGETHER), (0, 0))
    total, weights = jnp.pad(total, short), jnp.pad(weights, short)
    slot = jnp.pad(slot, short, constant_values=len(rows))

    def turn(i, total):
        part = lambda a: jax.lax.dynamic_slice_in_dim(a, i * _TOGETHER, _TOGETHER)
        more = part(total) + combine(rows, part(slot), part(weights), total.dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, more, i * _TOGETHER, 0)

    return jax.lax.fori_loop(0, len(total) // _TOGETHER, turn, total)[:tokens]


def active(ids: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """The experts that are chosen, ascending, and how many they are: a plan's tiles in place, without a sort.

    `ids [G, A]`; as many places as experts can be chosen, the last ones of which hold `num_experts - 1`.

    >>> experts, count = active(jnp.array([[5, 2], [2, 9]]), num_experts=8)
    >>> experts.tolist(), int(count)
    ([2, 5, 7, 7], 2)
    """
    every = jnp.arange(num_experts)
    last = jnp.cumsum((ids.reshape(-1, 1) == every).any(0), dtype=jnp.int32)
    place = jnp.arange(min(num_experts, ids.size))
    found = (last <= place[:, None]).sum(1, dtype=jnp.int32)
    return jnp.minimum(found, num_experts - 1), last[-1]


def _forward(x, ids, weights, experts, plan, layer, expected, call):
    return _run(x, ids, weights, experts, plan, layer, expected, call), (x, ids, weights, experts, layer)


def _backward(expected, call, saved, d_y):
    del expected, call
    x, ids, weights, experts, layer = saved
    d_x, d_weights, d_experts = xla_tiles.gradients(x, ids, weights, experts, layer, d_y)
    return d_x, None, d_weights, d_experts, None, None


_run.defvjp(_forward, _backward)
