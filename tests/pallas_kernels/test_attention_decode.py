"""One suite over every implementation of `decode_attention`, against `decode_oracle`."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from decode_oracle import LAYER, LAYERS, make, oracle
from expert_oracle import error

from pallas_kernels.attention.decode import OPERATION, QKNorm, Rotary, Seen, decode_attention

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16 = ml_dtypes.bfloat16
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform]
each = pytest.mark.parametrize("implementation", ANYWHERE)

# B, N, K, H, Hv, S, tokens in each row, and what differs from plain attention.
CASES = {
    "a head for each": (3, 4, 4, 16, 16, 40, [0, 39, 17], dict()),
    "grouped, a norm per head": (2, 8, 2, 32, 32, 130, [3, 129], dict(norm="head", half=16)),
    "odd heads, one norm, a window": (
        *(2, 6, 2, 24, 40, 200, [199, 64]),
        dict(norm="full", half=8, interleaved=True, window=70, dtype=np.float16),
    ),
    "heads of 80, chunks": (2, 10, 2, 80, 80, 96, [95, 63], dict(half=20, chunk=64)),
    "sinks": (2, 4, 2, 16, 16, 70, [0, 66], dict(half=8, sinks=True, window=np.array(5, np.int32))),
    "one key for all, interleaved": (1, 20, 1, 16, 24, 64, [63], dict(half=8, interleaved=True, dtype=np.float16)),
    "a chunk begins": (2, 2, 1, 16, 16, 128, [64, 127], dict(norm="full", chunk=np.array(64, np.int32), window=9)),
}
LONG = {
    "a long cache": (2, 4, 2, 32, 32, 2100, [2099, 40], dict(norm="head", half=16, sinks=True)),
    "a window in a long cache": (1, 2, 1, 16, 16, 2100, [1900], dict(half=8, window=700, dtype=np.float16)),
    "a chunk of a long cache": (2, 3, 1, 24, 40, 2100, [0, 2050], dict(chunk=1024, sinks=True)),
}


def operands(name):
    *shape, options = {**CASES, **LONG}[name]
    options = dict(options)
    return make(*shape, options.pop("dtype", BFLOAT16), **options)


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def run(call, layer, scale, implementation):
    return decode_attention(**call, layer=layer, scale=scale, implementation=implementation)


def attend(call, implementation, layer=LAYER):
    call = dict(call)
    return run(call, np.array(layer, np.int32), call.pop("scale"), implementation)


def assert_written(got, call, entries):
    """The new entries stand in their column of the layer, everything else is what it was, to the bit."""
    assert set(got) == {"k", "v"}
    for name, new in (("k", entries), ("v", call["v"])):
        want, found = call["cache"][name].copy(), np.asarray(got[name])
        assert found.dtype == want.dtype
        for row, length in enumerate(call["lengths"]):
            if length < want.shape[3]:
                written = found[LAYER, row, :, length]
                if name == "v" or call["norm"] is call["rotary"] is None:
                    np.testing.assert_array_equal(written, np.asarray(call[name])[row])
                else:  # rounded twice
                    bound = 3 * float(ml_dtypes.finfo(want.dtype).eps) * np.abs(new[row]).max()
                    assert np.abs(written.astype(np.float64) - new[row]).max() <= bound
                want[LAYER, row, :, length] = written
        np.testing.assert_array_equal(found, want)


def assert_standard(got, call):
    """The project's standard: 1.2 times the error of plain float32 attention with rounding in between."""
    (y, cache), dtype = got, call["q"].dtype
    (want, entries), plain = oracle(**call), oracle(**call, narrow=dtype)[0]
    assert y.dtype == dtype and y.shape == want.shape
    assert error(y, want) <= 1.2 * error(plain, want)
    assert_written(cache, call, entries)


SLOW = [*(list(CASES)[i] for i in (3, 5, 6)), *list(LONG)[1:]]
named = lambda cases: [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in cases]


@each
@pytest.mark.parametrize("name", named(CASES))
def test_values(name, implementation):
    call = operands(name)
    assert_standard(attend(call, implementation), call)


@pytest.mark.parametrize("name", named(LONG))
def test_long_caches_are_split(name):
    """A second kernel joins the parts; the columns that no row has filled are not read, or could be anything."""
    call = operands(name)
    static = dict(scale=call["scale"], implementation="triton_interpreted")
    kernels = str(jax.make_jaxpr(functools.partial(decode_attention, layer=LAYER, **static))(**_without(call, "scale")))
    assert "moe_jax_attention_join" in kernels
    assert_standard(attend(call, "triton_interpreted"), call)
    clean, _ = attend(call, "triton_interpreted")
    for stack in call["cache"].values():
        for row, length in enumerate(call["lengths"]):
            stack[LAYER, row, :, length:] = np.nan
    np.testing.assert_array_equal(attend(call, "triton_interpreted")[0], clean)


def _without(call, name):
    return {key: value for key, value in call.items() if key != name}


def test_long_caches_on_a_cpu():
    for name in ("a long cache", "a chunk of a long cache"):
        call = operands(name)
        assert_standard(attend(call, "xla"), call)


def test_in_float32():
    call = make(*CASES["grouped, a norm per head"][:7], np.float32, norm="head", half=12, sinks=True, window=100)
    y, cache = attend(call, None)
    want, entries = oracle(**call)
    assert y.dtype == np.float32 and np.abs(y - want).max() <= 2e-6 * np.abs(want).max()
    assert_written(cache, call, entries)


@each
@pytest.mark.parametrize("rows", [1, 2])
def test_a_full_row_writes_nothing(implementation, rows):
    call = make(rows, 4, 2, 16, 16, 32, [32, 7][:rows], BFLOAT16, half=8)
    y, cache = attend(call, implementation)
    want, entries = oracle(**call)
    assert_written(cache, call, entries)
    others = slice(1, rows)
    np.testing.assert_allclose(np.asarray(y)[others].astype(np.float64), want[others], atol=2**-6)


@each
def test_a_poisoned_row_stays_alone(implementation):
    call = operands("sinks")
    clean, _ = attend(call, implementation)
    for name in "qkv":
        poisoned = {**call, name: call[name].copy()}
        poisoned[name][1, 0, 3] = np.nan
        got, _ = attend(poisoned, implementation)
        np.testing.assert_array_equal(np.asarray(got)[0], np.asarray(clean)[0])
        touched = np.isnan(np.asarray(got)[1].astype(np.float32))
        group = 1 if name == "q" else 2  # heads that the NaN reaches
        np.testing.assert_array_equal(touched.any(1), np.arange(4) < group)
        assert touched[:group].all() if name != "v" else touched[:group, 3].all() and touched.sum() == group


@each
def test_the_layer_may_be_static(implementation):
    call = operands("a head for each")
    assert_standard(jax.jit(lambda: decode_attention(**call, layer=LAYER, implementation=implementation))(), call)


@pytest.mark.slow
def test_with_64_bit_types():
    with jax.enable_x64(True):
        for implementation in ANYWHERE:
            call = operands("sinks")
            assert_standard(attend(call, implementation), call)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_donated_cache_is_not_copied(rows):
    """A loop over tokens and layers: what the program needs beside its arguments is less than one stack."""
    layers, columns, size = 8, 256, 32
    stack = jax.ShapeDtypeStruct((layers, rows, 2, columns, size), jnp.float32)
    new = jax.ShapeDtypeStruct((rows, 2, size), jnp.float32)

    def tokens(q, cache, lengths):
        def layer(i, carry):
            x, cache, lengths = carry
            y, cache = decode_attention(x, x, x, cache, lengths, layer=i, scale=0.1)
            return y, cache, lengths

        def token(i, carry):
            x, cache, lengths = jax.lax.fori_loop(0, layers, layer, carry)
            return x, cache, lengths + 1

        return jax.lax.fori_loop(0, 5, token, (q, cache, lengths))

    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = jax.jit(tokens, donate_argnums=1).lower(new, {"k": stack, "v": stack}, lengths).compile()
    text, shape = program.as_text(), ",".join(map(str, stack.shape))
    copies = [line for line in text.splitlines() if f"= f32[{shape}]" in line and " copy" in line]
    assert copies == []
    assert program.memory_analysis().temp_size_in_bytes < 4 * stack.size
    assert program.memory_analysis().alias_size_in_bytes >= 8 * stack.size


GOOD = dict(q=(2, 8, 64), k=(2, 2, 64), v=(2, 2, 64), dtypes=(BFLOAT16,) * 4)


def call_of(q, k, v, dtypes, columns=32):
    q, k, v = (jnp.ones(shape, dtype) for shape, dtype in zip((q, k, v), dtypes, strict=False))
    stack = lambda new: jnp.ones((LAYERS, *new.shape[:2], columns, new.shape[2]), dtypes[3])
    return dict(q=q, k=k, v=v, cache={"k": stack(k), "v": stack(v)}, lengths=jnp.array([3, 4]), layer=0, scale=0.1)


@pytest.mark.parametrize(
    "changed, reason",
    [
        (dict(dtypes=(np.float32,) * 4), "must all be bfloat16 or all float16, got float32"),
        (dict(dtypes=(BFLOAT16, BFLOAT16, BFLOAT16, np.float32)), "got bfloat16, float32"),
        (dict(dtypes=(np.float16, np.float16, BFLOAT16, BFLOAT16)), "got bfloat16, float16"),
        (dict(q=(2, 8, 264), k=(2, 2, 264)), "heads of 264 and 64, 4 queries per key; at most 256 and 64"),
        (dict(v=(2, 2, 264)), "heads of 64 and 264, 4 queries per key"),
        (dict(q=(2, 130, 64)), "65 queries per key; at most 256 and 64"),
    ],
)
def test_refusals(changed, reason):
    call = call_of(**{**GOOD, **changed})
    for name in ("triton", "triton_interpreted"):
        with pytest.raises(ValueError, match=f"decode_attention cannot run as '{name}': .*{reason}"):
            decode_attention(**call, implementation=name)
    y = jax.eval_shape(lambda: decode_attention(**call)[0])  # not named, it runs
    assert y.shape == (*call["q"].shape[:2], call["v"].shape[2])


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(q=np.ones((2, 7, 64), BFLOAT16)), r"q: shape \(2, 7, 64\) does not fit keys of shape \(2, 2, 64\)"),
        (dict(q=np.ones((2, 8, 32), BFLOAT16)), r"q: shape \(2, 8, 32\) does not fit keys"),
        (dict(q=np.ones((3, 8, 64), BFLOAT16)), r"q: shape \(3, 8, 64\) does not fit keys"),
        (dict(k=np.ones((2, 4, 64), BFLOAT16)), r"cache: k of shape \(3, 2, 2, 32, 64\), .* for new \(2, 4, 64\)"),
        (dict(v=np.ones((2, 2, 32), BFLOAT16)), r"cache: v of shape \(3, 2, 2, 32, 64\), .* for new \(2, 2, 32\)"),
        (dict(layer=-1), "layer: -1 of 3 layers"),
        (dict(layer=3), "layer: 3 of 3 layers"),
        (dict(lengths=np.array([3])), r"lengths: shape \(1,\), expected \(2,\)"),
        (
            dict(rotary=Rotary(*np.ones((2, 1, 32), np.float32))),
            r"rotary: angles of shapes \(1, 32\) and \(1, 32\) for 2",
        ),
        (dict(rotary=Rotary(*np.ones((2, 2, 33), np.float32))), "for 2 rows and heads of 64"),
        (dict(rotary=Rotary(*np.ones((2, 2, 0), np.float32))), "for 2 rows and heads of 64"),
        (
            dict(norm=QKNorm(np.ones((3, 1)), np.ones((3, 64)), 0.0)),
            r"norm: q of shape \(3, 1\), expected \(3, 64\) or",
        ),
        (dict(norm=QKNorm(np.ones((3, 64)), np.ones((3, 8, 64)), 0.0)), r"norm: k of .*\(3, 2, 64\)"),
        (dict(seen=Seen(sinks=np.ones((3, 1)))), r"sinks: shape \(3, 1\), expected \(3, 8\)"),
        (dict(implementation="cuda"), "'cuda' is no implementation of decode_attention; there are: triton, xla"),
        (dict(implementation="triton"), "decode_attention as 'triton' runs on cuda, the program is made for cpu"),
    ],
)
def test_errors(monkeypatch, changed, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**call_of(**GOOD), **changed})
