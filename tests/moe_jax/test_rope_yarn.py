"""YaRN's ramp against a transcription of the paper's formulas, and which settings of a config reach the frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.rope import mla_score_factor, rope_config, rotate, rotation

DIM, THETA, ORIGINAL, FACTOR = 64, 10000.0, 4096, 40.0
SETTINGS = {"rope_theta": THETA, "rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": ORIGINAL}


def paper(fast=32.0, slow=1.0, truncate=True):
    """arXiv:2309.00071: pairs with more than `fast` turns are kept, with fewer than `slow` divided, linear between."""
    where = lambda turns: DIM * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))
    first, last = where(fast), where(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    found = []
    for i in range(DIM // 2):
        base = THETA ** (-2 * i / DIM)
        if i <= first:
            found.append(base)
        elif i >= last:
            found.append(base / FACTOR)
        else:
            share = (i - first) / (last - first)
            found.append(base * (1 - share) + base / FACTOR * share)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"truncate": False}, {"beta_fast": 8, "truncate": False}]
)
def test_ramp(options):
    words = {"beta_fast": "fast", "beta_slow": "slow", "truncate": "truncate"}
    want = paper(**{words[key]: value for key, value in options.items()})
    got = rope_config(SETTINGS | options, DIM, ORIGINAL * 40).frequencies
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert want != paper() or not options


def test_defaults_come_from_the_context():
    """Without them, the original length is the context, and the factor the ratio of the two."""
    short = {"rope_theta": THETA, "rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}
    assert rope_config(short, DIM, ORIGINAL * 40) == rope_config(SETTINGS, DIM, ORIGINAL * 40)
    alone = {key: value for key, value in SETTINGS.items() if key != "original_max_position_embeddings"}
    assert rope_config(alone, DIM, ORIGINAL) == rope_config(SETTINGS, DIM, ORIGINAL)


def test_deepseeks_two_magnitudes():
    both = SETTINGS | {"mscale": 0.707, "mscale_all_dim": 0.707}
    assert rope_config(both, DIM, ORIGINAL).factor == 1.0  # it goes into the scores instead, squared
    assert mla_score_factor(both) == pytest.approx((0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-14)
    with pytest.raises(ValueError, match="missing key 'factor'"):
        mla_score_factor({"rope_type": "yarn", "mscale_all_dim": 1.0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": 0.0}, "factor is 0.0, expected a positive number"),
        ({"factor": "4"}, "factor is '4', expected a positive number"),
        ({"beta_fast": -1}, "beta_fast is -1, expected a number that is not negative"),
        ({"truncate": 1}, "truncate is 1, expected true or false"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1, expected a number above 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a number above 1"),
        ({"rope_type": ["yarn"]}, r"rope_type: \['yarn'\] is not supported"),
    ],
)
def test_settings_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        rope_config(SETTINGS | options, DIM, ORIGINAL)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    rng, rope = np.random.default_rng(0), rope_config({"rope_theta": THETA}, 8, 128)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    place = lambda x, at: rotate(x, rotation(rope, jnp.array([[at]]), 128), interleaved)
    scores = [float((place(q, 9 + shift) * place(k, 2 + shift)).sum()) for shift in (0, 1, 40, 100)]
    np.testing.assert_allclose(scores, scores[0], atol=5e-5)
    assert abs(float((place(q, 3) * place(k, 2)).sum()) - scores[0]) > 1e-2
