"""Upcycling keeps what the dense model computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import ModelConfig
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
