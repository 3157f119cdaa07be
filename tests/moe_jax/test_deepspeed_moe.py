"""DeepSpeed's training layer `MoE` against its own outputs and the float64 loops; noise, gradients, refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from core_models import one_in
from deepspeed_oracle import moe as oracle_moe
from flax import nnx

from moe_jax.convert.deepspeed import moe_from_state_dict
from moe_jax.deepspeed import MoE

CASES = {case["name"]: case for case in json.loads((GOLDEN / "deepspeed" / "moe_layer.json").read_text())}
with np.load(GOLDEN / "deepspeed" / "moe_layer.npz") as stored:
    ARRAYS = dict(stored)
EXPERT, GATE = "deepspeed_moe.experts.deepspeed_experts.", "deepspeed_moe.gate.wg.weight"


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def state_dict(residual=False, width=8, hidden=12, experts=4):
    """Random weights under DeepSpeed's names."""
    shapes = {"dense_h_to_4h.weight": (hidden, width), "dense_h_to_4h.bias": (hidden,)}
    shapes |= {"dense_4h_to_h.weight": (width, hidden), "dense_4h_to_h.bias": (width,)}
    table = {f"{EXPERT}{e}.{name}": shape for e in range(experts) for name, shape in shapes.items()}
    table[GATE] = (experts, width)
    if residual:
        table |= {f"mlp.{name}": shape for name, shape in shapes.items()}
        table |= {"coefficient.weight": (2, width), "coefficient.bias": (2,)}
    return {name: 0.5 * numbers(*shape, seed=i) for i, (name, shape) in enumerate(table.items())}


def built(residual=False, **options):
    return moe_from_state_dict(dict(k=1, min_capacity=1) | options, state_dict(residual))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(definition, state, x, used, train, key):
    return nnx.merge(definition, state)(x, used, train=train, key=key)


def run(layer, x, used=None, train=False, key=None):
    """The layer as one compiled program."""
    return _run(*nnx.split(layer), x, used, train, key)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("prefix", one_in(2, ["", "layers.3.moe."]))
@pytest.mark.parametrize("name", one_in(3, CASES))
def test_deepspeeds_own_outputs(name, prefix):
    case, start = CASES[name], f"{name}/weights/"
    keys = "k eval_capacity_factor min_capacity drop_tokens gelu use_residual num_experts".split()
    config = {key: case[key] for key in keys} | {"hidden_size": case["hidden"], "drop_policy": "probs_upstream"}
    weights = {prefix + key.removeprefix(start): array for key, array in ARRAYS.items() if key.startswith(start)}
    layer = moe_from_state_dict(config, weights)
    y, l_aux, counts = run(layer, ARRAYS[f"{name}/x"], ARRAYS.get(f"{name}/used_token"))
    np.testing.assert_allclose(y, ARRAYS[f"{name}/output"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(l_aux, ARRAYS[f"{name}/l_aux"], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(counts, ARRAYS[f"{name}/exp_counts"])


def test_every_golden_case_is_compared():
    assert len(CASES) == 10 and {name.split("/")[0] for name in ARRAYS} == set(CASES)
    assert [name for name in CASES if CASES[name]["used_token"]] == ["moe_12"]
    assert {case["k"] for case in CASES.values()} == {1, 2, 3, 4}


OPTIONS = [
    dict(k=1, eval_capacity_factor=0.7),
    dict(k=2, eval_capacity_factor=0.7, gelu="erf"),
    dict(k=2, drop_tokens=False),
    *(dict(k=3, eval_capacity_factor=0.6, drop_policy=policy) for policy in ("gate", "position", "probs_upstream")),
]


# each with and without an MLP beside the experts; quick: now one, now the other
@pytest.mark.parametrize("number", one_in(2, [*range(6), *range(11, 5, -1)]))
def test_an_independent_layer_in_float64(number):
    options, residual = OPTIONS[number % 6], number >= 6
    x = numbers(2, 6, 8, seed=40)
    y, l_aux, counts = run(built(residual, **options), x)
    want, aux, choices = oracle_moe(dict(min_capacity=1) | options, state_dict(residual), x)
    close(y, want)
    np.testing.assert_allclose(l_aux, aux, rtol=2e-6)
    np.testing.assert_array_equal(counts, choices)
    assert l_aux.shape == () and counts.shape == (4,)


def test_experts_come_before_the_mlp_in_the_mix():
    weights = state_dict(True) | {"coefficient.weight": np.zeros((2, 8), np.float32)}
    x, options = numbers(5, 8), dict(k=1, drop_tokens=False)
    plain = {name: w for name, w in weights.items() if not name.startswith(("mlp.", "coefficient."))}
    for bias, alone in (([40.0, -40.0], True), ([-40.0, 40.0], False)):
        y, _, _ = run(moe_from_state_dict(options, weights | {"coefficient.bias": np.array(bias, np.float32)}), x)
        experts_only, _, _ = run(moe_from_state_dict(options, plain), x)
        assert np.allclose(y, experts_only, rtol=1e-5, atol=3e-6) == alone


def test_unused_tokens_take_no_expert():
    x, used = numbers(2, 6, 8, seed=3), np.array([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]])
    layer = built(eval_capacity_factor=0.8)
    y, l_aux, counts = run(layer, x, used)
    want, aux, choices = oracle_moe(dict(k=1, eval_capacity_factor=0.8), state_dict(), x, used.reshape(-1))
    close(y, want)
    np.testing.assert_allclose(l_aux, aux, rtol=2e-6)
    np.testing.assert_array_equal(counts, choices)
    assert counts.sum() == 9 and not y[used == 0].any()
    for same in (used.reshape(-1), used.astype(bool), used.astype(np.float32)):
        close(run(layer, x, same)[0], y)
    for wrong in (used[:1], used.T, np.ones(11)):
        with pytest.raises(ValueError, match="used_token: shape"):
            layer(x, wrong)


def test_any_number_of_axes_gives_the_same_rows():
    layer, x = built(k=2), numbers(2, 6, 8)
    y, l_aux, counts = run(layer, x)
    flat, same_aux, same_counts = run(layer, x.reshape(-1, 8))
    close(flat.reshape(2, 6, 8), y)
    close(same_aux, l_aux)
    assert (counts == same_counts).all()


NOISY = {
    "random token selection": (dict(k=1, use_rts=True, capacity_factor=0.25), False),
    "noise on the choice": (dict(k=1, noisy_gate_policy="RSample"), True),
    "jitter on the input": (dict(k=2, noisy_gate_policy="Jitter", top2_2nd_expert_sampling=False), None),
    "second expert sampled": (dict(k=2, top2_2nd_expert_sampling=True, drop_tokens=False), True),
}


@pytest.mark.parametrize("name", one_in(3, NOISY))
def test_training_samples_by_a_key(name):
    options, other_counts = NOISY[name]
    layer, x = built(True, **(dict(use_rts=False) | options)), numbers(4, 6, 8, seed=9)
    with pytest.raises(ValueError, match="key"):
        layer(x, train=True)
    first, second = (run(layer, x, None, True, jax.random.key(i)) for i in (0, 1))
    again = run(layer, x, None, True, jax.random.key(0))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(first[0] - second[0]).max() > 1e-4
    if other_counts is not None:
        assert bool((first[2] != second[2]).any()) == other_counts
    close(run(layer, x)[0], run(layer, x, key=jax.random.key(5))[0])  # evaluation samples nothing, and needs no key


def test_training_has_its_own_capacity():
    x, options = numbers(4, 6, 8, seed=9), dict(use_rts=False, min_capacity=1)
    layer = built(capacity_factor=0.25, eval_capacity_factor=2.0, **options)
    for train, factor in ((True, 0.25), (False, 2.0)):
        want, _, _ = oracle_moe(dict(k=1, eval_capacity_factor=factor), state_dict(), x)
        close(run(layer, x, None, train)[0], want)


@pytest.mark.parametrize("k", one_in(2, [1, 2, 3]))
def test_gradients_reach_the_gate_the_experts_and_the_mlp(k):
    gate = dict(k=k, use_rts=False, top2_2nd_expert_sampling=False, drop_policy="position")
    definition, state = nnx.split(MoE(8, 12, num_experts=4, use_residual=True, **gate, rngs=nnx.Rngs(1)))
    x, generator = numbers(3, 5, 8, seed=129), np.random.default_rng(8)  # no choice of an expert is near a tie

    @jax.jit
    def loss(state):
        layer = nnx.merge(definition, state)
        y, l_aux, _ = layer(x, train=True)
        routing = layer.gate(x, train=True)
        return (y**2).sum() + 0.1 * l_aux, (routing.ids, routing.keep)

    gradients, choices = jax.jit(jax.grad(loss, has_aux=True))(state)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        direction = generator.standard_normal(gradient.shape).astype(np.float32)
        ends = []
        for step in (4e-3, -4e-3):
            moved = {path: step * direction}
            value, chosen = loss(jax.tree_util.tree_map_with_path(lambda p, w, moved=moved: w + moved.get(p, 0), state))
            assert all((a == b).all() for a, b in zip(chosen, choices, strict=True)), "the loss jumps in between"
            ends.append(float(value))
        slope = float((gradient * direction).sum())
        np.testing.assert_allclose((ends[0] - ends[1]) / 8e-3, slope, rtol=2e-3, atol=5e-3)
        assert jnp.abs(gradient).sum() > 0
    assert len(jax.tree.leaves(gradients)) == 11


def test_new_layers_draw_their_weights():
    layer = MoE(8, 12, num_experts=4, k=2, use_residual=True, activation="swiglu", rngs=nnx.Rngs(0))
    assert layer.experts["gate"].shape == (4, 12, 8) and layer.residual["mix"].shape == (2, 8)
    y, _, counts = run(layer, numbers(2, 3, 8))
    assert y.shape == (2, 3, 8) and counts.sum() == 12 and np.isfinite(y).all()
    other = MoE(8, 12, num_experts=4, k=2, use_residual=True, activation="swiglu", rngs=nnx.Rngs(1))
    assert np.abs(other.gate.wg[...] - layer.gate.wg[...]).max() > 0.01
    assert all(np.abs(np.diff(w[...], axis=0)).max() > 0.01 for w in (layer.experts["up"], layer.experts["down"]))


def test_what_does_not_fit_is_refused():
    good = dict(num_experts=4, rngs=nnx.Rngs(0))
    for wrong, message in (
        (dict(k=5), "k: 5 experts per token out of num_experts 4"),
        (dict(capacity_factor=0.0), "capacity_factor: 0.0"),
        (dict(eval_capacity_factor=-1.0), "eval_capacity_factor: -1.0"),
        (dict(noisy_gate_policy="Loud"), "noisy_gate_policy: 'Loud'"),
        (dict(k=3, drop_policy="worst"), "drop_policy: 'worst'"),
        (dict(implementation="fastest"), "fastest"),
        (dict(rngs=None), "weights, rngs"),
        (dict(activation="softplus"), "softplus"),
    ):
        with pytest.raises(ValueError, match=message):
            MoE(8, 12, **(good | wrong))
    with pytest.raises(ValueError, match="intermediate_size: 0"):
        MoE(8, 0, **good)
    for x in (np.ones((2, 7), np.float32), np.float32(1)):
        with pytest.raises(ValueError, match=r"x: shape .*, expected \[..., 8\]"):
            built()(x)


def test_weights_that_do_not_fit_are_refused():
    kernels = dict(up=numbers(4, 12, 8), down=numbers(4, 8, 12), up_bias=numbers(4, 12), down_bias=numbers(4, 8))
    good = dict(gate=numbers(4, 8), experts=kernels)
    MoE(8, 12, num_experts=4, weights=good)
    for wrong, message in (
        (good | {"gate": numbers(5, 8)}, r"gate of shape \(5, 8\), expected \(4, 8\)"),
        (good | {"experts": kernels | {"up": numbers(4, 8, 12)}}, r"experts of shape .*\(4, 8, 12\).*expected"),
        (good | {"residual": {}}, "residual"),
        ({"gate": numbers(4, 8)}, r"\['gate'\], expected \['experts', 'gate'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MoE(8, 12, num_experts=4, weights=wrong)


def test_state_dicts_that_do_not_fit_are_refused():
    weights = state_dict(True)
    for change, message in (
        ({GATE: None}, "expected one deepspeed_moe.gate.wg.weight"),
        ({"coefficient.bias": None}, "missing coefficient.bias"),
        ({f"{EXPERT}2.dense_4h_to_h.bias": None}, f"missing {EXPERT}2.dense_4h_to_h.bias"),
        ({f"{EXPERT}3.dense_h_to_4h.weight": None}, f"{EXPERT}3"),
        ({f"{EXPERT}4.dense_h_to_4h.weight": numbers(12, 8)}, f"unknown .*{EXPERT}4"),
        ({"mlp.dense_4h_to_h.bias": numbers(9)}, r"\(9,\)"),
    ):
        wrong = {name: w for name, w in (weights | change).items() if w is not None}
        with pytest.raises(ValueError, match=message):
            moe_from_state_dict({"k": 1}, wrong)
    for config, message in (
        ({"k": 1, "use_residual": False}, "use_residual: False in the config, True in the weights"),
        ({"k": 1, "num_experts": 8}, "num_experts: 8 in the config, 4 in the weights"),
        ({"k": 1, "capacity": 2}, "'capacity' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_from_state_dict(config, weights)
