"""How every kernel of the Pallas Triton backend is called here."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


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
    arrays, structure = jax.tree.flatten(operands)

    def run(*refs):
        kernel(*jax.tree.unflatten(structure, refs[: len(arrays)]), *refs[len(arrays) :])

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
