"""The TPU's routing and plan in JAX's simulation: blocks, groups and gradients against XLA's. Every rule against
its oracle: test_routing, test_plan. By the real compiler: test_tpu_compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated_tpu import without_races  # noqa: F401  a fixture for all tests
from test_plan import check as check_against_oracle
from test_plan import host
from test_routing_triton import CALLS, DEFAULTS, arguments

from pallas_kernels.plan import tpu as plan_tpu
from pallas_kernels.plan.api import OPERATION as PLAN
from pallas_kernels.routing import tpu, xla
from pallas_kernels.routing.api import OPERATION


def check(logits, options):
    order = ("k", "score", "renormalize", "bias", "groups", "top_groups", "scale", "jitter", "forced")
    given = [options[name] for name in order]
    assert tpu.refuse(logits, *given) is None
    got = jax.jit(lambda logits: tpu.interpreted(logits, *given))(logits)
    want = jax.jit(lambda logits: xla.route(logits, *given))(logits)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_is_xlas_route(name, monkeypatch):
    monkeypatch.setattr(tpu, "_BLOCK", 1)  # blocks of 32 tokens, of which the last one is not full
    check(*arguments(name))


@pytest.mark.parametrize("name", ["plain", "160 experts in 8 groups"])
def test_ties_go_to_the_lowest_id_and_narrow_logits_are_read(name):
    logits, options = arguments(name)
    check(np.round(logits).astype(jnp.bfloat16), options)


@pytest.mark.parametrize("name", ["biased", "160 experts in 8 groups"])
def test_a_nan_takes_its_row_alone(name):
    logits, options = arguments(name)
    logits[3], logits[5, 7] = np.nan, np.nan
    logits[7, ::3] = -np.inf
    check(logits, options)


@pytest.mark.parametrize("name", ["plain", "60 experts in 5 groups"])
def test_the_gradient_is_xlas(name):
    logits, options = arguments(name)
    mix = np.random.default_rng(1).standard_normal((logits.shape[0], options["k"])).astype(np.float32)
    loss = lambda route, **how: jax.grad(lambda x: (mix * route(x, **options, **how)[1]).sum())(logits)
    simulated = functools.partial(tpu.route, interpret=tpu.compat.interpret_tpu())
    np.testing.assert_allclose(loss(simulated), loss(xla.route), rtol=1e-5, atol=1e-7)


def test_64_bit_types():
    logits, options = arguments("60 experts in 5 groups")
    with jax.enable_x64(True):
        check(logits, options)


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(40, 2, 5), (67, 3, 300), (33, 1, 8)])
def test_ranks_over_blocks(tokens, choices, experts, monkeypatch):
    monkeypatch.setattr(plan_tpu, "_ROWS", 16)
    rng = np.random.default_rng(0)
    for ids in (rng.integers(-2, experts + 2, (tokens, choices)), np.full((tokens, choices), experts - 1)):
        ids = ids.astype(np.int32)
        check_against_oracle(host(plan_tpu.interpreted(jnp.asarray(ids), experts, 8)), ids, experts, 8)


def test_what_is_chosen_on_tpus():
    ids, logits = jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 8))
    assert PLAN.chosen("tpu", ids, 8, 2) == "tpu" and PLAN.chosen("tpu", ids, 8, 4) == "xla"
    rest = [DEFAULTS[n] for n in ("renormalize", "bias", "groups", "top_groups", "scale", "jitter", "forced")]
    assert OPERATION.chosen("tpu", logits, 2, "softmax", *rest) == "tpu"
    assert OPERATION.chosen("tpu", logits, 2, "sparsemixer", *rest) == "xla"
    assert OPERATION.chosen("tpu", logits, 2, "softmax", *rest[:-1], ids) == "xla"
