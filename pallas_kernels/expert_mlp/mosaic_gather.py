"""Gathering rows straight into a stage: what Pallas has no operation for on Hopper (TMA gathers from Blackwell on).

Each thread of the producer warpgroup copies 16-byte pieces (`cp.async`) of the rows that the plan names, to where
wgmma wants them: tiles of 8 rows x 128 bytes, in which the 16-byte pieces of row r are permuted by `xor r % 8`
(the 128-byte swizzle of the PTX ISA, section on wgmma's shared-memory layouts).
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_THREADS = 128  # of a warpgroup
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


def find_rows(x, row_choice, first_row, rows, depth, choices):
    """Where the rows of a tile lie in `x`, for `gather_rows`: of every piece that a thread copies per stage, how many
    pieces lie before it at column 0; -1 for rows of padding (choices beyond those of x)."""
    tokens, width = x.shape
    elements, per_row, at_once, turns = _sharing(x.dtype, rows, depth)
    layout = _pieces(turns)
    found = plgpu.ShapeDtypeStruct((turns * _THREADS,), jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=found)
    def find(ctx, row_choice, first_row):
        del ctx
        c, word, long = _constant, ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        first_row, from_choice = first_row.registers.item(), mgpu.utils.memref_ptr(row_choice)
        thread = arith.remui(mgpu.utils.thread_idx(), c(_THREADS))
        piece, row = arith.remui(thread, c(per_row)), arith.divui(thread, c(per_row))
        found = []
        for turn in range(turns):
            own = arith.addi(row, c(turn * at_once))
            # threads that have no row in the last turn look at the tile's last one
            position = arith.addi(first_row, arith.minui(own, c(rows - 1)))
            address = _at(from_choice, _GENERIC, arith.muli(arith.extui(long, position), c(4, long)))
            token = arith.divui(llvm.load(word, address), c(choices))
            before = arith.addi(arith.muli(token, c(width // elements)), piece)
            before = arith.select(arith.cmpi(arith.CmpIPredicate.ult, token, c(tokens)), before, c(-1))
            found.append(vector.broadcast(ir.VectorType.get((1,), word), before))
        registers = np.array(found, dtype=object).reshape(turns, 1)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)

    return find(row_choice, *_words(first_row))


def gather_rows(x, found, stage, barriers, slot, column, depth=None):
    """Start copying the rows `found`, from `column` on, to `stage [rows, columns]`.

    Barrier `slot` completes a phase when all is there, see `wait_for_rows`. Rows of padding and columns beyond the end
    of x come as zeros. `depth`: that rows were found for, where the stage has several times as many columns.
    """
    width = x.shape[1]
    rows, columns = stage.shape
    depth = depth or columns
    elements, per_row, at_once, turns = _sharing(x.dtype, rows, depth)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _pieces(turns), _STAGE, plgpu.RefType(), _SCALAR, _SCALAR))
    def start(ctx, x, found, stage, barriers, slot, column):
        del ctx
        c, long = _constant, ir.IntegerType.get_signless(64)
        slot, column = slot.registers.item(), column.registers.item()
        thread = arith.remui(mgpu.utils.thread_idx(), c(_THREADS))
        piece, row = arith.remui(thread, c(per_row)), arith.divui(thread, c(per_row))
        # where the piece lies: in which 128-byte tile of its row, and which piece of that
        tile, within = (part(piece, c(_ROW_BYTES // _PIECE)) for part in (arith.divui, arith.remui))
        eighth, block = arith.remui(row, c(8)), arith.divui(row, c(8))
        block = arith.addi(arith.muli(block, c(columns * _PIECE // elements // _ROW_BYTES)), tile)
        target = arith.addi(arith.muli(block, c(8 * _ROW_BYTES)), arith.muli(eighth, c(_ROW_BYTES)))
        target = arith.addi(target, arith.muli(arith.xori(within, eighth), c(_PIECE)))
        target = _at(mgpu.utils.memref_ptr(stage), _SHARED, target)
        source = _at(
            mgpu.utils.memref_ptr(x), _GENERIC, arith.muli(arith.extui(long, column), c(_PIECE // elements, long))
        )
        inside = None
        if width % depth:
            last = arith.addi(column, arith.muli(piece, c(elements)))
            inside = arith.cmpi(arith.CmpIPredicate.ult, last, c(width))
        for turn, before in enumerate(found.registers.flat):
            before = vector.extract(before, dynamic_position=[], static_position=[0])
            real = arith.cmpi(arith.CmpIPredicate.sge, before, c(0))
            real = real if inside is None else arith.andi(real, inside)
            offset = arith.muli(arith.extsi(long, arith.select(real, before, c(0))), c(_PIECE, long))
            size = arith.select(real, c(_PIECE), c(0))
            # at_once rows further on: all threads move by as many whole blocks of 8 rows
            further = turn * at_once * columns * (_PIECE // elements)
            starts = range(0, columns * _PIECE // elements, depth * _PIECE // elements)
            copies = [
                f"cp.async.cg.shared.global [$0+{further + 8 * start}], [$1+{start}], 16, $2;" for start in starts
            ]
            operands, kinds = [target, _at(source, _GENERIC, offset), size], "r,l,r"
            if rows < (turn + 1) * at_once:  # fewer rows are left than the threads could copy
                copies = [f"@p {copy}" for copy in copies]
                fewer = "{ .reg .pred p; setp.lt.u32 p, $3, " + f"{rows - turn * at_once};"
                copies, operands, kinds = [fewer, *copies, "}"], [*operands, row], kinds + ",r"
            _asm(" ".join(copies), kinds, *operands)
        barrier = _at(mgpu.utils.memref_ptr(barriers), _SHARED, arith.muli(slot, c(_BARRIER_BYTES)))
        _asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r", barrier)

    start(x, found, stage, barriers, *_words(slot, column))


def _sharing(dtype, rows, depth):
    """How a stage is shared out: elements of a piece, pieces per row, rows that all threads copy at once, turns."""
    elements = _PIECE // dtype.itemsize
    per_row = depth // elements
    at_once = _THREADS // per_row
    return elements, per_row, at_once, -(-rows // at_once)


def _pieces(turns):
    """Layout of one number per thread and turn."""
    return plgpu.Layout.WG_STRIDED((turns * _THREADS,), vec_size=1)


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


_GENERIC, _SHARED = "!llvm.ptr", "!llvm.ptr<3>"


def _at(pointer, kind, offset):
    """`offset` bytes further on."""
    byte = ir.IntegerType.get_signless(8)
    return llvm.getelementptr(ir.Type.parse(kind), pointer, [offset], [-(2**31)], byte, 0)


def _words(*values):
    """Indices in 32 bits, also where 64 are enabled."""
    return [jnp.asarray(value, jnp.int32) for value in values]


def _constant(value, kind=None):
    kind = kind or ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _asm(code, constraints, *operands):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
