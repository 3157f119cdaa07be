"""How the TPU's expert MLP is cut: rows of a tile and hidden units of a block, by generation and shape.

A step of the kernel brings a block of hidden units, their rows of gate and up and columns of down, from memory while it
multiplies with the one before. So a tile takes as long as its expert's weights take to arrive, whatever its rows, up to
the `balance` of a generation: the rows for which products take as long as the bytes of their bfloat16 weights.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from .. import compat


@dataclasses.dataclass(frozen=True)
class Generation:
    """What kernels need to know of a TPU: `cores` of a device that share its memory, `vmem` bytes of each core, and
    `balance`, peak operations of bfloat16 per byte of memory bandwidth.
    """

    cores: int
    vmem: int
    balance: int


#: By name: memory of cores as in JAX's `tpu_info`, balance from Google's pages of each generation (docs/planning.md).
GENERATIONS = {
    "v5e": Generation(cores=1, vmem=128 << 20, balance=240),  # 197 TFLOP/s, 819 GB/s
    "v5p": Generation(cores=2, vmem=64 << 20, balance=166),  # 459 TFLOP/s, 2765 GB/s
    "v6e": Generation(cores=1, vmem=128 << 20, balance=560),  # 918 TFLOP/s, 1638 GB/s
    "v7": Generation(cores=1, vmem=64 << 20, balance=312),  # 1153 TFLOP/s, 3690 GB/s, half a chip
}
#: What a device calls itself.
_KINDS = {r"v5 ?(lite|e)": "v5e", r"v5p?\b": "v5p", r"v6 ?(lite|e)": "v6e", r"(v|TPU)7x?": "v7"}
#: A generation that is not known, and none: programs that are traced for no TPU in particular fit everywhere.
_UNKNOWN = Generation(cores=1, vmem=64 << 20, balance=240)
#: Of a core's memory, what kernels may ask for: XLA keeps some for itself.
_SHARE = 0.75
#: Bytes of weights that a step brings: less, and the 0.35 us that a step costs are in the way; more, and the first
#: block, which nothing hides, takes longer (4 MiB arrive in 1.4 us on v5p to 5.1 us on v5e).
_STEP_BYTES = 4 << 20
#: Share of the peak that products are taken to reach, and what a row costs outside the kernel, in rows of `D` that
#: are read or written: gathered, read by the kernel, written by it, and read for the sum over a token's experts.
_REACHED, _TOUCHED = 0.6, 5
#: Rows of tiles that are gathered; least ones are one pass of a matrix unit.
_ROWS = (128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """`rows` of a tile, `hidden` units of a block; `in_place`: a tile's rows are all tokens, in their order."""

    rows: int
    hidden: int
    in_place: bool


def generation() -> Generation:
    """The generation that is traced for, with as many cores as its devices have."""
    kind = compat.device_kind()
    for pattern, name in _KINDS.items():
        if "TPU" in kind and re.search(pattern, kind):
            known = GENERATIONS[name]
            return dataclasses.replace(known, cores=min(known.cores, compat.num_tpu_cores()))
    return _UNKNOWN


def hidden_block(width: int, hidden: int, unit_bytes: float) -> int:
    """Hidden units of a block: all, or a multiple of 128, of which the last block may have fewer.

    `unit_bytes`: of all kernels' weights of one hidden unit and one input. Those that divide `hidden` are taken first.

    >>> [hidden_block(*shape, 6.0) for shape in [(2048, 768), (4096, 14336), (2880, 2880), (64, 96)]]
    [256, 128, 128, 96]
    """
    most = max(1, int(_STEP_BYTES / (width * unit_bytes)) // 128)
    if hidden <= 128 * most:
        return hidden
    if hidden % 128:
        return 128 * most
    return 128 * next(n for n in range(most, 0, -1) if hidden // 128 % n == 0)


def choose(tokens: int, routed: int, experts, itemsize: int, target: Generation, rows: int | None = None) -> Tiling:
    """The tiling of `tokens` that choose `routed` experts in all; `rows`: of a plan that there is already.

    A tile costs about what its weights take to arrive, or its products where these take longer; gathered rows are moved
    as well. The form with the least in all is taken, of those that fit into a core's memory: few tokens run in place,
    many in tiles as high as their experts have rows.
    """
    kernels = [w for w in (experts.gate, experts.up, experts.down) if w is not None]
    stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(kernels))
    unit_bytes = stored / (math.prod(experts.up.shape[:-2]) * experts.width * experts.hidden)
    hidden = hidden_block(experts.width, experts.hidden, unit_bytes)
    if rows is not None:
        return Tiling(min(rows, tokens), hidden, rows >= tokens)
    arrival = max(unit_bytes / (len(kernels) * 2), 1 / target.balance)  # of int8 half of bfloat16's

    def cost(one: Tiling) -> float:
        count = experts.num_experts
        tiles = active(routed, count) if one.in_place else tiles_of(routed, count, one.rows)
        moved = 0 if one.in_place else _TOUCHED * routed * itemsize / (unit_bytes * experts.hidden)
        products = one.rows / (_REACHED * target.balance)
        return tiles * (arrival**4 + products**4) ** 0.25 + moved  # about the longer of both, which never overlap whole

    found = [Tiling(tokens, hidden, True), *(Tiling(size, hidden, False) for size in _ROWS if size < tokens)]
    fitting = [one for one in found if vmem_bytes(one, experts.width, unit_bytes, itemsize) <= _SHARE * target.vmem]
    return min(fitting or found[1:] or found, key=cost)


def active(routed: int, num_experts: int) -> float:
    """How many experts even routing chooses, `routed` times one.

    >>> round(active(8, 128), 1), active(1, 4)
    (7.8, 1.0)
    """
    return num_experts * (1 - (1 - 1 / num_experts) ** routed)


def tiles_of(routed: int, num_experts: int, rows: int) -> float:
    """How many tiles of `rows` gathered rows even routing fills: of each expert's tiles the last one is half full.

    >>> tiles_of(4096, 8, 256)
    20.0
    """
    some = max(active(routed, num_experts), 1e-9)
    return some * max(1.0, routed / some / rows + 0.5)


def vmem_bytes(one: Tiling, width: int, unit_bytes: float, itemsize: int) -> float:
    """About what a core holds at once: rows in and out twice, their sum in float32, two blocks of weights, and hidden
    vectors and their products.
    """
    tile = one.rows * width * (4 * itemsize + 4)
    weights = 2 * one.hidden * width * unit_bytes
    return tile + weights + one.rows * (4 * 4 * one.hidden + 2 * 4 * 512) + one.hidden * width * 4


def vmem_limit(target: Generation) -> int:
    """Bytes that a kernel may take."""
    return int(_SHARE * target.vmem)


def sublanes(dtype) -> int:
    """Rows of one tile of a TPU's memory."""
    return 32 // jnp.dtype(dtype).itemsize
