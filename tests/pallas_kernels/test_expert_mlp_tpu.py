"""The TPU's expert MLP in JAX's simulation of a TPU: blocks, forms, cores, int8, races, unwritten memory, and what it
moves. Routings of all kinds: test_expert_mlp. By the real compiler: test_tpu_compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens, oracle
from simulated_tpu import counted_transfers, without_races  # noqa: F401  a fixture for all tests

from pallas_kernels import make_plan, routed_mlp
from pallas_kernels.expert_mlp import tpu, tpu_tilings
from pallas_kernels.expert_mlp.api import OPERATION
from pallas_kernels.expert_mlp.tpu_kernel import NAME
from pallas_kernels.quantized import quantize

BFLOAT16 = ml_dtypes.bfloat16
GENERATIONS = tpu_tilings.GENERATIONS


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128 hidden units, of which these tests' experts have few."""
    monkeypatch.setattr(tpu_tilings, "_STEP_BYTES", 1)


@functools.partial(jax.jit, static_argnames=("tile_rows", "cores"))
def run(x, ids, weights, experts, layer=None, tile_rows=None, cores=1):
    plan = None if tile_rows is None else make_plan(ids, experts.num_experts, tile_rows)
    return tpu.interpreted(x, ids, weights, experts, plan, layer, cores=cores)


def int8(experts):
    kernels = {name: getattr(experts, name) for name in ("gate", "up", "down")}
    return dataclasses.replace(experts, **{n: None if w is None else quantize(w) for n, w in kernels.items()})


def widened(experts):
    """What int8 experts stand for."""
    kernels = {name: getattr(experts, name).dequantize(jnp.float32) for name in ("gate", "up", "down")}
    return dataclasses.replace(experts, **kernels)


def assert_standard(got, x, ids, weights, experts, layer=None):
    """The project's standard; float32 to 1e-5 of float64."""
    assert got.dtype == x.dtype and got.shape == x.shape
    want = oracle(x, ids, weights, experts, layer)
    if x.dtype == np.float32:
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    plain = oracle(x, ids, weights, experts, layer, np.float32, x.dtype)
    assert error(got, want) <= 1.2 * error(plain, want)


# tokens, rows of a tile (None: in place), hidden units (blocks of 128), make_experts' options
CASES = {
    "one token": (1, None, 256, dict(layout="out_in", layers=(2,), dtype=BFLOAT16)),
    "in place, a block that is not full": (9, None, 320, dict(layout="out_in", biases=True, dtype=BFLOAT16)),
    "in place, rows of hidden units": (9, None, 320, dict(layout="in_out", activation="relu", biases=True)),
    "gathered": (40, 16, 320, dict(layout="out_in", biases=True, dtype=BFLOAT16)),
    "gathered, rows of hidden units": (40, 16, 256, dict(layout="in_out", activation="geglu", layers=(2,))),
}


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_forms_and_blocks(name, cores):
    tokens, rows, hidden, options = CASES[name]
    x, ids, weights = make_tokens(tokens, 48, 5, 3, options.get("dtype", np.float32))
    experts = make_experts(5, 48, hidden, **options)
    layer = 1 if "layers" in options else None
    got = run(x, ids, weights, experts, layer, rows, cores)
    assert_standard(got, x, ids, weights, experts, layer)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("active", [0, 1, 2, 4])
def test_any_number_of_tiles(active, rows, cores):
    """None, one, and numbers that do not divide by the cores: what a core without work leaves behind is not read."""
    x, ids, weights = make_tokens(10, 48, 4, 1)
    ids = jnp.where(ids < active, ids, -1)
    experts = make_experts(4, 48, 256, layout="out_in")
    got = run(x, ids, weights, experts, None, rows, cores)
    assert_standard(got, x, ids, weights, experts)


@pytest.mark.parametrize("routing", ["as expected", "all", "none"])
def test_rows_that_were_not_expected_take_further_passes(routing, monkeypatch):
    """Of 96 choices 12 are expected; buffers are of 16 rows and 5 tiles more, all choices take two to three such."""
    x, ids, weights = make_tokens(48, 48, 5, 2)
    monkeypatch.setattr(tpu, "_TOGETHER", 20)  # tokens whose outputs are added up together
    inside = {"as expected": jnp.arange(48)[:, None] % 8 == 0, "all": True, "none": False}[routing]
    ids = jnp.where(inside, ids, -1)
    experts = make_experts(5, 48, 256, layout="out_in", biases=True)
    made = jax.jit(lambda ids: tpu.interpreted(x, ids, weights, experts, make_plan(ids, 5, 8), None, 12))
    assert made.trace(ids).jaxpr.pretty_print().count("while") > 0
    assert_standard(made(ids), x, ids, weights, experts)


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_int8(dtype, rows):
    x, ids, weights = make_tokens(20, 48, 5, 2, dtype)
    experts = int8(make_experts(5, 48, 320, layout="out_in", biases=True, layers=(2,), dtype=dtype))
    got = run(x, ids, weights, experts, 1, rows)
    wide = dataclasses.replace(widened(experts), **{n: getattr(experts, n) for n in ("up_bias", "down_bias")})
    assert_standard(got, x, ids, weights, jax.tree.map(lambda w: np.asarray(w, np.float32), wide), 1)


@pytest.mark.parametrize("rows", [None, 8])
def test_rows_and_idle_experts_without_numbers_stay_alone(rows):
    x, ids, weights = (np.array(a) for a in make_tokens(17, 48, 5, 2))
    ids[ids == 3] = -1
    experts = jax.tree.map(np.array, make_experts(5, 48, 320, layout="out_in", biases=True))
    clean = run(x, ids, weights, experts, None, rows)
    for array in jax.tree.leaves(experts):
        array[3] = np.nan
    x[4] = np.nan
    got = run(x, ids, weights, experts, None, rows)
    others = np.arange(17) != 4
    np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(clean)[others])
    assert np.isnan(np.asarray(got)[4]).all()


def test_an_active_expert_without_numbers_reaches_its_own_tokens_only():
    x, ids, weights = (np.array(a) for a in make_tokens(9, 48, 5, 2))
    experts = jax.tree.map(np.array, make_experts(5, 48, 128, layout="out_in"))
    experts.down[2] = np.inf
    got = np.asarray(run(x, ids, weights, experts))
    reached = (ids == 2).any(1)
    assert reached.any() and not np.isfinite(got[reached]).any() and np.isfinite(got[~reached]).all()


@pytest.mark.parametrize("rows", [None, 8])
def test_gradients_are_those_of_the_tile_loop(rows, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a plan of placeholders goes through `custom_vjp`
    x, ids, weights = make_tokens(12, 32, 4, 2)
    experts = make_experts(4, 32, 48, layout="out_in", biases=True)
    plan = None if rows is None else make_plan(ids, 4, rows)

    def loss(x, weights, experts, implementation):
        y = routed_mlp(x, ids, weights, experts, plan=plan, implementation=implementation)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    got, want = (jax.grad(loss, (0, 1, 2))(x, weights, experts, name) for name in ("tpu_interpreted", "xla_tiles"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), got, want)


# ---------------------------------------------------------------- what is moved


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_few_tokens_move_their_experts_weights_once(tokens, kind, cores, monkeypatch):
    """At most 1.05 times the weights of the active experts and the activations; whatever the routing."""
    x, ids, weights = make_tokens(tokens, 256, 16, 2, BFLOAT16)
    ids = jnp.where(ids % 3 == 0, -1, ids)
    experts = make_experts(16, 256, 512, layout="out_in", dtype=BFLOAT16)
    experts = int8(experts) if kind == "int8" else experts
    with counted_transfers(monkeypatch) as moved:
        y = tpu.interpreted(x, ids, weights, experts, None, None, cores=cores)
    active = len(set(np.asarray(ids).ravel().tolist()) - {-1})
    each = sum(leaf.nbytes for leaf in jax.tree.leaves(experts)) // 16
    activations = x.nbytes + ids.nbytes + weights.nbytes + y.nbytes
    written = y.nbytes if cores == 1 else cores * 4 * y.size  # each core's part of the sum, in float32
    assert active * each <= sum(moved.values()) + written <= 1.05 * (active * each + activations)


# ---------------------------------------------------------------- choices


def test_it_is_chosen_on_tpus_where_it_takes_the_call():
    x, ids, weights = make_tokens(4, 64, 5, 2, BFLOAT16)
    args = lambda experts, x=x, plan=None: (x, ids, weights, experts, plan, None, None)
    plain = make_experts(5, 64, 128, layout="out_in", dtype=BFLOAT16)
    assert OPERATION.chosen("tpu", *args(plain)) == OPERATION.chosen("tpu", *args(int8(plain))) == "tpu"
    assert OPERATION.chosen("cuda", *args(plain)) == "mosaic_gpu"
    grouped = dataclasses.replace(plain, up=quantize(plain.up, 32))
    for other, words in [
        (args(grouped), "takes int8 with one scale for each output, up has scales (5, 128, 2)"),
        (args(plain, x.astype(np.float16)), "takes bfloat16 and float32, x is float16"),
        (args(plain, x.astype(np.float32)), "x and kernels must have one dtype, got float32 and gate of bfloat16"),
        (args(plain, plan=make_plan(ids, 5, 3)), "a multiple of 16 rows in bfloat16, the plan has 3"),
    ]:
        assert OPERATION.chosen("tpu", *other) == "xla_tiles" and words in tpu.refuse(*other)


def test_a_program_for_tpus_holds_it():
    x, ids, weights = make_tokens(4, 64, 5, 2, BFLOAT16)
    experts = make_experts(5, 64, 128, layout="out_in", dtype=BFLOAT16)
    lower = lambda platform: jax.jit(routed_mlp).trace(x, ids, weights, experts).lower(lowering_platforms=(platform,))
    assert NAME in lower("tpu").as_text() and NAME not in lower("cpu").as_text()
    named = lambda *args: routed_mlp(*args, implementation="tpu")
    with pytest.raises(ValueError, match="routed_mlp as 'tpu' runs on tpu, the program is made for cpu"):
        jax.jit(named).trace(x, ids, weights, experts).lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"])
def test_generations_by_name(kind):
    name = {"TPU v5": "v5p", "TPU7x": "v7"}.get(kind) or kind.removeprefix("TPU ").replace(" lite", "e")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=2, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert tpu_tilings.generation() == GENERATIONS[name]
    assert tpu_tilings.generation().cores == 1


@pytest.mark.parametrize("name", GENERATIONS)
def test_tilings(name, monkeypatch):
    monkeypatch.undo()
    target = GENERATIONS[name]
    for num, width, hidden, choices in [(8, 4096, 14336, 2), (128, 2048, 768, 8), (256, 7168, 2048, 8)]:
        experts = jax.eval_shape(lambda: make_experts(2, 128, 128, layout="out_in", dtype=BFLOAT16))
        shapes = {n: jax.ShapeDtypeStruct((num, hidden, width), jnp.bfloat16) for n in ("gate", "up")}
        shapes["down"] = jax.ShapeDtypeStruct((num, width, hidden), jnp.bfloat16)
        experts = dataclasses.replace(experts, **shapes)
        found = [tpu_tilings.choose(2**i, choices, experts, 2, target) for i in range(15)]
        assert found[0].in_place and found[5].in_place and not found[-1].in_place
        first = [one.in_place for one in found].index(False)
        assert not any(one.in_place for one in found[first:])  # once gathered, always
        for one in found:
            assert tpu_tilings.vmem_bytes(one, width, 6.0, 2) <= tpu_tilings.vmem_limit(target)
            assert hidden % one.hidden == 0 and one.hidden % 128 == 0


def test_active_experts():
    rng = np.random.default_rng(0)
    for shape, num in [((1, 8), 128), ((64, 2), 8), ((5, 3), 4)]:
        ids = rng.integers(-2, num + 2, shape)
        got, count = tpu.active(jnp.asarray(ids), num)
        want = sorted({int(i) for i in ids.ravel() if 0 <= i < num})
        assert got[: int(count)].tolist() == want and int(count) == len(want) and len(got) == min(num, ids.size)
        assert (np.asarray(got) < num).all()
