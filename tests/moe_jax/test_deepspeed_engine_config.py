"""`EngineConfig`: the inference engine's JSON, its second and old names, what is refused, what a layer gets of it."""

import dataclasses
import functools
import json
import logging
import re

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.deepspeed.config import MoEInferenceConfig
from moe_jax.deepspeed.engine_config import ENGINE_WITHOUT_EFFECT, EngineConfig
from moe_jax.deepspeed.keys import ENGINE_ALIASES, ENGINE_DEPRECATED, engine_top_level

SIZES = {"hidden_size": 32, "heads": 4}

QUANT = {"enabled": True, "num_bits": 8, "q_type": "symmetric", "q_groups": 1}

#: Every key of the engine's configuration upstream, with its default there.
UPSTREAM = {
    "replace_with_kernel_inject": False,
    "dtype": "torch.float16",
    "tensor_parallel": {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None, "tp_group": None},
    "enable_cuda_graph": False,
    "use_triton": False,
    "triton_autotune": False,
    "zero": {},
    "triangular_masking": True,
    "moe": {
        "enabled": True,
        "ep_size": 1,
        "moe_experts": [1],
        "type": "standard",
        "ep_mp_group": None,
        "ep_group": None,
    },
    "keep_module_on_host": False,
    "quant": {
        "enabled": True,
        "activation": QUANT,
        "weight": {**QUANT, "quantized_initialization": {}, "post_init_quant": {}},
        "qkv": {"enabled": True},
    },
    "checkpoint": None,
    "base_dir": "",
    "set_empty_params": False,
    "save_mp_checkpoint_path": None,
    "checkpoint_config": {},
    "return_tuple": True,
    "training_mp_size": 1,
    "replace_method": "auto",
    "injection_policy": None,
    "injection_policy_tuple": None,
    "config": None,
    "max_out_tokens": 1024,
    "min_out_tokens": 1,
    "transposed_mode": False,
    "mp_size": 1,
    "mpu": None,
    "ep_size": 1,
    "ep_group": None,
    "ep_mp_group": None,
    "moe_experts": [1],
    "moe_type": "standard",
}


def build(**entries):
    return EngineConfig.from_dict(entries)


def test_upstreams_defaults_are_ours(caplog):
    with caplog.at_level(logging.INFO, "moe_jax"):
        assert EngineConfig.from_dict(UPSTREAM) == EngineConfig() == build()
    assert not caplog.records
    engine = EngineConfig()
    assert (engine.dtype, engine.max_out_tokens, engine.min_out_tokens) == ("float16", 1024, 1)
    assert engine.triangular_masking and engine.return_tuple and engine.checkpoint is None and engine.base_dir == ""
    assert engine.mesh_sizes() == {"data": 1, "expert": 1, "model": 1} and engine.moe_experts == [1]
    assert set(UPSTREAM) | set(ENGINE_ALIASES[""]) == engine_top_level()
    assert engine.layer_config(**SIZES) == MoEInferenceConfig(**SIZES, dtype="float16")


def test_sections_and_second_names():
    entries = {
        "tp": {"tp_size": 2},
        "moe": {"ep_size": 2, "num_experts": [4], "type": "residual"},
        "tm": False,
        "max_tokens": 64,
        "min_tokens": 8,
        "kernel_inject": False,
        "dtype": "bf16",
        "return_tuple": False,
        "checkpoint": "run/latest",
        "base_dir": "run",
    }
    engine = EngineConfig.from_dict(entries)
    long = {ENGINE_ALIASES[""].get(name, name): value for name, value in entries.items()}
    assert (
        long != entries
        and EngineConfig.from_dict(long) == engine
        and hash(EngineConfig.from_dict(long)) == hash(engine)
    )
    assert engine.mesh_sizes() == {"data": 1, "expert": 2, "model": 2}
    assert (engine.moe_experts, engine.checkpoint, engine.base_dir) == ([4], "run/latest", "run")
    assert engine.layer_config(**SIZES, k=2) == MoEInferenceConfig(
        **SIZES,
        k=2,
        dtype="bfloat16",
        global_experts=4,
        mlp_type="residual",
        mp_size=2,
        triangular_masking=False,
        return_tuple=False,
        max_out_tokens=64,
        min_out_tokens=8,
    )


def test_old_keys_go_to_their_sections():
    engine = build(mp_size=2, ep_size=2, moe_experts=[4, 8], moe_type="residual")
    assert engine == build(tp={"tp_size": 2}, moe={"ep_size": 2, "moe_experts": [4, 8], "type": "residual"})
    assert build(mp_size=2, tp={"tp_size": 2}).mesh_sizes()["model"] == 2
    with pytest.raises(ValueError, match=r"mp_size: 2 contradicts tensor_parallel\.tp_size 4"):
        build(mp_size=2, tp={"tp_size": 4})
    assert set(ENGINE_DEPRECATED) <= set(UPSTREAM)


def test_bools_and_disabled_sections():
    assert build(moe=True) == build(moe={}) == build()
    assert build(moe=False, ep_size=4).mesh_sizes()["expert"] == 1
    assert build(moe={"enabled": False, "moe_experts": [8]}).layer_config(**SIZES).num_experts == 1
    assert build(tp={"enabled": False, "tp_size": 4}).mesh_sizes()["model"] == 1


def test_auto_is_the_default():
    assert build(dtype="auto", max_out_tokens="auto", zero="auto", tp={"tp_size": "auto"}) == build()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"tensor_paralel": {}}, ["'tensor_paralel'", "'tensor_parallel'"]),
        ({"tp": {"size": 2}}, ["tensor_parallel", "'size'", "'tp_size'"]),
        ({"moe": {"experts": [4]}}, ["moe", "'experts'", "_experts'"]),
        ({"quant": {"wieght": {}}}, ["quant", "'wieght'", "'weight'"]),
        ({"quant": {"weight": {"bits": 8}}}, ["quant.weight", "'bits'", "'num_bits'"]),
        ({"quant": {"qkv": {"num_bits": 8}}}, ["quant.qkv", "'num_bits'", "'enabled'"]),
        ({"hidden_size": 32}, ["hidden_size", "layer_config"]),
        ({"tp": 2}, ["tensor_parallel", "2"]),
        ({"moe": [4]}, ["moe", "[4]"]),
        ({"quant": (True, 8)}, ["quant", "(True, 8)"]),
        ({"tp": {"tp_size": 0}}, ["tensor_parallel.tp_size", "0"]),
        ({"tp": {"tp_size": True}}, ["tensor_parallel.tp_size", "True"]),
        ({"tp": {"enabled": 1}}, ["tensor_parallel.enabled", "1"]),
        ({"moe": {"ep_size": -1}}, ["moe.ep_size", "-1"]),
        ({"moe": {"ep_size": 4, "moe_experts": [8, 6]}}, ["moe.ep_size: 4", "[8, 6]"]),
        ({"moe": {"moe_experts": []}}, ["moe.moe_experts", "empty"]),
        ({"moe": {"moe_experts": [4, 0]}}, ["moe.moe_experts", "[4, 0]"]),
        ({"moe": {"moe_experts": [4.0]}}, ["moe.moe_experts", "4.0"]),
        ({"moe": {"moe_experts": "4"}}, ["moe.moe_experts", "'4'"]),
        ({"moe": {"type": "pyramid"}}, ["moe.type", "'pyramid'", "residual"]),
        ({"moe": {"moe_experts": [4], "num_experts": [8]}}, ["moe.moe_experts", "[4]", "[8]"]),
        ({"dtype": "float64"}, ["dtype", "float64"]),
        ({"dtype": None}, ["dtype", "None"]),
        ({"max_out_tokens": 0}, ["max_out_tokens", "0"]),
        ({"min_tokens": 9, "max_tokens": 8}, ["min_out_tokens: 9 exceeds max_out_tokens 8"]),
        ({"max_tokens": 9, "max_out_tokens": 8}, ["max_out_tokens", "9", "8"]),
        ({"return_tuple": 0}, ["return_tuple", "0"]),
        ({"checkpoint": {"type": "ds_model"}}, ["checkpoint", "dict", "load_checkpoint"]),
        ({"base_dir": 3}, ["base_dir", "3"]),
        ({"quant": {"weight": {"num_bits": 4}}}, ["quant.weight.num_bits: 4", "8"]),
        ({"quant": {"weight": {"q_type": "asymmetric"}}}, ["quant.weight.q_type: asymmetric", "8"]),
        ({"quant": {"activation": {"num_bits": 4}}}, ["quant.activation.num_bits: 4"]),
        ({"quant": {"activation": {"q_type": "asymmetric"}}}, ["quant.activation.q_type: asymmetric"]),
        ({"quant": {"weight": {"q_type": "sym"}}}, ["quant.weight.q_type", "'sym'"]),
        ({"quant": {"weight": {"q_groups": 0}}}, ["quant.weight.q_groups", "0"]),
        ({"quant": {"enabled": "no"}}, ["quant.enabled", "'no'"]),
        ({"dtype": "int8", "quant": {"enabled": False}}, ["quant.enabled", "int8"]),
    ],
)
def test_impossible_values_are_refused(entries, words):
    with pytest.raises(ValueError) as caught:
        EngineConfig.from_dict(entries)
    for word in words:
        assert word in str(caught.value)


def test_no_dictionary():
    with pytest.raises(ValueError, match=r"config: expected a dictionary, got \[1\]"):
        EngineConfig.from_dict([1])


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match="moe: expected a MoEConfig"):
        EngineConfig(moe={"ep_size": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().dtype = "float32"


@pytest.mark.parametrize("path", sorted(ENGINE_WITHOUT_EFFECT))
def test_keys_without_effect_are_logged(path, caplog):
    entries = functools.reduce(lambda inner, part: {part: inner}, reversed(path.split(".")), 7)
    with caplog.at_level(logging.INFO, "moe_jax"):
        assert EngineConfig.from_dict(entries) == EngineConfig()
    assert [r.getMessage() for r in caplog.records] == [f"{path}=7 has no effect: {ENGINE_WITHOUT_EFFECT[path]}"]


def test_a_switched_off_quantisation_may_say_anything():
    engine = build(quant={"enabled": False, "weight": {"num_bits": 4}, "activation": {"q_type": "asymmetric"}})
    assert not engine.layer_config(**SIZES).q_int8 and engine.layer_config(**SIZES).quantize_groups == 1


def test_int8_reaches_the_layer():
    engine = build(dtype=jnp.int8, quant={"weight": {"q_groups": 8}})
    layer = engine.layer_config(**SIZES)
    assert (layer.q_int8, layer.working_dtype, layer.quantize_groups) == (True, "float16", 8)
    layer = engine.layer_config(**SIZES, bf16=True)
    assert (layer.q_int8, layer.working_dtype) == (True, "bfloat16")


def test_what_the_caller_states_wins():
    engine = build(max_out_tokens=64, moe={"type": "residual"})
    layer = engine.layer_config(**SIZES, dtype="float32", max_out_tokens=32, mlp_type="standard", moe_experts=4)
    found = layer.working_dtype, layer.max_out_tokens, layer.mlp_type, layer.num_experts
    assert found == ("float32", 32, "standard", 4)
    assert engine.layer_config(**MoEInferenceConfig(**SIZES).to_dict()).working_dtype == "float16"
    with pytest.raises(ValueError, match="nearest known key is 'heads'"):
        engine.layer_config(hidden_size=32, headss=4)


def test_experts_per_layer():
    engine = build(moe={"moe_experts": [4, 8, 8]})
    assert engine.moe_experts == [4, 8, 8]
    assert [engine.layer_config(moe_layer=i, **SIZES).num_experts for i in range(3)] == [4, 8, 8]
    assert engine.layer_config(**SIZES, global_experts=4).num_experts == 4
    assert build(moe={"moe_experts": [8]}).layer_config(moe_layer=5, **SIZES).num_experts == 8
    assert build(moe={"moe_experts": 8}).layer_config(**SIZES, moe_experts=2).moe_experts == 2
    with pytest.raises(
        ValueError, match=re.escape("moe_layer: needed, because the layers differ in moe_experts [4, 8, 8]")
    ):
        engine.layer_config(**SIZES)
    with pytest.raises(ValueError, match="moe_layer: 3 of 3 layers"):
        engine.layer_config(moe_layer=3, **SIZES)
    with pytest.raises(ValueError, match="moe_layer: True"):
        engine.layer_config(moe_layer=True, **SIZES)
    with pytest.raises(
        ValueError, match=re.escape("global_experts: 16 contradicts the engine's moe_experts [4, 8, 8]")
    ):
        engine.layer_config(**SIZES, global_experts=16)


def test_json_files(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(UPSTREAM | {"mp_size": 2}))
    with pytest.raises(ValueError, match="mp_size: 2 contradicts"):
        EngineConfig.from_json_file(path)
    path.write_text(json.dumps({"dtype": "fp32", "moe": {"ep_size": 2}}))
    assert EngineConfig.from_json_file(path) == build(dtype="float32", ep_size=2)
    path.write_text("{")
    for bad in (path, tmp_path / "none.json"):
        with pytest.raises(OSError, match=r"engine\.json|none\.json"):
            EngineConfig.from_json_file(bad)


def engines():
    experts = st.lists(st.integers(1, 6), min_size=1, max_size=3)
    moe = st.fixed_dictionaries(
        {}, optional={"enabled": st.booleans(), "type": st.sampled_from(["standard", "residual"])}
    )
    top = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["fp16", "torch.float32", "bf16", "int8", jnp.float16]),
            "tp": st.fixed_dictionaries({"tp_size": st.integers(1, 8)}, optional={"enabled": st.booleans()}),
            "max_out_tokens": st.integers(8, 4096),
            "min_out_tokens": st.integers(1, 8),
            "tm": st.booleans(),
            "checkpoint": st.text(),
            "quant": st.builds(lambda n: {"weight": {"q_groups": n}}, st.integers(1, 64)),
        },
    )

    def make(top, moe, experts, ep_size):
        moe = moe | {"ep_size": ep_size, "moe_experts": [n * ep_size for n in experts]}
        return EngineConfig.from_dict(top | {"moe": moe})

    return st.builds(make, top, moe, experts, st.integers(1, 4))


@settings(deadline=None, derandomize=True, database=None)
@given(engines())
def test_every_engine_round_trips(engine):
    again = EngineConfig.from_dict(json.loads(json.dumps(engine.to_dict())))
    assert again == engine and hash(again) == hash(engine) and again.mesh_sizes() == engine.mesh_sizes()
