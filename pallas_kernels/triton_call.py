"""How every kernel of the Pallas Triton backend is called here."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from . import compat

#: Rows, columns and depth of a product on tensor cores, at least.
LEAST = 16
_MEETING = 1024  # elements, which are spread over all warps


def call_triton(
    kernel: Callable[..., None],
    name: str,
    grid: int,
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    warps: int,
    interpret: bool,
    operands: Any,
    aliases: dict[int, int] | None = None,
    stages: int = 1,
) -> list[jax.Array]:
    """`kernel(operands, *outputs)` on references to whole arrays in global memory, by `grid` programs of `warps` warps.

    `operands`: a tuple of pytrees of arrays (None for what is not there), handed on as the same of references, so that
    a kernel sees the type that weights are stored as; `outputs`: shapes and dtypes; `aliases`: number of an array among
    all of the operands' -> output that is written in its place.
    """
    if warps & (warps - 1):
        raise ValueError(f"{name}: {warps} warps, no power of two")
    arrays, structure = jax.tree.flatten(operands)

    def run(*refs):
        own = lambda: kernel(*jax.tree.unflatten(structure, refs[: len(arrays)]), *refs[len(arrays) :])
        if interpret or not compat.launches_early():
            own()
        else:
            pl.when(_launch_next(pl.program_id(0)) >= 0)(own)

    call = pl.pallas_call(
        run,
        grid=(grid,),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )
    return list(call(*arrays))


def _launch_next(program):
    """`program`, and leave to launch the kernel that comes after this one (programmatic dependent launch).

    Its programs wait for this one's results where they begin, where XLA puts the wait, and not for their own launch.
    The assembler text is kept because its result is used.
    """
    like = jax.ShapeDtypeStruct((1,), jnp.int32)
    (program,) = pltriton.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[jnp.full((1,), program)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[like],
    )
    return jnp.max(program)


def zero_behind_a_barrier(index):
    """0, which the compiler does not know, from a reduction in which the warps of a program meet (two or more of them).

    What a kernel reads before this, it reads before the barrier; what it computes with the result, it computes behind
    it. Left to itself the compiler puts each read right before its use, behind the wait for the one before, and a
    program that few others run beside waits for memory so many times. `index`: any integer that is known only when the
    kernel runs, but for the lowest.
    """
    lowest = jnp.iinfo(jnp.int32).min
    return pl.multiple_of(jnp.max(jnp.where(index == lowest, lax.iota(jnp.int32, _MEETING), 0)), 16)
