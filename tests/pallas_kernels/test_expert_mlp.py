"""One suite over every implementation of `routed_mlp`, against `expert_oracle`."""

import functools
import itertools

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens, oracle
from simulated_tpu import without_races  # noqa: F401  a fixture for all tests

from pallas_kernels import ACTIVATIONS, Plan, make_plan, prepare, routed_mlp
from pallas_kernels.expert_mlp import xla_tiles
from pallas_kernels.expert_mlp.api import OPERATION

#: Those that run on a CPU, the TPU's kernel in JAX's simulation; the others have suites of their own (test_mosaic_gpu,
#: test_expert_mlp_row).
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform and "interpreted" not in name]
ANYWHERE.append("tpu_interpreted")
each = pytest.mark.parametrize("implementation", ANYWHERE)
BFLOAT16 = ml_dtypes.bfloat16
D, F = 24, 40

# Every activation, layout, dtype and awkward size, with and without biases and a stack; few, since each is compiled.
# tokens, E, choices, activations, make_experts' options
CASES = {
    "13 tokens": (13, 5, 2, ["swiglu"], dict(dtype=np.float32, layout="out_in", biases=True)),
    "more experts than tokens": (13, 60, 3, ["geglu", "relu"], dict(dtype=np.float32, layout="in_out")),
    "300 tokens": (300, 7, 2, ["reglu", "gelu"], dict(dtype=BFLOAT16, layout="in_out", biases=True)),
    "k = E": (7, 5, 5, ["geglu_tanh", "silu"], dict(dtype=np.float16, layout="out_in")),
    "one token of a stack": (
        *(1, 60, 4, ["swiglu_clamped", "gelu_tanh"]),
        dict(dtype=BFLOAT16, layout="out_in", biases=True, layers=(3,)),
    ),
}


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, ids, weights, all_experts, layer, implementation):
    """`routed_mlp` with each of `all_experts`."""
    return [routed_mlp(x, ids, weights, e, layer=layer, implementation=implementation) for e in all_experts]


def make(name):
    """`x`, `ids`, `weights`, a list of experts and the layer of a case."""
    tokens, num, choices, activations, options = CASES[name]
    x, ids, weights = (np.array(a) for a in make_tokens(tokens, D, num, choices, options["dtype"]))
    experts = [make_experts(num, D, F, activation=activation, **options) for activation in activations]
    return x, ids, weights, experts, np.array(1, np.int32) if "layers" in options else None


def base():
    """The operands of the first case, which is compiled for every implementation anyway."""
    x, ids, weights, [experts], _ = make("13 tokens")
    return x, ids, weights, experts


def assert_standard(got, x, ids, weights, experts, layer=None):
    """The project's standard: 1.2 times the error of plain float32 accumulation with rounding in between."""
    assert got.dtype == x.dtype and got.shape == x.shape
    want = oracle(x, ids, weights, experts, layer)
    plain = oracle(x, ids, weights, experts, layer, np.float32, x.dtype)
    assert error(got, want) <= 1.2 * error(plain, want), experts.activation.name


@each
@pytest.mark.parametrize("name", CASES)
def test_values(name, implementation):
    x, ids, weights, all_experts, layer = make(name)
    if implementation == "tpu_interpreted" and x.dtype == np.float16:
        with pytest.raises(ValueError, match="takes bfloat16 and float32, x is float16"):
            run(x, ids, weights, all_experts, layer, implementation)
        return
    all_got = run(x, ids, weights, all_experts, layer, implementation)
    for got, experts in zip(all_got, all_experts, strict=True):
        assert_standard(got, x, ids, weights, experts, layer)


def test_every_activation_has_a_case():
    assert sorted(name for case in CASES.values() for name in case[3]) == sorted(ACTIVATIONS)


@each
class TestRoutings:
    """Choices of every kind, through the functions that `test_values` has compiled."""

    def call(self, implementation, **changed):
        operands = {**dict(zip(("x", "ids", "weights", "experts"), base(), strict=True)), **changed}
        x, ids, weights, experts = operands.values()
        return run(x, ids, weights, [experts], None, implementation)[0], operands

    def test_experts_without_rows(self, implementation):
        ids = np.random.default_rng(0).choice([0, 3], (13, 2)).astype(np.int32)  # duplicates in a row as well
        got, operands = self.call(implementation, ids=ids)
        assert_standard(got, **operands)

    @pytest.mark.parametrize("expert", [0, 2, 4])
    def test_one_expert_takes_everything(self, implementation, expert):
        got, operands = self.call(implementation, ids=np.full((13, 2), expert, np.int32))
        assert_standard(got, **operands)

    @pytest.mark.parametrize("outside", [-1, -5, 5, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
    def test_ids_outside_add_nothing_whatever_their_weight(self, implementation, outside):
        x, ids, weights, _ = base()
        ids[::3, 0] = outside
        ids[1], x[1] = outside, np.nan  # a padded token: no choice at all, and garbage for a row
        clean = np.where(ids == outside, 0, weights)
        poisoned = np.where(ids == outside, np.nan, weights)
        got, operands = self.call(implementation, ids=ids, weights=poisoned, x=x)
        without, _ = self.call(implementation, ids=ids, weights=clean, x=x)
        np.testing.assert_array_equal(got, without)
        assert (np.asarray(got)[1] == 0).all()
        x[1] = 0
        assert_standard(got, **{**operands, "weights": clean, "x": x})

    def test_no_choice_inside_gives_zeros(self, implementation):
        got, _ = self.call(implementation, ids=np.full((13, 2), -1, np.int32), x=np.full((13, D), np.nan, np.float32))
        assert (np.asarray(got) == 0).all()

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    def test_a_poisoned_row_stays_alone(self, implementation, poison):
        x = base()[0]
        clean, _ = self.call(implementation)
        x[4, 7] = poison
        got, _ = self.call(implementation, x=x)
        others = np.arange(13) != 4
        np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(clean)[others])
        assert not np.isfinite(np.asarray(got)[4]).any()

    def test_a_poisoned_weight_stays_with_its_token(self, implementation):
        weights = base()[2]
        clean, _ = self.call(implementation)
        weights[4, 1] = np.nan
        got, _ = self.call(implementation, weights=weights)
        others = np.arange(13) != 4
        np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(clean)[others])
        assert np.isnan(np.asarray(got)[4]).all()

    def test_a_zero_weight_is_not_a_dropped_choice(self, implementation):
        x, _, weights, _ = base()
        x[4, 0], weights[4, 0] = np.nan, 0
        got, _ = self.call(implementation, x=x, weights=weights)
        assert np.isnan(np.asarray(got)[4]).all()

    def test_the_order_of_the_tokens_does_not_matter(self, implementation):
        x, ids, weights = base()[:3]
        order = np.random.default_rng(1).permutation(13)
        clean, _ = self.call(implementation)
        got, _ = self.call(implementation, x=x[order], ids=ids[order], weights=weights[order])
        np.testing.assert_array_equal(got, np.asarray(clean)[order])

    @pytest.mark.parametrize("tokens, choices", [(0, 2), (3, 0)])
    def test_nothing_to_do(self, implementation, tokens, choices):
        x, ids = np.ones((tokens, D), np.float32), np.zeros((tokens, choices), np.int32)
        got = routed_mlp(x, ids, ids.astype(np.float32), base()[3], implementation=implementation)
        assert got.shape == x.shape and got.dtype == np.float32 and (np.asarray(got) == 0).all()

    def test_the_layer_index_may_be_static(self, implementation):
        x, ids, weights, _ = base()
        stack = make_experts(5, D, F, layers=(3,), activation="gelu_tanh")
        both = jax.jit(
            lambda x, traced: [
                routed_mlp(x, ids, weights, stack, layer=layer, implementation=implementation) for layer in (2, traced)
            ]
        )
        static, traced = both(x, np.array(2, np.int32))
        np.testing.assert_array_equal(static, traced)
        assert_standard(traced, x, ids, weights, jax.tree.map(lambda w: np.asarray(w)[2], stack))

    def test_a_given_plan(self, implementation):
        x, ids, weights, experts = base()
        both = jax.jit(
            lambda *operands: [
                routed_mlp(*operands, plan=make_plan(operands[1], 5, tile_rows), implementation=implementation)
                for tile_rows in (8 if implementation == "tpu_interpreted" else 3, 16)  # several tiles; in place
            ]
        )
        ids[2] = ids[2, 0]  # in place, duplicates share a row
        for got in both(x, ids, weights, experts):
            assert_standard(got, x, ids, weights, experts)


def tiles(x, ids, weights, experts):
    """What `run` has compiled already."""
    return np.asarray(run(x, ids, weights, [experts], None, "xla_tiles")[0])


def test_the_batch_does_not_change_a_tokens_bits():
    """With the same rows per tile, a token's output is the same to the bit: in any batch, at any place in it, whatever
    its neighbours chose. (Tiles of other sizes may sum in another order. Held on the CPU by XLA, not promised by it.)
    """
    x, ids, weights, experts = base()
    in_tiles_of_8 = jax.jit(lambda x, ids, *rest: routed_mlp(x, ids, *rest, plan=make_plan(ids, 5, 8)))
    whole = tiles(x, ids, weights, experts)
    np.testing.assert_array_equal(in_tiles_of_8(x, ids, weights, experts), whole)  # the tile size it has by itself
    for start in (0, 5, 6):  # seven tokens: in place
        some = slice(start, start + 7)
        np.testing.assert_array_equal(in_tiles_of_8(x[some], ids[some], weights[some], experts), whole[some])
    others = np.where(np.arange(13)[:, None] == 9, ids, 4)
    np.testing.assert_array_equal(tiles(x, others, weights, experts)[9], whole[9])


@pytest.mark.parametrize("tokens, num, choices", [(150, 3, 1), (150, 20, 2), (60, 20, 1), (17, 20, 3)])
def test_every_width_of_a_tile(tokens, num, choices):
    """Even and uneven loads: tiles of one row to full ones, several of one expert, experts without any."""
    widths = xla_tiles.row_widths(xla_tiles.tile_rows(tokens, choices, num), tokens * choices / num, 12.0 * D * F)
    assert len(widths) > 1 or tokens * choices <= 2 * num
    x, ids, weights = (np.array(a) for a in make_tokens(tokens, D, num, choices, np.float32))
    experts = make_experts(num, D, F, layout="out_in", biases=True)
    few = np.arange(choices) + np.zeros_like(ids)
    grown = np.searchsorted(np.cumsum(2 ** np.arange(num)), np.arange(1, tokens + 1))[:, None] + np.arange(choices)
    for chosen in (ids, few, grown % num, np.where(ids % 2, num, ids)):
        assert_standard(tiles(x, chosen.astype(np.int32), weights, experts), x, chosen, weights, experts)


def test_an_idle_experts_weights_are_not_read():
    """What `xla_ragged` cannot: on a CPU it multiplies every expert's weights by zeros, also those that are NaN."""
    x, _, weights, experts = base()
    ids = np.tile(np.array([0, 3], np.int32), (13, 1))
    poisoned = jax.tree.map(np.array, experts)
    for array in jax.tree.leaves(poisoned):
        array[[1, 2, 4]] = np.nan
    np.testing.assert_array_equal(tiles(x, ids, weights, poisoned), tiles(x, ids, weights, experts))


@pytest.mark.parametrize("num, activation, biases", [(20, "swiglu", True), (20, "relu", False), (24, "gelu", True)])
def test_all_experts_in_one_product(num, activation, biases):
    """Where most experts have few rows. The loop runs rows beyond those, and all where most experts are idle."""
    tokens, choices = 60, 2
    size = xla_tiles.tile_rows(tokens, choices, num)
    assert xla_tiles.batched_rows(size, tokens * choices / num) == 16
    x, ids, weights = (np.array(a) for a in make_tokens(tokens, D, num, choices, np.float32))
    experts = make_experts(num, D, F, activation=activation, layout="out_in", biases=biases)
    even = (np.arange(tokens * choices) % num).reshape(ids.shape)
    cases = {
        "even": even,
        "as full as it gets": np.where(np.arange(tokens * choices).reshape(ids.shape) < 16, 0, 1 + even % (num - 1)),
        "one row too many": np.where(np.arange(tokens * choices).reshape(ids.shape) < 17, 0, 1 + even % (num - 1)),
        "two tiles of one expert": np.where(np.arange(tokens)[:, None] < 50, [0, 1], even),
        "most are idle": ids % 8,
        "some are idle, some take no row": np.where(even % 5 == 4, num, even),
    }
    for name, chosen in cases.items():
        got = tiles(x, chosen.astype(np.int32), weights, experts)
        assert_standard(got, x, chosen, weights, experts)
        assert np.isfinite(got).all(), name


def test_in_one_product_nan_stays_where_it_is():
    """An idle expert's weights reach no row, a token's row no other."""
    x, _, weights = (np.array(a) for a in make_tokens(60, D, 20, 2, np.float32))
    experts = make_experts(20, D, F, layout="out_in", biases=True)
    ids = (np.arange(120) % 15).reshape(60, 2).astype(np.int32)
    want = tiles(x, ids, weights, experts)
    poisoned = jax.tree.map(np.array, experts)
    for array in jax.tree.leaves(poisoned):
        array[15:] = np.nan
    x[7] = np.nan
    got = tiles(x, ids, weights, poisoned)
    others = np.arange(60) != 7
    np.testing.assert_array_equal(got[others], want[others])
    assert np.isnan(got[7]).all()


def test_kernels_read_in_pieces(monkeypatch):
    sizes = []
    monkeypatch.setattr(xla_tiles, "piece_rows", lambda out, *_: sizes.append(out) or out // 4)
    x, ids, weights, experts = base()
    got = jax.jit(lambda *operands: routed_mlp(*operands, implementation="xla_tiles"))(x, ids, weights, experts)
    assert set(sizes) == {D, F}
    assert_standard(got, x, ids, weights, experts)


def test_a_piece_divides_the_kernel_and_fits_the_cache():
    outs = (1, 7, 768, 1024, 1031, 1408, 4096, 14336)
    for out, row_bytes, columns in itertools.product(outs, (64, 2048, 8192, 57344), (8, 80)):
        rows = xla_tiles.piece_rows(out, row_bytes, columns)
        assert out % rows == 0 and (rows == out or rows * row_bytes <= (4 if columns == 8 else 8) << 20)
    assert xla_tiles.piece_rows(14336, 16384, 80) < 14336


def test_prepare_swaps_the_kernels_once():
    experts = make_experts(5, D, F, biases=True, layers=(2,))
    swapped = prepare(experts)
    assert (experts.layout, swapped.layout, swapped.activation) == ("in_out", "out_in", experts.activation)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(getattr(swapped, name), np.swapaxes(getattr(experts, name), -1, -2))
    for name in ("gate_bias", "up_bias", "down_bias"):
        assert getattr(swapped, name) is getattr(experts, name)
    assert prepare(swapped) is prepare(swapped, "xla_tiles") is swapped
    assert prepare(experts, "xla_ragged") is prepare(experts, "tpu") is experts
    assert prepare(make_experts(5, D, F, activation="relu")).gate is None
    with pytest.raises(ValueError, match="implementation: 'x' is no implementation of routed_mlp"):
        prepare(experts, "x")


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(x=np.zeros((13, F), np.float32)), r"x: shape \(13, 40\), expected \[G, 24\]"),
        (dict(x=np.zeros(D, np.float32)), r"x: shape \(24,\), expected \[G, 24\]"),
        (dict(x=np.zeros((13, D), int)), "x: dtype int"),
        (dict(ids=np.zeros((12, 2), int)), r"ids and weights: shapes \(12, 2\) and \(13, 2\), expected \[13, A\]"),
        (dict(ids=np.zeros(13, int)), r"ids and weights: shapes \(13,\)"),
        (dict(ids=np.zeros((13, 2), np.float32)), "ids: dtype float32"),
        (dict(weights=np.zeros((13, 1), np.float32)), r"ids and weights: .* \(13, 1\)"),
        (dict(expected=-1), "expected: -1 ids"),
        (dict(layer=0), "layer: experts of shape .* takes no layer index, got 0"),
        (dict(experts=make_experts(5, D, F, layers=(3,))), "layer: experts of shape .* needs layer index, got None"),
        (dict(experts=make_experts(5, D, F, layers=(3,)), layer=3), "layer: 3 of 3 layers"),
        (dict(experts=make_experts(5, D, F, layers=(3,)), layer=np.int32(-1)), "layer: -1 of 3 layers"),
        (dict(plan=(7, 2)), r"plan: made for ids of shape \(7, 2\), got \(13, 2\)"),
        (
            dict(implementation="cuda"),
            "'cuda' is no implementation of routed_mlp; there are: triton_row, mosaic_gpu, tpu, xla_tiles, xla_ragged",
        ),
        (dict(implementation="cuda", tokens=0), "'cuda' is no implementation of routed_mlp"),
    ],
)
def test_refusals(monkeypatch, changed, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    changed = dict(changed)
    x, ids, weights, experts = base()
    if "plan" in changed:
        slot, rest = np.zeros(changed["plan"], np.int32), np.zeros(8, np.int32)
        changed["plan"] = Plan(rest, slot, rest[:1], rest[0], tile_rows=8, in_place=False)
    tokens = slice(changed.pop("tokens", 13))
    with pytest.raises(ValueError, match=message):
        routed_mlp(**{**dict(x=x[tokens], ids=ids[tokens], weights=weights[tokens], experts=experts), **changed})
