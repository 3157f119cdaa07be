"""The GPU's backward pass lowered for CUDA without a GPU: what runs backwards, and that every shape fits."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from cuda import lowered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mosaic_gpu_lowering import MODELS, array, is_xla, operands

from pallas_kernels import make_plan, routed_mlp
from pallas_kernels.expert_mlp import mosaic_backward
from pallas_kernels.expert_mlp.mosaic_tilings import choose_backward, trained_rows

KERNELS = {"d_hidden", "d_x", "d_in_kernel", "d_out_kernel"}


def gradients(x, ids, weights, experts, layer=None, tile_rows=None):
    plan = None if tile_rows is None else make_plan(ids, experts.num_experts, tile_rows)
    loss = lambda x, weights, experts: routed_mlp(x, ids, weights, experts, layer=layer, plan=plan).sum()
    return jax.grad(loss, (0, 1, 2))(x, weights, experts)


def backward(text):
    return {name for name in KERNELS if f"moe_jax_expert_{name}_mosaic" in text or f'"moe_jax_expert_{name}"' in text}


@pytest.mark.parametrize(
    "model, tokens",
    [
        ("olmoe", 16384),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("qwen3", 4096), ("mixtral", 16384), ("gptoss", 70)]
        ),
    ],
)
def test_models(model, tokens):
    call = operands(tokens, *MODELS[model], layout="out_in")
    assert backward(lowered(gradients, *call)) == KERNELS


def test_a_stack_with_a_traced_layer_and_biases():
    x, ids, weights, experts = operands(100, 576, 192, 4, 2, lead=(3,), biases=True, activation="swiglu_clamped")
    text = lowered(gradients, x, ids, weights, experts, array(dtype=jnp.int32))
    assert backward(text) == KERNELS


def test_the_only_layer_of_a_stack_is_not_copied():
    """What a training loop passes: gradients come out of the kernel as they are returned."""
    call = operands(100, 128, 192, 4, 2, lead=(1,), layout="out_in")
    text = lowered(functools.partial(gradients, layer=0), *call)
    assert "dynamic_update_slice" not in text


@pytest.mark.parametrize("tile_rows", [64, 80])
def test_a_given_plan(tile_rows):
    """One that does not suit is made anew."""
    call = operands(200, 128, 64, 4, 2)
    assert backward(lowered(functools.partial(gradients, tile_rows=tile_rows), *call)) == KERNELS


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_the_kernels_gather_what_the_plan_does_not_lay_out(layout, monkeypatch):
    """x and its gradient have as many rows as there are tokens, all else as many as the plan."""
    calls, run = set(), mosaic_backward.weight_gradient

    def watched(call, a, b, spans, row_choice):
        calls.add((call.name, call.gathered))
        rows = [200 if call.gathered == n else len(row_choice) for n in range(2)]
        assert [len(a), len(b)] == rows
        return run(call, a, b, spans, row_choice)

    monkeypatch.setattr(mosaic_backward, "weight_gradient", watched)
    with jax.enable_x64(True):
        assert backward(lowered(gradients, *operands(200, 128, 64, 4, 2, layout=layout))) == KERNELS
    inputs = 1 if layout == "out_in" else 0
    assert calls == {("moe_jax_expert_d_in_kernel", inputs), ("moe_jax_expert_d_out_kernel", 1 - inputs)}


def test_few_tokens_and_float32_take_the_tile_loop_back():
    assert not backward(lowered(gradients, *operands(64, 128, 64, 4, 2)))
    assert not backward(lowered(gradients, *operands(200, 128, 64, 4, 2, dtype=jnp.float32)))
    assert is_xla(lowered(gradients, *operands(200, 128, 64, 4, 2), platform="cpu"))


@settings(deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(65, 1 << 17),
    num=st.integers(1, 1024),
    choices=st.integers(1, 32),
    width=st.integers(1, 256).map(lambda n: 64 * n),
    hidden=st.integers(1, 256).map(lambda n: 64 * n),
)
def test_a_chosen_tiling_fits_the_call(tokens, num, choices, width, hidden):
    rows = trained_rows(tokens, tokens * choices / num)
    assert rows in (64, 128) and rows < tokens
    experts = types.SimpleNamespace(num_experts=num, hidden=hidden, width=width)
    chosen = choose_backward(tokens, choices, experts, rows)
    for tiling, columns in ((chosen.hidden, hidden), (chosen.x, width)):
        assert tiling.rows == rows and tiling.columns <= columns and tiling.share % 64 == 0
    for tiling, m, n in ((chosen.fd, hidden, width), (chosen.df, width, hidden)):
        assert tiling.rows <= m and tiling.columns <= n and tiling.share % 64 == 0 and tiling.columns % 64 == 0
        assert rows % tiling.depth == 0
        # an accumulator has share * columns / 128 registers of a thread, of the 224 that each of two consumers has
        assert tiling.share * tiling.columns // 128 <= 224 - 64
        stores = tiling.consumers * 64 * 64 * 2
        assert tiling.stages * 2 * tiling.depth * (tiling.rows + tiling.columns) + stores < 227 * 1024
