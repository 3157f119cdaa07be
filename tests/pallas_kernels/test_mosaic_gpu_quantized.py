"""Experts in fewer bits through the GPU's kernels: values in JAX's interpreter, and shapes lowered for CUDA."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import H100, lowered
from expert_oracle import error, oracle
from test_mosaic_gpu import BFLOAT16, make, run, run_layer
from test_mosaic_gpu_lowering import HALF, KERNELS, MODELS, SMALL, TOKENS, array, is_xla, kernels, named, operands

from pallas_kernels import compat, routed_mlp
from pallas_kernels.expert_mlp.mosaic_forms import form_of
from pallas_kernels.expert_mlp.mosaic_int8 import Int8, Int8Groups
from pallas_kernels.expert_mlp.mosaic_mxfp4 import LOAD, MXFP4, SCALE, WIDEN
from pallas_kernels.expert_mlp.mosaic_weights import Plain
from pallas_kernels.mxfp4 import MXFP4Array
from pallas_kernels.quantized import QuantizedArray, dense, quantize, quantize_runs

interpreted = pytest.mark.skipif(not compat.INTERPRETS_GPU, reason="JAX's interpreter runs these kernels from 0.11 on")
NAMES = "gate", "up", "down"


def each_kernel(function, experts, names=NAMES):
    """The experts with other kernels."""
    given = [name for name in names if getattr(experts, name) is not None]
    return dataclasses.replace(experts, **{name: function(getattr(experts, name)) for name in given})


def assert_standard(got, x, ids, weights, experts, layer=None):
    """The project's standard, of the weights that the stored ones stand for, in float32 without rounding."""
    wide = each_kernel(lambda w: dense(w, jnp.float32), experts)
    want = oracle(x, ids, weights, wide, layer)
    plain = oracle(x, ids, weights, wide, layer, np.float32, x.dtype)
    assert got.dtype == x.dtype and error(got, want) <= 1.2 * error(plain, want)


# tokens, E, choices, D, F and make_experts' options; group size
CASES = {
    "a scale per column": ((7, 5, 2, 128, 64, dict(biases=True)), None),
    "gathered": ((24, 5, 2, 192, 128, dict(activation="relu")), None),
    "float16": ((9, 5, 2, 64, 64, dict(dtype=np.float16)), None),
    "groups": ((7, 5, 2, 256, 128, dict(biases=True)), 128),
    "the last group is shorter": ((7, 5, 2, 192, 128, {}), 128),
    "groups smaller than a stage": ((7, 3, 2, 256, 128, {}), 64),
    "groups larger than a stage": ((24, 3, 2, 320, 192, {}), 256),
    "a stack": ((8, 3, 2, 64, 128, dict(layers=(3,), activation="geglu", biases=True)), None),
    "groups of a stack": ((8, 3, 2, 128, 128, dict(layers=(3,))), 64),
    "MXFP4": ((7, 5, 2, 128, 64, dict(biases=True)), "mxfp4"),
    "MXFP4, gathered": ((24, 5, 2, 192, 320, dict(activation="relu")), "mxfp4"),
    "MXFP4, a stack": ((8, 3, 2, 64, 192, dict(layers=(3,))), "mxfp4"),
}
QUICK = {"a scale per column", "groups", "a stack", "MXFP4"}


def case(name):
    shape, group = CASES[name]
    *sizes, options = shape
    x, ids, weights, experts = make(*sizes, dict(dtype=BFLOAT16, layout="out_in") | options)
    smaller = random_mxfp4 if group == "mxfp4" else functools.partial(quantize, group_size=group)
    return x, ids, weights, each_kernel(smaller, experts)


def random_mxfp4(kernel):
    """Of the same shape, all codes and several powers of two."""
    rng, (*lead, width) = np.random.default_rng(3), kernel.shape
    blocks = rng.integers(0, 1 << 32, (*lead, width // 8), dtype=np.uint32)
    scales = rng.integers(120, 125, (*lead, width // 32)).astype(np.uint8)
    return MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales), np.dtype(BFLOAT16))


@interpreted
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_values(name):
    call = case(name)
    if "stack" in name:
        assert_standard(run_layer(*call, np.int32(1)), *call, layer=1)
    else:
        assert_standard(run(*call), *call)


@interpreted
def test_products_may_be_stored_differently():
    x, ids, weights, experts = make(7, 5, 2, 64, 128, dict(dtype=BFLOAT16, layout="out_in"))
    experts = each_kernel(quantize, experts, ("down",))
    assert_standard(run(x, ids, weights, experts), x, ids, weights, experts)


@interpreted
def test_a_poisoned_row_stays_alone_and_ids_outside_add_nothing():
    x, ids, weights, experts = case("a scale per column")
    clean = np.asarray(run(x, ids, weights, experts))
    x[4, 7], ids[2, 0], weights[2, 0] = np.nan, 5, np.nan
    got, others = np.asarray(run(x, ids, weights, experts)), ~np.isin(np.arange(len(x)), [2, 4])
    np.testing.assert_array_equal(got[others], clean[others])
    assert np.isfinite(got[2]).all() and not np.isfinite(got[4]).any()


@interpreted
def test_the_gradient_is_that_of_xla_tiles():
    x, ids, weights, experts = case("a scale per column")

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(x, weights, implementation):
        loss = lambda x, weights: routed_mlp(x, ids, weights, experts, implementation=implementation).sum()
        return jax.grad(loss, (0, 1))(x, weights)

    both = [gradients(x, weights, name) for name in ("mosaic_gpu_interpreted", "xla_tiles")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def int8(kernel, group=None):
    """A kernel without values."""
    blocks = 1 if group is None else -(-kernel.shape[-1] // group)
    scales = array(*kernel.shape[:-1], blocks, dtype=jnp.float32)
    return QuantizedArray(array(*kernel.shape, dtype=jnp.int8), scales, np.dtype(HALF), group)


def mxfp4(kernel):
    *lead, width = kernel.shape
    blocks, scales = (array(*lead, width // 8, dtype=jnp.uint32), array(*lead, width // 32, dtype=jnp.uint8))
    return MXFP4Array(blocks, scales, np.dtype(HALF))


def quantised(*sizes, group=None, **options):
    x, ids, weights, experts = operands(*sizes, layout="out_in", **options)
    smaller = mxfp4 if group == "mxfp4" else functools.partial(int8, group=group)
    return x, ids, weights, each_kernel(smaller, experts)


LOWERED = {("qwen3", 8), ("gptoss", 32), ("olmoe", 1024), ("mixtral", 128), ("dsv3ep", 16384)}


@pytest.mark.parametrize("group", [None, "mxfp4", pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "model, tokens",
    [
        sizes if sizes in LOWERED else pytest.param(*sizes, marks=pytest.mark.slow)
        for sizes in itertools.product(MODELS, TOKENS)
    ],
)
def test_models_lower(model, tokens, group):
    call = quantised(tokens, *MODELS[model], group=group, biases=model == "gptoss")
    assert kernels(lowered(named, *call)) == KERNELS


@pytest.mark.parametrize("group", [None, 64, "mxfp4", pytest.param(256, marks=pytest.mark.slow)])
def test_a_stack_with_a_traced_layer_and_biases_lowers(group):
    dtype = HALF if group == "mxfp4" else jnp.float16
    options = dict(dtype=dtype, activation="swiglu_clamped", biases=True, lead=(3,), group=group)
    for tokens in (8, 300):
        call = quantised(tokens, *MODELS["gptoss"], **options)
        run = lambda *call: named(*call[:-1], layer=call[-1])
        assert kernels(lowered(run, *call, array(dtype=jnp.int32))) == KERNELS


class TestRefusals:
    def refused(self, call, message):
        """Named it says why; not named, the tile loop runs."""
        with pytest.raises(ValueError, match=f"cannot run as 'mosaic_gpu': {message}"):
            lowered(named, *call)
        assert is_xla(lowered(routed_mlp, *call, kind=H100))

    def test_groups(self):
        self.refused(quantised(*SMALL, group=96), "groups must be multiples of 64 inputs, got 96")

    def test_gate_and_up(self):
        x, ids, weights, experts = quantised(*SMALL)
        gate = int8(array(*experts.gate.shape), 64)
        call = x, ids, weights, dataclasses.replace(experts, gate=gate)
        self.refused(call, "gate and up must be stored alike, with groups of the same size")

    def test_runs(self):
        x, ids, weights, experts = operands(*SMALL, layout="out_in")
        down = jax.eval_shape(lambda: quantize_runs(jnp.ones(experts.down.shape, HALF), 8, lead=1))
        call = x, ids, weights, dataclasses.replace(experts, down=down)
        self.refused(call, "scales over runs of a flattened matrix are not applied here")

    def test_float16_with_mxfp4(self):
        call = quantised(*SMALL, dtype=jnp.float16, group="mxfp4")
        self.refused(call, "MXFP4 kernels are multiplied by bfloat16, got float16")

    def test_float32(self):
        call = quantised(*SMALL, dtype=jnp.float32)
        self.refused(call, "x and kernels must both be bfloat16 or both float16, got float32")


def test_forms_follow_from_the_type():
    w = jnp.ones((2, 4, 256))
    assert form_of(random_mxfp4(w), "out_in") == MXFP4()
    assert form_of(w, "out_in") == Plain(transposed=True)
    assert form_of(quantize(w), "out_in") == Int8()
    assert form_of(quantize(w, 128), "out_in") == Int8Groups(128)
    # one group that covers all inputs
    assert form_of(quantize(w, 512), "out_in") == Int8()


class Registers:
    """Runs the few PTX instructions that MXFP4 is widened with, on arrays of 32-bit words."""

    def __init__(self, *operands):
        self.values = dict(enumerate(np.asarray(value, np.uint32) for value in operands))

    def run(self, code):
        for line in code.strip("{} ").split(";"):
            name, *operands = line.replace(",", " ").split() or [""]
            if name and name != ".reg":
                target, *sources = [self.name(operand) for operand in operands]
                self.values[target] = getattr(self, name.partition(".")[0])(*map(self.value, sources))
        return self.values

    def name(self, operand):
        return int(operand[1:]) if operand[0] == "$" else operand

    def value(self, operand):
        return self.values[operand] if operand in self.values else np.uint32(int(operand, 0))

    def prmt(self, a, b, select):
        pairs = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        picks = [select >> np.uint32(4 * i) & np.uint32(15) for i in range(4)]
        assert all((pick < 8).all() for pick in picks)  # 8 and more repeat a sign
        found = [
            (pairs >> (8 * pick).astype(np.uint64) & np.uint64(255)) << np.uint64(8 * i) for i, pick in enumerate(picks)
        ]
        return sum(found).astype(np.uint32)

    def lop3(self, a, b, c, table):
        assert table == 0xEA
        return a & b | c

    def mul(self, a, b):
        halves = [np.ascontiguousarray(np.broadcast_to(v, np.shape(a))).view(np.uint16).view(BFLOAT16) for v in (a, b)]
        with np.errstate(all="ignore"):  # the largest scales overflow, the last one is NaN
            return np.multiply(*halves).view(np.uint32)

    shl = staticmethod(np.left_shift)
    shr = staticmethod(np.right_shift)
    add = staticmethod(np.add)
    max = staticmethod(np.maximum)
    and_ = staticmethod(np.bitwise_and)
    or_ = staticmethod(np.bitwise_or)


setattr(Registers, "and", Registers.and_)
setattr(Registers, "or", Registers.or_)


def test_the_bits_of_mxfp4():
    """Every scale with every pair of codes, and what a quad makes of a block."""
    words = np.random.default_rng(0).integers(0, 1 << 32, (256, 4), dtype=np.uint32)
    words[:, 0] = np.arange(256) * 0x01010101
    scales = np.arange(256, dtype=np.uint8)[:, None]
    power = Registers(0, scales).run(SCALE)[0]
    want = np.asarray(MXFP4Array(words, scales).dequantize(jnp.bfloat16)).reshape(256, 4, 4, 2)
    for t in range(4):
        load = LOAD.partition(";")[2].partition(";")[2]  # but for the declaration and the load itself
        registers = Registers(0, 0, np.uint32(0x11 * t + 0x40))
        registers.values |= {name: words[:, j] for j, name in enumerate("abcd")}
        eight = registers.run(load)[0]
        four = Registers(0, 0, 0, 0, eight, power[:, 0]).run(WIDEN)
        got = np.stack([four[j] for j in range(4)], axis=1).view(np.uint16).view(BFLOAT16).reshape(256, 4, 2)
        np.testing.assert_array_equal(got.view(np.uint16)[:255], want[:, :, t].view(np.uint16)[:255])
        assert np.isnan(got[255]).all()
