"""Rotary frequencies against formulas in float64; the golden cases check them inside models."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.rope import SCALINGS, mla_score_factor, rope_config, rotate, rotation

DIM, THETA, CONTEXT = 16, 5000.0, 4096
BASE = np.array([THETA ** (-2 * i / DIM) for i in range(DIM // 2)])


def config(**settings):
    return rope_config({"rope_theta": THETA} | settings, DIM, CONTEXT)


def test_default_and_linear():
    np.testing.assert_allclose(config().frequencies, BASE, rtol=1e-14)
    np.testing.assert_allclose(config(rope_type="linear", factor=3.0).frequencies, BASE / 3, rtol=1e-14)


def test_dynamic():
    np.testing.assert_allclose(config(rope_type="dynamic", factor=4.0).frequencies, BASE, rtol=1e-14)
    stretched = THETA * 50.0 ** (DIM / (DIM - 2))
    want = [stretched ** (-2 * i / DIM) for i in range(DIM // 2)]
    np.testing.assert_allclose(config(rope_type="dynamic", alpha=50.0).frequencies, want, rtol=1e-14)


@pytest.mark.parametrize("high", [4.0, 1.0])
def test_llama3(high):
    """Wavelengths above original/low are divided, below original/high kept, those between blended."""
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": high}
    got = config(rope_type="llama3", original_max_position_embeddings=512, **settings).frequencies
    for frequency, base in zip(got, BASE, strict=True):
        wavelength = 2 * math.pi / base
        if wavelength < 512 / high:
            want = base
        elif wavelength > 512:
            want = base / 8
        else:
            smooth = (512 / wavelength - 1) / (high - 1)
            want = (1 - smooth) * base / 8 + smooth * base
        assert frequency == pytest.approx(want, rel=1e-12)


def test_yarn():
    got = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
    turns = 256 * BASE / (2 * math.pi)
    assert got.frequencies[0] == BASE[0] and turns[0] > 32  # many turns: kept
    assert got.frequencies[-1] == pytest.approx(BASE[-1] / 4) and turns[-1] < 1  # less than one: interpolated
    assert all(b / 4 <= f <= b for f, b in zip(got.frequencies, BASE, strict=True))
    assert got.factor == pytest.approx(0.1 * math.log(4) + 1)
    both = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=256, mscale=0.7, mscale_all_dim=1.3)
    assert both.factor == pytest.approx((0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1))
    named = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=256, attention_factor=1.5)
    assert named.factor == 1.5
    score = mla_score_factor({"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.3})
    assert score == pytest.approx((0.13 * math.log(4) + 1) ** 2)
    assert mla_score_factor({"rope_type": "default"}) == 1.0


def test_longrope_switches_beyond_the_original_length():
    short, long = list(np.linspace(1, 2, 8)), list(np.linspace(3, 9, 8))
    settings = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 1024}
    rope = config(rope_type="longrope", **settings)
    magnitude = math.sqrt(1 + math.log(4) / math.log(1024))
    positions = jnp.array([[0, 5, 1023]])
    for length, factors in ((1024, short), (1025, long)):
        cos, sin = rotation(rope, positions, length)
        angles = np.array([0, 5, 1023])[:, None] * (BASE / factors)
        np.testing.assert_allclose(cos[0], np.cos(angles) * magnitude, atol=2e-4)  # float32 angles of up to 1023
        np.testing.assert_allclose(sin[0], np.sin(angles) * magnitude, atol=2e-4)
    phi = config(rope_type="longrope", short_mscale=1.1, long_mscale=1.3, **settings)
    assert (phi.factor, phi.long_factor) == (1.1, 1.3)
    with pytest.raises(ValueError, match="long_factor: 3 factors for 8 frequencies"):
        config(rope_type="longrope", **settings | {"long_factor": [1, 2, 3]})


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs(interleaved):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2, DIM + 4)).astype(np.float32)
    rope = config()
    positions = np.array([[0, 1, 7]])
    got = np.asarray(rotate(jnp.asarray(x), rotation(rope, jnp.asarray(positions), 8), interleaved))
    for t, head, i in np.ndindex(3, 2, DIM // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + DIM // 2)
        pair = complex(x[0, t, head, a], x[0, t, head, b]) * np.exp(1j * positions[0, t] * BASE[i])
        assert got[0, t, head, a] == pytest.approx(pair.real, abs=2e-6)
        assert got[0, t, head, b] == pytest.approx(pair.imag, abs=2e-6)
    np.testing.assert_array_equal(got[..., DIM:], x[..., DIM:])  # the rest passes


def test_refusals():
    with pytest.raises(ValueError, match="rope_type: 'spiral'"):
        config(rope_type="spiral")
    with pytest.raises(ValueError, match="unknown keys low_freq_factor"):
        config(rope_type="linear", factor=2.0, low_freq_factor=1.0)
    with pytest.raises(ValueError, match="must be even"):
        rope_config({"rope_theta": 1e4}, 7, 128)
    assert set(SCALINGS) == {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}
