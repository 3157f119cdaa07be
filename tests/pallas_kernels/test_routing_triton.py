"""The GPU's routing kernel: interpreted against XLA's `route`, and lowered for CUDA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routing import triton, xla

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
DEFAULTS = dict(
    score="softmax", renormalize=True, bias=None, groups=1, top_groups=1, scale=1.0, jitter=0.01, forced=None
)

# G, E, k and what differs from the defaults; `bias` is drawn.
CALLS = {
    "plain": (13, 8, 2, {}),
    "one token, k = E": (1, 8, 8, {}),
    "one expert": (3, 1, 1, {}),
    "experts not a power of two": (13, 60, 4, dict(renormalize=False, scale=2.5)),
    "many tokens": (300, 8, 2, {}),
    "more than a warp's width": (5, 256, 10, {}),
    "biased": (13, 60, 5, dict(bias=True, renormalize=False)),
    "sigmoid": (13, 8, 3, dict(score="sigmoid")),
    "sigmoid as it is": (13, 8, 3, dict(score="sigmoid", renormalize=False, scale=2.5)),
    "160 experts in 8 groups": (13, 160, 6, dict(groups=8, top_groups=3, renormalize=False, scale=16.0)),
    "256 experts in 8 groups": (
        9,
        256,
        8,
        dict(score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5),
    ),
    "60 experts in 5 groups": (13, 60, 8, dict(score="sigmoid", bias=True, groups=5, top_groups=3)),
    "60 experts in 5 groups, softmax and bias": (13, 60, 8, dict(bias=True, groups=5, top_groups=3)),
    "groups of one": (13, 8, 2, dict(groups=8, top_groups=3)),
}


def arguments(name, seed=5):
    tokens, experts, k, options = CALLS[name]
    rng = np.random.default_rng(seed)
    options = {**DEFAULTS, **options, "k": k}
    if options["bias"]:
        options["bias"] = rng.standard_normal(experts).astype(np.float32) / 4
    return rng.standard_normal((tokens, experts)).astype(np.float32), options


def check(logits, options, **kernel):
    assert triton.refuse(logits, **options) is None
    got = jax.jit(functools.partial(triton.route, **options, **kernel, interpret=True))(logits)
    want = jax.jit(functools.partial(xla.route, **options))(logits)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_is_xlas_route(name):
    check(*arguments(name))


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("plain", jnp.bfloat16),
        ("sigmoid", jnp.float16),
        ("160 experts in 8 groups", jnp.bfloat16),
        ("60 experts in 5 groups", jnp.bfloat16),
    ],
)
def test_ties_go_to_the_lowest_id_and_narrow_logits_are_read(name, dtype):
    logits, options = arguments(name)
    check(np.round(logits).astype(dtype), options)


@pytest.mark.parametrize("block", [(1, 1), (8, 4), (64, 4)])
def test_any_block_gives_the_same(block):
    check(*arguments("plain"), block=block)


@pytest.mark.parametrize("name", ["experts not a power of two", "biased", "160 experts in 8 groups"])
def test_a_nan_takes_its_row_alone(name):
    logits, options = arguments(name)
    logits[3] = np.nan
    logits[5, 7] = np.nan
    logits[7, ::3] = -np.inf
    check(logits, options)


def test_a_nan_ranks_highest_for_a_sigmoid():
    logits, options = arguments("sigmoid")
    logits[3, [6, 2]] = np.nan
    ids, weights, _ = triton.route(logits, **options, interpret=True)
    others = np.where(np.isnan(logits), -np.inf, logits)
    assert ids[3].tolist() == [2, 6, int(others[3].argmax())]
    assert np.isnan(weights[3]).all() and not np.isnan(np.delete(weights, 3, 0)).any()


def test_weights_that_underflow_are_not_divided_by_zero():
    check(np.full((5, 8), -200, np.float32), arguments("sigmoid")[1])


def test_no_tokens_and_64_bit_types():
    _, options = arguments("plain")
    ids, weights, counts = triton.route(jnp.zeros((0, 8)), **options, interpret=True)
    assert ids.shape == weights.shape == (0, 2) and counts.tolist() == [0] * 8
    logits, options = arguments("60 experts in 5 groups")
    with jax.enable_x64(True):
        check(logits, options)


@pytest.mark.parametrize("name", ["plain", "60 experts in 5 groups"])
def test_the_gradient_is_xlas(name):
    logits, options = arguments(name)
    mix = np.random.default_rng(1).standard_normal((logits.shape[0], options["k"])).astype(np.float32)

    def loss(route, **how):
        return jax.grad(lambda x: (mix * route(x, **options, **how)[1]).sum())(logits)

    np.testing.assert_allclose(loss(triton.route, interpret=True), loss(xla.route), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(score="sparsemixer"), "score 'sparsemixer'"),
        (dict(forced=np.zeros((2, 2), np.int32)), "forced ids"),
        (dict(k=40), "k=40"),
        (dict(groups=64), "64 groups"),
    ],
)
def test_refusals(options, reason):
    assert reason in triton.refuse(jnp.zeros((2, 64)), **{**DEFAULTS, "k": 2, **options})


def test_too_many_experts_are_refused():
    assert "2000 experts" in triton.refuse(jnp.zeros((2, 2000)), **DEFAULTS, k=2)


def h100():
    """A mesh of one H100 that nobody has, where JAX wants to know for what it lowers."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 32, 16384])
@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_lowers_for_cuda(name, tokens, dtype):
    logits, options = arguments(name)
    shape = jax.ShapeDtypeStruct((tokens, logits.shape[1]), dtype)
    with h100():
        lowered = jax.jit(functools.partial(triton.route, **options)).trace(shape).lower(lowering_platforms=("cuda",))
    assert "moe_jax_routing_topk" in lowered.as_text()
