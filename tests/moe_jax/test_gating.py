"""The gates against DeepSpeed's own arrays, against a float64 oracle, and at their edges."""

import functools
import json
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from core_models import one_in
from flax import nnx
from gate_oracle import densify, oracle

from moe_jax.deepspeed.gate import TopKGate
from moe_jax.gating import gate
from moe_jax.router import top1_gating, top2_gating, topk_gating
from moe_jax.routing import GateRule, gate_capacity

FOLDER: pathlib.Path = GOLDEN / "deepspeed"
NAME = operator.itemgetter("name")


def stored(kind):
    """All cases; seven of eight are slow: each compiles a program of its own."""
    cases = json.loads((FOLDER / f"gating_{kind}.json").read_text())
    return one_in(8, cases)


@pytest.fixture(scope="module")
def arrays():
    return {kind: np.load(FOLDER / f"gating_{kind}.npz") for kind in ("top1", "top2", "topk")}


def compare(routing, arrays, name):
    dense, mask = densify(routing)
    np.testing.assert_allclose(dense, arrays[f"{name}/combine_weights"], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(mask, arrays[f"{name}/dispatch_mask"])
    np.testing.assert_array_equal(routing.counts, arrays[f"{name}/exp_counts"])
    assert abs(float(routing.aux_loss) - float(arrays[f"{name}/l_aux"])) < 2e-6


@pytest.mark.parametrize("case", stored("top1"), ids=NAME)
def test_top1_as_deepspeed(case, arrays):
    name, arrays = case["name"], arrays["top1"]
    used = arrays[f"{name}/used_token"] if case["used_token"] else None
    routing = top1_gating(
        arrays[f"{name}/logits"],
        case["capacity_factor"],
        case["min_capacity"],
        used_token=used,
        drop_tokens=case["drop_tokens"],
    )
    assert routing.capacity == (case["capacity"] if case["drop_tokens"] else None)
    compare(routing, arrays, name)


@pytest.mark.parametrize("case", stored("top2"), ids=NAME)
def test_top2_as_deepspeed(case, arrays):
    name, arrays = case["name"], arrays["top2"]
    numbers = case["capacity_factor"], case["min_capacity"]
    compare(top2_gating(arrays[f"{name}/logits"], *numbers, case["drop_tokens"]), arrays, name)


@pytest.mark.parametrize("case", stored("topk"), ids=NAME)
def test_topk_as_deepspeed(case, arrays):
    name, arrays = case["name"], arrays["topk"]
    policies = [case["drop_policy"] or "probs"]
    if policies == ["probs"] and case["drop_tokens"]:  # the stored arrays have the quirk
        policies = ["probs_upstream"] + ["probs"] * (case["dropped_though_room_left"] == 0)
    for policy in policies:
        numbers = case["k"], case["capacity_factor"], case["min_capacity"], case["drop_tokens"]
        compare(topk_gating(arrays[f"{name}/logits"], *numbers, policy), arrays, name)


def test_probs_fill_the_room_that_upstream_leaves(arrays):
    logits = arrays["topk"]["topk_030/logits"]  # 8 choices are dropped there though there is room
    routing = topk_gating(logits, 6, 1.0, 1)
    np.testing.assert_array_equal(np.bincount(routing.ids[routing.keep]), np.minimum(routing.counts, 6))
    assert int(topk_gating(logits, 6, 1.0, 1, drop_policy="probs_upstream").keep.sum()) < int(routing.keep.sum())


@pytest.mark.parametrize("case", ["top1_000", "top2_003", "topk_012"])
def test_dense_views(case, arrays):
    kind, logits = case[:4], arrays[case[:4]][f"{case}/logits"]
    rule = {"top1": GateRule.top1(1.0, 1), "top2": GateRule.top2(1.0, 4, False), "topk": GateRule.topk(4, 1.0, 1)}[kind]
    routing = gate(logits, rule)
    dense, mask = densify(routing)
    np.testing.assert_array_equal(routing.dense_combine_weights(), dense)
    np.testing.assert_array_equal(routing.dense_dispatch_mask(), mask)
    np.testing.assert_allclose(dense, arrays[kind][f"{case}/combine_weights"], rtol=0, atol=2e-6)


RULES = {
    "top1": GateRule.top1(0.7, 1),
    "top1_all": GateRule.top1(0.7, 1, drop_tokens=False),
    "top2": GateRule.top2(0.7, 1),
    "top2_all": GateRule.top2(0.7, 1, drop_tokens=False),
    "position": GateRule.topk(3, 0.6, 1, drop_policy="position"),
    "probs": GateRule.topk(3, 0.6, 1, drop_policy="probs"),
    "probs_upstream": GateRule.topk(3, 0.6, 1, drop_policy="probs_upstream"),
    "gate": GateRule.topk(3, 0.6, 1, drop_policy="gate"),
    "every_expert": GateRule.topk(5, 0.5, 1, drop_policy="gate"),
}
run = jax.jit(gate, static_argnums=(1, 4))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_against_the_oracle(rule):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(11, 5)).astype(np.float32)
        used = np.random.default_rng(seed).random(11) < (1.0 if rule.k > 1 else 0.7)
        routing = run(logits, rule, used, None, True)
        capacity = None if not rule.drop_tokens else routing.capacity
        weights, counts, aux = oracle(logits, rule.k, capacity, rule.policy, used)
        np.testing.assert_allclose(densify(routing)[0], weights, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(routing.counts, counts)
        assert float(routing.aux_loss) == pytest.approx(aux, abs=1e-6)


@pytest.mark.parametrize("kind", one_in(2, RULES))
def test_padding_changes_nothing(kind):
    """Tokens with and without padding between them, garbage in the padding; gradients as well."""
    rule, rng = RULES[kind], np.random.default_rng(1)
    real = rng.normal(size=(11, 5)).astype(np.float32)
    places = np.sort(rng.permutation(19)[:11])
    used = np.isin(np.arange(19), places)
    padded = np.full((19, 5), np.nan, np.float32)
    padded[places] = real
    alone, among = run(real, rule), run(padded, rule, used)
    for name in ("ids", "weights", "keep"):
        np.testing.assert_allclose(getattr(among, name)[places], getattr(alone, name), rtol=1e-6)
    kept = np.asarray(alone.keep)
    np.testing.assert_array_equal(among.position[places][kept], alone.position[kept])
    assert (np.asarray(among.ids)[~used] == -1).all() and not np.asarray(among.keep)[~used].any()
    np.testing.assert_array_equal(among.counts, alone.counts)
    np.testing.assert_allclose([among.aux_loss, among.z_loss], [alone.aux_loss, alone.z_loss], rtol=1e-6)
    if rule.drop_tokens:  # what is dropped lies outside the slots of the larger batch, too
        assert (np.asarray(among.position)[used & ~np.asarray(among.keep).all(-1)].max(-1) >= among.capacity).all()

    def loss(logits):
        routing = gate(logits, rule, used)
        return routing.aux_loss + routing.z_loss + (routing.weights**2).sum()

    slope = np.asarray(jax.jit(jax.grad(loss))(padded))
    assert np.isfinite(slope).all() and not slope[~used].any() and slope[used].any()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_forced_choices_are_taken_as_if_they_were_best(rule):
    """In any order, some left to the gate: what the gate does for logits of which these are the highest."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((40, 8)).astype(np.float32)
    chosen = np.stack([rng.permutation(8)[: rule.k] for _ in logits])
    forced = np.where(rng.random(chosen.shape) < 0.4, -1, chosen)
    routing = jax.jit(functools.partial(gate, rule=rule))(logits, forced=forced)
    for own, asked, ids in zip(logits, forced, np.asarray(routing.ids), strict=True):
        asked = [e for e in asked if e >= 0]
        free = [e for e in np.argsort(-own) if e not in asked][: rule.k - len(asked)]
        assert ids.tolist() == sorted(asked + free, key=lambda e: -own[e])
    chances = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(routing.ids), 1)
    kept = np.where(routing.keep, chances, 0)
    if rule.renormalize:
        kept /= np.maximum(kept.sum(1, keepdims=True), np.finfo(np.float32).eps)
    np.testing.assert_allclose(routing.weights, kept, rtol=1e-5)
    assert bool(routing.keep.all()) == (not rule.drop_tokens)
    again = gate(logits, rule, forced=np.asarray(routing.ids)[:, ::-1])
    np.testing.assert_array_equal(again.keep, routing.keep)


def test_minus_infinity_is_a_logit():
    logits = np.array([[1.0, -np.inf, -np.inf], [-np.inf, 0.0, -np.inf]], np.float32)
    routing = gate(logits, GateRule.top2(1.0, 2, second_expert_sampling=True), key=jax.random.key(0))
    assert routing.ids[0, 0] == 0 and routing.ids[1, 0] == 1
    assert (routing.ids[:, 0] != routing.ids[:, 1]).all()
    np.testing.assert_array_equal(routing.weights, [[1, 0], [1, 0]])
    assert np.isfinite(float(routing.aux_loss))


# tokens, experts, factor: as torch computes the capacity; in float64 all but the last are another number
CAPACITIES = """45 2 1.2 28, 55 6 2.4 23, 100 8 1.2 16, 135 6 1.2 28, 210 51 1.7 8, 225 9 4.8 121, 250 10 9.6 241,
265 48 9.6 54, 284 7 5.25 214, 288 15 6.25 121, 70 48 4.8 8, 175 8 9.6 211, 260 221 3.4 5, 33 4 1.5 13"""


@pytest.mark.parametrize("row", [row.split() for row in CAPACITIES.split(",")], ids="-".join)
def test_capacity_in_float32(row):
    tokens, experts, factor, slots = int(row[0]), int(row[1]), float(row[2]), int(row[3])
    rule = GateRule.top1(factor, 1)
    assert gate_capacity(rule, tokens, experts) == slots
    assert gate_capacity(rule, np.arange(tokens + 1), experts)[-1] == slots


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("name", one_in(2, ["top1", "top1_all", "top2", "probs", "probs_upstream", "gate"]))
def test_few_tokens(name, tokens):
    rule = RULES[name]
    for used in (None, np.ones(tokens, bool)):
        routing = run(np.ones((tokens, 5), np.float32), rule, used)
        assert routing.ids.shape == (tokens, rule.k) and routing.keep.all()
        assert routing.counts.tolist() == [tokens] * rule.k + [0] * (5 - rule.k)
        assert routing.dense_combine_weights().shape[:2] == (tokens, 5)
        assert float(routing.aux_loss) == pytest.approx(tokens)


def test_more_slots_than_tokens():
    routing = topk_gating(np.eye(3), 2, 9.0, 1)
    assert routing.capacity == 18 and routing.keep.all()
    assert top1_gating(np.eye(3), 1.0, 50).dense_dispatch_mask().shape == (3, 3, 50)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64, np.int32])
def test_everything_in_float32(dtype):
    routing = top2_gating(np.arange(12).reshape(4, 3).astype(dtype), 1.0, 1)
    assert routing.weights.dtype == routing.aux_loss.dtype == routing.z_loss.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights[0], softmax_of([2.0, 1.0]), rtol=1e-6)


def softmax_of(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_random_selection_of_tokens():
    logits = np.tile(np.array([2.0, 0.0], np.float32), (12, 1))
    keeps = []
    for seed in range(4):
        routing = top1_gating(logits, 1.0, 1, use_rts=True, key=jax.random.key(seed))
        keep = np.asarray(routing.keep)[:, 0]
        assert keep.sum() == routing.capacity == 6
        assert routing.position[keep, 0].tolist() == list(range(6))  # slots in the order of the tokens
        assert (np.asarray(routing.position)[~keep] >= 6).all()
        keeps.append(tuple(keep))
    assert len(set(keeps)) > 1
    assert top1_gating(logits, 1.0, 1, drop_tokens=False, use_rts=True).keep.all()  # nothing to select: no key


def test_gumbel_noise_samples_the_softmax():
    logits = np.tile(np.log(np.array([0.6, 0.3, 0.1], np.float32)), (6000, 1))
    first = top1_gating(logits, 3.0, 1, noisy_gate_policy="RSample", key=jax.random.key(0))
    np.testing.assert_allclose(np.asarray(first.counts) / 6000, [0.6, 0.3, 0.1], atol=0.03)
    np.testing.assert_allclose(first.weights[:, 0], np.array([0.6, 0.3, 0.1])[first.ids[:, 0]], rtol=1e-5)
    second = top2_gating(logits, 3.0, 1, second_expert_sampling=True, key=jax.random.key(1))
    assert (np.asarray(second.ids)[:, 0] == 0).all()
    np.testing.assert_allclose(np.asarray(second.counts) / 6000, [1, 0.75, 0.25], atol=0.03)
    jittered = top1_gating(logits[:8], 1.0, 1, noisy_gate_policy="Jitter")
    np.testing.assert_array_equal(jittered.ids, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: top1_gating(x[0], 1.0, 1), r"logits: expected shape \[G, E\], got \(3,\)"),
        (lambda x: top1_gating(x > 0, 1.0, 1), "logits: dtype bool"),
        (lambda x: top1_gating(x, 0.0, 1), "capacity_factor: 0.0"),
        (lambda x: top1_gating(x, float("nan"), 1), "capacity_factor: nan"),
        (lambda x: top1_gating(x, 1e30, 1), "capacity_factor, min_capacity: 1e.30, 1 make 1.33e.30 slots"),
        (lambda x: top1_gating(x, 1.0, -1), "min_capacity: expected an integer of at least 0, got -1"),
        (lambda x: top1_gating(x, 1.0, 1, used_token=np.ones(3)), r"used_token: shape \(3,\), expected \(4,\)"),
        (lambda x: top1_gating(x, 1.0, 1, noisy_gate_policy="Gauss"), "noisy_gate_policy: 'Gauss'"),
        (lambda x: top1_gating(x, 1.0, 1, noisy_gate_policy="RSample"), "key: None, but RSample"),
        (lambda x: top1_gating(x, 1.0, 1, use_rts=True), "key: None, but random token selection"),
        (lambda x: top2_gating(x, 1.0, 1, second_expert_sampling=True), "key: None, but sampling the second"),
        (lambda x: top2_gating(x[:, :1], 1.0, 1), "k: 2 experts per token out of 1"),
        (lambda x: topk_gating(x, 0, 1.0, 1), "k: expected an integer of at least 1, got 0"),
        (lambda x: topk_gating(x, 4, 1.0, 1), "k: 4 experts per token out of 3"),
        (lambda x: topk_gating(x, 2, 1.0, 1, drop_policy="random"), "drop_policy: 'random' is not one of"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 3), np.float32))


def module(**options):
    return TopKGate(6, 4, **{"min_capacity": 1, **options}, rngs=nnx.Rngs(0))


def test_module_in_inference():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    for k, public in ((1, top1_gating), (2, top2_gating), (3, lambda *a: topk_gating(a[0], 3, *a[1:]))):
        layer = module(k=k, capacity_factor=3.0, eval_capacity_factor=0.5, noisy_gate_policy="RSample")
        logits = x.reshape(10, 6) @ np.asarray(layer.wg[...]).T
        want, got = public(logits, 0.5, 1), layer(x)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.keep, want.keep)
        np.testing.assert_allclose(got.weights, want.weights, atol=1e-6)
        assert got.capacity == want.capacity
    used = np.arange(10).reshape(2, 5) % 2
    np.testing.assert_array_equal(layer(x, used).ids[::2], -1)


def test_module_in_training():
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    plain = module(capacity_factor=2.0, use_rts=False)
    assert plain(x, train=True).capacity == 20 and plain(x).capacity == 10
    for options in ({}, {"noisy_gate_policy": "Jitter", "use_rts": False}, {"k": 2}):
        layer = module(**options)
        with pytest.raises(ValueError, match="key: None"):
            layer(x, train=True)
        first, second = (layer(x, train=True, key=jax.random.key(seed)) for seed in (0, 1))
        assert not np.array_equal(first.weights, second.weights)
    assert module(k=3, drop_policy="gate")(x, train=True).capacity == 30  # nothing random above k = 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=5), "k: 5 experts per token out of num_experts 4"),
        (dict(k=0), "k: expected an integer"),
        (dict(eval_capacity_factor=-1.0), "eval_capacity_factor: -1.0"),
        (dict(capacity_factor=0), "^capacity_factor: 0"),
        (dict(min_capacity=-2), "min_capacity: .*got -2"),
        (dict(noisy_gate_policy="jitter"), "noisy_gate_policy: 'jitter'"),
        (dict(drop_policy="choice"), "drop_policy: 'choice'"),
    ],
)
def test_module_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)
    with pytest.raises(ValueError, match=r"x: shape \(2, 7\), expected \[..., 6\]"):
        module()(np.ones((2, 7), np.float32))
