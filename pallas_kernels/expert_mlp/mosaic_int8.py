"""Int8 kernels in the grouped product: exact in x's dtype, so that scales are left until products are summed up."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_weights import COLUMNS, DEPTH, Widened


@dataclasses.dataclass(frozen=True)
class Int8(Widened):
    """`QuantizedArray` with a scale per column."""

    bits = 8

    def arrays(self, kernel):
        return kernel.values, kernel.scales.reshape(kernel.scales.shape[:2])

    def stages(self, count, tiling, loaded):
        # in rows of 128 bytes where the kernel's rows are whole ones
        row = 128 if tiling.depth % 128 == 0 and loaded.shape[2] % 128 == 0 else 64
        transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row)
        return plgpu.SMEM((count, tiling.columns, tiling.depth), loaded.dtype, transforms=transforms)

    def load(self, piece, n, slot, first, ahead):
        return piece.w_s[n][slot, pl.ds(piece.mine.start + first, COLUMNS)]

    def widen(self, piece, stored, part):
        return stored[:, part * DEPTH : (part + 1) * DEPTH].astype(piece.x_s.dtype)

    def multiply(self, piece):
        values = super().multiply(piece)
        scales = [piece.per_column(kernel[1].at[piece.expert, piece.columns]) for kernel in piece.kernels]
        return tuple(value * piece.spread(scale) for value, scale in zip(values, scales, strict=True))


@dataclasses.dataclass(frozen=True)
class Int8Groups(Int8):
    """`QuantizedArray` with a scale per column and `group` inputs, a multiple of 64.

    Each group's products are summed up by themselves and scaled in float32: scaled before, weights would be rounded.
    """

    group: int = 128

    def arrays(self, kernel):
        return kernel.values, kernel.scales

    def ahead(self, piece, k):
        depth = piece.x_s.shape[2]
        return [
            [self._scale(piece, kernel, k * depth + first) for first in self._firsts(depth)] for kernel in piece.kernels
        ]

    def _firsts(self, depth):
        """Where groups begin in a stage, or the one that goes through it."""
        return range(0, depth, min(self.group, depth))

    def _scale(self, piece, kernel, depth):
        group = jnp.minimum(lax.div(jnp.asarray(depth, jnp.int32), jnp.int32(self.group)), kernel[1].shape[2] - 1)
        return piece.per_column(kernel[1].at[piece.expert, piece.columns, group])

    def multiply(self, piece):
        depth = piece.x_s.shape[2]
        firsts, parts = self._firsts(depth), min(self.group, depth) // DEPTH

        def product(n, slot, first):
            def run(accumulator):
                start = first // DEPTH
                self.issue(piece, n, accumulator, slot, (), range(start, start + parts))
                return accumulator[...]

            return pl.run_scoped(run, piece.accumulator)

        def step(k, state):
            totals, ahead = state
            following = self.ahead(piece, k + 1)
            slot = piece.stages.wait(k)
            for i, first in enumerate(firsts):
                totals = [total + piece.spread(ahead[n][i]) * product(n, slot, first) for n, total in enumerate(totals)]
            piece.stages.free_before(k + 1)
            return totals, following

        zeros = plgpu.layout_cast(jnp.zeros(piece.accumulator.shape, jnp.float32), plgpu.Layout.WGMMA)
        state = [zeros] * len(piece.kernels), self.ahead(piece, 0)
        return tuple(lax.fori_loop(0, piece.stages.count, step, state)[0])
