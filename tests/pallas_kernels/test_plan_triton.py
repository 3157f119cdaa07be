"""The GPU's plan kernels: interpreted against `make_plan` and its oracle, and lowered for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plan import SHAPES, host, patterns
from test_plan import check as check_against_oracle
from test_routing_triton import h100

from pallas_kernels import make_plan
from pallas_kernels.plan import triton as plan_triton
from pallas_kernels.plan.triton import Block

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

# One launch, several programs, several steps in a program; then counted by a kernel of its own.
BLOCKS = [None, Block(4, 4, 1, False), Block(8, 2, 1, False), Block(8, 4, 1, True), Block(64, 16, 1, True)]


def kernel(num_experts, tile_rows, block=None):
    return jax.jit(functools.partial(_kernel, num_experts=num_experts, tile_rows=tile_rows, block=block))


def _kernel(ids, num_experts, tile_rows, block):
    return plan_triton.make_plan(ids, num_experts, tile_rows, interpret=True, block=block)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_field_is_the_oracles(shape):
    run = kernel(*shape[2:])
    for ids in patterns(shape).values():
        ids = ids.astype(np.int32)
        check_against_oracle(host(run(ids)), ids, *shape[2:])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("tile_rows", [5, 32])
def test_any_block_gives_make_plans_plan(block, tile_rows):
    shape = (21, 3, 6, tile_rows)
    run = kernel(*shape[2:], block)
    rng = np.random.default_rng(0)
    # In place the choice that a row names is any of its token's, where an id occurs twice: then the oracle decides.
    draws = [np.argsort(rng.random((21, 9)), axis=1)[:, :3] for _ in range(3)]
    for ids in [ids.astype(np.int32) for ids in draws]:
        got, want = run(ids), make_plan(jnp.asarray(ids), *shape[2:])
        for field in dataclasses.fields(want):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), err_msg=field.name)
    for ids in patterns(shape).values():
        check_against_oracle(host(run(ids.astype(np.int32))), ids, *shape[2:])


def test_sizes_that_triton_takes():
    """Three warps, which gpt-oss' 30 tokens once came to, end the process."""
    for experts in (2, 8, 32, 60, 128, 512):
        for choices in [*range(1, 2000), 4096, 100_000]:
            block = plan_triton.default_block(choices, experts)
            assert all(n.bit_count() == 1 for n in (block.choices, block.step, block.warps)), (choices, experts, block)


def test_more_blocks_than_are_added_up_at_once(monkeypatch):
    monkeypatch.setattr(plan_triton, "_COMPARISONS", 64)
    ids = np.random.default_rng(2).integers(0, 7, (40, 2)).astype(np.int32)
    for block in (Block(8, 8, 1, True), Block(16, 8, 1, False)):
        check_against_oracle(host(kernel(7, 4, block)(ids)), ids, 7, 4)


def test_64_bit_ids_and_types():
    ids = np.array([[0, 9], [2, 1], [-1, 2]])
    with jax.enable_x64(True):
        plan = host(kernel(3, 2)(jnp.asarray(ids)))
    check_against_oracle(plan, ids, 3, 2)


def test_refusals():
    ids = jnp.zeros((4, 2), jnp.int32)
    assert plan_triton.refuse(ids, 512, 128) is None
    assert "2000 experts" in plan_triton.refuse(ids, 2000, 128)
    assert "32 bits" in plan_triton.refuse(ids, 8, 2**29)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 128, 8),
        (32, 8, 128, 32),
        (32, 8, 128, 16),
        (5, 1, 1, 2),
        (64, 8, 512, 16),
        (128, 8, 128, 128),
        (4096, 2, 8, 128),
        (16384, 8, 128, 128),
        (16384, 10, 512, 64),
        (16384, 8, 160, 1),
    ],
    ids=str,
)
def test_the_kernels_lower_for_cuda(shape):
    tokens, choices, num_experts, tile_rows = shape
    run = jax.jit(lambda ids: plan_triton.make_plan(ids, num_experts, tile_rows))
    with h100():
        lowered = run.trace(jax.ShapeDtypeStruct((tokens, choices), jnp.int32)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "moe_jax_routing_place" in text
    apart = plan_triton.default_block(tokens * choices, num_experts).apart
    assert ("moe_jax_routing_count" in text) == apart
