"""Saving and loading whole models."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, golden_cases

import moe_jax
from moe_jax.checkpoint.hub import SHIPPED
from moe_jax.checkpoint.source import Checkpoint
from moe_jax.cli import main
from moe_jax.model import Model, tiny_config
from moe_jax.weights import flattened


def equal(one, other):
    a, b = flattened(one.arrays()), flattened(other.arrays())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("case", golden_cases())
def test_load_of_save_is_exact(case, tmp_path):
    model = moe_jax.load_pretrained(GOLDEN / "hf" / case)
    moe_jax.save_pretrained(model, tmp_path)
    equal(moe_jax.load_pretrained(tmp_path), model)
    before, after = (Checkpoint(folder).tensors for folder in (GOLDEN / "hf" / case, tmp_path))
    ours = {name: stored.shape for name, stored in after.items()}
    theirs = {name: stored.shape for name, stored in before.items()}
    assert ours.items() <= theirs.items()
    assert all("vision" in name or "multi_modal" in name for name in theirs.keys() - ours.keys())
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (case == "gpt_oss_mxfp4")  # fp8 is widened
    assert config["model_type"] == model.config.model_type


def test_bfloat16_and_shards(tmp_path):
    model = moe_jax.load_pretrained(GOLDEN / "hf" / "qwen3_moe", dtype="bfloat16")
    moe_jax.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and all(p.stat().st_size < 40_000 for p in shards)
    equal(moe_jax.load_pretrained(tmp_path, dtype="bfloat16"), model)
    moe_jax.save_pretrained(model, tmp_path)  # fewer files: none of the old ones may stay
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    equal(moe_jax.load_pretrained(tmp_path, dtype="bfloat16"), model)


def test_generation_settings_travel(tmp_path):
    model = Model.initialize(tiny_config(), generation={"eos_token_id": [3, 4], "pad_token_id": 0})
    moe_jax.save_pretrained(model, tmp_path)
    assert moe_jax.load_pretrained(tmp_path).generation == model.generation
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation_config.json: not a JSON file"):
        moe_jax.load_pretrained(tmp_path)


def test_arguments(tmp_path):
    folder = GOLDEN / "hf" / "mixtral"
    for dtype in ("int8", "float64", "nonsense", 7):
        with pytest.raises(ValueError, match="dtype"):
            moe_jax.load_pretrained(folder, dtype=dtype)
    with pytest.raises(ValueError, match="mesh"):
        moe_jax.load_pretrained(folder, mesh=object())
    with pytest.raises(OSError):
        moe_jax.load_pretrained(tmp_path)
    assert moe_jax.load_pretrained(folder).dtype == np.float32  # "auto" on a CPU


def test_implementations_by_name():
    folder, ids = GOLDEN / "hf" / "mixtral", [[1, 2, 3, 4]]
    default = moe_jax.load_pretrained(folder)(ids)
    for implementation in ("xla_ragged", {"routed_mlp": "xla_ragged"}):
        other = moe_jax.load_pretrained(folder, implementation=implementation)
        np.testing.assert_allclose(other(ids), default, atol=2e-5)
    with pytest.raises(ValueError, match="there are: triton_row, mosaic_gpu, tpu, xla_tiles, xla_ragged"):
        moe_jax.load_pretrained(folder, implementation="cuda_magic")(ids)
    with pytest.raises(ValueError, match="unknown operations attention"):
        moe_jax.load_pretrained(folder, implementation={"attention": "xla"})


def test_without_settings_no_generation_config_is_left(tmp_path):
    """transformers would take an empty one for the model's own and never stop."""
    model = Model.initialize(tiny_config())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    moe_jax.save_pretrained(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def test_saving_again_replaces_the_weights_and_nothing_else(tmp_path):
    model = Model.initialize(tiny_config())
    (tmp_path / "model-lora.safetensors").write_bytes(b"someone's own")
    moe_jax.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    moe_jax.save_pretrained(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "model-lora.safetensors"}
    moe_jax.save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    np.testing.assert_array_equal(moe_jax.load_pretrained(tmp_path)([[1, 2]]), model([[1, 2]]))


def test_a_tied_head_must_be_a_copy_of_the_embedding(tmp_path):
    values = tiny_config().to_dict()
    moe_jax.save_pretrained(Model.initialize(moe_jax.ModelConfig.from_dict(values), seed=1), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    with pytest.raises(OSError, match="lm_head.weight is not equal to model.embed_tokens.weight"):
        moe_jax.load_pretrained(tmp_path)


def test_an_unknown_implementation_is_refused_before_anything_is_read(tmp_path):
    for given in ("cuda", {"routed_mlp": "cuda"}):
        with pytest.raises(ValueError, match="'cuda' is no implementation of routed_mlp"):
            moe_jax.load_pretrained(tmp_path / "nothing here", implementation=given)
        with pytest.raises(ValueError, match="'cuda' is no implementation of routed_mlp"):
            Model.initialize(tiny_config(), implementation=given)


def test_a_trained_model_comes_with_the_package(capsys):
    """As `configs/novels.md` has it: of its size, no mean reader of what it has read, and there without a network."""
    model, tokenizer = moe_jax.load_pretrained("novels"), moe_jax.load_tokenizer(SHIPPED / "novels")
    assert sum(array.size for array in flattened(model.arrays()).values()) == 4467456
    assert (SHIPPED / "novels" / "model.safetensors").stat().st_size < 10**7
    read = "It is a truth universally acknowledged, that a single man in possession\nof a good fortune, must be in want"
    unread = "The quarterly report lists 14 databases, 3 of which were migrated to another cluster on Monday night."
    losses = [-moe_jax.score(model, tokenizer.encode(text)).log_probabilities.mean() for text in (read, unread)]
    assert losses[0] < 3 < 4.5 < losses[1], losses
    assert main(["generate", "Mr. Knightley", "--model", "novels", "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out) > 10
