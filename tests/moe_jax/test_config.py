"""Configs: every key is honoured, known to be irrelevant, or refused by name."""

import json
from pathlib import Path

import pytest

from moe_jax import ModelConfig
from moe_jax.families import FAMILIES
from moe_jax.model import tiny_config

ROOT = Path(__file__).resolve().parents[2]
TINY = sorted(p for p in (ROOT / "configs" / "tiny").glob("*.json"))
BASE = tiny_config().to_dict()


def make(**changes):
    return ModelConfig.from_dict({k: v for k, v in (BASE | changes).items() if v != "absent"})


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match="config key 'mystery_scale' is not known"):
        make(mystery_scale=2.0)
    assert make(mystery_scale=None).num_layers == 2  # unset


@pytest.mark.parametrize("model_type", ["switch_transformers", "minimax", "jetmoe", "gpt2", ""])
def test_unknown_family_lists_the_supported(model_type):
    with pytest.raises(ValueError, match="not supported") as error:
        make(model_type=model_type)
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "'hidden_size' is missing"),
        ({"hidden_size": "32"}, "'hidden_size' is '32', expected an integer"),
        ({"hidden_size": True}, "expected an integer"),
        ({"num_experts_per_tok": 5}, "top_k: 5 experts per token out of num_experts 4"),
        ({"num_local_experts": 0}, "num_experts: expected a positive integer, got 0"),
        ({"num_experts": 8}, "contradict each other.*4.*8"),
        ({"num_attention_heads": 3, "head_dim": 8}, "num_heads: 3 is not a multiple of num_kv_heads 2"),
        ({"num_hidden_layers": 0}, "at least one layer"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type: 'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "missing key 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "unknown keys wobble"),
        ({"model_type": 3}, "'model_type' is 3"),
        ({"sliding_window": -1}, "window: expected a positive integer"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_both_rope_spellings_mean_the_same():
    hub = make(rope_theta=5e4, rope_scaling={"type": "linear", "factor": 2.0}).architecture
    five = make(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}).architecture
    assert hub == five


def test_both_expert_spellings_mean_the_same():
    assert make(num_local_experts="absent", num_experts=4).architecture == make().architecture


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_each_key_is_honoured_or_refused(path):
    """Changing a number or switch of a text config changes the architecture, is refused, or is known not to matter."""
    hub = json.loads(path.read_text())
    family = FAMILIES[hub["model_type"]]
    text = hub[family.nested_config] if family.nested_config else hub
    before, idle = ModelConfig.from_dict(hub).architecture, set()
    for key, value in text.items():
        if not isinstance(value, (bool, int, float)):
            continue
        changed = (not value) if isinstance(value, bool) else value * 2 + 1
        other = text | {key: changed}
        try:
            after = ModelConfig.from_dict(hub | {family.nested_config: other} if family.nested_config else other)
        except ValueError:
            continue
        if after.architecture == before:
            idle.add(key)
    from moe_jax.families.hub import IRRELEVANT

    allowed = IRRELEVANT | {
        # training, or written beside the key that counts
        *("router_jitter_noise input_jitter_noise head_dim initial_context_length original_max_position_embeddings "
          "num_nextn_predict_layers ep_size is_llama_config for_llm_compressor eod_token_id").split(),
        # the released configs switch off what these belong to
        *"sliding_window max_window_layers decoder_sparse_step n_group topk_group use_sliding_window".split(),
        *"num_mtp_modules mtp_transformer_layers use_mtp mlp_intermediate_size intermediate_size".split(),
        *"rope_theta moe_layer_end_index cla_share_factor nope_layer_interval no_rope_layer_interval".split(),
    }  # fmt: skip
    if hub["model_type"] == "hunyuan_v1_moe":
        from moe_jax.families.hunyuan_v1_moe import _UNUSED

        allowed |= set(_UNUSED)
    assert idle <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_released_configs_load(path):
    assert ModelConfig.from_json_file(path).to_dict() == json.loads(path.read_text())


def test_frozen_and_comparable():
    config = make()
    with pytest.raises(AttributeError, match="frozen"):
        config.hub = {}
    with pytest.raises(TypeError):
        config.hub["hidden_size"] = 1
    assert config == make() and hash(config) == hash(make()) and config != make(hidden_size=64)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_files(tmp_path):
    with pytest.raises(OSError):
        ModelConfig.from_json_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a JSON file"):
        ModelConfig.from_json_file(tmp_path / "config.json")
    with pytest.raises(ValueError, match="expected a dictionary"):
        ModelConfig.from_dict([1])
    with pytest.raises(ValueError, match="'text_config' is missing"):
        ModelConfig.from_dict({"model_type": "llama4"})
