"""`route_tokens`: the GPU's kernels interpreted against XLA's product and `route`, what is chosen, and lowering."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from cuda import lowered

from pallas_kernels import route, route_tokens
from pallas_kernels.routing import router_triton
from pallas_kernels.routing.api import TOKENS_OPERATION

BFLOAT16 = ml_dtypes.bfloat16
OPTIONS = dict(score="softmax", renormalize=True, bias=None, groups=1, top_groups=1, scale=1.0)
KERNELS = ("moe_jax_routing_product", "moe_jax_routing_topk")

# G, D, E, k and what differs from the defaults; `bias` is drawn.
CALLS = {
    "one token": (1, 192, 8, 2, {}),
    "one expert": (3, 64, 1, 1, {}),
    "60 experts": (5, 200, 60, 4, dict(renormalize=False, scale=2.5)),
    "sigmoid and bias": (5, 192, 60, 6, dict(score="sigmoid", bias=True)),
    "groups": (33, 320, 128, 8, dict(score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5)),
    "groups, softmax": (33, 64, 60, 3, dict(groups=5, top_groups=2, renormalize=False)),
    "64 tokens": (64, 128, 8, 8, {}),
}
NAMED = [
    pytest.param(call, id=name, marks=pytest.mark.slow if name in ("one expert", "64 tokens") else ())
    for name, call in CALLS.items()
]
SLOW = [
    pytest.param((tokens, width, experts, 2, options), marks=pytest.mark.slow)
    for tokens in (1, 5, 33)
    for width, experts in ((64, 8), (1000, 60), (2048, 128))
    for options in ({}, dict(score="sigmoid", bias=True), dict(groups=4, top_groups=2, renormalize=False))
]


def make(call, dtype=BFLOAT16):
    """`x`, router weight, k and options."""
    tokens, width, experts, k, options = call
    rng = np.random.default_rng(3)
    options = {**OPTIONS, **options}
    if options["bias"]:
        options["bias"] = rng.standard_normal(experts).astype(np.float32) / 4
    x = rng.standard_normal((tokens, width)).astype(dtype)
    return x, (rng.standard_normal((width, experts)) / np.sqrt(width)).astype(dtype), k, options


def run(implementation, x, router_weight, k, options):
    call = functools.partial(route_tokens, k=k, **options, implementation=implementation)
    return [np.asarray(a) for a in jax.jit(call)(x, router_weight)]


def check(x, router_weight, k, options):
    got, want = (run(name, x, router_weight, k, options) for name in ("triton_interpreted", "xla"))
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    np.testing.assert_array_equal(got[2], want[2])
    return got


@pytest.mark.parametrize("call", NAMED + SLOW)
def test_the_kernels_are_xlas(call):
    check(*make(call))


def test_in_float16_against_route():
    x, router_weight, k, options = make(CALLS["sigmoid and bias"], np.float16)
    got = check(x, router_weight, k, options)
    logits = x.astype(np.float64) @ router_weight.astype(np.float64)
    want = route(jnp.asarray(logits, jnp.float32), k, **options)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    np.testing.assert_array_equal(got[2], want[2])


def test_ties_go_to_the_lowest_id():
    x, router_weight, k, options = make(CALLS["60 experts"])
    ids, *_ = check(x, np.repeat(router_weight[:, :20], 3, axis=1), k, options)
    assert (ids % 3 == [0, 1, 2, 0]).all()


def test_a_nan_takes_its_row_alone():
    x, router_weight, k, options = make(CALLS["60 experts"])
    clean = run("triton_interpreted", x, router_weight, k, options)
    x[2, 7] = np.nan
    got = run("triton_interpreted", x, router_weight, k, options)
    others = np.arange(len(x)) != 2
    for one, other in zip(got[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(one[others], other[others])
    assert np.isnan(got[1][2]).all() and got[0][2].tolist() == [0, 1, 2, 3]


def test_the_batch_does_not_change_a_tokens_bits():
    x, router_weight, k, options = make(CALLS["groups"])
    whole = run("triton_interpreted", x, router_weight, k, options)
    got = run("triton_interpreted", x[28:], router_weight, k, options)
    for one, other in zip(got[:2], whole[:2], strict=True):
        np.testing.assert_array_equal(one, other[28:])


def test_no_tokens():
    ids, weights, counts = run("triton_interpreted", *make((0, 64, 8, 2, {})))
    assert ids.shape == weights.shape == (0, 2) and counts.tolist() == [0] * 8


@pytest.mark.parametrize("name", ["60 experts", "sigmoid and bias", pytest.param("groups", marks=pytest.mark.slow)])
def test_the_gradients_are_xlas(name):
    x, router_weight, k, options = make(CALLS[name])
    mix = np.random.default_rng(1).standard_normal((len(x), k)).astype(np.float32)

    def gradients(implementation):
        def loss(x, w):
            return (mix * route_tokens(x, w, k, **options, implementation=implementation)[1]).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, router_weight)

    for one, other in zip(gradients("triton_interpreted"), gradients("xla"), strict=True):
        assert one.dtype == other.dtype == BFLOAT16
        one, other = (np.asarray(a).astype(np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-4 * np.abs(other).max())  # once rounded otherwise
        assert np.abs(other).max() > 0


@pytest.mark.parametrize(
    "shape, dtypes, options, reason",
    [
        ((65, 64), (BFLOAT16, BFLOAT16), {}, "65 tokens, at most 64"),
        ((8, 64), (np.float32, np.float32), {}, "must both be bfloat16 or both float16, got float32 and float32"),
        ((8, 64), (BFLOAT16, np.float32), {}, "got bfloat16 and float32"),
        ((8, 64), (np.float16, BFLOAT16), {}, "got float16 and bfloat16"),
        ((8, 64), (BFLOAT16, BFLOAT16), dict(score="sparsemixer"), "score 'sparsemixer'"),
    ],
)
def test_refusals(shape, dtypes, options, reason):
    x, router_weight = jnp.ones(shape, dtypes[0]), jnp.ones((shape[1], 8), dtypes[1])
    options = {**OPTIONS, **options}
    assert reason in router_triton.refuse(x, router_weight, 2, **options)
    for name in ("triton", "triton_interpreted"):
        with pytest.raises(ValueError, match=f"route_tokens cannot run as '{name}': .*{reason}"):
            route_tokens(x, router_weight, 2, **options, implementation=name)
    assert TOKENS_OPERATION.chosen("cuda", x, router_weight, 2, *options.values()) == "xla"
    assert route_tokens(x, router_weight, 2, **options)[0].shape == (shape[0], 2)  # not named, it runs


def test_the_platform_is_refused_where_it_is_named():
    x, router_weight, k, options = make(CALLS["one token"])
    with pytest.raises(ValueError, match="route_tokens as 'triton' runs on cuda, the program is made for cpu"):
        run("triton", x, router_weight, k, options)
    with pytest.raises(ValueError, match="'Triton' is no implementation of route_tokens; there are: triton, xla"):
        run("Triton", x, router_weight, k, options)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(x=np.ones(64, BFLOAT16)), r"router_weight: shape \(64, 8\), expected \[D, E\] for x of shape \(64,\)"),
        (dict(router_weight=np.ones((32, 8), BFLOAT16)), r"router_weight: shape \(32, 8\)"),
        (dict(k=9), "k: 9 experts per token out of 8"),
        (dict(score="relu"), "score: 'relu'"),
        (dict(groups=3), "groups: 1 of 3 groups do not fit 8 experts"),
        (dict(bias=np.ones(7, np.float32)), r"bias: shape \(7,\), expected \(8,\)"),
    ],
)
def test_errors(monkeypatch, changed, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    with pytest.raises(ValueError, match=message):
        route_tokens(**{**dict(x=np.ones((3, 64), BFLOAT16), router_weight=np.ones((64, 8), BFLOAT16), k=2), **changed})


def test_what_is_chosen():
    def chosen(platform, tokens, dtype):
        x, router_weight = jax.ShapeDtypeStruct((tokens, 64), dtype), jax.ShapeDtypeStruct((64, 8), dtype)
        return TOKENS_OPERATION.chosen(platform, x, router_weight, 2, *OPTIONS.values())

    assert [chosen("cuda", n, BFLOAT16) for n in (1, 64, 65)] == ["triton", "triton", "xla"]
    assert [chosen("cuda", 8, dtype) for dtype in (np.float16, np.float32)] == ["triton", "xla"]
    assert [chosen(platform, 8, BFLOAT16) for platform in ("cpu", "tpu")] == ["xla", "xla"]


def text(tokens, width, experts, k, dtype=BFLOAT16, platform="cuda", **options):
    call = functools.partial(route_tokens, k=k, **options)
    shapes = jax.ShapeDtypeStruct((tokens, width), dtype), jax.ShapeDtypeStruct((width, experts), dtype)
    return lowered(call, *shapes, platform=platform)


@pytest.mark.parametrize(
    "tokens, width, experts, k",
    [
        (1, 4096, 8, 2),
        (32, 2048, 128, 8),
        (64, 7168, 256, 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, 2880, 32, 4), (8, 2048, 64, 8), (64, 7168, 512, 10), (5, 100, 60, 4), (64, 64, 1, 1)]
        ),
    ],
)
def test_the_kernels_lower_for_cuda(tokens, width, experts, k):
    program = text(tokens, width, experts, k)
    assert all(name in program for name in KERNELS)


def test_other_programs_hold_no_product():
    assert not any(name in text(8, 64, 8, 2, platform="cpu") for name in KERNELS)
    many = text(65, 64, 8, 2)
    assert KERNELS[0] not in many and KERNELS[1] in many  # XLA's product, then the GPU's routing
    assert KERNELS[0] not in text(8, 64, 8, 2, dtype=np.float32)


def test_they_lower_with_64_bit_types():
    with jax.enable_x64(True):
        assert all(name in text(8, 192, 128, 4) for name in KERNELS)
