"""Weight gradients on Hopper: one product for every expert, summed up over the expert's rows.

    for every expert and every tile of its kernel:                              (persistent blocks take turns)
        accumulator = 0
        for some rows of the expert at a time: accumulator += A[rows, tile's rows].T @ B[rows, tile's columns]
        out[expert, tile] = accumulator

A and B hold the rows of a plan, or one of them is gathered by the producer as the plan says. Both lie in shared memory
as they do in global memory, wgmma reads them across. A block is as in `mosaic_kernel`: one producer warpgroup fills a
ring of stages, which runs on across tiles, and one or two consumer warpgroups share a tile's rows. An expert's steps
end with its rows, so that no step holds another's: a NaN stays with its expert. One without rows gets zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_block import PRODUCER_REGISTERS, consumer_registers, grouped_order
from .mosaic_gather import arrivals, find_rows, gather_rows, initialize, wait_for_rows
from .mosaic_kernel import SHARED_BYTES, SHARED_RESERVE, STORE_COLUMNS

#: Rows that wgmma needs at once where it reads them across: those of a swizzled tile.
STEP = 64
_I32 = jnp.int32
#: Columns of a row that are found at once, 128 bytes: eight threads bring them.
_FOUND = 64
_STORE_ROWS = 64  # stored at once


@dataclasses.dataclass(frozen=True)
class GradientTiling:
    """How a block cuts a kernel's gradient: tiles of `rows` x `columns`, `depth` rows of the plan at a time.

    `stages`, `consumers` and `group` as in `mosaic_kernel.Tiling`; consumers share a tile's rows.
    """

    rows: int
    columns: int
    depth: int = STEP
    stages: int = 4
    consumers: int = 2
    group: int = 8

    @property
    def tile(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def share(self) -> int:
        """Rows of one consumer."""
        return self.rows // self.consumers


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What is static of a call. `gathered`: which of the two operands is (0, 1), None if both are laid out like the
    plan; `choices`: per token of it."""

    name: str
    tiling: GradientTiling
    gathered: int | None
    choices: int
    num_sms: int
    interpret: Any = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """Which are experts' first steps through a plan, and how many they have: int32 `[E]`."""

    first: jax.Array
    steps: jax.Array


def spans_of(plan, choices: int, num_experts: int, depth: int) -> Spans:
    """For `choices` in all, in steps of `depth` rows, which divide a tile's. Steps without any are left out.

    >>> from pallas_kernels import make_plan
    >>> plan = make_plan(jnp.array([[0, 2]] * 5), num_experts=3, tile_rows=4)
    >>> spans = spans_of(plan, 10, num_experts=3, depth=2)
    >>> spans.first.tolist(), spans.steps.tolist()
    ([0, 4, 4], [3, 0, 3])
    """
    filled = (plan.row_choice.reshape(-1, depth) < choices).any(1)
    steps_of = filled.reshape(plan.max_tiles, -1).sum(1, dtype=jnp.int32)
    own = plan.tile_expert == jnp.arange(num_experts)[:, None]  # tiles past the last have no steps
    tiles = (own & (steps_of > 0)).sum(1, dtype=jnp.int32)
    first = (jnp.cumsum(tiles, dtype=jnp.int32) - tiles) * (plan.tile_rows // depth)
    return Spans(first, jnp.where(own, steps_of, 0).sum(1, dtype=jnp.int32))


def weight_gradient(call: Contraction, a, b, spans: Spans, row_choice):
    """`[E, M, N]` in the operands' dtype, `out[e] = a[rows of e].T @ b[rows of e]`, accumulated in float32.

    `a` `[rows, M]`, `b` `[rows, N]`, or `[G, M]` or `[G, N]` where gathered. Rows that are padding must be zero in one
    of the two, and finite in the other.
    """
    tiling = call.tiling
    kernel = plgpu.kernel(
        functools.partial(_block, call),
        out_type=jax.ShapeDtypeStruct((len(spans.first), a.shape[1], b.shape[1]), a.dtype),
        grid=(call.num_sms,),
        grid_names=("block",),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            stages=[plgpu.SMEM((tiling.stages, tiling.depth, size), a.dtype) for size in tiling.tile],
            out_s=plgpu.SMEM((tiling.consumers, _store_slots(tiling), _STORE_ROWS, STORE_COLUMNS), a.dtype),
            full=plgpu.Barrier(num_arrivals=2 if call.gathered is None else 1, num_barriers=tiling.stages),
            rows=[] if call.gathered is None else [arrivals(tiling.stages), plgpu.Barrier(num_arrivals=1)],
            free=plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=tiling.stages),
        ),
        kernel_name=call.name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=call.interpret,
    )
    # where nobody reads the choices, they are not even computed
    return kernel(a, b, spans.first, spans.steps, spans.steps if call.gathered is None else row_choice)


def _store_slots(tiling):
    """Slots of staging memory per consumer, two if there is room."""
    ring = tiling.stages * tiling.depth * 2 * (tiling.rows + tiling.columns)
    slots = min(2, (SHARED_BYTES - SHARED_RESERVE - ring) // (tiling.consumers * _STORE_ROWS * 2 * STORE_COLUMNS))
    if slots < 1:
        raise ValueError(f"tiling: {tiling} leaves no shared memory for stores")
    return slots


@dataclasses.dataclass(frozen=True)
class _Refs:
    """A block's references: operands and output in global memory, the ring and its barriers in shared memory."""

    operands: Any
    first: Any
    steps: Any
    row_choice: Any
    out: Any
    stages: Any
    out_s: Any
    full: Any
    free: Any
    rows: Any


def _block(call, a, b, first, steps, row_choice, out, *, stages, out_s, full, free, rows):
    refs = _Refs((a, b), first, steps, row_choice, out, stages, out_s, full, free, rows)
    tiling, warpgroup = call.tiling, lax.axis_index("warpgroup")
    if not call.interpret:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    work = _Work(call, refs)

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(call, refs, work)

    @pl.when(warpgroup < tiling.consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(tiling.consumers), action="increase")
        _consume(call, refs, work, warpgroup)


class _Work:
    """The pieces of work of this block: expert and corner of its i-th tile, and the expert's rows."""

    def __init__(self, call, refs):
        self.tiling, self.refs, self.blocks = call.tiling, refs, call.num_sms
        self.experts, *self.sizes = refs.out.shape
        self.tiles = tuple(map(pl.cdiv, self.sizes, self.tiling.tile))
        self.block = lax.axis_index("block")
        total = _I32(self.experts * self.tiles[0] * self.tiles[1])
        self.pieces = lax.div(total - self.block + (self.blocks - 1), _I32(self.blocks))

    def piece(self, i):
        index, per_expert = self.block + i * self.blocks, _I32(self.tiles[0] * self.tiles[1])
        expert = lax.div(index, per_expert)
        tile = grouped_order(lax.rem(index, per_expert), *map(_I32, self.tiles), self.tiling.group)
        corner = [
            # The last tile ends with the kernel: where they do not divide, it computes some of it a second time.
            at * cut if size % cut == 0 else jnp.minimum(at * cut, size - cut)
            for at, cut, size in zip(tile, self.tiling.tile, self.sizes, strict=True)
        ]
        return expert, corner

    def span(self, i):
        """First step and steps of the i-th piece's expert; of some expert if there are fewer pieces."""
        expert = jnp.minimum(self.piece(i)[0], self.experts - 1)
        return self.refs.first[expert], self.refs.steps[expert]

    def each(self, run):
        """`run(i, done, first, steps)` for every piece, after `done` steps; returns how many there were.

        The next piece's span is asked for early: the answer takes a while.
        """

        def step(i, carry):
            done, first, steps = carry
            following = self.span(i + 1)
            run(i, done, first, steps)
            return done + steps, *following

        return lax.fori_loop(0, self.pieces, step, (_I32(0), *self.span(_I32(0))))[0]


def _produce(call, refs, work):
    tiling = call.tiling
    slot_of = lambda step: lax.rem(step, _I32(tiling.stages))
    if call.gathered is not None:
        source = refs.operands[call.gathered]
        initialize(refs.rows[0])
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.rows[1])

    def find(step):
        if call.gathered is None:
            return ()
        return find_rows(source, refs.row_choice, step * tiling.depth, tiling.depth, _FOUND, call.choices)

    def load(i, done, first, steps):
        _, corner = work.piece(i)

        def step(k, found):
            following = find(first + jnp.minimum(k + 1, steps - 1))
            slot, rows = slot_of(done + k), pl.ds((first + k) * tiling.depth, tiling.depth)

            @pl.when(done + k >= tiling.stages)
            def _():
                plgpu.barrier_wait(refs.free.at[slot])

            for n, (operand, stage) in enumerate(zip(refs.operands, refs.stages, strict=True)):
                if n == call.gathered:
                    gather_rows(operand, found, stage.at[slot], refs.rows[0], slot, corner[n], _FOUND)
                else:
                    part = operand.at[rows, pl.ds(corner[n], stage.shape[2])]
                    plgpu.copy_gmem_to_smem(part, stage.at[slot], refs.full.at[slot])
            return following

        lax.fori_loop(0, steps, step, find(first))

    total = work.each(load)

    @pl.loop(jnp.maximum(total - tiling.stages, 0), total)
    def _(step):
        plgpu.barrier_wait(refs.free.at[slot_of(step)])


def _consume(call, refs, work, warpgroup):
    tiling, ring = call.tiling, _I32(call.tiling.stages)
    mine = pl.ds(warpgroup * tiling.share, tiling.share)
    a_s, b_s = refs.stages
    free = lambda step: plgpu.barrier_arrive(refs.free.at[lax.rem(step, ring)])
    if call.gathered is not None:
        plgpu.barrier_wait(refs.rows[1])

    def wait(step):
        slot = lax.rem(step, ring)
        plgpu.barrier_wait(refs.full.at[slot])
        if call.gathered is not None:
            wait_for_rows(refs.rows[0], slot, lax.rem(lax.div(step, ring), _I32(2)))
        return slot

    def piece(i, done, _, steps):
        def run(accumulator):
            @pl.loop(0, steps)
            def _(k):
                slot = wait(done + k)
                plgpu.wgmma(accumulator, a_s.at[slot, :, mine].T, b_s.at[slot])
                # One step's product stays in flight; the stage before is free.
                plgpu.wgmma_wait(1)
                pl.when(k > 0)(lambda: free(done + k - 1))

            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: free(done + steps - 1))
            return accumulator[...]

        sums = pl.run_scoped(run, plgpu.ACC((tiling.share, tiling.columns)))
        expert, (row, column) = work.piece(i)
        _store(refs, sums.astype(refs.out.dtype), expert, row + warpgroup * tiling.share, column, warpgroup)

    work.each(piece)
    plgpu.wait_smem_to_gmem(0)


def _store(refs, sums, expert, row, column, warpgroup):
    """A consumer's rows to the output; in parts that take turns in the staging memory."""
    _, slots, rows, columns = refs.out_s.shape
    parts = [(r, c) for r in range(0, sums.shape[0], rows) for c in range(0, sums.shape[1], columns)]
    for turn, (r, c) in enumerate(parts):
        staged = refs.out_s.at[warpgroup, turn % slots]
        # a piece begins in the first slot, wherever the one before it ended
        plgpu.wait_smem_to_gmem(slots - 1 if turn else 0, wait_read_only=True)
        staged[...] = sums[r : r + rows, c : c + columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, refs.out.at[expert, pl.ds(row + r, rows), pl.ds(column + c, columns)])
