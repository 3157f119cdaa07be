"""The GPU's expert MLP lowered for CUDA without a GPU: what is chosen, what is refused, and that every shape fits."""

import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
from cuda import H100, lowered, mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.benchmarks.shapes import find
from pallas_kernels import ACTIVATIONS, Activation, Experts, compat, make_plan, moe_block, routed_mlp
from pallas_kernels.expert_mlp import mosaic_gpu
from pallas_kernels.expert_mlp.api import OPERATION
from pallas_kernels.expert_mlp.mosaic_kernel import Tiling
from pallas_kernels.expert_mlp.mosaic_tilings import TILE_ROWS, Tilings, choose, tile_rows

KERNELS = {"moe_jax_expert_up", "moe_jax_expert_down"}
HALF = jnp.bfloat16

# D, F, E, choices
MODELS = {
    name: (shape.width, shape.hidden, shape.experts, shape.top_k)
    for name, shape in ((name, find(name)) for name in ("mixtral", "qwen3", "olmoe", "gptoss", "dsv3ep"))
}
TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
QUICK = {("mixtral", 4096), ("qwen3", 1), ("olmoe", 32), ("gptoss", 8), ("dsv3ep", 1024)}


def array(*shape, dtype=HALF):
    return jax.ShapeDtypeStruct(shape, dtype)


def experts_of(width, hidden, num, *, lead=(), dtype=HALF, layout="in_out", activation="swiglu", biases=False):
    """Experts without values."""
    activation = activation if isinstance(activation, Activation) else Activation(activation)

    def kernel(inner, outer):
        return array(*lead, num, *((inner, outer) if layout == "in_out" else (outer, inner)), dtype=dtype)

    return Experts(
        gate=kernel(width, hidden) if activation.gated else None,
        up=kernel(width, hidden),
        down=kernel(hidden, width),
        gate_bias=array(*lead, num, hidden, dtype=dtype) if biases and activation.gated else None,
        up_bias=array(*lead, num, hidden, dtype=dtype) if biases else None,
        down_bias=array(*lead, num, width, dtype=dtype) if biases else None,
        activation=activation,
        layout=layout,
    )


def operands(tokens, width, hidden, num, choices, dtype=HALF, **options):
    """`x`, `ids`, `weights` and experts, of shapes alone."""
    ids, weights = array(tokens, choices, dtype=jnp.int32), array(tokens, choices, dtype=jnp.float32)
    return array(tokens, width, dtype=dtype), ids, weights, experts_of(width, hidden, num, dtype=dtype, **options)


def kernels(text):
    return {name for name in KERNELS if f"{name}_mosaic_gpu" in text or f'"{name}"' in text}


def is_xla(text):
    return "mosaic" not in text and not re.search("moe_jax_expert", text)


SMALL = 8, 128, 64, 4, 2


class TestChoice:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_by_platform_and_type(self, dtype):
        call = *operands(*SMALL, dtype=dtype), None, None, None
        with mesh_of(H100):
            half = dtype != jnp.float32
            assert OPERATION.chosen("cuda", *call) == ("mosaic_gpu" if half else "xla_tiles")
            assert OPERATION.chosen("tpu", *call) == ("xla_tiles" if dtype == jnp.float16 else "tpu")
        assert OPERATION.chosen("cpu", *call) == "xla_tiles"

    @pytest.mark.parametrize("kind", [H100, "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H800", "NVIDIA H20"])
    def test_every_hopper(self, kind):
        with mesh_of(kind):
            assert OPERATION.chosen("cuda", *operands(*SMALL), None, None, None) == "mosaic_gpu"

    def test_float32_takes_the_tile_loop(self):
        assert is_xla(lowered(routed_mlp, *operands(*SMALL, dtype=jnp.float32)))

    def test_one_trace_serves_either(self):
        with mesh_of():
            traced = jax.jit(routed_mlp).trace(*operands(*SMALL))
            texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")]
        assert kernels(texts[0]) == KERNELS and is_xla(texts[1])

    def test_the_gradient_takes_the_kernels_forward_and_the_tile_loop_back(self):
        x, ids, weights, experts = operands(*SMALL)

        def gradients(x, ids, weights, experts):
            loss = lambda x, weights, experts: routed_mlp(x, ids, weights, experts).astype(jnp.float32).sum()
            return jax.value_and_grad(loss, (0, 1, 2))(x, weights, experts)

        assert kernels(lowered(gradients, x, ids, weights, experts)) == KERNELS
        assert is_xla(lowered(gradients, x, ids, weights, experts, platform="cpu"))


def named(*args, implementation="mosaic_gpu", **options):
    return routed_mlp(*args, implementation=implementation, **options)


class TestRefusals:
    def refused(self, call, message, kind=H100, **options):
        """Named it says why, in the interpreter too; not named, the tile loop runs."""
        for name in ("mosaic_gpu", "mosaic_gpu_interpreted"):
            with pytest.raises(ValueError, match=f"cannot run as '{name}': {message}"):
                lowered(functools.partial(named, implementation=name, **options), *call, kind=kind)
        assert is_xla(lowered(functools.partial(routed_mlp, **options), *call, kind=kind))

    def test_float32(self):
        self.refused(
            operands(*SMALL, dtype=jnp.float32),
            "x and kernels must both be bfloat16 or both float16, got float32 and float32",
        )

    @pytest.mark.parametrize("mixed", [(jnp.float16, HALF), (jnp.float32, HALF), (HALF, jnp.float32)])
    def test_mixed_types(self, mixed):
        x, ids, weights, _ = operands(*SMALL, dtype=mixed[0])
        names = [jnp.dtype(dtype).name for dtype in mixed]
        call = x, ids, weights, experts_of(*SMALL[1:4], dtype=mixed[1])
        self.refused(call, f"x and kernels must both .* got {names[0]} and {names[1]}")

    @pytest.mark.parametrize("width, hidden", [(72, 64), (64, 72), (32, 64)])
    def test_widths(self, width, hidden):
        self.refused(operands(8, width, hidden, 4, 2), f"widths must be multiples of 64, got D={width} and F={hidden}")

    @pytest.mark.parametrize("rows", [3, 76, 168])
    def test_rows_of_a_plan(self, rows):
        def with_plan(x, ids, weights, experts, **options):
            return routed_mlp(x, ids, weights, experts, plan=make_plan(ids, 4, rows), **options)

        with pytest.raises(ValueError, match=f"tiles must have a multiple of 8 rows up to 160, the plan has {rows}"):
            lowered(functools.partial(with_plan, implementation="mosaic_gpu"), *operands(*SMALL))
        assert is_xla(lowered(with_plan, *operands(*SMALL)))

    @pytest.mark.parametrize(
        "kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090", "NVIDIA GB200"]
    )
    def test_other_gpus(self, kind):
        self.refused(operands(*SMALL), rf"needs a Hopper GPU \(H100, H200\), the program is made for {kind}", kind)

    @pytest.mark.skipif(compat.INTERPRETS_GPU, reason="jax 0.10's")
    def test_an_old_interpreter(self):
        with pytest.raises(ValueError, match="JAX's interpreter runs these kernels from 0.11 on, this is JAX 0.10"):
            lowered(functools.partial(named, implementation="mosaic_gpu_interpreted"), *operands(*SMALL))

    def test_other_platforms(self):
        with pytest.raises(ValueError, match="routed_mlp as 'mosaic_gpu' runs on cuda, the program is made for cpu"):
            lowered(named, *operands(*SMALL), platform="cpu")
        with pytest.raises(ValueError, match="runs on cuda, the program is made for cuda, cpu"):
            traced = jax.jit(named).trace(*operands(*SMALL))
            traced.lower(lowering_platforms=("cuda", "cpu"))


class TestPrograms:
    """That they lower is most of the test: Mosaic checks layouts and shapes, `_store_slots` the shared memory."""

    @pytest.mark.parametrize(
        "model, tokens",
        [
            case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(MODELS, TOKENS)
        ],
    )
    def test_models(self, model, tokens):
        width, hidden, num, choices = MODELS[model]
        experts = experts_of(width, hidden, num)
        block = functools.partial(moe_block, k=choices)
        run = lambda x, router_weight, experts: block(x, router_weight, experts)
        assert kernels(lowered(run, array(tokens, width), array(width, num), experts)) == KERNELS

    @pytest.mark.parametrize("tokens", [8, 40, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_stack_with_a_traced_layer_biases_and_clamped_swiglu(self, tokens):
        """gpt-oss', in float16 and with the contraction last."""
        options = dict(dtype=jnp.float16, layout="out_in", activation="swiglu_clamped", biases=True, lead=(3,))
        x, ids, weights, experts = operands(tokens, *MODELS["gptoss"], **options)
        run = lambda x, ids, weights, experts, layer: named(x, ids, weights, experts, layer=layer)
        assert kernels(lowered(run, x, ids, weights, experts, array(dtype=jnp.int32))) == KERNELS

    def test_biases_may_have_a_type_of_their_own(self):
        x, ids, weights, experts = operands(*SMALL)
        biased = experts_of(*SMALL[1:4], dtype=jnp.float32, biases=True)
        experts = Experts(
            **{name: getattr(experts, name) for name in ("gate", "up", "down")},
            **{name: getattr(biased, name) for name in ("up_bias", "down_bias")},
        )
        assert kernels(lowered(named, x, ids, weights, experts)) == KERNELS

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", ["in_out", "out_in"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation(self, activation, layout):
        for tokens, biases in ((8, True), (40, False), (700, True)):
            call = operands(tokens, 192, 320, 4, 2, activation=activation, layout=layout, biases=biases)
            assert kernels(lowered(named, *call)) == KERNELS

    @pytest.mark.parametrize("tokens", [1, 8, pytest.param(40, marks=pytest.mark.slow), 700])
    def test_with_64_bit_types(self, tokens):
        with jax.enable_x64(True):
            assert kernels(lowered(named, *operands(tokens, 128, 64, 4, 2))) == KERNELS

    @pytest.mark.parametrize("rows", [16, pytest.param(160, marks=pytest.mark.slow)])
    def test_a_given_plan(self, rows):
        run = lambda x, ids, weights, experts: named(x, ids, weights, experts, plan=make_plan(ids, 4, rows))
        assert kernels(lowered(run, *operands(170, 128, 64, 4, 2))) == KERNELS

    def test_too_large_a_tiling_is_refused(self):
        large = Tilings(Tiling(160, 128, 128, 6), Tiling(160, 256))
        run = functools.partial(mosaic_gpu.routed_mlp, plan=None, layer=None, tilings=large)
        with pytest.raises(ValueError, match="tiling: .* leaves no shared memory for stores"):
            lowered(run, *operands(8, 1024, 128, 4, 2))


def tilings():
    """Every one that `choose` can return, and a call that gets it: tokens, D, F, E, choices, gated, rows."""
    found = {}
    sizes = 1, 8, 9, 32, 128, 512, 2048, 4096, 16384
    for gated, (num, choices), tokens in itertools.product((True, False), [(1, 1), (8, 2), (128, 8)], sizes):
        for width, hidden in [(64, 64), (128, 128), (192, 2112), (2112, 192)]:
            experts = types.SimpleNamespace(num_experts=num, gate=gated or None, hidden=hidden, width=width)
            for rows in (None, *TILE_ROWS):
                if not (rows is None and tokens == 1):
                    key = gated, choose(tokens, choices, experts, rows)
                    found.setdefault(key, (tokens, width, hidden, num, choices, gated, rows))
    return found


FOUND = tilings()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((key[1], shape), marks=() if number % 90 == 7 else pytest.mark.slow, id=str(shape))
        for number, (key, shape) in enumerate(FOUND.items())
    ],
)
def test_every_tiling_lowers(shape):
    expected, (tokens, width, hidden, num, choices, gated, rows) = shape
    call = operands(tokens, width, hidden, num, choices, activation="swiglu" if gated else "gelu", biases=True)
    assert choose(tokens, choices, call[3], rows) == expected
    plan = lambda ids: None if rows is None else make_plan(ids, num, rows, implementation="xla")
    run = lambda x, ids, weights, experts: named(x, ids, weights, experts, plan=plan(ids))
    assert kernels(lowered(run, *call)) == KERNELS


@settings(deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 1 << 17),
    num=st.integers(1, 1024),
    choices=st.integers(1, 32),
    width=st.integers(1, 256).map(lambda n: 64 * n),
    hidden=st.integers(1, 256).map(lambda n: 64 * n),
    gated=st.booleans(),
    rows=st.sampled_from((None, *TILE_ROWS)),
)
def test_a_chosen_tiling_fits_the_call(tokens, num, choices, width, hidden, gated, rows):
    experts = types.SimpleNamespace(num_experts=num, gate=gated or None, hidden=hidden, width=width)
    chosen = choose(tokens, choices, experts, rows)
    assert chosen.up.rows == chosen.down.rows == (rows or tile_rows(tokens, tokens * choices / num))
    assert chosen.up.rows in TILE_ROWS
    for tiling, columns, count in ((chosen.up, hidden, 1 + gated), (chosen.down, width, 1)):
        assert tiling.columns <= columns and tiling.share % 64 == 0 and tiling.depth % 64 == 0
        # an accumulator has share * rows / 128 registers of a thread, of the 224 that each of two consumers has
        assert count * tiling.share * tiling.rows // 128 <= (224 if tiling.consumers == 2 else 232) - 48
        ring = tiling.stages * 2 * tiling.depth * (tiling.rows + count * tiling.columns)
        assert ring * tiling.blocks < 227 * 1024


@given(tokens=st.integers(9, 1 << 17), mean=st.floats(0.01, 600))
@settings(deadline=None, derandomize=True, database=None)
def test_equal_tiles_hold_the_mean_and_some_more(tokens, mean):
    room = mean + (3 if mean <= 32 else 2 if mean <= 200 else 1.4) * mean**0.5
    tiles = math.ceil(room / TILE_ROWS[-1])
    assert room <= tiles * tile_rows(tokens, mean) < room + 8 * tiles


@pytest.mark.parametrize("tokens", [2, 9, 20, 37])
def test_any_number_of_tokens_in_place(tokens):
    """TMA takes rows in blocks of 8: others are gathered."""
    assert kernels(lowered(named, *operands(tokens, 128, 64, 4, 4))) == KERNELS


@given(tokens=st.integers(1, 8), mean=st.floats(0.01, 8))
@settings(deadline=None, derandomize=True, database=None)
def test_few_tokens_are_in_place(tokens, mean):
    assert tile_rows(tokens, mean) == 8
    assert tile_rows(1 << 17, 600.5 + mean) == 128  # what multiplies fastest
