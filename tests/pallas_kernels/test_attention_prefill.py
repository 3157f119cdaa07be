"""Attention of prompts against plain NumPy in float64, whatever implementation; cuDNN's calls by JAX's own formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.attention import api, cudnn, prefill_attention, xla

HEADS, KV_HEADS, HEAD = 6, 2, 8
LENGTHS = (13, 4, 9)


def draw(queries, keys, value=HEAD, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return (
        make(3, queries, HEADS, HEAD),
        make(3, KV_HEADS, keys, HEAD),
        make(3, KV_HEADS, keys, value),
        jnp.asarray(rng.normal(size=HEADS), jnp.float32),
    )


def plain(q, k, v, start, scale, window=None, chunk=None, sinks=None):
    """One query, one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        at, group = start + t, n // (HEADS // KV_HEADS)
        first = max(0, 0 if window is None else at - window + 1, 0 if chunk is None else at // chunk * chunk)
        powers = np.exp(scale * (k[b, group, first : at + 1] @ q[b, t, n]))
        total = powers.sum() + (0 if sinks is None else np.exp(float(sinks[n])))
        y[b, t, n] = powers / total @ v[b, group, first : at + 1]
    return y


def real(y, start):
    """What stands at real tokens."""
    return np.concatenate([np.asarray(row, np.float64)[: max(0, n - start)] for row, n in zip(y, LENGTHS, strict=True)])


def lowered(function, *operands, platform="cuda"):
    """Text of a program for a GPU; without a described one, which JAX's call of cuDNN refuses."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def formula(monkeypatch):
    """cuDNN's implementations as on a machine that has it, computed by JAX's formula in XLA."""
    monkeypatch.setattr(compat, "no_cudnn", lambda: None)
    monkeypatch.setattr(cudnn, "_attention", functools.partial(jax.nn.dot_product_attention, implementation="xla"))


LIMITS = {
    "none": {},
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "both, traced": {"window": jnp.asarray(5), "chunk": jnp.asarray(6)},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_xla(limits, start, sinks):
    options = LIMITS[limits]
    q, k, v, logits = draw(13 - start, 13 if start == 0 else 16, value=5)
    sinks = logits if sinks else None
    got = prefill_attention(q, k, v, np.array(LENGTHS), jnp.asarray(start), scale=0.3, sinks=sinks, **options)
    want = plain(q, k, v, start, 0.3, sinks=sinks, **{n: int(a) for n, a in options.items()})
    np.testing.assert_allclose(real(got, start), real(want, start), atol=2e-6)


@pytest.mark.parametrize("queries", [12, 13])  # of whole blocks, and not
def test_blocks_of_queries_equal_one_pass(queries, monkeypatch):
    q, k, v, sinks = draw(queries, 13)
    run = lambda: np.asarray(prefill_attention(q, k, v, np.array(LENGTHS), scale=0.3, window=4, sinks=sinks))
    whole = run()
    monkeypatch.setattr(xla, "BLOCK", 3 * HEADS * 13 * 4)
    np.testing.assert_allclose(run(), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["cudnn", "cudnn_masked"])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_calls_of_cudnn(name, window, formula):
    one = api.OPERATION.implementations[name]
    q, k, v, _ = draw(13, 13, dtype=jnp.bfloat16)
    args = q, k, v, jnp.asarray(LENGTHS), 0, 0.3, window, None, None
    assert one.refuse(*args) is None
    want = plain(q, k, v, 0, 0.3, window)
    np.testing.assert_allclose(real(one.run(*args), 0), real(want, 0), atol=0.02)


@pytest.mark.parametrize("limits", LIMITS)
def test_masked_calls_of_cudnn_later_in_a_prompt(limits, formula, monkeypatch):
    options = {"window": None, "chunk": None} | LIMITS[limits]
    q, k, v, _ = draw(8, 16, dtype=jnp.bfloat16)
    args = q, k, v, jnp.asarray(LENGTHS), jnp.asarray(5), 0.3, *options.values(), None
    assert "must be the integer 0" in cudnn.refuse(*args) and cudnn.refuse_masked(*args) is None
    want = plain(q, k, v, 5, 0.3, **{n: int(a) for n, a in LIMITS[limits].items()})
    for pairs in (cudnn._PAIRS, 16 * 3):
        monkeypatch.setattr(cudnn, "_PAIRS", pairs)
        got = np.asarray(cudnn.masked(*args), np.float64)
        np.testing.assert_allclose(real(got, 5), real(want, 5), atol=0.02)
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": jnp.zeros((1, 4, 2, 8), jnp.float32)}, "bfloat16 or all float16"),
        ({"v": jnp.zeros((1, 2, 4, 16), jnp.bfloat16)}, "heads of 8 and 16"),
        ({"sinks": jnp.zeros(2)}, "sinks"),
        ({"scale": jnp.ones(())}, "scale"),
        ({"chunk": 4}, "chunk must be None"),
        ({"window": jnp.asarray(3)}, "an integer or None"),
        ({"start": jnp.asarray(0)}, "must be the integer 0"),
    ],
)
def test_what_cudnn_refuses(change, words, formula):
    small = jnp.zeros((1, 2, 4, 8), jnp.bfloat16)
    given = {
        "q": jnp.zeros((1, 4, 2, 8), jnp.bfloat16),
        "k": small,
        "v": small,
        "lengths": jnp.asarray([4]),
        "start": 0,
    }
    given |= {"start": 0, "scale": 1.0, "window": None, "chunk": None, "sinks": None}
    assert cudnn.refuse(**given) is None
    assert words in cudnn.refuse(**given | change)
    options = {n: a for n, a in (given | change).items() if n not in ("q", "k", "v", "lengths", "start")}
    operands = [(given | change)[n] for n in ("q", "k", "v", "lengths", "start")]
    with pytest.raises(ValueError, match=words):
        prefill_attention(*operands, **options, implementation="cudnn")


def test_without_the_plugin_xla_runs():
    half = draw(13, 13, dtype=jnp.bfloat16)[:3]
    run = lambda *a, **options: prefill_attention(*a, jnp.asarray(LENGTHS), scale=0.3, **options)
    assert "__cudnn" not in lowered(run, *half)
    with pytest.raises(ValueError, match="CUDA plugin is not installed"):
        run(*half, implementation="cudnn")


def test_programs_for_cuda_hold_cudnn(monkeypatch):
    """Made on a CPU, JAX told that there is cuDNN: a causal call, a masked one, and none on a CPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(compat, "no_cudnn", lambda: None)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v = draw(16, 16, dtype=jnp.bfloat16)[:3]
    lengths = jnp.asarray(LENGTHS)
    whole = lambda q, k, v: prefill_attention(q, k, v, lengths, scale=0.3, window=4)
    text = lowered(whole, q, k, v)
    assert "__cudnn$fmhaSoftmax" in text and "PADDING_CAUSAL" in text
    assert "stablehlo.dot_general" not in text  # no other branch beside it
    assert "__cudnn" not in lowered(whole, q, k, v, platform="cpu")
    later = lambda q, k, v, start: prefill_attention(q, k, v, lengths, start, scale=0.3)
    assert "__cudnn$fmhaScaleBiasSoftmax" in lowered(later, q[:, :8], k, v, jnp.int32(3))
    assert "__cudnn" not in lowered(later, *(a.astype(jnp.float32) for a in (q[:, :8], k, v)), jnp.int32(3))


def test_shapes_that_do_not_fit():
    q, k, v, _ = draw(4, 6)
    for operands in ((q, k, v[:, :, :5]), (q[:2], k, v), (q[:, :, :5], k, v)):
        with pytest.raises(ValueError, match=r"expected \[B, T, N, H\]"):
            api.prefill_attention.__wrapped__(*operands, np.array(LENGTHS), scale=1.0)
    with pytest.raises(ValueError, match="4 queries from position 3 on, but 6 keys"):
        prefill_attention(q, k, v, np.array(LENGTHS), 3, scale=1.0)
