"""`route` against the gate rules written out in float64, one token at a time."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from simulated_tpu import without_races  # noqa: F401  a fixture for all tests

from pallas_kernels import route
from pallas_kernels.routing.api import OPERATION

STATIC = ("k", "score", "renormalize", "groups", "top_groups", "scale", "jitter", "implementation")
route_jit = jax.jit(route, static_argnames=STATIC)
#: Those that run on a CPU, the TPU's in JAX's simulation; the GPU's kernels have a suite of their own
#: (test_routing_triton).
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform and "interpreted" not in name]
IMPLEMENTATIONS = [pytest.param(name, id=name) for name in (*ANYWHERE, "tpu_interpreted")]
TOKENS, EXPERTS = 13, 8

# name -> keyword arguments of `route`; `bias` and `forced` are filled in by `call`, E is 8 unless given.
RULES = {
    "softmax": dict(k=2),
    "softmax, as they are": dict(k=3, renormalize=False, scale=2.5),
    "softmax, biased": dict(k=2, renormalize=False, bias=True),
    "softmax, groups": dict(k=3, groups=4, top_groups=2, renormalize=False, scale=16.0),
    "softmax, all experts": dict(k=8),
    "softmax, one expert": dict(k=1, experts=1),
    "softmax, 60 experts": dict(k=4, experts=60, renormalize=False),
    "softmax, forced": dict(k=2, forced=True),
    "sigmoid": dict(k=2, score="sigmoid"),
    "sigmoid, as they are": dict(k=1, score="sigmoid", renormalize=False),
    "sigmoid, biased groups": dict(k=3, score="sigmoid", bias=True, groups=4, top_groups=2, scale=2.5),
    "sigmoid, 60 experts": dict(k=8, experts=60, score="sigmoid", bias=True, groups=5, top_groups=3),
    "sigmoid, forced": dict(k=3, score="sigmoid", bias=True, groups=4, top_groups=2, scale=2.5, forced=True),
    "sparsemixer": dict(k=2, score="sparsemixer"),
    "sparsemixer, wide": dict(k=2, score="sparsemixer", jitter=0.3),
    "sparsemixer, forced": dict(k=2, score="sparsemixer", jitter=0.3, forced=True),
}


def arguments(experts=EXPERTS, bias=False, forced=False, **options):
    """Seeded logits and keyword arguments; `forced` leaves some choices to the router."""
    rng = np.random.default_rng(11)
    # Half of the tokens have logits close to each other, where sparsemixer looks beyond the best.
    spread = np.where(np.arange(TOKENS) % 2, 2.0, 0.05)[:, None]
    logits = (1 + spread * rng.standard_normal((TOKENS, experts))).astype(np.float32)
    if bias:
        options["bias"] = rng.standard_normal(experts).astype(np.float32) / 2
    if forced:
        drawn = np.argsort(rng.random((TOKENS, experts)), axis=1)[:, : options["k"]]
        options["forced"] = np.where(rng.random(drawn.shape) < 0.3, -1, drawn).astype(np.int32)
    return logits, options


def on_tpus(rule):
    """Whether the TPU's kernel takes a rule; XLA's runs there else."""
    return "sparsemixer" not in rule and "forced" not in rule


def first(values, n):
    """Indices of the `n` largest, the lowest index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def oracle_row(logits, forced, k, score="softmax", renormalize=True, bias=None, groups=1, top_groups=1, scale=1.0):
    """One token: ids and weights."""
    exp = np.exp(logits - logits.max())
    scores = exp / exp.sum() if score == "softmax" else 1 / (1 + np.exp(-logits))
    ranked = scores if bias is None else scores + bias
    size = len(logits) // groups
    best = 1 if score == "softmax" else 2
    strength = [sum(sorted(ranked[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    kept = first(strength, top_groups)
    left = [r if e // size in kept and e not in forced else -np.inf for e, r in enumerate(ranked)]
    free = iter(first(left, k))
    ids = [f if f >= 0 else next(free) for f in forced]
    weights = scores[ids]
    return ids, weights / (weights.sum() if renormalize else 1) * scale


def sparsemixer_row(logits, forced, jitter=0.01, **_):
    """One token by arXiv:2409.12136: a softmax over the experts within `2 * jitter` of the best, twice."""
    left, ids, weights = list(range(len(logits))), [], []
    if min(forced) >= 0:  # a pair from a record comes in any order; the better one is weighed first
        forced = sorted(forced, key=lambda e: -logits[e])
    for turn in range(2):
        best = max(logits[e] for e in left)
        finite = [e for e in left if logits[e] > -np.inf]
        near = [e for e in finite if (best - logits[e]) / max(abs(logits[e]), best) <= 2 * jitter]
        free = max((e for e in left if e not in forced), key=lambda e: (logits[e], -e))
        chosen = forced[turn] if forced[turn] >= 0 else free
        total = sum(np.exp(logits[e] - best) for e in near)
        weights.append(np.exp(logits[chosen] - best) / total if chosen in near else 0.0)
        ids.append(chosen)
        left = [e for e in left if e != chosen]
    return ids, weights


def oracle(logits, forced=None, **options):
    """`ids`, float64 `weights` and `counts`."""
    row = sparsemixer_row if options.get("score") == "sparsemixer" else oracle_row
    forced = np.full((len(logits), options["k"]), -1) if forced is None else forced
    options = {n: v.astype(np.float64) if n == "bias" else v for n, v in options.items()}
    chosen = [row(values, f, **options) for values, f in zip(logits.astype(np.float64), forced, strict=True)]
    ids = np.array([ids for ids, _ in chosen])
    return ids, np.array([w for _, w in chosen]), np.bincount(ids.ravel(), minlength=logits.shape[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_oracles(rule, implementation):
    logits, options = arguments(**RULES[rule])
    if implementation == "tpu_interpreted" and not on_tpus(rule):
        with pytest.raises(ValueError, match="route cannot run as 'tpu_interpreted': (score 'sparsemixer'|forced ids)"):
            route_jit(logits, implementation=implementation, **options)
        return
    got_ids, got_weights, got_counts = route_jit(logits, implementation=implementation, **options)
    ids, weights, counts = oracle(logits, **options)
    assert (got_ids.dtype, got_weights.dtype, got_counts.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_array_equal(got_counts, counts)
    # A float32 exponential is good to an ulp or two, a sum of up to 60 adds as much again: 5 ulp of 2**-23.
    np.testing.assert_allclose(got_weights, weights, rtol=6e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestEveryImplementation:
    def call(self, implementation, rule, logits, **more):
        _, options = arguments(**RULES[rule])
        if implementation == "tpu_interpreted" and not on_tpus(rule):
            implementation = None
        return [np.asarray(v) for v in route_jit(logits, implementation=implementation, **{**options, **more})]

    def test_ties_go_to_the_lowest_id(self, implementation):
        flat = np.zeros((TOKENS, EXPERTS), np.float32)
        two = flat.copy()
        two[:, [6, 3]] = 1
        assert (self.call(implementation, "softmax", flat)[0] == [0, 1]).all()
        assert (self.call(implementation, "softmax", two)[0] == [3, 6]).all()
        assert (self.call(implementation, "softmax", -two)[0] == [0, 1]).all()
        assert (self.call(implementation, "sigmoid", two)[0] == [3, 6]).all()
        assert (self.call(implementation, "sparsemixer", two)[0] == [3, 6]).all()
        assert (self.call(implementation, "softmax, all experts", two)[0] == [3, 6, 0, 1, 2, 4, 5, 7]).all()
        # Groups of two experts: those of 3 and 6 tie and win, then the experts inside.
        assert (self.call(implementation, "softmax, groups", two)[0] == [3, 6, 2]).all()
        no_bias = np.zeros(EXPERTS, np.float32)
        assert (self.call(implementation, "sigmoid, biased groups", flat, bias=no_bias)[0] == [0, 1, 2]).all()

    @pytest.mark.parametrize("rule", ["softmax", "softmax, groups", "sigmoid, biased groups", "sparsemixer"])
    @pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
    def test_a_poisoned_row_stays_alone(self, implementation, rule, poison):
        logits, _ = arguments(**RULES[rule])
        ids, weights, _ = self.call(implementation, rule, logits)
        logits[4] = poison
        logits[7, 2] = poison
        got_ids, got_weights, got_counts = self.call(implementation, rule, logits)
        others = np.delete(np.arange(TOKENS), [4, 7])
        np.testing.assert_array_equal(got_ids[others], ids[others])
        np.testing.assert_array_equal(got_weights[others], weights[others])
        assert ((got_ids >= 0) & (got_ids < EXPERTS)).all()
        np.testing.assert_array_equal(got_counts, np.bincount(got_ids.ravel(), minlength=EXPERTS))

    @pytest.mark.parametrize("rule", ["softmax", "sigmoid", "sparsemixer"])
    def test_experts_at_minus_infinity_weigh_nothing(self, implementation, rule):
        logits, options = arguments(**RULES[rule])
        logits[:, [0, 5]] = -np.inf
        ids, weights, counts = self.call(implementation, rule, logits)
        want_ids, want_weights, _ = oracle(logits, **options)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=6e-7)
        assert counts[0] == counts[5] == 0

    def test_one_finite_logit_takes_all_the_weight(self, implementation):
        logits = np.full((TOKENS, EXPERTS), -np.inf, np.float32)
        logits[:, 3] = -7
        ids, weights, _ = self.call(implementation, "softmax", logits)
        assert (ids == [3, 0]).all() and (weights == [1, 0]).all()
        ids, weights, _ = self.call(implementation, "sigmoid", logits)
        assert (ids == [3, 0]).all() and (weights == [1, 0]).all()

    def test_infinite_logits_saturate_a_sigmoid(self, implementation):
        logits, _ = arguments()
        logits[:, 6] = np.inf
        ids, weights, _ = self.call(implementation, "sigmoid, as they are", logits)
        assert (ids == 6).all() and (weights == 1).all()

    def test_weights_that_underflow_are_not_divided_by_zero(self, implementation):
        logits = np.full((TOKENS, EXPERTS), -200, np.float32)
        _, weights, _ = self.call(implementation, "sigmoid", logits)
        assert (weights == 0).all()

    @pytest.mark.parametrize("constant", [1024.0, -4096.0])
    def test_a_constant_added_to_a_token_changes_nothing_for_softmax(self, implementation, constant):
        logits, _ = arguments()
        logits = np.round(logits * 256) / 256  # so that the sum is exact, and the result the same to the bit
        shift = np.where(np.arange(TOKENS) % 3, constant, 0).astype(np.float32)[:, None]
        for rule in ("softmax", "softmax, groups"):
            for one, other in zip(
                self.call(implementation, rule, logits), self.call(implementation, rule, logits + shift), strict=True
            ):
                np.testing.assert_array_equal(one, other)

    def test_the_bias_steers_the_choice_and_never_enters_the_weights(self, implementation):
        logits, _ = arguments()
        bias = np.array([0, 0, 0, 9, 0, 0, 0, 8], np.float32)
        ids, weights, _ = self.call(implementation, "softmax, biased", logits, bias=bias)
        assert (ids == [3, 7]).all()
        exp = np.exp(logits.astype(np.float64))
        np.testing.assert_allclose(weights, (exp / exp.sum(1, keepdims=True))[:, [3, 7]], rtol=6e-7)

    @pytest.mark.parametrize("rule", ["softmax, groups", "sigmoid, biased groups", "sparsemixer"])
    def test_no_tokens(self, implementation, rule):
        _, options = arguments(**RULES[rule])
        ids, weights, counts = self.call(implementation, rule, np.zeros((0, EXPERTS), np.float32))
        assert ids.shape == weights.shape == (0, options["k"])
        assert (counts == np.zeros(EXPERTS)).all() and counts.dtype == np.int32

    def test_narrow_logits_are_computed_in_float32(self, implementation):
        logits = arguments()[0].astype(jnp.bfloat16)
        narrow = self.call(implementation, "softmax", logits)
        wide = self.call(implementation, "softmax", logits.astype(np.float32))
        for one, other in zip(narrow, wide, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)

    def test_groups_are_ranked_by_their_best_or_their_best_two(self, implementation):
        # Group 0 has the best expert, group 1 the best two, groups 2 and 3 nothing.
        logits = np.tile(np.array([4, -4, 3, 3, -4, -4, -4, -4], np.float32), (TOKENS, 1))
        softmax = route_jit(logits, 2, groups=4, top_groups=1, implementation=implementation)
        sigmoid = route_jit(logits, 2, "sigmoid", groups=4, top_groups=1, implementation=implementation)
        assert (np.asarray(softmax[0]) == [0, 1]).all() and (np.asarray(sigmoid[0]) == [2, 3]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=0), "k: 0 experts per token out of 8"),
        (dict(k=9), "k: 9 experts per token out of 8"),
        (dict(logits=np.zeros(8, np.float32)), r"logits: expected shape \[G, E\], got \(8,\)"),
        (dict(logits=np.zeros((2, 8), int)), "logits: dtype int64"),
        (dict(score="tanh"), "score: 'tanh' is not one of softmax, sigmoid, sparsemixer"),
        (dict(groups=0), "groups: 1 of 0 groups do not fit 8 experts"),
        (dict(groups=3), "groups: 1 of 3 groups do not fit 8 experts"),
        (dict(groups=4, top_groups=5), "groups: 5 of 4 groups do not fit 8 experts"),
        (dict(groups=4, top_groups=0), "groups: 0 of 4 groups do not fit 8 experts"),
        (dict(k=3, groups=4, top_groups=1), "top_groups: 1 groups of 2 experts hold fewer than k=3"),
        (dict(bias=np.zeros(7, np.float32)), r"bias: shape \(7,\), expected \(8,\)"),
        (dict(score="sparsemixer", k=1), "sparsemixer chooses 2 experts without bias or groups, got k=1"),
        (dict(score="sparsemixer", bias=np.zeros(8, np.float32)), "sparsemixer chooses 2 experts without bias"),
        (dict(score="sparsemixer", groups=2, top_groups=2), "sparsemixer .* groups=2"),
        (dict(score="sigmoid", groups=8, top_groups=2), "groups: 8 groups of one expert have no best two"),
        (dict(forced=np.zeros((2, 1), int)), r"forced: shape \(2, 1\), expected \(2, 2\)"),
        (dict(forced=np.array([[0, -1], [8, 1]])), "forced: id 8 of 8 experts"),
        (
            dict(implementation="cuda"),
            "implementation: 'cuda' is no implementation of route; there are: triton, tpu, xla",
        ),
    ],
)
def test_refusals(monkeypatch, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    with pytest.raises(ValueError, match=message):
        route(**{"logits": np.zeros((2, 8), np.float32), "k": 2, **options})


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_free_slot_never_repeats_a_forced_expert(score):
    logits = np.tile(np.arange(8, dtype=np.float32), (3, 1))
    ids, weights, _ = route(logits, 3, score, forced=np.array([[7, -1, -1], [-1, 6, -1], [-1, -1, -1]], np.int32))
    assert ids.tolist() == [[7, 6, 5], [7, 6, 5], [7, 6, 5]]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_a_free_slot_of_sparsemixer_never_repeats_a_forced_expert():
    logits = np.tile(np.arange(8, dtype=np.float32), (3, 1))
    forced = np.array([[-1, 7], [7, -1], [-1, -1]], np.int32)
    ids, _, _ = route(logits, 2, "sparsemixer", forced=forced)
    assert ids.tolist() == [[6, 7], [7, 6], [7, 6]]
