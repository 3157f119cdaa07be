"""What holds for every gate and all logits."""

import jax
import numpy as np
import pytest
from gate_oracle import densify
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.gating import gate
from moe_jax.routing import GateRule

run = jax.jit(gate, static_argnums=(1, 4))
often = settings(derandomize=True, deadline=None, max_examples=50)

TIGHT = {
    "top1": GateRule.top1(0.6, 1),
    "top2": GateRule.top2(0.6, 1),
    **{f"topk_{p}": GateRule.topk(3, 0.6, 1, drop_policy=p) for p in ("position", "probs", "probs_upstream", "gate")},
}
ROOMY = {
    "top1": GateRule.top1(1.0, 1, drop_tokens=False),
    "top2": GateRule.top2(1.0, 1, drop_tokens=False),
    "topk": GateRule.topk(3, 1.0, 1, drop_tokens=False),
    "every_expert": GateRule.topk(5, 1.0, 9, drop_policy="gate"),
}


def rules(*groups):
    named = {f"{name}_{i}": rule for i, group in enumerate(groups) for name, rule in group.items()}
    return pytest.mark.parametrize("rule", named.values(), ids=named)


# Quarters: exact under the additions below, and with many ties.
logits = st.lists(st.integers(-24, 24), min_size=45, max_size=45).map(
    lambda values: np.array(values, np.float32).reshape(9, 5) / 4
)
shifts = st.lists(st.integers(-40, 40), min_size=9, max_size=9).map(lambda v: np.array(v, np.float32)[:, None] / 4)
orders = st.permutations(range(9)).map(np.array)
broken = st.sampled_from([np.nan, np.inf, -np.inf])


@rules(TIGHT, ROOMY)
@often
@given(logits=logits)
def test_capacity_and_slots(rule, logits):
    routing = run(logits, rule)
    _, mask = densify(routing)  # fails where two choices share a slot
    position, keep = np.asarray(routing.position), np.asarray(routing.keep)
    counts = np.bincount(np.asarray(routing.ids).ravel(), minlength=5)
    np.testing.assert_array_equal(routing.counts, counts)
    kept = mask.sum((0, 2))
    if rule.drop_tokens:
        assert (kept <= routing.capacity).all() and (position[~keep] >= routing.capacity).all()
        if rule.policy != "probs_upstream":  # no expert has room left while a choice is dropped
            np.testing.assert_array_equal(kept, np.minimum(counts, routing.capacity))
    else:
        assert keep.all()
    # slots are filled without gaps
    np.testing.assert_array_equal(mask.any(0).sum(-1), kept)
    assert all(mask[:, e, : kept[e]].any(0).all() for e in range(5))
    assert (np.sort(routing.ids, axis=-1)[:, 1:] != np.sort(routing.ids, axis=-1)[:, :-1]).all()
    total = np.where(keep, routing.weights, 0).sum(-1)
    if rule.renormalize:
        np.testing.assert_allclose(total, keep.any(-1), atol=1e-6)
    assert not np.asarray(routing.weights)[~keep].any()


@rules(ROOMY, {name: TIGHT[name] for name in ("top1", "top2", "topk_position", "topk_gate")})
@often
@given(logits=logits, shifts=shifts)
def test_a_constant_on_a_tokens_logits_changes_nothing(rule, logits, shifts):
    plain, shifted = run(logits, rule), run(logits + shifts, rule)
    for name in ("ids", "keep", "position", "counts", "weights", "aux_loss"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(shifted, name))


@rules(ROOMY)
@often
@given(logits=logits, order=orders)
def test_permuted_tokens(rule, logits, order):
    plain, permuted = run(logits, rule), run(logits[order], rule)
    for name in ("ids", "weights", "keep"):
        np.testing.assert_array_equal(np.asarray(getattr(plain, name))[order], getattr(permuted, name))
    np.testing.assert_array_equal(plain.counts, permuted.counts)
    np.testing.assert_allclose(plain.aux_loss, permuted.aux_loss, rtol=1e-6)


@rules(TIGHT, ROOMY)
@often
@given(logits=logits, bad=broken, expert=st.integers(0, 4), tokens=st.sets(st.integers(0, 8), min_size=1, max_size=8))
def test_broken_tokens_change_no_other(rule, logits, bad, expert, tokens):
    rows = sorted(tokens)
    others = ~np.isin(np.arange(9), rows)
    logits = logits.copy()
    if bad == -np.inf:
        logits[rows] = bad
    else:
        logits[rows, expert] = bad
    with_them, without = run(logits, rule, np.ones(9, bool), None, True), run(logits, rule, others, None, True)
    kept = np.asarray(without.keep)[others]
    for name in ("ids", "weights", "keep"):
        np.testing.assert_array_equal(np.asarray(getattr(with_them, name))[others], getattr(without, name)[others])
    positions = (np.asarray(routing.position)[others][kept] for routing in (with_them, without))
    np.testing.assert_array_equal(*positions)
    np.testing.assert_array_equal(with_them.ids[np.array(rows)], np.tile(np.arange(rule.k), (len(rows), 1)))
    assert np.isnan(np.asarray(with_them.weights)[rows][np.asarray(with_them.keep)[rows]]).all()


@rules(TIGHT, ROOMY)
@often
@given(expert=st.integers(0, 4), logits=logits)
def test_all_tokens_to_one_expert(rule, expert, logits):
    logits = logits.copy()
    logits[:, expert] = 50
    routing = run(logits, rule)
    assert int(routing.counts[expert]) == 9 and (np.asarray(routing.ids)[:, 0] == expert).all()
    room = 9 if routing.capacity is None else min(routing.capacity, 9)
    assert int(np.asarray(routing.keep)[:, 0].sum()) == room


@rules({name: rule for name, rule in TIGHT.items() if rule.renormalize}, {"top2": ROOMY["top2"], "topk": ROOMY["topk"]})
@often
@given(logits=logits)
def test_identity_experts_return_the_tokens(rule, logits):
    """Dispatch and combine through the dense views, upstream's own formula."""
    routing = run(logits, rule)
    weights, mask = densify(routing)
    x = np.arange(27, dtype=np.float32).reshape(9, 3)
    slots = np.einsum("gec,gd->ecd", mask.astype(np.float32), x)
    back = np.einsum("gec,ecd->gd", weights, slots)
    undropped = np.asarray(routing.keep).any(-1)
    np.testing.assert_allclose(back[undropped], x[undropped], rtol=1e-5)
    assert not back[~undropped].any()
