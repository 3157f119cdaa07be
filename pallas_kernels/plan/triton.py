"""The plan on a GPU without a sort and without atomics: choices are counted and ranked in blocks.

Each program places one block of choices. It knows the choices of every expert in the blocks before its own and in all
of them: counted by itself where choices are few (one launch), else by a kernel that ran before (two launches).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import call_triton
from .value import Plan, tile_bound

MAX_EXPERTS = 1024
# Comparisons of choices with experts that a warp makes at once, and four times the counts that it adds up at once:
# what its registers hold.
_COMPARISONS = 4096


@dataclasses.dataclass(frozen=True)
class Block:
    """How programs work: `choices` each, placed `step` at a time (powers of two); `apart`: counted by a kernel."""

    choices: int
    step: int
    warps: int
    apart: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a plan."""

    choices: int
    per_token: int
    experts: int
    tile_rows: int
    tiles: int
    in_place: bool
    block: Block

    @property
    def blocks(self) -> int:
        """Programs."""
        return pl.cdiv(max(1, self.choices), self.block.choices)

    @property
    def rows(self) -> int:
        """Of all tiles: the slot of a choice that takes no row."""
        return self.tiles * self.tile_rows


def refuse(ids, num_experts, tile_rows) -> str | None:
    """Why this call is not supported, None if it is."""
    if num_experts > MAX_EXPERTS:
        return f"{num_experts} experts, at most {MAX_EXPERTS}"
    if tile_bound(ids.size, num_experts, tile_rows) * tile_rows >= 2**31:
        return f"{ids.size} choices in tiles of {tile_rows} rows need more than 32 bits"
    return None


def make_plan(ids, num_experts, tile_rows, *, interpret=False, block=None) -> Plan:
    """See `plan.make_plan`. `block`: chosen if None."""
    num_tokens, per_token = ids.shape
    choices, tiles = ids.size, tile_bound(ids.size, num_experts, tile_rows)
    flat = jnp.asarray(ids, jnp.int32).reshape(-1) if choices else jnp.full(1, -1, jnp.int32)
    block = block or default_block(choices, num_experts)
    in_place = tile_rows >= num_tokens
    layout = Layout(choices, per_token, num_experts, tile_rows, tiles, in_place, block)
    call = functools.partial(call_triton, grid=layout.blocks, warps=block.warps, interpret=interpret)

    operands = [flat]
    if block.apart:
        kernel, name = functools.partial(moe_jax_routing_count, layout=layout), "moe_jax_routing_count"
        operands += call(kernel, name, outputs=[((layout.blocks, num_experts), jnp.int32)], operands=operands)
    outputs = [((flat.size,), jnp.int32), ((tiles,), jnp.int32), ((1,), jnp.int32)]
    outputs += [] if in_place else [((layout.rows,), jnp.int32)]
    kernel, name = functools.partial(moe_jax_routing_place, layout=layout), "moe_jax_routing_place"
    slot, tile_expert, num_tiles, *row_choice = call(kernel, name, outputs=outputs, operands=operands)
    slot = slot[:choices]
    if in_place:  # no kernel reads it then, so outside: XLA drops it where nobody does
        padding = jnp.full(layout.rows, choices, jnp.int32)
        row_choice = [padding.at[slot].set(jnp.arange(choices, dtype=jnp.int32), mode="drop")]
    return Plan(
        row_choice=row_choice[0],
        slot=slot.reshape(num_tokens, per_token),
        tile_expert=tile_expert,
        num_tiles=num_tiles.reshape(()),
        tile_rows=tile_rows,
        in_place=in_place,
    )


#: Runs anywhere, slowly, to test the kernels.
interpreted = functools.partial(make_plan, interpret=True)


def default_block(choices: int, num_experts: int) -> Block:
    """One launch as long as all programs can count all choices in less time than a launch takes.

    >>> default_block(256, 128)
    Block(choices=32, step=32, warps=8, apart=False)
    >>> default_block(131072, 128)
    Block(choices=1024, step=64, warps=8, apart=True)
    """
    columns = _columns(num_experts)
    apart = choices * max(8, columns) > 65536
    most = max(16, min(64, 8192 // columns))
    size = min(8192, pl.next_power_of_2(pl.cdiv(choices, 128)) if apart else pl.next_power_of_2(pl.cdiv(choices, 8)))
    size = max(16, most if apart else 16, size)
    step = min(size, most)
    at_once = step if apart else max(step, choices // 4)
    warps = min(8, max(1, at_once * columns // 256))
    return Block(size, step, 1 << (warps.bit_length() - 1), apart)


# ---------------------------------------------------------------- inside the kernels
#
# A comparison of choices with experts is summed over its first axis, within the threads; a sum over the last axis
# would be one over the lanes of a warp for every row.


def moe_jax_routing_count(ids_ref, count_ref, *, layout):
    """One program: how many choices of its block each expert has."""
    block, expert = pl.program_id(0), _experts(layout)
    count = _count(ids_ref, block * layout.block.choices, layout.block.choices, layout)
    pltriton.store(count_ref.at[block, expert], count, mask=expert < layout.experts)


def moe_jax_routing_place(*refs, layout):
    """One program: the slots of its block of choices, its share of the tiles and of the rows that are padding."""
    ids_ref, *counts_ref = refs[: 1 + layout.block.apart]
    slot_ref, tile_ref, num_ref, *row_ref = refs[1 + layout.block.apart :]
    block, expert = pl.program_id(0), _experts(layout)
    if layout.block.apart:
        before, count = _add_up(counts_ref[0], block, layout)
    else:
        before, count = _count_all(ids_ref, block, layout)
    if layout.in_place:
        tiles = jnp.minimum(count, 1)
    else:
        tiles = lax.div(count + (layout.tile_rows - 1), jnp.int32(layout.tile_rows))
    last = jnp.cumsum(tiles, dtype=jnp.int32)
    first_row = (last - tiles) * layout.tile_rows
    num_tiles = jnp.sum(tiles, dtype=jnp.int32)

    def place(step, base):
        choice, ids = _load(ids_ref, block * layout.block.choices + step * layout.block.step, layout.block.step, layout)
        slot = _sum_first(jnp.where(expert[:, None] == ids[None, :], base[:, None], 0))
        if layout.in_place:
            slot = slot + lax.div(choice, jnp.int32(layout.per_token))
        else:
            slot = slot + _sum_first((ids[:, None] == ids[None, :]) & (choice[:, None] < choice[None, :]))
            base = base + _sum_first(ids[:, None] == expert[None, :])
        slot = jnp.where(ids >= 0, slot, layout.rows)
        if not layout.in_place:
            pltriton.store(row_ref[0].at[slot], choice, mask=ids >= 0)
        pltriton.store(slot_ref.at[choice], slot, mask=choice < slot_ref.shape[0])
        return base

    lax.fori_loop(
        0, layout.block.choices // layout.block.step, place, first_row if layout.in_place else first_row + before
    )
    _write_tiles(tile_ref, block, last, layout)
    pltriton.store(num_ref.at[lax.iota(jnp.int32, 1)], jnp.broadcast_to(num_tiles, (1,)), mask=block == 0)
    if not layout.in_place:
        end = first_row + tiles * layout.tile_rows
        _write_padding(row_ref[0], block, first_row + count, end, num_tiles * layout.tile_rows, layout)


def _columns(experts):
    return max(2, pl.next_power_of_2(experts))


def _experts(layout):
    """Their numbers, padded to a power of two: no choice is for those past the last."""
    return lax.iota(jnp.int32, _columns(layout.experts))


def _sum_first(values):
    return jnp.sum(values.astype(jnp.int32), axis=0, dtype=jnp.int32)


def _load(ids_ref, at, number, layout):
    """`number` choices from the `at`-th on, and their ids: -1 for a choice that takes no row."""
    choice = at + lax.iota(jnp.int32, number)
    ids = pltriton.load(ids_ref.at[choice], mask=choice < ids_ref.shape[0], other=-1)
    return choice, jnp.where((ids >= 0) & (ids < layout.experts), ids, -1)


def _count(ids_ref, at, number, layout, weigh=jnp.ones_like):
    """The sum of `weigh(choice)` for each expert over its choices among the `number` from the `at`-th on."""
    expert = _experts(layout)
    many = min(pl.next_power_of_2(number), max(1, layout.block.warps * _COMPARISONS // expert.shape[0]))

    def body(step, count):
        choice, ids = _load(ids_ref, at + step * many, many, layout)
        return count + _sum_first(jnp.where(ids[:, None] == expert[None, :], weigh(choice)[:, None], 0))

    return lax.fori_loop(0, pl.cdiv(number, many), body, jnp.zeros(expert.shape, jnp.int32))


def _count_all(ids_ref, block, layout):
    """Choices of each expert in the blocks before this one, and in all, from the ids."""
    own = block * layout.block.choices
    # Both in one sum: choices are fewer than 2**15 here.
    both = _count(ids_ref, 0, ids_ref.shape[0], layout, lambda choice: jnp.where(choice < own, (1 << 16) + 1, 1))
    return both >> 16, both & 0xFFFF


def _add_up(count_ref, block, layout):
    """Choices of each expert in the blocks before this one, and in all, from the counts of the blocks."""
    expert = _experts(layout)
    many = min(pl.next_power_of_2(layout.blocks), max(1, layout.block.warps * _COMPARISONS // 4 // expert.shape[0]))

    def body(step, sums):
        one = step * many + lax.iota(jnp.int32, many)
        there = (one < layout.blocks)[:, None] & (expert < layout.experts)[None, :]
        counts = pltriton.load(count_ref.at[one[:, None], expert[None, :]], mask=there, other=0)
        return sums[0] + _sum_first(jnp.where((one < block)[:, None], counts, 0)), sums[1] + _sum_first(counts)

    zeros = jnp.zeros(expert.shape, jnp.int32)
    return lax.fori_loop(0, pl.cdiv(layout.blocks, many), body, (zeros, zeros))


def _share(total, block, layout, body):
    """`body(indices, mask)` over this program's share of `range(total)`, some at a time."""
    share = pl.cdiv(total, layout.blocks)
    many = min(pl.next_power_of_2(share), layout.block.step)

    def one(step, carry):
        local = step * many + lax.iota(jnp.int32, many)
        index = block * share + local
        body(index, (local < share) & (index < total))
        return carry

    lax.fori_loop(0, pl.cdiv(share, many), one, 0)


def _write_tiles(tile_ref, block, last, layout):
    """The expert of each tile; `last`: the end of each expert's tiles."""

    def write(tile, mask):
        # Experts whose tiles all come before; past the last tile that is all of them, padding too.
        expert = _sum_first(last[:, None] <= tile[None, :])
        pltriton.store(tile_ref.at[tile], jnp.minimum(expert, layout.experts - 1), mask=mask)

    _share(layout.tiles, block, layout, write)


def _write_padding(row_ref, block, start, end, used, layout):
    """The sentinel in the rows from `start` to `end` of each expert, and in all rows after the `used` ones.

    No row that holds a choice is written, so that it does not matter which program comes first.
    """
    expert = _experts(layout)
    many = min(pl.next_power_of_2(layout.tile_rows), 64)

    def tails(own, mask):
        hit = (expert[:, None] == own[None, :]) & mask[None, :]
        first = _sum_first(jnp.where(hit, start[:, None], 0))
        past = _sum_first(jnp.where(hit, end[:, None], 0))

        def tail(step, carry):
            row = first[:, None] + (step * many + lax.iota(jnp.int32, many))[None, :]
            there = row < past[:, None]
            row = jnp.where(there, row, layout.rows)
            pltriton.store(row_ref.at[row], jnp.full(row.shape, layout.choices, jnp.int32), mask=there)
            return carry

        lax.fori_loop(0, pl.cdiv(layout.tile_rows, many), tail, 0)

    def rest(row, mask):
        sentinel = jnp.full(row.shape, layout.choices, jnp.int32)
        pltriton.store(row_ref.at[row], sentinel, mask=mask & (row >= used))

    _share(layout.experts, block, layout, tails)
    _share(layout.rows, block, layout, rest)


interpreted = functools.partial(make_plan, interpret=True)
