"""The GPU's kernels of `decode_attention` lowered for CUDA without a GPU: what is chosen, and real shapes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cuda import lowered

from pallas_kernels.attention.decode import OPERATION, QKNorm, Rotary, Seen, decode_attention

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
HALF = jnp.bfloat16
DECODE, JOIN = '"moe_jax_attention_decode"', '"moe_jax_attention_join"'

# N, K, H, Hv and what there is beside.
MODELS = {
    "qwen3": (32, 4, 128, 128, dict(norm="head", half=64)),
    "olmoe": (16, 16, 128, 128, dict(norm="full", half=64)),
    "gpt-oss": (64, 8, 64, 64, dict(half=32, sinks=True, window=True)),
    "glm": (96, 8, 128, 128, dict(norm="head", half=32, interleaved=True)),
    "minimax": (48, 8, 128, 128, dict(norm="full", half=32)),
    "odd": (20, 5, 80, 40, dict(half=40, chunk=True)),
    "wide": (8, 1, 256, 256, dict()),
}


def array(*shape, dtype=HALF):
    return jax.ShapeDtypeStruct(shape, dtype)


def operands(heads, kv_heads, size, width, options, batch=1, columns=512, dtype=HALF, layers=24):
    array_ = functools.partial(array, dtype=dtype)
    integer, norm, half = array(dtype=jnp.int32), options.get("norm"), options.get("half")
    wide = norm == "full"
    scales = [array_(layers, *[n] * wide, size) for n in (heads, kv_heads)]
    turn = array(batch, half or 1, dtype=jnp.float32)
    return dict(
        q=array_(batch, heads, size),
        k=array_(batch, kv_heads, size),
        v=array_(batch, kv_heads, width),
        cache={name: array_(layers, batch, kv_heads, columns, n) for name, n in (("k", size), ("v", width))},
        lengths=array(batch, dtype=jnp.int32),
        layer=integer,
        norm=QKNorm(*scales, 1e-6) if norm else None,
        rotary=Rotary(turn, turn, options.get("interleaved", False)) if half else None,
        seen=Seen(
            window=integer if options.get("window") else None,
            chunk=integer if options.get("chunk") else None,
            sinks=array_(layers, heads) if options.get("sinks") else None,
        ),
    )


def held(arrays, platform="cuda", **how):
    """The kernels that a program holds."""
    text = lowered(lambda arrays: decode_attention(**arrays, scale=0.1, **how), arrays, platform=platform)
    return {name for name in (DECODE, JOIN) if name in text}


QUICK = "qwen3", "gpt-oss", "odd"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_real_shapes_lower(name):
    """Not named: one kernel where the cache is short, two where it is long."""
    *shape, options = MODELS[name]
    assert held(operands(*shape, options, batch=3)) == {DECODE}
    assert held(operands(*shape, options, columns=32768)) == {DECODE, JOIN}


@pytest.mark.parametrize("batch, columns", [(1, 4096), (32, 4096), (32, 131072)])
def test_batches(batch, columns):
    assert DECODE in held(operands(*MODELS["qwen3"], batch=batch, columns=columns, dtype=jnp.float16))


def test_named_and_with_64_bit_types():
    *shape, options = MODELS["gpt-oss"]
    for columns in (256, 32768):
        arrays = operands(*shape, options, columns=columns)
        kernels = {DECODE} if columns == 256 else {DECODE, JOIN}
        assert held(arrays, implementation="triton") == kernels
        with jax.enable_x64(True):
            assert held(arrays, implementation="triton") == kernels


def test_what_is_chosen():
    def chosen(platform, dtype):
        names = "q k v cache lengths layer norm rotary seen".split()
        q, k, v, cache, lengths, layer, norm, rotary, seen = map(
            operands(*MODELS["qwen3"], dtype=dtype).__getitem__, names
        )
        return OPERATION.chosen(platform, q, k, v, cache["k"], cache["v"], lengths, layer, 0.1, norm, rotary, seen)

    assert [chosen("cuda", dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)] == ["triton", "triton", "xla"]
    assert {chosen(platform, HALF) for platform in ("cpu", "tpu")} == {"xla"}
    assert held(operands(*MODELS["qwen3"]), platform="cpu") == set()
    assert held(operands(*MODELS["qwen3"], dtype=jnp.float32)) == set()
