"""Gathering rows straight into a stage: what Pallas has no operation for on Hopper (TMA gathers from Blackwell on).

Each thread of the producer warpgroup copies 16-byte pieces (`cp.async`) of the rows that the plan names, to where
wgmma wants them: tiles of 8 rows x 128 bytes, in which the 16-byte pieces of row r are permuted by `xor r % 8`
(the 128-byte swizzle of the PTX ISA, section on wgmma's shared-memory layouts).
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_THREADS = 128
_PIECE = 16  # bytes, the most that cp.async copies
_ROW_BYTES = 128  # of a swizzled tile
_SCALAR = plgpu.Layout.WG_SPLAT
_BARRIER_BYTES = 8
_STAGE = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(_ROW_BYTES)))


def arrivals(stages):
    """Shared memory for one barrier per stage: Pallas' own cannot be told of `cp.async`."""
    return plgpu.SMEM((stages * _BARRIER_BYTES // 4,), jnp.int32)


def initialize(barriers):
    """Make `barriers` ready; by the producer, before anybody waits for them."""
    stages = barriers.shape[0] * 4 // _BARRIER_BYTES

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(ctx, barriers):
        del ctx
        address = mgpu.utils.memref_ptr(barriers)
        first = f"mbarrier.init.shared::cta.b64 [$0+{{}}], {_THREADS};"
        lines = " ".join("@p " + first.format(stage * _BARRIER_BYTES) for stage in range(stages))
        thread = arith.remui(mgpu.utils.thread_idx(), _constant(_THREADS))
        _asm(
            "{ .reg .pred p; setp.eq.u32 p, $1, 0; " + lines + " fence.mbarrier_init.release.cluster; }",
            "r,r",
            address,
            thread,
        )

    start(barriers)


def gather_rows(x, row_choice, stage, barriers, slot, first_row, column, choices):
    """Start copying `x[row_choice[first_row + r] // choices, column:]` to row r of `stage [rows, depth]`.

    Barrier `slot` completes a phase when all is there, see `wait_for_rows`. Rows of padding (choices beyond those of
    x) and columns beyond the end of x come as zeros.
    """
    tokens, width = x.shape
    rows, depth = stage.shape
    per_row = depth * x.dtype.itemsize // _PIECE
    elements = _PIECE // x.dtype.itemsize
    at_once = _THREADS // per_row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _STAGE, plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR))
    def start(ctx, x, row_choice, stage, barriers, slot, first_row, column):
        del ctx
        c, word, long = _constant, ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        slot, first_row, column = (value.registers.item() for value in (slot, first_row, column))
        thread = arith.remui(mgpu.utils.thread_idx(), c(_THREADS))
        piece, row = arith.remui(thread, c(per_row)), arith.divui(thread, c(per_row))
        column = arith.addi(column, arith.muli(piece, c(elements)))
        inside = arith.cmpi(arith.CmpIPredicate.ult, column, c(width))
        # where the piece lies within its row: which 128-byte tile, and which piece of it
        within = arith.remui(piece, c(_ROW_BYTES // _PIECE))
        tile = arith.divui(piece, c(_ROW_BYTES // _PIECE))
        from_x, from_choice = (mgpu.utils.memref_ptr(ref) for ref in (x, row_choice))
        to = mgpu.utils.memref_ptr(stage)
        generic, shared = ir.Type.parse("!llvm.ptr"), ir.Type.parse("!llvm.ptr<3>")

        def at(pointer, kind, offset):
            return llvm.getelementptr(kind, pointer, [offset], [-(2**31)], ir.IntegerType.get_signless(8), 0)

        for turn in range(-(-rows // at_once)):
            partial = rows < (turn + 1) * at_once
            mine = arith.cmpi(arith.CmpIPredicate.ult, row, c(rows))
            position = arith.addi(first_row, arith.select(mine, row, c(0)) if partial else row)
            address = at(from_choice, generic, arith.muli(arith.extui(long, position), c(4, long)))
            token = arith.divui(llvm.load(word, address), c(choices))
            real = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.ult, token, c(tokens)))
            token = arith.select(real, token, c(0))
            offset = arith.addi(arith.muli(arith.extui(long, token), c(width, long)), arith.extui(long, column))
            source = at(from_x, generic, arith.muli(offset, c(_PIECE // elements, long)))
            eighth = arith.remui(row, c(8))
            block = arith.addi(arith.muli(arith.divui(row, c(8)), c(depth * (_PIECE // elements) // _ROW_BYTES)), tile)
            target = arith.addi(arith.muli(block, c(8 * _ROW_BYTES)), arith.muli(eighth, c(_ROW_BYTES)))
            target = arith.addi(target, arith.muli(arith.xori(within, eighth), c(_PIECE)))
            size = arith.select(real, c(_PIECE), c(0))
            copy = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
            if partial:  # fewer rows are left than the threads could copy
                copy = "{ .reg .pred p; setp.lt.u32 p, $3, " + f"{rows}; @p {copy}" + " }"
            operands = at(to, shared, target), source, size, *([row] if partial else [])
            _asm(copy, "r,l,r,r" if partial else "r,l,r", *operands)
            row = arith.addi(row, c(at_once))
        barrier = at(mgpu.utils.memref_ptr(barriers), shared, arith.muli(slot, c(_BARRIER_BYTES)))
        _asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r", barrier)

    start(x, row_choice, stage, barriers, *_words(slot, first_row, column))


def wait_for_rows(barriers, slot, phase):
    """Wait until barrier `slot` has completed its phase of parity `phase`, and show what was copied to wgmma."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def wait(ctx, barriers, slot, phase):
        del ctx
        slot, phase = (value.registers.item() for value in (slot, phase))
        offset = arith.muli(slot, _constant(_BARRIER_BYTES))
        lines = (
            "{ .reg .pred p; .reg .b32 a; add.u32 a, $0, $1;",
            "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2;",
            "@p bra DONE; bra WAIT; DONE: fence.proxy.async.shared::cta; }",
        )
        _asm(" ".join(lines), "r,r,r", mgpu.utils.memref_ptr(barriers), offset, phase)

    wait(barriers, *_words(slot, phase))


def _words(*values):
    """Indices in 32 bits, also where 64 are enabled."""
    return [jnp.asarray(value, jnp.int32) for value in values]


def _constant(value, kind=None):
    kind = kind or ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _asm(code, constraints, *operands):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
