"""`SelfAttention` by itself against the float64 loops: heads, positions, masks, earlier keys, probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepspeed_oracle import attention as oracle_attention
from deepspeed_oracle import random_weights
from flax import nnx

from moe_jax import MoEInferenceConfig
from moe_jax.convert.deepspeed import quantize_groups
from moe_jax.deepspeed import SelfAttention
from moe_jax.deepspeed.attention import mask_bias

SMALL = dict(hidden_size=16, heads=4)
LEFT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {
    "plain": {},
    "Bloom": dict(bigscience_bloom=True),
    "Bloom, six heads": dict(bigscience_bloom=True, hidden_size=18, heads=6, triangular_masking=False),
    "two key heads": dict(num_kv=2, rotary_dim=2, rotate_half=True),
    "three key heads of six": dict(num_kv=3, heads=6, hidden_size=24, rotary_dim=4),
    "halves rotated": dict(rotary_dim=4, rotate_half=True, rope_theta=50.0),
    "pairs rotated": dict(rotary_dim=4, rotate_every_two=True),
    "a window of one": dict(local_attention=True, window_size=1),
    "a window": dict(local_attention=True, window_size=2),
    "no triangle": dict(triangular_masking=False),
    "muP": dict(use_mup=True),
    "no scaling": dict(scale_attention=False),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def built(seed=1, layer_index=0, **options):
    """A module, its options and its weights."""
    options = SMALL | options
    weights = random_weights(options, seed)
    own = {name.removeprefix("attention."): w for name, w in weights.items() if name.startswith("attention.")}
    return SelfAttention(MoEInferenceConfig(**options), layer_index, own), options, own


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_prompt_and_what_follows_it(name):
    attention, options, weights = built(**OPTIONS[name])
    x = numbers(2, 6, options["hidden_size"])
    want, present, chances = oracle_attention(options, weights, x[:, :5])
    y, cache, got = attention(x[:, :5], get_present=True, output_attentions=True)
    close(y, want)
    close(cache, present)
    close(got, chances)
    want, present, chances = oracle_attention(options, weights, x[:, 5:], past=present)
    y, cache, got = attention(x[:, 5:], layer_past=cache, get_present=True, output_attentions=True)
    close(y, want)
    close(cache, present)
    close(got, chances)


@pytest.mark.parametrize("index", [0, 4])
def test_the_layers_index_divides_the_scores_where_asked(index):
    attention, options, weights = built(scale_attn_by_inverse_layer_idx=True, layer_index=index)
    x = numbers(2, 5, 16)
    want = oracle_attention(options, weights, x, layer_index=index)
    close(attention(x), want[0])
    plain, _, _ = built(layer_index=index)
    close(plain(x), oracle_attention(SMALL, weights, x, layer_index=index)[0])


MASKS = {
    "a row per sequence": np.array([[1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]),
    "bools for all heads": np.array([[[[True, False, True, True, True]]], [[[True, True, False, False, False]]]]),
    "bools for each head": np.random.default_rng(1).random((2, 4, 5, 5)) < 0.5,
    "one for all sequences": np.array([[[[1, 0, 1, 1, 0]]]], np.int8),
    "added": 3 * numbers(2, 5, seed=3),
    "added for each query": 3 * numbers(1, 1, 5, 5, seed=4),
    "added for each head": 3 * numbers(2, 4, 1, 5, seed=5),
}
MASKS["bools for each head"][..., np.arange(5), np.arange(5)] = True


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    attention, options, weights = built()
    x, mask = numbers(2, 5, 16), MASKS[name]
    want, _, chances = oracle_attention(options, weights, x, mask=mask)
    y, got = attention(x, mask, output_attentions=True)
    close(y, want)
    close(got, chances)
    inverted, _, _ = built(invert_mask=False)
    close(inverted(x, mask if mask.dtype.kind == "f" else 1 - mask.astype(np.int32)), want)


def test_queries_that_see_padding_only_weigh_it_as_if_it_were_real():
    attention, options, weights = built()
    x = numbers(2, 5, 16)
    _, got = attention(x, LEFT, output_attentions=True)
    _, _, chances = oracle_attention(options, weights, x, mask=LEFT)
    close(got[1], chances[1])
    close(got[0, :, 2:], chances[0, :, 2:])
    # a score of s - 10000 is rounded to 2^-10 in float32, by upstream as well
    np.testing.assert_allclose(got[0, :, :2], chances[0, :, :2], atol=2**-10)
    assert not np.triu(got, 1).any()


@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -np.inf, -1e31])
def test_a_very_low_additive_mask_shows_no_later_token(lowest):
    attention, _, _ = built()
    x, mask = numbers(2, 5, 16), np.where(LEFT == 1, 0.0, lowest).astype(np.float32)
    y, chances = attention(x, mask, output_attentions=True)
    assert not np.triu(chances, 1).any() and not np.asarray(chances[0, :, 2:, :2]).any()
    want = attention(x, LEFT)
    close(y[0, 2:], want[0, 2:])
    close(y[1], want[1])
    close(chances[0, :, :2, :2], np.broadcast_to([[1, 0], [0.5, 0.5]], (4, 2, 2)))


@pytest.mark.parametrize("kind", [int, bool, float])
@pytest.mark.parametrize("width", [1, 5])
def test_a_mask_of_the_new_tokens_says_nothing_of_earlier_ones(width, kind):
    attention, options, weights = built()
    x, new = numbers(2, 5, 16), np.array([[1], [0]])
    mask = new if width == 1 else np.concatenate([np.ones((2, 4), int), new], 1)
    if kind is float:
        mask = np.where(mask == 1, 0.0, -10000.0).astype(np.float32)
    _, past = attention(x[:, :4], get_present=True)
    want, _, _ = oracle_attention(options, weights, x[:, 4:], past=past, mask=new)
    close(attention(x[:, 4:], mask.astype(np.float32 if kind is float else kind), past), want)


def test_the_addends_of_a_mask():
    shape = 2, 4, 3, 5
    assert mask_bias(None, shape) is None
    rows = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    bias = mask_bias(rows, shape)
    assert bias.shape == (2, 1, 1, 5) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[:, 0, 0], (1 - rows) * -10000.0)
    np.testing.assert_array_equal(mask_bias(rows == 1, shape), bias)
    np.testing.assert_array_equal(mask_bias(1 - rows, shape, invert=False), bias)
    np.testing.assert_array_equal(jax.jit(lambda m: mask_bias(m, shape))(rows), bias)
    new = mask_bias(np.array([[0, 1, 1], [1, 0, 1]]), shape)
    np.testing.assert_array_equal(new[:, 0, 0], [[0, 0, -10000.0, 0, 0], [0, 0, 0, -10000.0, 0]])
    floats = numbers(1, 4, 3, 5)
    np.testing.assert_array_equal(mask_bias(floats, shape), np.broadcast_to(floats, shape))


@pytest.mark.parametrize(
    ("shape", "value"),
    [((2, 4), 1), ((3, 5), 1), ((2, 3, 1, 5), 1), ((2, 1, 2, 5), 1), ((2, 1, 5), 1), ((5,), 1), ((2, 5), -1)],
)
def test_other_masks_are_refused(shape, value):
    with pytest.raises(ValueError, match=r"input_mask: (shape .*2 rows, 4 heads, 3 queries, 5 keys|integers other)"):
        mask_bias(np.full(shape, value), (2, 4, 3, 5))


@pytest.mark.parametrize("options", [dict(num_kv=2), dict(bigscience_bloom=True)])
def test_int8_weights_are_deepspeeds(options):
    exact, options, weights = built(**options)
    attention = SelfAttention(MoEInferenceConfig(**options, q_int8=True, quantize_groups=2), 0, weights)
    near = dict(weights)
    for name in ("attn_qkvw", "attn_ow"):
        q, scale = quantize_groups(weights[name].T, 2)
        near[name] = (q.reshape(2, -1) / scale).reshape(q.shape).T.astype(np.float32)
    x = numbers(2, 5, 16)
    assert attention.weights["attention"]["q"][...].values.dtype == jnp.int8
    close(attention(x), SelfAttention(exact.config, 0, near)(x))
    assert np.abs(attention(x) - exact(x)).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype):
    attention, options, weights = built(bf16=True)
    x = jnp.asarray(numbers(2, 5, 16), dtype)
    y, present = attention(x, get_present=True)
    assert y.dtype == x.dtype and present[0].dtype == jnp.bfloat16
    want, _, _ = oracle_attention(options, weights, x)
    assert np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2)) < 4 * float(jnp.finfo(jnp.bfloat16).eps)


def test_what_does_not_fit_is_refused():
    attention, options, weights = built(max_out_tokens=6)
    for x, message in (
        (np.ones((2, 5, 15), np.float32), r"x: .*expected floats \[B, T, 16\]"),
        (np.ones((5, 16), np.float32), "x: "),
        (np.ones((2, 5, 16), np.int32), "x: int32"),
        (np.ones((2, 7, 16), np.float32), "7 new tokens exceed max_out_tokens 6"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(x)
    config = MoEInferenceConfig(**options)
    for given, message in (
        (dict(weights=weights | {"attn_ob": np.ones(15)}), r"attn_ob: shape \(15,\), expected \(16,\)"),
        (dict(weights={"attn_ob": np.ones(16)}), "missing .*attn_ow"),
        (dict(weights=weights | {"attn_zb": np.ones(16)}), "unknown .*attn_zb"),
        (dict(weights=weights | {"attn_ow": np.ones((16, 16), np.int8)}), "no floats in .*attn_ow"),
        (dict(), "weights, rngs"),
        (dict(weights=weights, rngs=nnx.Rngs(0)), "weights, rngs"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfAttention(config, **given)
    with pytest.raises(ValueError, match="num_kv: 2 beside heads 4"):
        SelfAttention(MoEInferenceConfig(**SMALL, bigscience_bloom=True, num_kv=2), rngs=nnx.Rngs(0))
