"""One block of a grouped product (`mosaic_kernel`): a producer that loads, consumers that multiply and store."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..activations import simple_erf
from ..compat import load_registers
from .mosaic_gather import find_rows, gather_rows, initialize, wait_for_rows
from .mosaic_weights import Piece

_I32 = jnp.int32
PRODUCER_REGISTERS, _REGISTERS = 56, 504  # per thread, of all warpgroups together


@dataclasses.dataclass(frozen=True)
class _Refs:
    """A block's references: operands and output in global memory, the ring and its barriers in shared memory."""

    xs: Any
    tile_expert: Any
    num_tiles: Any
    row_choice: Any
    layer: Any
    biases: Any
    kernels: Any  # of each the arrays that its form has
    outs: Any
    x_s: Any
    w_s: Any
    out_s: Any
    full: Any
    free: Any
    rows: Any
    wide_s: Any  # interpreted only


def block(product, sizes, *refs, x_s, w_s, out_s, full, free, rows, wide_s):
    refs, outs = refs[: -sizes.outputs], refs[-sizes.outputs :]
    xs, plan_and_layer, others = refs[: sizes.terms], refs[sizes.terms : sizes.terms + 4], refs[sizes.terms + 4 :]
    biases, others = others[: sizes.biases], others[sizes.biases :]
    count = sizes.terms * sizes.products
    kernels = [others[n * sizes.arrays : (n + 1) * sizes.arrays] for n in range(count)]
    refs = _Refs(xs, *plan_and_layer, biases, kernels, outs, x_s, w_s, out_s, full, free, rows, wide_s)
    tiling, warpgroup = product.tiling, lax.axis_index("warpgroup")
    if not (product.overlap or product.interpret):
        plgpu.griddepcontrol_wait()
    if not product.interpret:
        plgpu.griddepcontrol_launch_dependents()
    work = _Work(product, sizes, refs)

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(product, sizes, refs, work)

    @pl.when(warpgroup < tiling.consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(tiling.consumers), action="increase")
        _consume(product, sizes, refs, work, warpgroup)


def consumer_registers(consumers):
    """What a producer leaves to each thread of the consumers."""
    return min(232, (_REGISTERS - PRODUCER_REGISTERS) // consumers // 8 * 8)


class _Work:
    """The pieces of work of this block: tile and first column of its i-th piece."""

    def __init__(self, product, sizes, refs):
        self.tiling, self.sizes, self.refs, self.product = product.tiling, sizes, refs, product
        self.strips, self.steps = sizes.strips(self.tiling), sizes.steps(self.tiling)
        self.stages = min(self.tiling.stages, self.steps)
        self.num_tiles = refs.num_tiles[0]
        self.first = refs.layer[0] * product.experts
        self.blocks = product.num_sms * self.tiling.blocks
        self.block = lax.axis_index("block")
        self.pieces = lax.div(self.num_tiles * self.strips - self.block + (self.blocks - 1), _I32(self.blocks))

    def piece(self, i):
        index = self.block + i * self.blocks
        tile, strip = grouped_order(index, self.num_tiles, self.strips, self.tiling.group)
        # The last strip ends with the columns: where they do not divide, it computes some of them a second time.
        column = strip * self.tiling.columns
        if self.sizes.out % self.tiling.columns:
            column = jnp.minimum(column, self.sizes.out - self.tiling.columns)
        return tile, column

    def expert(self, i):
        """Of the i-th piece; that of some tile if there are fewer pieces."""
        tile = jnp.clip(self.piece(i)[0], 0, self.refs.tile_expert.shape[0] - 1)
        # an id that is none (a padded token by itself) has its tile all the same
        return jnp.clip(self.refs.tile_expert[tile], 0, self.product.experts - 1) + self.first


def grouped_order(index, tiles, strips, group):
    """Piece `index` in an order that takes `group` tiles through all their strips before the next ones."""
    if group == 1:
        return lax.div(index, _I32(strips)), lax.rem(index, _I32(strips))
    which = lax.div(index, _I32(group * strips))
    size = jnp.clip(tiles - which * group, 1, group)
    inside = index - which * (group * strips)
    return which * group + lax.rem(inside, size), lax.div(inside, size)


class _Loads:
    """Copies to a slot of the ring. Where products are added up, each step belongs to one of them."""

    def __init__(self, product, sizes, refs):
        self.product, self.sizes, self.refs, self.tiling = product, sizes, refs, product.tiling

    def weights(self, column, expert, k, slot):
        strip, refs = pl.ds(column, self.tiling.columns), self.refs

        def load(term, depth):
            kernels = refs.kernels[term * self.sizes.products :][: self.sizes.products]
            for kernel, w_s in zip(kernels, refs.w_s, strict=True):
                source = self.product.weights.source(kernel, expert, strip, depth)
                plgpu.copy_gmem_to_smem(source, w_s.at[slot], refs.full.at[slot])

        self._in_its_term(load, k)

    def rows(self, tile, k, slot):
        # a start that is traced: rows beyond the end of x are wanted here, and come as zeros
        rows = pl.ds(tile * (0 if self.product.source == "in_place" else self.tiling.rows), self.tiling.rows)

        def load(term, depth):
            refs = self.refs
            plgpu.copy_gmem_to_smem(refs.xs[term].at[rows, depth], refs.x_s.at[slot], refs.full.at[slot])

        self._in_its_term(load, k)

    def _in_its_term(self, load, k):
        terms, of_term, depth = self.sizes.terms, self.sizes.steps_of_term(self.tiling), self.tiling.depth
        for term in range(terms):
            first = term * of_term
            run = functools.partial(load, term, pl.ds((k - first) * depth, depth))
            run() if terms == 1 else pl.when((k >= first) & (k < first + of_term))(run)


def _produce(product, sizes, refs, work):
    tiling, stages, steps = product.tiling, work.stages, work.steps
    total, load = work.pieces * steps, _Loads(product, sizes, refs)

    def slot_of(step):
        return lax.rem(step, _I32(stages))

    if product.source == "gathered":
        initialize(refs.rows[0])
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.rows[1])
    ahead, first = 0, work.expert(_I32(0))
    if product.overlap:  # the first piece's weights do not wait for the kernel before, the rows do
        ahead = stages

        @pl.when(work.pieces > 0)
        def _():
            _, column = work.piece(_I32(0))

            @pl.loop(0, ahead)
            def _(k):
                load.weights(column, first, k, k)

        plgpu.griddepcontrol_wait()

    def load_piece(i, expert):
        tile, column = work.piece(i)
        following = work.expert(i + 1)  # asked for early: the answer takes a while
        if product.source == "gathered":
            start = tile * tiling.rows
            found = find_rows(refs.xs[0], refs.row_choice, start, tiling.rows, tiling.depth, product.choices)

        @pl.loop(0, steps)
        def _(k):
            step = i * steps + k
            slot = slot_of(step)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(refs.free.at[slot])

            if ahead:

                @pl.when(step >= ahead)
                def _():
                    load.weights(column, expert, k, slot)

            else:
                load.weights(column, expert, k, slot)
            if product.source != "gathered":
                load.rows(tile, k, slot)
            else:
                gather_rows(refs.xs[0], found, refs.x_s.at[slot], refs.rows[0], slot, k * tiling.depth)

        return following

    lax.fori_loop(0, work.pieces, load_piece, first)

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _(step):
        plgpu.barrier_wait(refs.free.at[slot_of(step)])


class _Stages:
    """The stages of a piece of work as a consumer goes through them, `count` in all."""

    def __init__(self, product, refs, work, i):
        self.gathered, self.refs, self.ring, self.count = product.source == "gathered", refs, work.stages, work.steps
        self.first = i * work.steps

    def wait(self, k):
        """The slot of the k-th, once it is filled."""
        step = self.first + k
        slot = lax.rem(step, _I32(self.ring))
        plgpu.barrier_wait(self.refs.full.at[slot])
        if self.gathered:
            wait_for_rows(self.refs.rows[0], slot, lax.rem(lax.div(step, _I32(self.ring)), _I32(2)))
        return slot

    def free_before(self, k):
        """The consumer has read the one before the k-th."""
        plgpu.barrier_arrive(self.refs.free.at[lax.rem(self.first + k - 1, _I32(self.ring))])


def _consume(product, sizes, refs, work, warpgroup):
    tiling = product.tiling
    mine = pl.ds(warpgroup * tiling.share, tiling.share)
    if product.source == "gathered":
        plgpu.barrier_wait(refs.rows[1])

    @pl.loop(0, work.pieces)
    def _(i):
        (tile, column), expert = work.piece(i), work.expert(i)
        column = column + warpgroup * tiling.share
        piece = Piece(
            stages=_Stages(product, refs, work, i),
            kernels=refs.kernels,
            w_s=refs.w_s,
            x_s=refs.x_s,
            wide_s=refs.wide_s[0].at[warpgroup] if refs.wide_s else None,
            expert=expert,
            mine=mine,
            columns=pl.ds(column, tiling.share),
        )
        values = _biased(product, refs, product.weights.multiply(piece), expert, column)
        result, *kept = refs.outs
        row, turn = tile * tiling.rows, 0
        # first what is kept: its registers are then free for the activation
        for out, value in zip(kept, values if product.keeps else (), strict=True):
            turn = _store(refs, out, value, row, column, warpgroup, turn)
        _store(refs, result, _activated(product, values), row, column, warpgroup, turn)

    plgpu.wait_smem_to_gmem(0)


def _biased(product, refs, values, expert, column):
    """Accumulators `[share, rows]` with their biases."""
    if not refs.biases:
        return values
    layout, strip = plgpu.Layout.WGMMA.reduce(1), pl.ds(column, product.tiling.share)

    def add(value, bias):
        bias = load_registers(bias.at[expert, strip], layout)
        return value + lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, (0,))

    return tuple(map(add, values, refs.biases))


def _activated(product, values):
    if product.activation is None:
        return values[0]
    gate, up = values if len(values) == 2 else (None, values[0])
    return product.activation(gate, up, simple_erf)


def _store(refs, out, y, row, column, warpgroup, turn):
    """`y [share, rows]`, transposed, to an output; in parts that take turns in the staging memory.

    `turn`: parts that this piece of work has stored before; returns how many it has then. A piece begins in the first
    slot, wherever the one before it ended, and so waits for all that came before.
    """
    _, slots, most, columns = refs.out_s.shape
    y = y.astype(out.dtype)
    parts = [(c, r) for c in range(0, y.shape[0], columns) for r in range(0, y.shape[1], most)]
    for number, (c, r) in enumerate(parts, turn):
        rows = pl.ds(0, min(most, y.shape[1] - r))
        staged = refs.out_s.at[warpgroup, number % slots, rows]
        plgpu.wait_smem_to_gmem(slots - 1 if number else 0, wait_read_only=True)
        part = y[c : c + columns, r : r + rows.size]
        staged.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(row + r, rows.size), pl.ds(column + c, columns)])
    return turn + len(parts)
