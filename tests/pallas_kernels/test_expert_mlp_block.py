"""`capacity_mlp` and `moe_block` against `expert_oracle`."""

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens, oracle

from pallas_kernels import capacity_mlp, moe_block
from pallas_kernels.expert_mlp.api import OPERATION

E, D, F = 5, 24, 40
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform and "interpreted" not in name]
with_capacity = jax.jit(capacity_mlp, static_argnames="capacity")


def in_turn(ids):
    """Each choice's place among those of its expert, row by row."""
    position, taken = np.zeros_like(ids), {}
    for index, e in np.ndenumerate(ids):
        position[index] = taken.setdefault(e, 0)
        taken[e] += 1
    return position


def make(dtype=ml_dtypes.bfloat16):
    x, ids, weights = make_tokens(13, D, E, 2, dtype)
    experts = make_experts(E, D, F, dtype=dtype, layout="out_in", biases=True)
    return dict(x=np.array(x), ids=np.array(ids), weights=np.array(weights), position=in_turn(ids), experts=experts)


def assert_standard(got, x, ids, weights, experts):
    want = oracle(x, ids, weights, experts)
    plain = oracle(x, ids, weights, experts, wide=np.float32, narrow=x.dtype)
    assert got.dtype == x.dtype and error(got, want) <= 1.2 * error(plain, want)


def test_choices_at_or_beyond_the_capacity_are_dropped():
    operands = make()
    kept = operands["position"] < 4
    assert 0 < (~kept).sum() < kept.sum() and (~kept).all(1).any() | (kept.sum(1) == 1).any()
    got = with_capacity(**operands, capacity=4)
    del operands["position"]
    assert_standard(got, **{**operands, "ids": np.where(kept, operands["ids"], -1)})


def test_the_position_decides_not_the_order():
    operands = make()
    last_first = in_turn(operands["ids"][::-1, ::-1])[::-1, ::-1]
    kept = last_first < 4
    assert (kept != (operands["position"] < 4)).any()
    got = with_capacity(**{**operands, "position": last_first}, capacity=4)
    del operands["position"]
    assert_standard(got, **{**operands, "ids": np.where(kept, operands["ids"], -1)})


def test_what_is_dropped_or_outside_poisons_nothing():
    operands = make()
    ids, position = operands["ids"], operands["position"]
    ids[3], ids[6, 0], position[8, 1] = -1, E, -1
    dropped = (ids < 0) | (ids >= E) | (position < 0) | (position >= 4)
    clean = with_capacity(**operands, capacity=4)
    poisoned = {**operands, "weights": np.where(dropped, np.nan, operands["weights"]), "x": operands["x"].copy()}
    poisoned["x"][dropped.all(1)] = np.nan
    got = np.asarray(with_capacity(**poisoned, capacity=4))
    np.testing.assert_array_equal(got, clean)
    assert dropped.all(1).sum() > 1 and (got[dropped.all(1)] == 0).all()


def test_a_nan_row_stays_alone():
    operands = make()
    clean = np.asarray(with_capacity(**operands, capacity=4))
    kept = np.flatnonzero((operands["position"] < 4).all(1))[1]
    operands["x"][kept, 3] = np.nan
    got = np.asarray(with_capacity(**operands, capacity=4))
    others = np.arange(13) != kept
    np.testing.assert_array_equal(got[others], clean[others])
    assert np.isnan(got[kept].astype(np.float32)).all()


@pytest.mark.parametrize("tokens, choices", [(0, 2), (3, 0)])
def test_nothing_to_do(tokens, choices):
    ids = np.zeros((tokens, choices), np.int32)
    x = np.ones((tokens, D), ml_dtypes.bfloat16)
    got = capacity_mlp(x, ids, ids.astype(np.float32), ids, make()["experts"], capacity=2)
    assert got.shape == x.shape and got.dtype == x.dtype and not np.asarray(got).any()


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(capacity=0), "capacity 0"),
        (dict(position=np.zeros((13, 1), int)), r"position \(13, 1\) for ids \(13, 2\)"),
        (dict(experts=make_experts(E, D, F, layers=(2,))), r"takes one layer's experts.* got experts \(2, 5, 24, 40\)"),
        (dict(x=np.zeros((13, 3), np.float32)), r"x: shape \(13, 3\), expected \[G, 24\]"),
        (dict(ids=np.zeros((13, 2), np.float32)), "ids: dtype float32"),
    ],
)
def test_refusals(monkeypatch, changed, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    with pytest.raises(ValueError, match=message):
        capacity_mlp(**{**make(), "capacity": 4, **changed})


@pytest.mark.parametrize("number, implementation", list(enumerate(ANYWHERE)))
def test_block(number, implementation):
    score, renormalize, choices = [("sigmoid", True, 2), ("softmax", False, E)][number % 2]
    operands = make()
    x, experts = operands["x"], operands["experts"]
    router = np.random.default_rng(4).standard_normal((D, E)).astype(x.dtype)
    block = jax.jit(moe_block, static_argnames=("k", "score", "renormalize", "implementation"))
    got = block(x, router, experts, choices, score=score, renormalize=renormalize, implementation=implementation)

    logits = x.astype(np.float64) @ router.astype(np.float64)
    scores = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :choices]
    weights = np.take_along_axis(scores, ids, axis=1)
    assert_standard(got, x, ids, weights / (weights.sum(1, keepdims=True) if renormalize else 1), experts)


def test_block_without_tokens_and_its_refusals(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    experts = make_experts(E, D, F)
    assert moe_block(jnp.zeros((0, D)), jnp.zeros((D, E)), experts, 2).shape == (0, D)
    with pytest.raises(ValueError, match=r"router_weight: shape \(24, 4\), expected \(24, 5\)"):
        moe_block(jnp.zeros((3, D)), jnp.zeros((D, 4)), experts, 2)
    with pytest.raises(ValueError, match="k: 6 experts per token out of 5"):
        moe_block(jnp.zeros((3, D)), jnp.zeros((D, E)), experts, 6)
