"""Latent attention of one token and the products around it: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from cuda import lowered
from expert_oracle import error

from pallas_kernels.attention.decode import Rotary
from pallas_kernels.attention.latent import OPERATION, decode_latent_attention
from pallas_kernels.attention.latent_products import OPERATION as PRODUCTS
from pallas_kernels.attention.latent_products import absorb, latent_values
from pallas_kernels.linear import RMSNorm
from pallas_kernels.quantized import dense, is_quantized, quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16, LAYERS, LAYER, EPSILON = ml_dtypes.bfloat16, 3, 1, 1e-2
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform]
each = pytest.mark.parametrize("implementation", ANYWHERE)


def turned(x, rotary, row, rounded):
    """`x [..., R]` rotated."""
    if rotary is None:
        return x
    cos, sin = (np.asarray(a)[row].astype(x.dtype) for a in (rotary.cos, rotary.sin))
    y, half = x.copy(), len(cos)
    for i in range(half):
        low, high = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + half)
        y[..., low] = x[..., low] * cos[i] - x[..., high] * sin[i]
        y[..., high] = x[..., high] * cos[i] + x[..., low] * sin[i]
    return rounded(y)


def oracle(absorbed, q, new, cache, lengths, *, scale, norm, rotary, narrow=None):
    """Output and new entries in float64; or in float32, rounded to `narrow` where plain operations would."""
    wide = np.float64 if narrow is None else np.float32
    rounded = lambda a: a if narrow is None else a.astype(narrow).astype(wide)
    absorbed, q, new = (np.asarray(a).astype(wide) for a in (absorbed, q, new))
    latents, rotaries = (np.asarray(dense(cache[n], jnp.float32))[LAYER].astype(wide) for n in ("latent", "k_rotary"))
    rank, width = latents.shape[-1], rotaries.shape[-1]
    y, entries = np.zeros_like(absorbed), np.zeros_like(new)
    for row, position in enumerate(np.asarray(lengths)):
        latent = new[row, :rank]
        if norm is not None:
            share = np.sqrt(np.mean(latent**2) + wide(EPSILON))
            latent = rounded(latent / share * np.asarray(norm.scale)[LAYER].astype(wide))
        entries[row] = np.concatenate([latent, turned(new[row, rank:], rotary, row, rounded)])
        keys = np.concatenate([latents[row, :position], entries[row, None, :rank]])
        others = np.concatenate([rotaries[row, :position], entries[row, None, rank:]])
        scores = absorbed[row] @ keys.T + turned(q[row, :, -width:], rotary, row, rounded) @ others.T
        powers = np.exp((scores - scores.max(1, keepdims=True)) * wide(scale))
        y[row] = rounded(powers / powers.sum(1, keepdims=True)) @ keys
    return rounded(y), entries


# B, N, H, Z, R, S, tokens in each row, and what else there is.
CASES = {
    "few heads, unequal rows": (3, 4, 24, 32, 8, 40, [0, 39, 17], dict()),
    "odd heads": (2, 20, 16, 48, 16, 130, [129, 3], dict(interleaved=True, dtype=np.float16)),
    "as it comes": (1, 3, 8, 16, 8, 20, [7], dict(plain=True)),
    "two blocks of heads": (1, 72, 12, 32, 4, 70, [66], dict(interleaved=True)),
    "in parts": (2, 16, 24, 64, 8, 700, [650, 40], dict()),
    "int8": (2, 20, 24, 32, 8, 300, [299, 64], dict(int8=True)),
}


def make(
    batch, heads, size, rank, width, columns, lengths, *, dtype=BFLOAT16, interleaved=False, plain=False, int8=False
):
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    cache = {"latent": draw(LAYERS, batch, columns, rank), "k_rotary": draw(LAYERS, batch, columns, width)}
    for stack in cache.values():
        stack[[0, 2]] *= 50
        for row, length in enumerate(lengths):
            stack[LAYER, row, length:] = 1000
    angles = (rng.random((batch, width // 2)) * 6).astype(np.float32)
    return dict(
        absorbed=draw(batch, heads, rank), q=draw(batch, heads, size), new=draw(batch, rank + width),
        cache={n: quantize(s) for n, s in cache.items()} if int8 else cache,
        lengths=np.array(lengths, np.int32), scale=(rank + width) ** -0.5,
        norm=None if plain else RMSNorm(draw(LAYERS, rank), EPSILON, LAYER),
        rotary=None if plain else Rotary(np.cos(angles), np.sin(angles), interleaved),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def run(call, layer, scale, implementation):
    if call["norm"] is not None:
        call = {**call, "norm": RMSNorm(call["norm"].scale, EPSILON, layer)}
    return decode_latent_attention(**call, layer=layer, scale=scale, implementation=implementation)


def attend(call, implementation):
    return run({k: v for k, v in call.items() if k != "scale"}, np.int32(LAYER), call["scale"], implementation)


def made(name):
    *shape, options = CASES[name]
    return make(*shape, **options)


@each
@pytest.mark.parametrize("name", CASES)
def test_values(name, implementation):
    call = made(name)
    y, cache = attend(call, implementation)
    want, entries = oracle(**call)
    plain, _ = oracle(**call, narrow=call["q"].dtype)
    int8 = is_quantized(cache["latent"])
    assert y.dtype == call["q"].dtype and y.shape == want.shape
    assert error(np.asarray(y), want) <= 1.2 * error(plain, want) + 0.01 * int8  # its own entry is seen in int8
    for part, new in zip(("latent", "k_rotary"), np.split(entries, [call["absorbed"].shape[-1]], -1), strict=True):
        for before, after in zip(*map(jax.tree.leaves, (call["cache"][part], cache[part])), strict=True):
            want, after = np.array(before), np.asarray(after)
            for row, length in enumerate(call["lengths"]):
                want[LAYER, row, length] = after[LAYER, row, length]
            np.testing.assert_array_equal(after, want)
        for row, length in enumerate(call["lengths"]):
            entry = np.asarray(dense(cache[part], jnp.float32))[LAYER, row, length]
            assert np.abs(entry - new[row]).max() <= 0.012 * np.abs(new[row]).max()


@each
def test_full_and_poisoned_rows(implementation):
    call = made("few heads, unequal rows")
    clean, _ = attend(call, implementation)
    call["lengths"] = np.array([0, 40, 17], np.int32)
    call["new"] = call["new"].copy()
    call["new"][2, 0] = np.nan
    got, cache = attend(call, implementation)
    np.testing.assert_array_equal(got[0], clean[0])
    assert np.isnan(np.asarray(got[2], np.float32)).all()
    for part in cache:
        np.testing.assert_array_equal(cache[part][LAYER, 1], call["cache"][part][LAYER, 1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_a_donated_cache_is_not_copied(rows, int8):
    layers, columns, rank = 32, 256, 32
    stack = jax.ShapeDtypeStruct((layers, rows, columns, rank), jnp.float32)
    stack = jax.eval_shape(quantize, stack) if int8 else stack
    new = jax.ShapeDtypeStruct((rows, 2, rank), jnp.float32)

    def tokens(q, cache, lengths):
        def layer(i, carry):
            x, cache = carry
            new = x.reshape(rows, 2 * rank)
            return decode_latent_attention(x, x, new, cache, lengths, layer=i, scale=0.1)

        return jax.lax.fori_loop(0, layers, layer, (q, cache))

    lengths, cache = jax.ShapeDtypeStruct((rows,), jnp.int32), {"latent": stack, "k_rotary": stack}
    program = jax.jit(tokens, donate_argnums=1).lower(new, cache, lengths).compile()
    leaves = jax.tree.leaves(stack)
    assert program.memory_analysis().alias_size_in_bytes >= 2 * sum(a.size * a.dtype.itemsize for a in leaves)
    assert program.memory_analysis().temp_size_in_bytes < leaves[0].size * leaves[0].dtype.itemsize


def random(*shape, dtype=BFLOAT16):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("implementation", ["xla", "triton_interpreted"])
@pytest.mark.parametrize("rows, form", [(1, None), (1, "rows"), (5, None), (5, "groups"), (70, None)])
def test_products(rows, form, implementation):
    heads, plain, width, rank = 3, 24, 40, 32
    dtype = np.float32 if implementation == "xla" else BFLOAT16  # whose products XLA rounds on a CPU
    q, mixed = random(rows, heads, plain + 8, dtype=dtype), random(rows, heads, rank, dtype=dtype)
    kv_up = random(LAYERS, heads, plain + width, rank, dtype=dtype)
    if form:
        kv_up = quantize(kv_up, group_size=None if form == "rows" else 16)
    wide = np.asarray(dense(kv_up, dtype))[LAYER].astype(np.float64)
    for run, x, want in (
        (absorb, q, np.einsum("bnh,nhz->bnz", q[..., :plain].astype(np.float64), wide[:, :plain])),
        (latent_values, mixed, np.einsum("bnz,nvz->bnv", mixed.astype(np.float64), wide[:, plain:])),
    ):
        got = run(x, kv_up, plain, layer=LAYER, implementation=implementation)
        bound = 1e-6 * np.abs(want).max() if dtype == np.float32 else 1.2 * error(want.astype(dtype), want)
        assert got.dtype == dtype and error(np.asarray(got), want) <= bound


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("heads, batch, columns", [(16, 1, 4096), (128, 32, 32768), (64, 3, 240)])
def test_lowered_for_cuda(heads, batch, columns, monkeypatch):
    """DeepSeek's shapes, in bfloat16 and int8."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    turn = array(batch, 32, dtype=jnp.float32)
    cache = {"latent": array(4, batch, columns, 512), "k_rotary": array(4, batch, columns, 64)}
    for stored in (cache, jax.eval_shape(lambda c: {n: quantize(s) for n, s in c.items()}, cache)):
        call = dict(
            absorbed=array(batch, heads, 512), q=array(batch, heads, 192), new=array(batch, 576), cache=stored,
            lengths=array(batch, dtype=jnp.int32), norm=RMSNorm(array(4, 512), 1e-6, array(dtype=jnp.int32)),
            rotary=Rotary(turn, turn, True),
        )  # fmt: skip
        text = lowered(lambda call: decode_latent_attention(**call, layer=1, scale=0.1), call)
        assert '"moe_jax_attention_latent"' in text and ('"moe_jax_attention_join"' in text) == (columns > 240)
    kv_up = array(4, heads, 256, 512)
    products = lambda q, mixed, w: (absorb(q, w, 128, layer=1), latent_values(mixed, w, 128, layer=1))
    for weights in (kv_up, jax.eval_shape(quantize, kv_up)):
        text = lowered(products, call["q"], call["absorbed"], weights)
        assert text.count('"moe_jax_latent_products"') == 2
    assert "dynamic_slice" not in text


def test_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call = made("as it comes")
    for changed, message in (
        (dict(q=call["q"][..., :4]), "8 rotary components"),
        (dict(new=call["new"][:, :5]), r"new: shape \(1, 5\), expected \(1, 24\)"),
        (dict(absorbed=call["absorbed"][..., :8]), "latent of shape .* does not fit"),
        (dict(norm=RMSNorm(np.ones(16), 0.0)), r"norm: scale of shape \(16,\)"),
        (dict(lengths=np.array([3, 4])), r"lengths: shape \(2,\), expected \(1,\)"),
        (dict(rotary=Rotary(*np.ones((2, 1, 5), np.float32))), "rotary: angles .* for 1 rows and heads of 8"),
        (dict(implementation="triton"), "made for cpu"),
        (dict(implementation="triton_interpreted", q=call["q"].astype(np.float32)), "got bfloat16, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_latent_attention(**{**call, **changed}, layer=0)
    with pytest.raises(ValueError, match="kv_up: shape"):
        absorb(call["q"], np.ones((1, 4, 8, 8)), 4, layer=0)
    with pytest.raises(ValueError, match="mixed: shape"):
        latent_values(call["q"], np.ones((1, 3, 8, 16)), 4, layer=0)
    assert PRODUCTS.chosen("cuda", jnp.ones((1, 3, 8)), jnp.ones((1, 3, 8, 8)), 0, 4, False) == "xla"
