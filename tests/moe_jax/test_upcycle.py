"""Upcycling keeps what the dense model computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import ModelConfig
from moe_jax.cli import main
from moe_jax.model import Model, tiny_config
from moe_jax.upcycle import tiny_llama


def test_known_answer_survives_saving(tmp_path):
    dense = Model.initialize(tiny_llama(), seed=1)
    moe = moe_jax.upcycle(dense, num_experts=4, top_k=2, seed=7)
    ids = np.random.default_rng(0).integers(0, 96, (2, 9))
    np.testing.assert_allclose(moe(ids), dense(ids), atol=2e-5)
    record = moe(ids, return_record=True)
    assert len({tuple(row) for row in np.asarray(record.expert_ids[0]).reshape(-1, 2)}) > 1  # routers do differ
    moe_jax.save_pretrained(moe, tmp_path)
    np.testing.assert_array_equal(moe_jax.load_pretrained(tmp_path)(ids), moe(ids))


def test_rope_and_norm_defaults_are_kept():
    hub = tiny_llama().to_dict() | {"tie_word_embeddings": True}
    dense = Model.initialize(ModelConfig.from_dict(hub))
    moe = moe_jax.upcycle(dense)
    ours, theirs = moe.architecture.block, dense.architecture.block
    assert ours.attention == dataclasses.replace(theirs.attention) and ours.norm == theirs.norm
    np.testing.assert_allclose(moe([[5, 6, 7]]), dense([[5, 6, 7]]), atol=2e-5)


def test_refusals():
    with pytest.raises(ValueError, match="takes a dense llama model, got mixtral"):
        moe_jax.upcycle(Model.initialize(tiny_config()))
    biased = ModelConfig.from_dict(tiny_llama().to_dict() | {"attention_bias": True})
    with pytest.raises(ValueError, match="no biases"):
        moe_jax.upcycle(Model.initialize(biased))
    with pytest.raises(ValueError, match="top_k: 5"):
        moe_jax.upcycle(Model.initialize(tiny_llama()), num_experts=4, top_k=5)
    with pytest.raises(ValueError, match="takes kernels in floats"):
        moe_jax.upcycle(moe_jax.quantize(Model.initialize(tiny_llama())))
    for noise in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"noise: {noise} "):
            moe_jax.upcycle(Model.initialize(tiny_llama()), noise=noise)


def test_dtype_is_kept():
    dense = Model.initialize(tiny_llama(), dtype=jnp.bfloat16)
    assert moe_jax.upcycle(dense).dtype == jnp.bfloat16


def llama_with(**more):
    return Model.initialize(ModelConfig.from_dict(tiny_llama().to_dict() | more), seed=2)


@pytest.mark.parametrize(
    "more",
    [
        {"partial_rotary_factor": 0.5},
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["partial", "llama3"],
)
def test_rope_keys_beside_the_scaling_are_kept(more):
    dense = llama_with(**more)
    assert dense.architecture.block.attention != Model.initialize(tiny_llama()).architecture.block.attention
    assert moe_jax.upcycle(dense).architecture.block.attention == dense.architecture.block.attention


IDS = np.random.default_rng(0).integers(0, 96, (2, 9))


def test_a_shared_expert_is_the_dense_mlp(tmp_path):
    dense = Model.initialize(tiny_llama(), seed=1)
    moe = moe_jax.upcycle(dense, num_experts=3, top_k=2, seed=7, shared_expert=True)
    np.testing.assert_allclose(moe(IDS), dense(IDS), atol=2e-5)
    kept, given, experts = moe.arrays()["shared"], dense.arrays()["dense"], moe.arrays()["moe"]
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(kept[name], given[name])
        for expert in range(3):
            np.testing.assert_array_equal(experts[name][:, expert] * (2 if name == "down" else 1), given[name])
    assert moe.config.model_type == "qwen2_moe" and not kept["scale"].any()
    assert moe.architecture.block.attention == dense.architecture.block.attention
    moe_jax.save_pretrained(moe, tmp_path)
    np.testing.assert_array_equal(moe_jax.load_pretrained(tmp_path)(IDS), moe(IDS))


def test_a_shared_expert_needs_its_half():
    """What is preserved is the sum: neither part alone is the dense MLP."""
    dense = Model.initialize(tiny_llama(), seed=1)
    moe = moe_jax.upcycle(dense, shared_expert=True)
    for group in ("shared", "moe"):
        weights = moe.arrays()
        weights[group] = weights[group] | {"down": weights[group]["down"] * 0}
        assert np.abs(Model(moe.config, weights)(IDS) - dense(IDS)).max() > 0.05


@pytest.mark.parametrize("shared_expert", [False, True])
def test_noise_is_as_wide_as_said(shared_expert):
    dense = Model.initialize(tiny_llama(), seed=1)
    weights = dense.arrays()
    weights["dense"]["up"] = weights["dense"]["up"] * jnp.array([1.0, 100.0])[:, None, None]
    dense = Model(dense.config, weights)
    plain, noisy, again = (
        moe_jax.upcycle(dense, seed=3, noise=noise, shared_expert=shared_expert).arrays() for noise in (0, 0.25, 0.25)
    )
    for name in ("gate", "up", "down"):
        kernels, added = np.asarray(plain["moe"][name]), np.asarray(noisy["moe"][name] - plain["moe"][name])
        np.testing.assert_allclose(added.std((2, 3)), 0.25 * kernels.std((2, 3)), rtol=0.06)
        assert (np.abs(added.mean((2, 3))) < 0.03 * kernels.std((2, 3))).all()
        rows = added.reshape(2 * 4, -1)
        assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.12  # other noise for each layer and expert
        np.testing.assert_array_equal(noisy["moe"][name], again["moe"][name])
    np.testing.assert_array_equal(plain["moe"]["router"], noisy["moe"]["router"])
    if shared_expert:
        np.testing.assert_array_equal(plain["shared"]["up"], noisy["shared"]["up"])


def test_noise_changes_the_model_by_and_by():
    dense = Model.initialize(tiny_llama(), seed=1)
    far = [float(np.abs(moe_jax.upcycle(dense, noise=noise)(IDS) - dense(IDS)).max()) for noise in (0.001, 0.1, 1.0)]
    assert 0 < far[0] < 0.02 < far[1] < far[2]
    narrow = Model.initialize(tiny_llama(), dtype=jnp.bfloat16)
    assert {a.dtype for a in moe_jax.upcycle(narrow, noise=0.1, shared_expert=True).arrays()["moe"].values()} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_from_the_command_line(tmp_path, capsys):
    dense = Model.initialize(tiny_llama(), seed=1)
    moe_jax.save_pretrained(dense, tmp_path / "dense")
    command = ["convert", "--model", str(tmp_path / "dense"), "--output", str(tmp_path / "moe")]
    upcycled = [*command, "--upcycle", "3", "--shared-expert", "--noise", "0.1", "--seed", "5"]
    assert main(upcycled) == 0
    expected = moe_jax.upcycle(dense, 3, seed=5, noise=0.1, shared_expert=True)
    np.testing.assert_array_equal(moe_jax.load_pretrained(tmp_path / "moe")(IDS), expected(IDS))
    capsys.readouterr()
    assert main([*command, "--shared-expert", "--noise", "0.1"]) != 0
    assert "noise, shared_expert: only with --upcycle" in capsys.readouterr().err
