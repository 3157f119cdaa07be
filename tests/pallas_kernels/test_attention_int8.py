"""`decode_attention` over caches in int8, against float64 over what the caches stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from cuda import lowered
from decode_oracle import LAYER, make, oracle
from expert_oracle import error

from pallas_kernels.attention.decode import OPERATION, decode_attention
from pallas_kernels.quantized import QuantizedArray, quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16 = ml_dtypes.bfloat16
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform]
each = pytest.mark.parametrize("implementation", ANYWHERE)
CASES = {
    "a norm per head": (2, 8, 2, 32, 32, 130, [3, 129], dict(norm="head", half=16)),
    "odd heads": (2, 6, 2, 24, 40, 200, [199, 0], dict(half=8, interleaved=True, window=70, dtype=np.float16)),
    "a row, sinks": (1, 4, 2, 16, 16, 70, [66], dict(half=8, sinks=True)),
    "in parts": (2, 4, 2, 32, 32, 2100, [2099, 40], dict(norm="full", half=16, sinks=True)),
}


def operands(name):
    *shape, options = CASES[name]
    options = dict(options)
    call = make(*shape, options.pop("dtype", BFLOAT16), **options)
    for stack in call["cache"].values():  # moderate entries: a scale is an entry's own
        stack[...] = np.clip(stack.astype(np.float32), -40, 40).astype(stack.dtype)
    call["cache"] = {name: quantize(stack) for name, stack in call["cache"].items()}
    return call


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def run(call, scale, implementation):
    return decode_attention(**call, layer=LAYER, scale=scale, implementation=implementation)


def attend(call, implementation):
    return run({k: v for k, v in call.items() if k != "scale"}, call["scale"], implementation)


def wide_cache(cache):
    return {name: np.asarray(stack.dequantize(jnp.float32)) for name, stack in cache.items()}


@each
@pytest.mark.parametrize("name", CASES)
def test_values(name, implementation):
    call = operands(name)
    y, cache = attend(call, implementation)
    wide = {**call, "cache": wide_cache(call["cache"])}
    want, entries = oracle(**wide)
    plain, _ = oracle(**wide, narrow=call["q"].dtype)
    # the new token's own entry is seen in int8
    own = np.abs(want).max() * 0.01
    assert y.dtype == call["q"].dtype
    assert np.abs(np.asarray(y, np.float64) - want).max() <= 1.2 * np.abs(plain - want).max() + own
    for part, new in (("k", entries), ("v", call["v"].astype(np.float64))):
        before, after = call["cache"][part], cache[part]
        assert isinstance(after, QuantizedArray) and after.dtype == before.dtype
        values, scales = np.array(before.values), np.array(before.scales)
        for row, length in enumerate(call["lengths"]):
            found = np.asarray(after.values[LAYER, row, :, length]), np.asarray(after.scales[LAYER, row, :, length])
            biggest = np.abs(new[row]).max(-1, keepdims=True)
            np.testing.assert_allclose(found[1], biggest / 127, rtol=0.01)
            assert np.abs(found[0] * found[1] - new[row]).max() <= 0.52 * found[1].max() + 0.01 * biggest.max()
            values[LAYER, row, :, length], scales[LAYER, row, :, length] = found
        np.testing.assert_array_equal(after.values, values)
        np.testing.assert_array_equal(after.scales, scales)


@each
def test_small_values_in_float16(implementation):
    """Their scales are smaller than float16's least numbers: they must not be rounded to it on their way."""
    call = operands("odd heads")
    small = call["cache"]["v"]
    call["cache"]["v"] = dataclasses.replace(small, scales=small.scales * np.float32(2.0**-14))
    call["v"] = call["v"] * np.float16(2.0**-14)
    y, _ = attend(call, implementation)
    want, _ = oracle(**{**call, "cache": wide_cache(call["cache"])})
    least = float(jnp.finfo(np.float16).smallest_subnormal)
    assert np.abs(np.asarray(y, np.float64) - want).max() <= 0.015 * np.abs(want).max() + least


def test_implementations_agree():
    """Not only with the oracle: the same entries, and the new token seen as it is stored."""
    call = operands("a norm per head")
    (y, cache), (other, same) = (attend(call, name) for name in ("xla", "triton_interpreted"))
    assert error(np.asarray(other), np.asarray(y, np.float64)) < 0.01
    for part in "kv":
        assert np.abs(cache[part].values.astype(int) - same[part].values.astype(int)).max() <= 1
        np.testing.assert_allclose(cache[part].scales, same[part].scales, rtol=1e-2)


@each
def test_a_poisoned_row_stays_alone(implementation):
    call = operands("a norm per head")
    clean, _ = attend(call, implementation)
    call["k"] = call["k"].copy()
    call["k"][1, 0, 3] = np.nan
    got, cache = attend(call, implementation)
    np.testing.assert_array_equal(got[0], clean[0])
    assert np.isnan(np.asarray(got[1, :4], np.float32)).all()
    assert np.isnan(cache["k"].scales[LAYER, 1, 0, call["lengths"][1]]).all()


@each
def test_a_full_row_writes_nothing(implementation):
    call = operands("a row, sinks")
    call["lengths"] = np.array([70], np.int32)
    _, cache = attend(call, implementation)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(call["cache"]), strict=True):
        np.testing.assert_array_equal(one, other)


def shapes(columns=512, layers=24, batch=1, dtype=jnp.bfloat16):
    array = jax.ShapeDtypeStruct
    stack = lambda: QuantizedArray(
        array((layers, batch, 4, columns, 128), jnp.int8),
        array((layers, batch, 4, columns, 1), jnp.float32),
        jnp.dtype(dtype),
    )
    new = array((batch, 4, 128), dtype)
    query = array((batch, 32, 128), dtype)
    return dict(q=query, k=new, v=new, cache={"k": stack(), "v": stack()}, lengths=array((batch,), jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lowered_for_cuda(dtype, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    run = functools.partial(decode_attention, layer=3, scale=0.1)
    text = lowered(lambda call: run(**call), shapes(dtype=dtype))
    assert '"moe_jax_attention_decode"' in text and '"moe_jax_attention_join"' not in text
    assert '"moe_jax_attention_join"' in lowered(lambda call: run(**call), shapes(32768, dtype=dtype))
    # bytes that Triton's offsets do not reach: another way
    assert "moe_jax_attention_decode" not in lowered(lambda call: run(**call), shapes(32768, 48, 3, dtype))


def test_refused():
    call = operands("a row, sinks")
    wide = call["cache"]["k"].dequantize(jnp.bfloat16)
    call["cache"] = dict(call["cache"], k=quantize(wide, group_size=8))
    with pytest.raises(ValueError, match="scales of shape .* not one for each entry"):
        attend(call, "triton_interpreted")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_donated_cache_is_not_copied(rows):
    layers, columns, size = 8, 256, 32
    stack = jax.eval_shape(lambda: quantize(jnp.zeros((layers, rows, 2, columns, size))))
    new = jax.ShapeDtypeStruct((rows, 2, size), jnp.float32)

    def tokens(q, cache, lengths):
        def layer(i, carry):
            x, cache = carry
            return decode_attention(x, x, x, cache, lengths, layer=i, scale=0.1)

        return jax.lax.fori_loop(0, layers, layer, (q, cache))

    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = jax.jit(tokens, donate_argnums=1).lower(new, {"k": stack, "v": stack}, lengths).compile()
    leaves = jax.tree.leaves(stack)
    shapes = {",".join(map(str, a.shape)) for a in leaves}
    copies = [
        line for line in program.as_text().splitlines() if " copy(" in line and any(f"[{s}]" in line for s in shapes)
    ]
    assert copies == []
    assert program.memory_analysis().alias_size_in_bytes >= 2 * sum(a.size * a.dtype.itemsize for a in leaves)
