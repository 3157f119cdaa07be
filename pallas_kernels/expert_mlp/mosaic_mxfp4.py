"""MXFP4 kernels in the grouped product: four bits become bfloat16, scale and all, in a consumer's registers.

Of the fragment of 16 columns by 32 inputs that a warp gives to wgmma, a thread holds inputs 2t and 2t+1 of each eight
(t: its number in a quad) of two columns: byte t of each word. All four threads of a quad read the same four words and
keep a byte of each. A byte permutation is a table of eight bytes: one gives the upper byte of a value's bfloat16 by its
exponent and mantissa, another the lower. Products with powers of two are exact.

Scales come from global memory a step ahead, those of block t of 32 inputs to thread t: their rows are too odd for TMA.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ..mxfp4 import GROUP, MXFP4Array
from .mosaic_weights import COLUMNS, DEPTH, Widened

_THREADS = 128  # of a warpgroup
_PER_WORD = 8  # inputs
_SCALAR = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class MXFP4(Widened):
    """`MXFP4Array`. A stage has at most 128 inputs: a block of 32 for each thread of a quad."""

    bits = 4

    def arrays(self, kernel):
        return kernel.blocks, kernel.scales

    def stages(self, count, tiling, loaded):
        # not swizzled: rows of 64 bytes, read 16 at once, are free of bank conflicts
        return plgpu.SMEM((count, tiling.columns, tiling.depth // _PER_WORD), loaded.dtype)

    def source(self, kernel, expert, strip, depth):
        first = lax.div(jnp.asarray(depth.start, jnp.int32), jnp.int32(_PER_WORD))
        return kernel[0].at[expert, strip, pl.ds(first, depth.size // _PER_WORD)]

    def ahead(self, piece, k):
        blocks = piece.x_s.shape[2] // GROUP
        firsts = range(0, piece.mine.size, COLUMNS)
        if piece.interpreted:
            return [
                [_scales(kernel[1], piece, first, k * blocks, blocks) for first in firsts] for kernel in piece.kernels
            ]
        ask = lambda kernel, first: _ask(kernel[1], piece.expert, piece.columns.start + first, k * blocks, blocks)
        return [[ask(kernel, first) for first in firsts] for kernel in piece.kernels]

    def load(self, piece, n, slot, first, ahead):
        columns, scales = pl.ds(piece.mine.start + first, COLUMNS), ahead[first // COLUMNS]
        if piece.interpreted:
            return piece.w_s[n][slot, columns], scales
        return _load(piece.w_s[n].at[slot, columns], scales)

    def widen(self, piece, stored, part):
        if not piece.interpreted:
            return _widen(stored, part, piece.x_s.shape[2] // GROUP)
        words, blocks = DEPTH // _PER_WORD, DEPTH // GROUP
        of = lambda array, size: array[:, part * size : (part + 1) * size]
        return MXFP4Array(of(stored[0], words), of(stored[1], blocks)).dequantize(piece.x_s.dtype)


def _scales(scales, piece, first, block, blocks):
    """In the interpreter."""
    columns, last = pl.ds(piece.columns.start + first, COLUMNS), scales.shape[2] - 1
    return jnp.stack([scales[piece.expert, columns, jnp.minimum(block + b, last)] for b in range(blocks)], axis=1)


def _ask(scales, expert, column, block, blocks):
    """Of blocks from `block` on and 64 columns, each thread's: of block t, of two columns."""
    _, out, count = scales.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR), return_type=_numbers(2))
    def ask(ctx, scales, expert, column, block):
        del ctx
        c, long = _constant, ir.IntegerType.get_signless(64)
        expert, column, block = (value.registers.item() for value in (expert, column, block))
        row, t = _place()
        block = arith.addi(block, arith.minui(t, c(blocks - 1)))
        # the last stage may reach beyond the kernel, where all its values are zeros
        block = arith.extui(long, arith.minui(block, c(count - 1)))
        column = arith.extui(long, arith.addi(column, row))
        column = arith.addi(arith.muli(arith.extui(long, expert), c(out, long)), column)
        offset = arith.addi(arith.muli(column, c(count, long)), block)
        address = _at(mgpu.utils.memref_ptr(scales), "!llvm.ptr", offset)
        return _pack([_asm(f"ld.global.nc.u8 $0, [$1+{half * 8 * count}];", "=r,l", address) for half in (0, 1)])

    return ask(scales, *_words(expert, column, block))


def _load(stage, scales):
    """Each thread's part of 64 columns of a stage, and its scales as pairs of bfloat16.

    Four bits of two columns times the stage's blocks, block by block: the bytes t of a block's words.
    """
    row_bytes = stage.shape[1] * 4
    blocks = stage.shape[1] * _PER_WORD // GROUP

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _strided(2)), return_type=_numbers(2 * blocks + 2))
    def load(ctx, stage, scales):
        del ctx
        row, t = _place()
        start = _at(mgpu.utils.memref_ptr(stage), "!llvm.ptr<3>", arith.muli(row, _constant(row_bytes)))
        select = arith.addi(arith.muli(t, _constant(0x11)), _constant(0x40))
        offsets = [half * 8 * row_bytes + b * 16 for half in (0, 1) for b in range(blocks)]
        values = [_asm(LOAD.format(offset=offset), "=r,r,r", start, select) for offset in offsets]
        pairs = [_asm(SCALE, "=r,r", value, effects=False) for value in _unpack(scales)]
        return _pack(values + pairs)

    return load(stage, scales)


def _widen(stored, part, blocks):
    """64 inputs of those in bfloat16, as wgmma takes them."""
    shape, layout = (COLUMNS, DEPTH), plgpu.Layout.WGMMA
    wide = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(_strided(2 * blocks + 2),), return_type=wide)
    def widen(ctx, stored):
        del ctx
        word, half_type = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        *values, upper, lower = _unpack(stored)
        _, t = _place()
        quad = arith.subi(arith.remui(mgpu.utils.thread_idx(), _constant(32)), t)
        registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
        flat = registers.reshape(DEPTH // 8, 2)  # eight inputs, column + 8
        for half, scale in enumerate((upper, lower)):
            for b in range(DEPTH // GROUP):
                block = part * (DEPTH // GROUP) + b
                source = arith.addi(quad, _constant(block))
                power = _asm("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", scale, source)
                four = llvm.inline_asm(
                    llvm.StructType.get_literal([word] * 4),
                    [values[half * blocks + block], power],
                    WIDEN,
                    "=r,=r,=r,=r,r,r",
                )
                for j in range(4):
                    pair = vector.broadcast(ir.VectorType.get((1,), word), llvm.extractvalue(word, four, [j]))
                    flat[4 * b + j, half] = vector.bitcast(ir.VectorType.get((2,), half_type), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return widen(stored)


LOAD = """{{ .reg .b32 a, b, c, d;
ld.shared.v4.b32 {{a, b, c, d}}, [$1+{offset}];
prmt.b32 a, a, b, $2;
prmt.b32 c, c, d, $2;
prmt.b32 $0, a, c, 0x5410; }}"""

#: 2**(scale - 127) in bfloat16, twice: the scale is the exponent, but for 0 (subnormal) and 255 (NaN).
SCALE = """{ .reg .b32 e, n;
shl.b32 e, $1, 7;
max.u32 e, e, 0x40;
add.u32 n, $1, 1;
shr.u32 n, n, 2;
and.b32 n, n, 0x40;
or.b32 e, e, n;
prmt.b32 $0, e, e, 0x1010; }"""

_FOUR = """prmt.b32 p, 0x3f3f3f00, 0x40404040, code;
prmt.b32 n, 0xbfbfbf80, 0xc0c0c0c0, code;
prmt.b32 h, p, n, sign;
prmt.b32 l, 0xc0800000, 0xc0804000, code;
prmt.b32 n, l, h, 0x5140;
prmt.b32 l, l, h, 0x7362;
mul.bf16x2 ${0}, n, $5;
mul.bf16x2 ${1}, l, $5;
"""

#: Eight values of four bits ($4), the first in the lowest, times a pair of equal powers ($5): four pairs.
WIDEN = (
    """{ .reg .b32 code, sign, p, n, h, l;
and.b32 code, $4, 0x77777777;
shr.u32 sign, $4, 1;
lop3.b32 sign, sign, 0x44444444, 0x32103210, 0xea;
"""
    + _FOUR.format(0, 1)
    + """shr.u32 code, code, 16;
shr.u32 sign, sign, 16;
"""
    + _FOUR.format(2, 3)
    + "}"
)


def _strided(count):
    """Layout of some numbers per thread."""
    return plgpu.Layout.WG_STRIDED((count * _THREADS,), vec_size=1)


def _numbers(count):
    return plgpu.ShapeDtypeStruct((count * _THREADS,), jnp.int32, layout=_strided(count))


def _pack(values):
    kind = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = np.array([vector.broadcast(kind, value) for value in values], dtype=object).reshape(len(values), 1)
    return mgpu.FragmentedArray(_registers=registers, _layout=_strided(len(values)).to_mgpu(), _is_signed=True)


def _unpack(array):
    return [vector.extract(value, dynamic_position=[], static_position=[0]) for value in array.registers.flat]


def _place():
    """The thread's first column of 64, the other is 8 further on, and its number in its quad."""
    c, thread = _constant, arith.remui(mgpu.utils.thread_idx(), _constant(_THREADS))
    warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
    return arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4))), arith.remui(lane, c(4))


def _at(pointer, kind, offset):
    """`offset` bytes further on."""
    byte = ir.IntegerType.get_signless(8)
    return llvm.getelementptr(ir.Type.parse(kind), pointer, [offset], [-(2**31)], byte, 0)


def _words(*values):
    return [jnp.asarray(value, jnp.int32) for value in values]


def _constant(value, kind=None):
    kind = kind or ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _asm(code, constraints, *operands, effects=True):
    word = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(word, operands, code, constraints, has_side_effects=effects)
