"""`MoEInferenceConfig`: upstream's defaults, names, keys without effect, round trips, the page."""

import dataclasses
import json
import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.deepspeed import values
from moe_jax.deepspeed.config import WITHOUT_EFFECT, ActivationFuncType, MoEInferenceConfig, NormType
from moe_jax.deepspeed.keys import ENGINE_WITHOUT_EFFECT
from pallas_kernels import Activation

PAGE = Path(__file__).parents[2] / "docs" / "from_deepspeed.md"
SIZES = {"hidden_size": 32, "heads": 4}

#: Every key of DeepSpeedInferenceConfig and DeepSpeedMoEInferenceConfig (0.16 to main) with its default there.
UPSTREAM = {
    "hidden_size": -1,
    "intermediate_size": -1,
    "heads": -1,
    "num_hidden_layers": -1,
    "layer_norm_eps": 1e-12,
    "local_rank": -1,
    "mp_size": 1,
    "fp16": False,
    "bf16": False,
    "q_int8": False,
    "pre_layer_norm": True,
    "norm_type": "LayerNorm",
    "stochastic_mode": False,
    "scale_attention": True,
    "triangular_masking": True,
    "local_attention": False,
    "window_size": 256,
    "rotary_dim": -1,
    "rotate_half": False,
    "rotate_every_two": True,
    "return_tuple": True,
    "mlp_after_attn": True,
    "mlp_act_func_type": "GELU",
    "training_mp_size": 1,
    "bigscience_bloom": False,
    "max_out_tokens": 1024,
    "min_out_tokens": 1,
    "enable_qkv_quantization": False,
    "use_mup": False,
    "scale_attn_by_inverse_layer_idx": False,
    "return_single_tuple": False,
    "set_empty_params": False,
    "transposed_mode": False,
    "use_triton": False,
    "triton_autotune": False,
    "num_kv": -1,
    "rope_theta": 10000,
    "invert_mask": True,
    "moe_experts": 1,
    "global_experts": 1,
    "k": 1,
    "capacity_factor": 1.0,
    "eval_capacity_factor": 1.0,
    "min_capacity": 1,
    "noisy_gate_policy": None,
    "drop_tokens": True,
    "use_rts": False,
    "mlp_type": "standard",
}
#: `dtype` is float16 in DeepSpeedInferenceConfig and no key of DeepSpeedMoEInferenceConfig, whose fp16 is False.
OURS = {
    "dtype": None,
    "drop_policy": "probs_upstream",
    "gelu": None,
    "quantize_groups": 1,
    "mlp_extra_grouping": False,
    "merge_count": 1,
}


def build(**changes):
    return MoEInferenceConfig(**{**SIZES, **changes})


def test_defaults_are_upstreams():
    defaults = {field.name: field.default for field in dataclasses.fields(MoEInferenceConfig)}
    assert defaults == UPSTREAM | OURS
    assert build().to_dict() == UPSTREAM | OURS | SIZES | {"intermediate_size": 128}


def test_enums_have_upstreams_numbers():
    assert list(ActivationFuncType) == ["UNKNOWN", "GELU", "ReLU", "GATED_GELU", "GATED_SILU"]
    assert [ActivationFuncType(i) for i in range(5)] == list(ActivationFuncType)
    assert [NormType(i) for i in range(4)] == ["UNKNOWN", "LayerNorm", "GroupNorm", "RMSNorm"] == list(NormType)
    assert build(norm_type=3).norm_type == NormType.RMSNorm == "RMSNorm"
    for wrong in (4, -1, True, 1.0, None, "Layer"):
        with pytest.raises(ValueError):
            NormType(wrong)


def test_derived_sizes():
    config = build(num_kv=2, rotary_dim=8, rotate_half=True)
    assert (config.intermediate_size, config.head_dim, config.kv_heads, config.num_experts) == (128, 8, 2, 1)
    assert build().kv_heads == 4
    assert build(intermediate_size=0).intermediate_size == 128
    assert build(intermediate_size=48).intermediate_size == 48
    assert build(noisy_gate_policy="None").noisy_gate_policy is None
    for norm in ("RMSNorm", "rmsnorm", 3, NormType.RMSNorm):
        assert build(norm_type=norm).norm_type == "RMSNorm"


@pytest.mark.parametrize(("given", "both"), [((4, 1), (4, 4)), ((1, 8), (8, 8)), ((2, 8), (2, 8)), ((1, 1), (1, 1))])
def test_experts_of_a_rank_and_of_all(given, both):
    config = build(moe_experts=given[0], global_experts=given[1])
    assert (config.moe_experts, config.global_experts) == both and config.num_experts == both[1]


def test_numpy_numbers_become_plain():
    config = build(hidden_size=np.int32(64), layer_norm_eps=np.float32(0.5), fp16=np.True_)
    assert config == build(hidden_size=64, layer_norm_eps=0.5, fp16=True)
    json.dumps(config.to_dict())


def test_frozen_hashable_and_replaceable():
    config = build(moe_experts=4, k=2)
    assert {config: 1}[build(global_experts=4, k=2)] == 1
    assert config != build() and config != "config"
    assert dataclasses.replace(config, k=1).k == 1
    with pytest.raises(ValueError, match="k: 9"):
        dataclasses.replace(config, k=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 1
    with pytest.raises(TypeError):
        MoEInferenceConfig(32)


def test_upstreams_dumped_names_are_aliases(caplog):
    with caplog.at_level(logging.INFO, "moe_jax"):
        config = MoEInferenceConfig.from_dict({**SIZES, "epsilon": 1e-5, "layer_id": 3})
    assert config == build(layer_norm_eps=1e-5)
    assert [r.getMessage() for r in caplog.records] == [f"layer_id=3 has no effect: {WITHOUT_EFFECT['layer_id']}"]
    assert MoEInferenceConfig.from_dict({**SIZES, "epsilon": 0.5, "layer_norm_eps": 0.5}).layer_norm_eps == 0.5
    with pytest.raises(ValueError, match=r"layer_norm_eps: 0.5 and 0.25"):
        MoEInferenceConfig.from_dict({**SIZES, "layer_norm_eps": 0.5, "epsilon": 0.25})
    with pytest.raises(ValueError, match="layer_id"):
        MoEInferenceConfig.from_dict({**SIZES, "layer_id": "3"})


CHANGED = {"local_rank": 0, "mp_size": 2, "training_mp_size": 2, "min_out_tokens": 2}


@pytest.mark.parametrize("name", sorted(set(WITHOUT_EFFECT) - {"layer_id"}))
def test_keys_without_effect_are_logged(name, caplog):
    value = CHANGED.get(name, True)
    with caplog.at_level(logging.INFO, "moe_jax"):
        config = build()
        assert not caplog.records
        assert getattr(build(**{name: value}), name) == value != getattr(config, name)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert caplog.records[0].getMessage() == f"{name}={value!r} has no effect: {WITHOUT_EFFECT[name]}"


def test_unknown_keys_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'hiden_size'; the nearest known key is 'hidden_size'"):
        MoEInferenceConfig.from_dict({**SIZES, "hiden_size": 3})
    with pytest.raises(ValueError, match=r"unknown key 7"):
        MoEInferenceConfig.from_dict({**SIZES, 7: 3})
    with pytest.raises(ValueError, match="expected a dictionary, got list"):
        MoEInferenceConfig.from_dict([1])


@pytest.mark.parametrize(
    "extra",
    [
        {"moe": True},
        {"moe": {}},
        {"tensor_parallel": {}},
        {"tp": {}},
        {"ep_size": 2},
        {"moe_experts": [4]},
        {"quant": {}},
    ],
)
def test_an_engines_dictionary_is_pointed_to_its_class(extra):
    with pytest.raises(ValueError, match=rf"{next(iter(extra))}: .*EngineConfig\.from_dict"):
        MoEInferenceConfig.from_dict({**SIZES, **extra})


def test_json_files(tmp_path):
    path = tmp_path / "config.json"
    config = build(moe_experts=4, k=2, dtype="bf16", num_hidden_layers=3)
    path.write_text(json.dumps(config.to_dict()))
    assert MoEInferenceConfig.from_json_file(path) == config == MoEInferenceConfig.from_json_file(str(path))
    path.write_text('{"hidden_size": 32, "heads": 4, "layer_norm_eps": NaN}')
    with pytest.raises(ValueError, match="layer_norm_eps: nan"):
        MoEInferenceConfig.from_json_file(path)
    for content in (b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"heads": ' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"config\.json"):
            values.read_json(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(OSError):
            MoEInferenceConfig.from_json_file(missing)


def configs():
    heads = st.sampled_from([1, 2, 4, 8])
    floats = st.floats(1e-6, 1e6)
    local = st.integers(1, 4)
    flags = [name for name, value in UPSTREAM.items() if isinstance(value, bool)]
    free = [name for name in flags if name not in ("fp16", "bf16", "mlp_after_attn", "rotate_every_two")]

    def make(heads, head_dim, local, ranks, k, rest, dtype, chosen):
        return MoEInferenceConfig(
            hidden_size=2 * heads * head_dim,
            heads=heads,
            moe_experts=local,
            global_experts=local * ranks,
            k=min(k, local * ranks),
            **rest,
            **dtype,
            **dict.fromkeys(chosen, True),
        )

    rest = st.fixed_dictionaries(
        {"layer_norm_eps": floats, "capacity_factor": floats, "rope_theta": floats, "min_capacity": st.integers(0, 9)},
        optional={
            "mlp_type": st.sampled_from(["standard", "residual"]),
            "noisy_gate_policy": st.sampled_from([None, "None", "Jitter", "RSample"]),
            "norm_type": st.sampled_from([1, 3, "RMSNorm"]),
            "mlp_act_func_type": st.integers(1, 4),
            "rotary_dim": st.sampled_from([-1, 0, 2]),
            "window_size": st.integers(1, 2**40),
            "intermediate_size": st.integers(-3, 3),
            "gelu": st.sampled_from(["tanh", "erf"]),
            "drop_policy": st.sampled_from(["probs", "position", "gate", "probs_upstream"]),
        },
    )
    dtype = st.sampled_from([{}, {"fp16": True}, {"bf16": True}, {"dtype": "int8"}, {"dtype": jnp.bfloat16}])
    return st.builds(
        make,
        heads,
        st.integers(1, 8),
        local,
        st.integers(1, 4),
        st.integers(1, 16),
        rest,
        dtype,
        st.sets(st.sampled_from(free)),
    )


@settings(deadline=None, derandomize=True, database=None)
@given(configs())
def test_every_config_round_trips(config):
    again = MoEInferenceConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config) and again.to_dict() == config.to_dict()
    assert dataclasses.replace(config) == config
    assert config.working_dtype in ("float32", "float16", "bfloat16") and Activation(config.activation)


@pytest.mark.parametrize("key", [*WITHOUT_EFFECT, *ENGINE_WITHOUT_EFFECT])
def test_the_page_lists_every_key_without_effect(key):
    assert f"`{key}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*UPSTREAM, *OURS])
def test_the_page_lists_every_key(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
