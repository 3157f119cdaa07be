"""The loss of training against logits and routing of a plain call, and its gradients on meshes against one device's."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_models import only

from moe_jax import Model, ModelConfig, make_mesh, shard
from moe_jax.router import describe
from moe_jax.train import Data, Optimizer, Routing, Settings, Training

CONFIGS = Path(__file__).parents[3] / "configs" / "tiny"
FAMILIES = sorted(path.stem for path in CONFIGS.glob("*.json"))
LENGTH = 12


def training(model, routing=None, batch=4, **settings):
    data = Data(corpus="", length=LENGTH, batch_size=batch)
    given = {"model": "", "data": data, "steps": 4, "routing": routing or Routing(balance=0.1, z=0.01)} | settings
    return Training(model.architecture, Settings(**given), model.sharding, model.implementation)


@functools.cache
def model_of(family):
    return Model.initialize(ModelConfig.from_json_file(CONFIGS / f"{family}.json"), seed=2)


def windows_of(model, rows=4):
    return np.random.default_rng(5).integers(2, model.architecture.vocab_size, (rows, LENGTH + 1), np.int32)


@pytest.mark.parametrize("family", only(["deepseek_v3", "gpt_oss", "llama4"], FAMILIES))
def test_loss_is_that_of_a_plain_call(family):
    model = model_of(family)
    windows = windows_of(model)
    record = model(windows[:, :-1], return_record=True)
    chances = jax.nn.log_softmax(record.logits, -1)
    want = -np.take_along_axis(np.asarray(chances), windows[:, 1:, None], -1).mean()
    total, losses = training(model).evaluate(model.arrays(), windows)
    np.testing.assert_allclose(losses.cross_entropy, want, rtol=2e-6)
    router = model.architecture.block.router
    if router is None:
        assert losses.counts.size == 0 and float(total) == float(losses.cross_entropy)
        return
    np.testing.assert_allclose(total, losses.cross_entropy + 0.1 * losses.balance + 0.01 * losses.z, rtol=1e-6)
    if router.rule is not None:
        return  # DeepSpeed's losses have tests of their own
    flat = lambda a: np.asarray(a).reshape(-1, a.shape[-1])
    layers = [
        describe(router, *map(flat, given))
        for given in zip(record.router_logits, record.expert_ids, record.expert_weights, strict=True)
    ]
    np.testing.assert_array_equal(losses.counts, [layer.counts for layer in layers])
    np.testing.assert_allclose(losses.balance, np.mean([layer.aux_loss for layer in layers]), rtol=1e-5)
    np.testing.assert_allclose(losses.z, np.mean([layer.z_loss for layer in layers]), rtol=1e-5)


def test_padding_has_no_part_in_it():
    model = model_of("mixtral")
    windows = windows_of(model)
    counted = np.ones((4, LENGTH), np.float32)
    counted[3] = 0
    run = training(model)
    _, losses = run.evaluate(model.arrays(), windows, counted)
    _, alone = run.evaluate(model.arrays(), windows[:3])
    np.testing.assert_array_equal(losses.counts, alone.counts)
    for name in ("cross_entropy", "balance", "z"):
        np.testing.assert_allclose(getattr(losses, name), getattr(alone, name), rtol=1e-6)


def test_capacity_drops_beyond_it():
    model = model_of("mixtral")
    run = training(model, Routing(capacity_factor=0.5))
    assert run.evaluate(model.arrays(), windows_of(model))[1].dropped == 0  # as the model will be used
    _, losses = jax.jit(run.gradient)(model.arrays(), windows_of(model))
    router = model.architecture.block.router
    room = int(np.ceil(4 * LENGTH * router.top_k / router.num_experts * 0.5))
    kept = np.minimum(losses.counts, room).sum()
    np.testing.assert_allclose(losses.dropped, 1 - kept / np.sum(losses.counts), rtol=1e-6)
    assert 0.4 < float(losses.dropped) < 1


@functools.cache
def gradients(family, settings=()):
    model = model_of(family)
    run = training(model, batch=8, **dict(settings))
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), model.arrays())
    return jax.tree.map(np.asarray, jax.jit(run.gradient)(weights, windows_of(model, 8)))


def close(got, want, tolerance=1e-5):
    """Within `tolerance` of the largest number of each array; of those that are next to nothing (biases of keys, whose
    gradient is zero but for rounding) of a hundredth of the largest of all."""
    largest = lambda tree: max(np.abs(leaf).max(initial=0) for leaf in jax.tree.leaves(tree))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(largest(b), 1e-2 * largest(want)))


MESHES = [
    ("mixtral", (2, 4, 1), "ring"),
    ("mixtral", (1, 4, 2), "all_to_all"),
    ("mixtral", (2, 2, 2), "replicated"),
    ("mixtral", (8, 1, 1), None),
    ("deepspeed_moe", (8, 1, 1), None),
    ("qwen2_moe", (2, 2, 2), None),
]


@pytest.mark.parametrize("case", only(MESHES[1:2], MESHES))
def test_gradients_on_meshes(case):
    family, sizes, exchange = case
    options = {} if exchange is None else {"exchange": exchange}
    plain = model_of(family)
    model = shard(Model(plain.config, plain.arrays(), implementation=options), make_mesh(*sizes))
    run = training(model, batch=8)
    gradient, losses = jax.jit(run.gradient)(run.start(model.arrays()).weights, run.put(windows_of(model, 8)))
    want_gradient, want_losses = gradients(family)
    close(gradient, want_gradient)
    close(losses, want_losses)


@pytest.mark.parametrize("how", ["remat", "accumulation"])
def test_ways_to_save_memory_change_nothing(how):
    ways = {"remat": {"remat": True}, "accumulation": {"optimizer": Optimizer(accumulation=2)}}
    gradient, losses = gradients("llama", tuple(ways[how].items()))
    want_gradient, want_losses = gradients("llama")
    close(gradient, want_gradient)
    close(losses, want_losses)


def test_what_a_mesh_would_store_twice_is_refused():
    model = shard(model_of("gpt_oss"), make_mesh(model=2))
    with pytest.raises(ValueError, match=r"mesh: .* does not divide attention\.o_bias"):
        training(model)


def test_settings_that_a_model_cannot_follow():
    with pytest.raises(ValueError, match="bias_rate: 0.1, but the model has no selection biases"):
        training(model_of("mixtral"), Routing(bias_rate=0.1))
    with pytest.raises(ValueError, match="capacity_factor: the model's gate has one of its own"):
        training(model_of("deepspeed_moe"), Routing(capacity_factor=1.0))
