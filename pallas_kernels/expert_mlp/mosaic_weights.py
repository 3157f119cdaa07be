"""How kernels are stored, and what a consumer makes of a stage of them: the rest of a block does not know.

A form says what of a kernel the producer loads into a stage, and multiplies a piece of work: `[share, rows]` in
float32, finished but for bias and activation. `Plain` kernels go to wgmma from shared memory. Smaller ones pass
through registers, where they are widened: wgmma takes the operand with the columns from there as well.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import load_registers

#: Columns that wgmma takes, and inputs in one row of a swizzled tile of x, 128 bytes.
COLUMNS, DEPTH = 64, 64


@dataclasses.dataclass(frozen=True)
class Piece:
    """A consumer's share of one piece of work.

    `stages`: of the ring, in order; `kernels`: of each the references to its arrays in global memory; `w_s`: of each
    the ring's stages, `x_s` those of x; `mine`: the consumer's columns in a stage, `columns` the same in a kernel;
    `wide_s`: memory for what registers hold, in the interpreter.
    """

    stages: Any
    kernels: Any
    w_s: Any
    x_s: Any
    wide_s: Any
    expert: Any
    mine: Any
    columns: Any

    @property
    def interpreted(self) -> bool:
        """Whether JAX's interpreter runs this."""
        return self.wide_s is not None

    @property
    def accumulator(self):
        """Of one kernel."""
        return plgpu.ACC((self.mine.size, self.x_s.shape[1]))

    def operand(self, wide):
        """Registers as wgmma's operand; the interpreter's takes none but from memory."""
        if not self.interpreted:
            return wide
        self.wide_s[...] = wide
        return self.wide_s

    def per_column(self, values):
        """From global memory one value for each column, in the accumulators' layout."""
        return load_registers(values, plgpu.Layout.WGMMA.reduce(1))

    def spread(self, values):
        """Those as wide as an accumulator."""
        return lax.broadcast_in_dim(values.astype(jnp.float32), self.accumulator.shape, (0,))


@dataclasses.dataclass(frozen=True)
class Plain:
    """As x is: `[E, K, N]`, or `[E, N, K]` where `transposed`."""

    transposed: bool = False

    #: Of an element.
    bits = 16

    def arrays(self, kernel):
        """What the block gets of a kernel, first what is loaded into stages."""
        return (kernel,)

    def out(self, kernel) -> int:
        """Columns of a kernel."""
        return kernel.shape[1 if self.transposed else 2]

    def stages(self, count, tiling, loaded):
        """Shared memory for a kernel's part of the ring; `loaded`: the array that it comes from."""
        tile = (tiling.columns, tiling.depth) if self.transposed else (tiling.depth, tiling.columns)
        return plgpu.SMEM((count, *tile), loaded.dtype)

    def source(self, kernel, expert, strip, depth):
        """What the producer copies to a stage."""
        return kernel[0].at[expert, strip, depth] if self.transposed else kernel[0].at[expert, depth, strip]

    def multiply(self, piece):
        """The products of a piece of work, one for each kernel."""
        stages, mine = piece.stages, piece.mine

        def run(*accumulators):
            @pl.loop(0, stages.count)
            def _(k):
                slot = stages.wait(k)
                for accumulator, w_s in zip(accumulators, piece.w_s, strict=True):
                    own = w_s.at[slot, mine] if self.transposed else w_s.at[slot, :, mine].T
                    plgpu.wgmma(accumulator, own, piece.x_s.at[slot].T)
                # One step's products stay in flight; the stage before is free.
                plgpu.wgmma_wait(len(piece.w_s))

                @pl.when(k > 0)
                def _():
                    stages.free_before(k)

            plgpu.wgmma_wait(0)
            stages.free_before(stages.count)
            return tuple(accumulator[...] for accumulator in accumulators)

        return pl.run_scoped(run, *[piece.accumulator] * len(piece.w_s))


class Widened:
    """Kernels `[E, N, K]` that a consumer loads into registers and widens there, 64 columns and inputs at a time."""

    bits: int

    def arrays(self, kernel):
        raise NotImplementedError

    def out(self, kernel) -> int:
        return kernel.shape[1]

    def stages(self, count, tiling, loaded):
        raise NotImplementedError

    def source(self, kernel, expert, strip, depth):
        return kernel[0].at[expert, strip, depth]

    def ahead(self, piece, k):
        """What step `k` needs from global memory, asked for one step before, for each kernel."""
        return [()] * len(piece.kernels)

    def load(self, piece, n, slot, first, ahead):
        """Of kernel `n` 64 columns of a stage, from the consumer's `first` on, as they are stored."""
        raise NotImplementedError

    def widen(self, piece, stored, part):
        """64 inputs of that in x's dtype: `[64, 64]`."""
        raise NotImplementedError

    def issue(self, piece, n, accumulator, slot, ahead, parts, after_first=lambda: None):
        """Multiply some parts of a stage. While wgmma has one in hand, the next is widened.

        Not where a step has but one product: the next one's registers would be those that wgmma reads.
        """
        firsts = range(0, piece.mine.size, COLUMNS)
        in_flight = 1 if len(firsts) * len(parts) * len(piece.kernels) > 1 else 0
        for first in firsts:
            own = accumulator.at[pl.ds(first, COLUMNS)] if piece.mine.size > COLUMNS else accumulator
            stored = self.load(piece, n, slot, first, ahead)
            for part in parts:
                wide = piece.operand(self.widen(piece, stored, part))
                plgpu.wgmma(own, wide, piece.x_s.at[slot, :, pl.ds(part * DEPTH, DEPTH)].T)
                plgpu.wgmma_wait(in_flight)
                if first == 0 and part == parts[0]:
                    after_first()

    def multiply(self, piece):
        stages, parts = piece.stages, range(piece.x_s.shape[2] // DEPTH)

        def run(*accumulators):
            def step(k, ahead):
                following = self.ahead(piece, k + 1)
                slot = stages.wait(k)
                free_before = lambda: pl.when(k > 0)(lambda: stages.free_before(k))
                for n, accumulator in enumerate(accumulators):
                    after_first = (lambda: None) if n else free_before
                    self.issue(piece, n, accumulator, slot, ahead[n], parts, after_first)
                return following

            lax.fori_loop(0, stages.count, step, self.ahead(piece, 0))
            plgpu.wgmma_wait(0)
            stages.free_before(stages.count)
            return tuple(accumulator[...] for accumulator in accumulators)

        return pl.run_scoped(run, *[piece.accumulator] * len(piece.w_s))
