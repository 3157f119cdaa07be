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
from ..quantized import QuantizedArray, is_quantized

#: Columns that wgmma takes, and inputs in one row of a swizzled tile of x, 128 bytes.
COLUMNS, DEPTH = 64, 64
_DTYPES = (jnp.bfloat16, jnp.float16)


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
    def accumulator(self):
        """Of one kernel."""
        return plgpu.ACC((self.mine.size, self.x_s.shape[1]))

    def operand(self, wide):
        """Registers as wgmma's operand; the interpreter's takes none but from memory."""
        if self.wide_s is None:
            return wide
        self.wide_s[...] = wide
        return self.wide_s

    def per_column(self, values):
        """One value for each column, from global memory, as wide as an accumulator."""
        values = load_registers(values, plgpu.Layout.WGMMA.reduce(1))
        return lax.broadcast_in_dim(values.astype(jnp.float32), self.accumulator.shape, (0,))


@dataclasses.dataclass(frozen=True)
class Plain:
    """As x is: `[E, K, N]`, or `[E, N, K]` where `transposed`."""

    transposed: bool = False

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


class _Widened:
    """Kernels `[E, N, K]` that a consumer loads into registers and widens there, 64 columns and inputs at a time."""

    def out(self, kernel) -> int:
        return kernel.shape[1]

    def load(self, piece, n, slot, columns, k):
        """Of kernel `n` some columns of the stage of step `k`, as they are stored."""
        raise NotImplementedError

    def widen(self, stored, part, dtype):
        """64 inputs of that, in x's dtype: `[columns, 64]`."""
        raise NotImplementedError

    def issue(self, piece, n, accumulator, slot, k, parts, after_first=lambda: None):
        """Multiply some parts of a stage. While wgmma has one in hand, the next is widened."""
        for first in range(0, piece.mine.size, COLUMNS):
            own = accumulator.at[pl.ds(first, COLUMNS)] if piece.mine.size > COLUMNS else accumulator
            stored = self.load(piece, n, slot, pl.ds(piece.mine.start + first, COLUMNS), k)
            for part in parts:
                wide = piece.operand(self.widen(stored, part, piece.x_s.dtype))
                plgpu.wgmma(own, wide, piece.x_s.at[slot, :, pl.ds(part * DEPTH, DEPTH)].T)
                plgpu.wgmma_wait(1)
                if first == 0 and part == parts[0]:
                    after_first()

    def multiply(self, piece):
        stages, parts = piece.stages, range(piece.x_s.shape[2] // DEPTH)

        def run(*accumulators):
            @pl.loop(0, stages.count)
            def _(k):
                slot = stages.wait(k)

                def free_before():
                    pl.when(k > 0)(lambda: stages.free_before(k))

                for n, accumulator in enumerate(accumulators):
                    self.issue(piece, n, accumulator, slot, k, parts, (lambda: None) if n else free_before)

            plgpu.wgmma_wait(0)
            stages.free_before(stages.count)
            return tuple(accumulator[...] for accumulator in accumulators)

        return pl.run_scoped(run, *[piece.accumulator] * len(piece.w_s))


@dataclasses.dataclass(frozen=True)
class Int8(_Widened):
    """`QuantizedArray` with a scale per column, which is left until the products are done: widening is exact."""

    def arrays(self, kernel):
        return kernel.values, kernel.scales.reshape(kernel.scales.shape[:2])

    def stages(self, count, tiling, loaded):
        # in rows of 128 bytes where the kernel's rows are whole ones
        row = 128 if tiling.depth % 128 == 0 and loaded.shape[2] % 128 == 0 else 64
        transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row)
        return plgpu.SMEM((count, tiling.columns, tiling.depth), loaded.dtype, transforms=transforms)

    def source(self, kernel, expert, strip, depth):
        return kernel[0].at[expert, strip, depth]

    def load(self, piece, n, slot, columns, k):
        return piece.w_s[n][slot, columns]

    def widen(self, stored, part, dtype):
        return stored[:, part * DEPTH : (part + 1) * DEPTH].astype(dtype)

    def multiply(self, piece):
        values = super().multiply(piece)
        scales = [piece.per_column(kernel[1].at[piece.expert, piece.columns]) for kernel in piece.kernels]
        return tuple(value * scale for value, scale in zip(values, scales, strict=True))


@dataclasses.dataclass(frozen=True)
class Int8Groups(Int8):
    """`QuantizedArray` with a scale per column and `group` inputs, a multiple of 64.

    Each group's products are summed up by themselves and scaled in float32: scaled before, weights would be rounded.
    """

    group: int = 128

    def arrays(self, kernel):
        return kernel.values, kernel.scales

    def multiply(self, piece):
        depth, shape = piece.x_s.shape[2], piece.accumulator.shape
        together = min(self.group, depth)

        def add(k, slot, first, n, scale, total):
            def run(accumulator):
                parts = range(first // DEPTH, (first + together) // DEPTH)
                self.issue(piece, n, accumulator, slot, k, parts)
                return accumulator[...]

            return total + scale * pl.run_scoped(run, piece.accumulator)

        def step(k, totals):
            firsts = range(0, depth, together)
            scales = [[self._scale(piece, kernel, k * depth + first) for kernel in piece.kernels] for first in firsts]
            slot = piece.stages.wait(k)
            for first, some in zip(firsts, scales, strict=True):
                totals = [add(k, slot, first, n, *both) for n, both in enumerate(zip(some, totals, strict=True))]
            piece.stages.free_before(k + 1)
            return tuple(totals)

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, piece.stages.count, step, (zeros,) * len(piece.kernels))

    def _scale(self, piece, kernel, depth):
        last = kernel[1].shape[2] - 1
        return piece.per_column(kernel[1].at[piece.expert, piece.columns, jnp.minimum(depth // self.group, last)])


def refuse(x, experts) -> str | None:
    """Why these kernels cannot be multiplied by rows of x; None if they can."""
    given = [w for w in (experts.gate, experts.up, experts.down) if w is not None]
    plain = [w for w in given if not is_quantized(w)]
    if x.dtype not in _DTYPES or any(w.dtype != x.dtype for w in plain):
        kinds = ", ".join(sorted({str(w.dtype) for w in plain or given}))
        return f"x and kernels must both be bfloat16 or both float16, got {x.dtype} and {kinds}"
    quantized = [w for w in given if is_quantized(w)]
    if others := {type(w).__name__ for w in quantized if not isinstance(w, QuantizedArray)}:
        return f"kernels stored as {', '.join(others)} are not multiplied here"
    if any(w.runs for w in quantized):
        return "scales over runs of a flattened matrix are not applied here"
    groups = [group for w in quantized if (group := _group(w)) is not None]
    if any(group % DEPTH for group in groups):
        return f"groups must be multiples of {DEPTH} inputs, got {groups[0]}"
    if experts.gate is not None and form_of(experts.gate, experts.layout) != form_of(experts.up, experts.layout):
        return "gate and up must be stored alike, with groups of the same size"
    return None


def form_of(kernel: Any, layout: str) -> Any:
    """How a kernel that is not refused is stored."""
    if not is_quantized(kernel):
        return Plain(layout == "out_in")
    group = _group(kernel)
    return Int8() if group is None else Int8Groups(group)


def _group(kernel: Any) -> int | None:
    return None if kernel.scales.shape[-1] == 1 else kernel.group_size
