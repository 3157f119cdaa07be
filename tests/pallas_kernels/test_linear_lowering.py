"""The GPU's kernels of `linear` lowered for CUDA without a GPU: what is chosen, and that real shapes lower."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cuda import lowered, mesh_of

from pallas_kernels.linear import LayerNorm, RMSNorm, linear
from pallas_kernels.linear.api import OPERATION
from pallas_kernels.quantized import quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
HALF = jnp.bfloat16
ROW, ROWS = '"moe_jax_linear_row"', '"moe_jax_linear_rows"'

# L, K, N of each kernel and what there is beside.
MODELS = {
    "qwen3 q, k, v": (48, 2048, (4096, 512, 512), dict(norm=True)),
    "qwen3 o": (48, 4096, (2048,), dict(residual=True)),
    "qwen3 router": (48, 2048, (128,), dict(norm=True, normed=True, dtype=jnp.float32)),
    "olmoe q, k, v": (16, 2048, (2048, 2048, 2048), dict(norm=True)),
    "layer norm, q, k, v": (24, 2048, (2048, 2048, 2048), dict(norm="layer", biased=True)),
    "layer norm, router": (12, 2048, (128,), dict(norm="layer", normed=True, dtype=jnp.float32)),
    "gpt-oss q, k, v": (24, 2880, (4096, 512, 512), dict(norm=True, biased=True)),
    "gpt-oss o": (24, 4096, (2880,), dict(residual=True, biased=True)),
    "gpt-oss router": (24, 2880, (32,), dict(norm=True, normed=True, biased=True, dtype=jnp.float32)),
    "deepseek dense": (3, 7168, (18432, 18432), dict(norm=True)),
    "deepseek down": (3, 18432, (7168,), dict(residual=True)),
    "deepseek router": (58, 7168, (256,), dict(norm=True, normed=True, dtype=jnp.float32)),
    "qwen3 q, k, v in int8": (48, 2048, (4096, 512, 512), dict(norm=True, group=None)),
    "deepseek down in groups": (3, 18432, (7168,), dict(residual=True, group=128)),
    "gpt-oss q, k, v in groups": (24, 2880, (4096, 512, 512), dict(norm=True, biased=True, group=64)),
}


def array(*shape, dtype=HALF):
    return jax.ShapeDtypeStruct(shape, dtype)


def operands(rows, layers, width, sizes, norm=False, biased=False, residual=False, dtype=None, normed=False, **stored):
    """What `linear` takes, of shapes alone; `group`: of int8 kernels."""
    kernels = [array(layers, size, width) for size in sizes]
    if stored:
        int8 = lambda kernel: quantize(jnp.ones(kernel.shape, kernel.dtype), stored["group"])
        kernels = [jax.eval_shape(int8, kernel) for kernel in kernels]
    layer = array(dtype=jnp.int32)
    if norm:
        parts = [array(layers, width)] * (2 if norm == "layer" else 1)
        norm = (LayerNorm if norm == "layer" else RMSNorm)(*parts, 1e-6, layer)
    return dict(
        x=array(rows, width),
        kernels=kernels,
        layer=layer,
        norm=norm or None,
        biases=[array(layers, size) for size in sizes] if biased else None,
        residual=array(rows, sizes[0]) if residual else None,
    ), dict(dtype=dtype, normed=normed)


def text(arrays, options, **how):
    call = lambda arrays, **named: linear(**arrays, **options, **named)
    platform = how.pop("platform", "cuda")
    return lowered(functools.partial(call, **how), arrays, platform=platform)


def held(program):
    """The kernels that a program holds."""
    return {name for name in (ROW, ROWS) if name in program}


QUICK = "layer norm, router", "qwen3 q, k, v", "gpt-oss q, k, v", "gpt-oss router", "deepseek down in groups"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_real_shapes_lower(name):
    """Not named: the kernel for one row and that for a few."""
    layers, width, sizes, options = MODELS[name]
    for rows, kernel in ((1, ROW), (32, ROWS)):
        assert held(text(*operands(rows, layers, width, sizes, **options))) == {kernel}


@pytest.mark.parametrize("implementation, rows", [("triton_row", 1), ("triton_rows", 1), ("triton_rows", 64)])
@pytest.mark.parametrize("int8", [dict(group=32)])
def test_named(implementation, rows, int8):
    program = text(*operands(rows, 2, 96, (100, 3), norm=True, biased=True, **int8), implementation=implementation)
    assert held(program) == {f'"moe_jax_linear_{implementation[7:]}"'}


def test_in_float16_of_one_kernel_and_with_64_bit_types():
    half = lambda *shape: array(*shape, dtype=jnp.float16)
    for rows, kernel in ((1, ROW), (5, ROWS)):
        assert held(lowered(lambda x, w: linear(x, [w]), half(rows, 100), half(7, 100))) == {kernel}
        with jax.enable_x64(True):
            assert held(text(*operands(rows, 2, 96, (100,), norm=True, residual=True, group=32))) == {kernel}


def test_what_is_chosen():
    def chosen(platform, rows, dtype=HALF, size=1024, width=64):
        x, kernel = array(rows, width, dtype=dtype), array(size, width, dtype=dtype)
        return OPERATION.chosen(platform, x, [kernel], None, None, None, None, None, False)

    rows = (1, 2, 64, 65)
    assert [chosen("cuda", n) for n in rows] == ["triton_row", "triton_rows", "triton_rows", "xla"]
    assert {chosen("cuda", n, jnp.float32) for n in rows} == {"xla"}
    assert [chosen("cuda", 2, width=width) for width in (8, 9)] == ["xla", "triton_rows"]  # a product takes 16
    assert {chosen(platform, n) for n in rows for platform in ("cpu", "tpu")} == {"xla"}


def test_other_programs_hold_no_kernel():
    assert not held(text(*operands(1, 2, 64, (8,)), platform="cpu"))
    assert not held(text(*operands(65, 2, 64, (1024,))))
    with mesh_of():
        traced = jax.jit(lambda arrays: linear(**arrays)).trace(operands(1, 2, 64, (8,))[0])
        texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")]
    assert [held(program) for program in texts] == [{ROW}, set()]
