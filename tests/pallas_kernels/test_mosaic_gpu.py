"""The GPU's expert MLP in JAX's interpreter, against `expert_oracle`. Lowering: test_mosaic_gpu_lowering."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens, oracle
from test_expert_mlp_gradients import arrays_of, dense_gradients

from pallas_kernels import ACTIVATIONS, compat, make_plan, routed_mlp
from pallas_kernels.expert_mlp import mosaic_block

pytestmark = pytest.mark.skipif(not compat.INTERPRETS_GPU, reason="JAX's interpreter runs these kernels from 0.11 on")
BFLOAT16 = ml_dtypes.bfloat16

# tokens, E, choices, D, F and make_experts' options
CASES = {
    "in place": (7, 5, 2, 128, 64, dict(dtype=BFLOAT16, activation="swiglu", biases=True)),
    "gathered": (24, 5, 2, 64, 64, dict(dtype=np.float16, activation="relu", layout="out_in")),
    "one token of a stack": (
        *(1, 5, 3, 64, 192),
        dict(dtype=BFLOAT16, activation="geglu", layout="out_in", biases=True, layers=(3,)),
    ),
    "in place, but no whole blocks of 8": (13, 3, 3, 64, 64, dict(dtype=BFLOAT16, activation="gelu")),
    "k = E": (5, 3, 3, 192, 64, dict(dtype=np.float16, activation="swiglu_clamped", biases=True)),
}


@functools.partial(jax.jit, static_argnames=("tile_rows", "layer"))
def run(x, ids, weights, experts, layer=None, tile_rows=None):
    return call(x, ids, weights, experts, layer, tile_rows)


@functools.partial(jax.jit, static_argnames="tile_rows")
def run_layer(x, ids, weights, experts, layer, tile_rows=None):
    """The same, the layer traced."""
    return call(x, ids, weights, experts, layer, tile_rows)


def call(x, ids, weights, experts, layer, tile_rows):
    plan = None if tile_rows is None else make_plan(ids, experts.num_experts, tile_rows)
    return routed_mlp(x, ids, weights, experts, plan=plan, layer=layer, implementation="mosaic_gpu_interpreted")


def make(tokens, num, choices, width, hidden, options):
    x, ids, weights = (np.array(a) for a in make_tokens(tokens, width, num, choices, options["dtype"]))
    return x, ids, weights, make_experts(num, width, hidden, **options)


def assert_standard(got, x, ids, weights, experts, layer=None):
    """The project's standard: 1.2 times the error of plain float32 accumulation with rounding in between."""
    assert got.dtype == x.dtype and got.shape == x.shape
    want = oracle(x, ids, weights, experts, layer)
    plain = oracle(x, ids, weights, experts, layer, np.float32, x.dtype)
    assert error(got, want) <= 1.2 * error(plain, want)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    operands = make(*CASES[name])
    if "layers" in CASES[name][-1]:
        assert_standard(run_layer(*operands, np.int32(1)), *operands, layer=1)
    else:
        assert_standard(run(*operands), *operands)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, tokens):
    layout = ("in_out", "out_in")[ACTIVATIONS.index(activation) % 2]
    operands = make(tokens, 5, 2, 64, 128, dict(dtype=dtype, activation=activation, layout=layout, biases=True))
    assert_standard(run(*operands), *operands)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("width, hidden", [(192, 64), (64, 192), (320, 448)])
def test_widths_that_strips_do_not_divide(width, hidden, layout, tokens):
    operands = make(tokens, 3, 2, width, hidden, dict(dtype=BFLOAT16, layout=layout))
    assert_standard(run(*operands), *operands)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["gate_bias", "up_bias", "down_bias"])
def test_a_bias_alone(given):
    x, ids, weights, experts = make(6, 4, 2, 64, 64, dict(dtype=BFLOAT16, biases=True))
    others = {"gate_bias", "up_bias", "down_bias"} - {given}
    operands = x, ids, weights, dataclasses.replace(experts, **dict.fromkeys(others))
    assert_standard(run(*operands), *operands)


# Rows of a tile that are more than the tokens, as many, and fewer; two accumulators of 160 rows.
@pytest.mark.parametrize(
    "tokens, tile_rows",
    [(5, 16), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(24, 24), (40, 16), (170, 160), (33, 64)])],
)
def test_a_given_plan(tokens, tile_rows):
    x, ids, weights, experts = make(tokens, 5, 2, 64, 64, dict(dtype=BFLOAT16, layout="out_in"))
    ids[2] = ids[2, 0]  # in place, duplicates share a row
    assert_standard(run(x, ids, weights, experts, tile_rows=tile_rows), x, ids, weights, experts)


@pytest.mark.slow
def test_the_layer_index_may_be_static():
    operands = make(*CASES["one token of a stack"])
    for layer in (0, 2):
        static = run(*operands, layer=layer)
        np.testing.assert_array_equal(static, run_layer(*operands, np.int32(layer)))
        assert_standard(static, *operands, layer=layer)


@pytest.mark.parametrize("name", ["in place", "gathered"])
class TestRoutings:
    """Choices of every kind, through the functions that `test_values` has compiled."""

    def test_experts_without_rows(self, name):
        x, ids, weights, experts = make(*CASES[name])
        ids = np.random.default_rng(0).choice([0, 3], ids.shape).astype(np.int32)  # duplicates in a row as well
        assert_standard(run(x, ids, weights, experts), x, ids, weights, experts)

    def test_one_expert_takes_everything(self, name):
        x, ids, weights, experts = make(*CASES[name])
        ids[:] = 4
        assert_standard(run(x, ids, weights, experts), x, ids, weights, experts)

    def test_ids_outside_add_nothing_whatever_their_weight(self, name):
        x, ids, weights, experts = make(*CASES[name])
        ids[::3, 0], ids[2, 1] = 5, np.iinfo(np.int32).max
        ids[1], x[1] = [-1, np.iinfo(np.int32).min], np.nan  # a padded token: no choice, and garbage for a row
        outside = (ids < 0) | (ids >= 5)
        clean = np.where(outside, 0, weights)
        got = np.asarray(run(x, ids, np.where(outside, np.nan, weights), experts))
        np.testing.assert_array_equal(got, run(x, ids, clean, experts))
        assert (got[1] == 0).all()
        x[1] = 0
        assert_standard(got, x, ids, clean, experts)

    def test_no_choice_inside_gives_zeros(self, name):
        x, ids, weights, experts = make(*CASES[name])
        got = run(np.full_like(x, np.nan), np.full_like(ids, -1), np.full_like(weights, np.nan), experts)
        assert (np.asarray(got) == 0).all()

    @pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # in the interpreter
    @pytest.mark.parametrize("poison", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
    def test_a_poisoned_row_stays_alone(self, name, poison):
        """The NaN gets through `relu` as well."""
        x, ids, weights, experts = make(*CASES[name])
        clean = np.asarray(run(x, ids, weights, experts))
        x[4, 7] = poison
        got, others = np.asarray(run(x, ids, weights, experts)), np.arange(len(x)) != 4
        np.testing.assert_array_equal(got[others], clean[others])
        assert not np.isfinite(got[4]).any()

    def test_a_poisoned_weight_stays_with_its_token_and_a_zero_is_a_choice(self, name):
        x, ids, weights, experts = make(*CASES[name])
        clean = np.asarray(run(x, ids, weights, experts))
        weights[4, 1] = np.nan
        x[2, 0], weights[2, 0] = np.nan, 0
        got, others = np.asarray(run(x, ids, weights, experts)), ~np.isin(np.arange(len(x)), [2, 4])
        np.testing.assert_array_equal(got[others], clean[others])
        assert np.isnan(got[[2, 4]]).all()

    def test_an_idle_experts_weights_are_not_read(self, name):
        x, ids, weights, experts = make(*CASES[name])
        ids[:] = [0, 3]
        poisoned = jax.tree.map(np.array, experts)
        for array in jax.tree.leaves(poisoned):
            array[[1, 2, 4]] = np.nan
        np.testing.assert_array_equal(run(x, ids, weights, poisoned), run(x, ids, weights, experts))

    def test_the_order_and_the_neighbours_of_a_token_do_not_matter(self, name):
        x, ids, weights, experts = make(*CASES[name])
        clean = np.asarray(run(x, ids, weights, experts))
        order = np.random.default_rng(1).permutation(len(x))
        np.testing.assert_array_equal(run(x[order], ids[order], weights[order], experts), clean[order])
        others = np.where(np.arange(len(x))[:, None] == 3, ids, 4)
        np.testing.assert_array_equal(run(x, others, weights, experts)[3], clean[3])


def test_one_token_with_ids_outside():
    x, ids, weights, experts = make(*CASES["one token of a stack"])
    for some in ([-1, 0, 5], [-1, -1, -1], [2, 2, 9]):
        ids = np.array([some], np.int32)
        inside = (ids >= 0) & (ids < 5)
        got = run_layer(x, ids, np.where(inside, weights, np.nan), experts, np.int32(2))
        if inside.any():
            assert_standard(got, x, ids, np.where(inside, weights, 0), experts, layer=2)
        else:
            assert (np.asarray(got) == 0).all()


@pytest.mark.parametrize("tokens, choices", [(0, 2), (3, 0)])
def test_nothing_to_do(tokens, choices):
    x, ids = np.ones((tokens, 64), BFLOAT16), np.zeros((tokens, choices), np.int32)
    got = run(x, ids, ids.astype(np.float32), make_experts(5, 64, 64, dtype=BFLOAT16))
    assert got.shape == x.shape and got.dtype == BFLOAT16 and (np.asarray(got) == 0).all()


@pytest.mark.parametrize(
    "sizes", [(1, 8), pytest.param((2, 3, 4, 5, 6, 7), marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_the_batch_does_not_change_a_tokens_bits(sizes):
    """One token by itself, in place, and gathered: the same to the bit, given the same ids and weights."""
    x, ids, weights, experts = make(24, 5, 2, 64, 64, CASES["gathered"][-1])
    whole = np.asarray(run(x, ids, weights, experts))
    for tokens in sizes:
        some = slice(24 - tokens, 24)
        np.testing.assert_array_equal(run(x[some], ids[some], weights[some], experts), whole[some])


def test_erf_is_exact_enough_to_be_rounded():
    x = np.concatenate([np.linspace(-6, 6, 4001), [0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    want = np.array([math.erf(v) for v in x.astype(np.float64)])
    np.testing.assert_allclose(mosaic_block.simple_erf(jnp.asarray(x)), want, atol=1e-6)


@pytest.mark.parametrize(
    "tokens, choices, activation",
    [(6, 2, "swiglu"), pytest.param(20, 2, "gelu_tanh", marks=pytest.mark.slow)],
)
def test_the_gradient_is_that_of_xla_tiles(tokens, choices, activation):
    """To the bit; and near the error of a dense float32 backward pass that rounds what the forward pass rounds."""
    options = dict(dtype=BFLOAT16, activation=activation, layout="out_in", biases=True)
    x, ids, weights, experts = make(tokens, 5, choices, 64, 64, options)
    ids[0], ids[1, 1], ids[2, 0] = 2, -1, 5
    cotangent = np.random.default_rng(8).standard_normal(x.shape).astype(BFLOAT16)

    @functools.partial(jax.jit, static_argnums=3)
    def gradients(x, weights, experts, implementation):
        def loss(x, weights, experts):
            y = routed_mlp(x, ids, weights, experts, implementation=implementation)
            return (y.astype(jnp.float32) * cotangent).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(x, weights, experts)

    both = [gradients(x, weights, experts, name) for name in ("mosaic_gpu_interpreted", "xla_tiles")]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=0.01)  # the forward pass is not left out
    jax.tree.map(np.testing.assert_array_equal, both[0][1], both[1][1])
    d_x, d_weights, d_experts = both[0][1]
    got = {"x": d_x, "weights": d_weights, **arrays_of(d_experts)}
    operands = x, weights, experts, cotangent, ids, None
    plain = dense_gradients(jnp.float32, *operands, narrow=BFLOAT16)
    with jax.enable_x64(True):
        want = dense_gradients(jnp.float64, *operands)
    assert set(got) == set(want)
    for field in want:
        dtype = np.float32 if field == "weights" else BFLOAT16
        assert got[field].dtype == dtype
        # each choice's share of a row's gradient is rounded before they are added up, which `plain` does not do
        bound = 1.4 if field == "x" else 1.2
        assert error(got[field], want[field]) <= bound * error(plain[field].astype(dtype), want[field]), field
