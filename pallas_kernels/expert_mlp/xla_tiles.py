"""The expert MLP as a loop over the tiles of the plan: work follows the active experts, not all of them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..plan import make_plan
from ..quantized import dense, is_quantized, rows_of
from .reference import combine, expert


def routed_mlp(x, ids, weights, experts, plan, layer):
    """See `api.routed_mlp`."""
    if plan is None:
        plan = make_plan(ids, experts.num_experts, tile_rows(*ids.shape, experts.num_experts))
    widths, mean = (plan.tile_rows,), ids.size / experts.num_experts
    if not plan.in_place:
        kernels = sum(w.nbytes for w in (experts.gate, experts.up, experts.down) if w is not None)
        widths = row_widths(plan.tile_rows, mean, kernels / math.prod(experts.up.shape[:-2]))
    whole = layer is None and experts.layout == "out_in" and not experts.quantized
    # bfloat16 would be widened for all experts at once
    batched = batched_rows(plan.tile_rows, mean) if whole and experts.up.dtype == jnp.float32 else 0
    tiles = _tiles(plan, ids)
    first = 0 if layer is None else layer * experts.num_experts
    packed = plan.row_choice.shape[0] if plan.in_place else ids.size + plan.tile_rows
    rows = _run_tiles(x, experts.flat(), tiles._replace(expert=tiles.expert + first), packed, widths, batched)
    nowhere = plan.slot >= plan.row_choice.shape[0]
    slot = tiles.start.at[plan.slot // plan.tile_rows].get(mode="clip") + plan.slot % plan.tile_rows
    return combine(rows, jnp.where(nowhere, packed, slot), weights, x.dtype)


def gradients(x, ids, weights, experts, layer, d_y):
    """Cotangents of `x`, `weights` and `experts`, for implementations that have no backward pass of their own.

    The loop recomputes the hidden rows: grouped products for input and weight gradients.
    """
    run = lambda x, weights, experts: routed_mlp(x, ids, weights, experts, None, layer)
    return jax.vjp(run, x, weights, experts)[1](d_y)


class _Tiles(NamedTuple):
    """What the loop over tiles reads of a plan.

    `token [tiles, size]`: the tokens of each tile's rows. `expert`, `length` and `start` `[tiles]`: the tile's
    expert, its rows that hold work, and where its output begins. Outputs are packed: a tile writes `size` rows, and
    the next tile overwrites the padding. `num_tiles`: tiles that hold work.
    """

    token: jax.Array
    expert: jax.Array
    length: jax.Array
    start: jax.Array
    num_tiles: jax.Array


def _tiles(plan, ids):
    choice = plan.row_choice.reshape(-1, plan.tile_rows)
    length = jnp.full(len(choice), plan.tile_rows) if plan.in_place else (choice < ids.size).sum(1)
    length = length.astype(jnp.int32)
    start = jnp.cumsum(length, dtype=jnp.int32) - length
    return _Tiles(choice // ids.shape[1], plan.tile_expert, length, start, plan.num_tiles)


def tile_rows(tokens: int, choices: int, num_experts: int) -> int:
    """Rows per tile (measured on a CPU: docs/decisions.md).

    Few rows in all: one row a tile, whose products read the weights in place. Otherwise tiles that hold an expert's
    rows at once even where all tokens go to few experts, since each further tile copies the weights again; at most
    128 rows, which fill the cache. `row_widths` spares the padding. From 16 rows on, multiples of 16: XLA runs others
    slower than the next larger one.

    >>> tile_rows(8, 4, num_experts=32), tile_rows(32, 8, num_experts=64), tile_rows(512, 8, num_experts=64)
    (1, 16, 128)
    """
    if tokens * choices <= min(512, 2 * num_experts):
        return 1
    step = 16 if tokens > 16 else 8
    return max(8, min(128, (tokens - 1) // step * step))


def batched_rows(size: int, mean: float) -> int:
    """How many rows of every expert to compute in one batched product instead of a loop; 0: always loop.

    A batched product reads kernels where they are, the loop copies them first, which takes as long again: it pays
    where few rows (`mean` on average) of most experts are asked for. Few experts exceed these rows; the loop runs the
    rest.

    >>> batched_rows(16, mean=4.0), batched_rows(128, mean=16.0), batched_rows(128, mean=64.0)
    (16, 32, 0)
    """
    rows = -(-math.ceil(mean + 2 * math.sqrt(mean)) // 16) * 16
    return rows if rows <= min(size, _BATCHED_ROWS) else 0


def row_widths(size: int, mean: float, expert_bytes: float) -> tuple[int, ...]:
    """How many rows of a tile of `size` may be computed, least first: few, since each costs compile time.

    They lie close where tiles of `mean` rows on average will end. The first may be `ROW_BY_ROW` or less: such tiles
    run each row by itself, which pays for more than one row only where the expert's kernels stay in the cache.

    >>> row_widths(128, mean=64.0, expert_bytes=25e6), row_widths(16, mean=4.0, expert_bytes=25e6)
    ((32, 64, 80, 96, 128), (1, 8, 16))
    """
    if size <= 8:
        return (size,)
    if mean <= 6:
        widths = {ROW_BY_ROW if expert_bytes <= _CACHED_BYTES else 1, 8, 32, size}
    elif mean <= 24:
        widths = {8, 16, 32, size}
    else:
        widths = {-(-int(mean * part) // 16) * 16 for part in (0.5, 1, 1.25, 1.5)} | {size}
    return tuple(sorted(width for width in widths if width <= size))


#: Most rows of each expert that are computed in a batched product; beyond, padding costs more than copies of kernels.
_BATCHED_ROWS = 48
#: Most rows of one expert that run one by one rather than as a product of 8.
ROW_BY_ROW = 4
#: Size of an expert that a CPU's last-level cache keeps from one row to the next.
_CACHED_BYTES = 8 << 20


def _take(experts, index):
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), experts)


def _on_tile(x, experts, index):
    """Expert `index` on a tile's rows `x [rows, D]`.

    One row: its product reads the kernel in place, unless it must be unpacked. More rows: XLA on a CPU copies the
    kernel first, so it is copied in pieces that stay in the cache until they are used, and the kernel is the left
    operand, which XLA multiplies faster with few rows. Together they halve the time of 8-row tiles (docs/decisions.md).
    """
    packed = is_quantized(experts.up) and experts.up.packed
    if (x.shape[0] == 1 and not packed) or experts.layout != "out_in":
        return expert(x, _take(experts, index))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def linear(kernel, bias, columns):
        y = _by_pieces(kernel, index, columns, wide)
        return y if bias is None else y + bias[index][:, None]

    return _mlp(linear, experts, x)


def _mlp(product, experts, rows):
    """The expert MLP on `rows [..., rows, D]` with `product(kernel, bias, columns)`, kernels on the left.

    XLA would fold the transposes into the products, and then not run them as they are written.
    """
    columns = jax.lax.optimization_barrier(jnp.swapaxes(rows, -1, -2))
    up = product(experts.up, experts.up_bias, columns)
    gate = None if experts.gate is None else product(experts.gate, experts.gate_bias, columns)
    hidden = experts.activation(gate, up).astype(columns.dtype)
    out = product(experts.down, experts.down_bias, hidden).astype(columns.dtype)
    return jnp.swapaxes(jax.lax.optimization_barrier(out), -1, -2)


def _by_pieces(kernels, index, columns, dtype):
    """`kernels[index] @ columns`: `kernels [E, out, in]`, `columns [in, rows]`, in pieces along `out`."""
    _, out, width = kernels.shape
    size = piece_rows(out, width * jnp.dtype(dtype).itemsize, columns.shape[1])
    if is_quantized(kernels) and kernels.runs:
        size = out

    def piece(i):
        # all indices in one type, also with 64 bits enabled
        cut = rows_of(kernels, index, jnp.asarray(i * size, index.dtype), size)
        return jnp.matmul(dense(cut, columns.dtype), columns, preferred_element_type=dtype)

    if size == out:
        return piece(0)
    put = lambda i, y: jax.lax.dynamic_update_slice_in_dim(y, piece(i), i * size, axis=0)
    return jax.lax.fori_loop(0, out // size, put, jnp.zeros((out, columns.shape[1]), dtype))


def piece_rows(out: int, row_bytes: int, columns: int) -> int:
    """Rows of a kernel that are copied at once, to be multiplied by `columns`: the largest divisor of `out` within 4 MB
    (8 MB from 32 columns on); all, if it is below 1 MB.

    >>> piece_rows(1024, 2048 * 4, 8), piece_rows(1408, 2048 * 4, 8), piece_rows(1031, 2048 * 4, 8)
    (512, 352, 1031)
    """
    pieces = max(1, -(-out * row_bytes // (_PIECE_BYTES if columns < 32 else 2 * _PIECE_BYTES)))
    while out % pieces and out // pieces * row_bytes >= _SMALLEST_PIECE:
        pieces += 1
    return out if out % pieces else out // pieces


#: A piece must stay in the cache between its copy and its use, and be worth a product of its own. Measured for D=2048,
#: F=1024 on a busy machine: with 8 rows, 1 MB took 1.1 to 1.5 times as long as 4 MB, whole kernels (8 MB) 1.2 to 1.9
#: times; with 80 rows, 2 to 4 MB were equal within the noise. On a second machine 8 MB took 0.92 times as long as 4 MB
#: with 32 to 128 rows.
_PIECE_BYTES = 4 << 20
_SMALLEST_PIECE = 1 << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _run_tiles(x, experts, tiles, packed, widths, batched):
    """Rows `[packed, D]`: each tile's expert on its tokens.

    If most experts have a tile, the first `batched` rows of each are one product, and the loop runs only the rest.
    """
    if not batched:
        return _loop(x, experts, tiles, packed, widths)
    used = jnp.arange(len(tiles.expert)) < tiles.num_tiles
    first = used & (tiles.expert != jnp.roll(tiles.expert, 1)).at[0].set(True)
    most = 3 * first.sum() >= 2 * experts.up.shape[0]
    rows = _loop(x, experts, _beyond(tiles, first & most, used, batched), packed, widths)
    return jax.lax.cond(most, lambda: _batch(x, experts, tiles, first, rows, batched), lambda: rows)


def _beyond(tiles, first, used, width):
    """The `used` tiles without the first `width` rows of those in `first`, as far as any rows are left."""
    skipped = jnp.where(first, width, 0).astype(jnp.int32)
    token = jnp.where(first[:, None], jnp.roll(tiles.token, -width, axis=1), tiles.token)
    length, start = tiles.length - skipped, tiles.start + skipped
    left = used & (length > 0)
    order = jnp.argsort(~left, stable=True)
    num_tiles = left.sum().astype(tiles.num_tiles.dtype)
    return _Tiles(token[order], tiles.expert[order], length[order], start[order], num_tiles)


def _batch(x, experts, tiles, first, rows, width):
    """`rows` with the first `width` of each tile in `first`, at most one per expert, put in by one batched product."""
    count, row = experts.up.shape[0], jnp.arange(width, dtype=jnp.int32)
    index = jnp.where(first, tiles.expert, count)
    token = jnp.full((count, width), len(x), jnp.int32)
    token = token.at[index].set(tiles.token[:, :width], mode="drop")

    def product(kernel, bias, columns):
        y = jnp.matmul(kernel, columns, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        return y if bias is None else y + bias[..., None]

    out = _mlp(product, experts, _gather(x, token)).reshape(count * width, -1)
    own = first[:, None] & (row < tiles.length[:, None])
    place = jnp.where(own, tiles.start[:, None] + row, len(rows))
    source = jnp.full(len(rows), count * width, jnp.int32)
    source = source.at[place].set(index[:, None] * width + row, mode="drop")
    return jnp.where((source < count * width)[:, None], out.at[source].get(mode="clip"), rows)


def _loop(x, experts, tiles, packed, widths):
    """`_run_tiles` tile by tile, each with the least of `widths` rows that holds its tokens."""
    size = tiles.token.shape[1]

    def at_once(width):
        def run(t):
            out = _on_tile(_gather(x, tiles.token[t, :width]), experts, tiles.expert[t])
            return jnp.pad(out, ((0, size - width), (0, 0)))

        return run

    def row_by_row(t):
        def row(r, out):
            y = _on_tile(_gather(x, tiles.token[t, r][None]), experts, tiles.expert[t])
            return jax.lax.dynamic_update_slice_in_dim(out, y, r, axis=0)

        return jax.lax.fori_loop(0, tiles.length[t], row, jnp.zeros((size, x.shape[1]), x.dtype))

    branches = [row_by_row if 1 < width <= ROW_BY_ROW else at_once(width) for width in widths]

    def body(t, rows):
        fitting = sum((tiles.length[t] > width).astype(jnp.int32) for width in widths[:-1])
        out = jax.lax.switch(fitting, branches, t)
        return jax.lax.dynamic_update_slice_in_dim(rows, out, tiles.start[t], axis=0)

    return jax.lax.fori_loop(0, tiles.num_tiles, body, jnp.zeros((packed, x.shape[1]), x.dtype))


def _gather(x, tokens):
    return x.at[tokens].get(mode="fill", fill_value=0)


def _forward(x, experts, tiles, packed, widths, batched):
    return _run_tiles(x, experts, tiles, packed, widths, batched), (x, experts, tiles)


def _backward(packed, widths, batched, saved, d_rows):
    """The same loop backwards, recomputing each tile; weight gradients accumulate in place in float32.

    Quantised kernels are constants: nothing flows to their values or scales.
    """
    del packed, widths, batched
    x, experts, tiles = saved
    size = tiles.token.shape[1]

    def body(t, carry):
        d_x, d_experts = carry
        index, tokens = tiles.expert[t], tiles.token[t]
        taken, own = _gather(x, tokens), _take(experts, index)
        own = jax.tree.map(lambda w: dense(w, x.dtype), own, is_leaf=is_quantized)
        _, pull = jax.vjp(expert, taken, own)
        d_out = jax.lax.dynamic_slice_in_dim(d_rows, tiles.start[t], size)
        d_out = jnp.where(jnp.arange(size)[:, None] < tiles.length[t], d_out, 0)  # the rest is the next tile's
        d_taken, d_expert = pull(d_out)
        d_x = d_x.at[tokens].add(d_taken.astype(d_x.dtype), mode="drop")
        add = lambda total, part: total.at[index].add(part.astype(total.dtype)) if total.ndim else total
        return d_x, jax.tree.map(add, d_experts, d_expert)

    def wide(w):
        return jnp.zeros(() if is_quantized(w) else w.shape, jnp.promote_types(w.dtype, jnp.float32))

    begin = wide(x), jax.tree.map(wide, experts, is_leaf=is_quantized)
    d_x, d_experts = jax.lax.fori_loop(0, tiles.num_tiles, body, begin)
    d_experts = jax.tree.map(lambda d, w: None if is_quantized(w) else d.astype(w.dtype), d_experts, experts)
    return d_x.astype(x.dtype), d_experts, None


_run_tiles.defvjp(_forward, _backward)
