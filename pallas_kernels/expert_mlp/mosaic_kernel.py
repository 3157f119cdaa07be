"""One grouped product on Hopper, the kernel under the `mosaic_gpu` expert MLP.

    for every tile of the plan and every strip of columns:                  (persistent blocks take turns)
        accumulators = rows of the tile @ strip of each kernel of the tile's expert
        out[tile, strip] = activation(accumulators + biases)

The kernel's columns take the side of wgmma that comes in multiples of 64, and the rows of x the side that comes in
multiples of 8, so that tiles can be as small or as odd as experts' loads are: 8 rows for decoding, 144 where experts
have about 256. A block is one producer warpgroup, which fills a ring of stages in shared memory, and one or two
consumer warpgroups, which multiply and store. The ring runs on across tiles: the next tile's loads are on their way
while the last one is stored.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_block import block
from .mosaic_gather import arrivals
from .mosaic_weights import COLUMNS, DEPTH

STORE_COLUMNS = 64  # stored at once: a row of them fills the 128 bytes of a swizzled tile
SHARED_BYTES, SHARED_RESERVE = 232448, 3072  # of an SM; of that, for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a block cuts the product, and how it is shared out.

    `rows` of a tile (the plan's `tile_rows`), `columns` per kernel and strip, `depth` of a stage along the
    contraction, `stages` of the ring, `consumers`: warpgroups that share a strip. `group`: tiles that run through
    their strips together, so that they share what is in the L2 cache. `blocks`: blocks per SM.
    """

    rows: int
    columns: int
    depth: int = 64
    stages: int = 4
    consumers: int = 2
    group: int = 8
    blocks: int = 1

    @property
    def share(self) -> int:
        """Columns of one consumer."""
        return self.columns // self.consumers


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static of a call. `source` of the rows: "in_place" (row g of each tile is row g of x), "tiled" (x is
    laid out like the plan) or "gathered" (the plan's choices say which). `choices`: per token.
    `weights`: how kernels are stored (`mosaic_weights`). `experts`: per layer. `overlap`: begin to load weights while
    the kernel before still runs. `keeps`: the products are stored as well, before the activation. `added`: each kernel
    has its own x, and the products are added up."""

    name: str
    tiling: Tiling
    activation: Any  # gate (or None), up -> hidden; None: the plain product
    source: str
    choices: int
    weights: Any
    experts: int
    overlap: bool
    num_sms: int
    interpret: Any = False
    keeps: bool = False
    added: bool = False


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes of a call: `width` K of the contraction, `out` N columns, and what follows from the tiling.

    `terms`: products that are added up, each in as many steps; `products`: accumulators; `outputs`: arrays.
    """

    width: int
    out: int
    terms: int
    products: int
    outputs: int
    arrays: int  # of each kernel
    biases: int

    def strips(self, tiling: Tiling) -> int:
        return pl.cdiv(self.out, tiling.columns)

    def steps_of_term(self, tiling: Tiling) -> int:
        return pl.cdiv(self.width, tiling.depth)

    def steps(self, tiling: Tiling) -> int:
        return self.terms * self.steps_of_term(tiling)


def grouped_product(product: Product, x, kernels, biases, plan, layer, after=()):
    """`[tiles * rows, N]` for kernels (one or two), stored as the product says, and biases (as many, or none) `[E, N]`.

    `x` `[G, K]`, or `[tiles * rows, K]` where it is tiled, one for each kernel where products are added; `layer` int32
    `[1]`. Rows of padding hold anything. Products that are kept follow the result, in the kernels' order. `after`:
    arrays that are not read, but must exist before this kernel runs: what the next one loads without waiting for it.
    """
    tiling, weights = product.tiling, product.weights
    xs = x if product.added else [x]
    x, terms, count = xs[0], len(xs), len(kernels) // len(xs)
    arrays = [weights.arrays(kernel) for kernel in kernels]
    outputs = 1 + count if product.keeps else 1
    sizes = _Sizes(x.shape[1], weights.out(kernels[0]), terms, count, outputs, len(arrays[0]), len(biases))
    stages = min(tiling.stages, sizes.steps(tiling))
    slots = _store_slots(tiling, stages, count, weights.bits, outputs)
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM((stages, tiling.rows, tiling.depth), x.dtype),
        w_s=[weights.stages(stages, tiling, arrays[0][0])] * count,
        out_s=plgpu.SMEM((tiling.consumers, *slots, STORE_COLUMNS), x.dtype),
        full=plgpu.Barrier(num_arrivals=count + (product.source != "gathered"), num_barriers=stages),
        rows=[arrivals(stages), plgpu.Barrier(num_arrivals=1)] if product.source == "gathered" else [],
        wide_s=[plgpu.SMEM((tiling.consumers, COLUMNS, DEPTH), x.dtype)] if product.interpret else [],
        free=plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=stages),
    )
    out = jax.ShapeDtypeStruct((plan.max_tiles * tiling.rows, sizes.out), x.dtype)
    kernel = plgpu.kernel(
        functools.partial(block, product, sizes),
        out_type=[out] * outputs if product.keeps else out,
        grid=(product.num_sms * tiling.blocks,),
        grid_names=("block",),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=product.name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=product.interpret,
    )
    # where nobody reads them, the choices are not even computed
    choices = plan.row_choice if product.source == "gathered" else plan.tile_expert
    plan_and_layer = plan.tile_expert, plan.num_tiles.reshape(1), choices, layer
    return kernel(*xs, *plan_and_layer, *biases, *(array for some in arrays for array in some), *after)


def _store_slots(tiling, stages, kernels, bits, outputs=1):
    """Slots of staging memory per consumer and rows of each: two of as many rows as there is room for.

    `bits`: of a kernel's element. One slot will do where a piece of work is stored at once.
    """
    ring = stages * tiling.depth * (16 * tiling.rows + bits * kernels * tiling.columns) // 8
    room = SHARED_BYTES // tiling.blocks - SHARED_RESERVE - ring
    for parts in range(1, tiling.rows // 8 + 1):
        slots = min(2, outputs * parts * tiling.share // STORE_COLUMNS)
        rows = 8 * pl.cdiv(tiling.rows, 8 * parts)
        if tiling.consumers * slots * rows * 2 * STORE_COLUMNS <= room:
            return slots, rows
    raise ValueError(f"tiling: {tiling} leaves no shared memory for stores")
