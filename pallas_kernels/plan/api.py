"""The plan operation: signature, checks and choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Int

from ..dims import Array as AnyArray
from ..registry import Implementation, Operation
from . import tpu, triton, xla
from .value import Plan

OPERATION = Operation(
    "make_plan",
    {
        "triton": Implementation(triton.make_plan, triton.refuse, platform="cuda"),
        "tpu": Implementation(tpu.make_plan, tpu.refuse, platform="tpu"),
        "xla": Implementation(xla.make_plan),
        "triton_interpreted": Implementation(triton.interpreted, triton.refuse, by_choice=False),
        "tpu_interpreted": Implementation(tpu.interpreted, tpu.refuse, by_choice=False),
    },
)


def make_plan(
    ids: Int[AnyArray, "G A"], num_experts: int, tile_rows: int, *, implementation: str | None = None
) -> Plan:
    """Lay the choices `ids` out in tiles of `tile_rows` rows, each tile for one expert.

    Args: `ids` int `[G, A]`, an id outside `[0, num_experts)` takes no row; within an expert rows keep the order of
    `ids` read row by row. If `tile_rows >= G` the plan is in place, one tile per active expert. `implementation`:
    `triton` (CUDA; counts and ranks in blocks, without a sort), `tpu` (the same on TPUs, but for plans in place) or
    `xla` (one stable sort).

    Raises `ValueError` for a shape that is not `[G, A]`, `num_experts < 1` or `tile_rows < 1`.

    >>> plan = make_plan(jnp.array([[0, 2], [2, 1], [2, 9]]), num_experts=3, tile_rows=2)
    >>> plan.tile_expert[:plan.num_tiles].tolist(), plan.row_choice.reshape(-1, 2)[:4].tolist()
    ([0, 1, 2, 2], [[0, 6], [3, 6], [1, 2], [4, 6]])
    """
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: expected integers of shape [G, A], got {ids.dtype} {ids.shape}")
    if num_experts < 1 or tile_rows < 1:
        raise ValueError(f"num_experts and tile_rows must be at least 1, got {num_experts} and {tile_rows}")
    return OPERATION.run(implementation, jnp.asarray(ids, jnp.int32), num_experts, tile_rows)
