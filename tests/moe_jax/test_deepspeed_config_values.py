"""Values of `MoEInferenceConfig`: what is refused and with which words, dtypes, activations."""

import dataclasses
import enum
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.deepspeed.config import ActivationFuncType, MoEInferenceConfig
from pallas_kernels import Activation


def build(**changes):
    return MoEInferenceConfig(**{"hidden_size": 32, "heads": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": 32.0}, ["hidden_size", "32.0"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"heads": 5}, ["heads: 5 does not divide hidden_size 32"]),
        ({"heads": 0}, ["heads", "0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": -2}, ["num_hidden_layers", "-2"]),
        ({"layer_norm_eps": -1e-5}, ["layer_norm_eps", "-1e-05"]),
        ({"layer_norm_eps": math.nan}, ["layer_norm_eps", "nan"]),
        ({"layer_norm_eps": "1e-5"}, ["layer_norm_eps", "'1e-5'"]),
        ({"layer_norm_eps": False}, ["layer_norm_eps", "False"]),
        ({"mp_size": 0}, ["mp_size", "0"]),
        ({"mp_size": 8}, ["mp_size: 8 does not divide heads 4"]),
        ({"mp_size": 2, "num_kv": 1}, ["mp_size: 2 does not divide kv_heads 1"]),
        ({"mp_size": 2, "intermediate_size": 63}, ["mp_size: 2 does not divide intermediate_size 63"]),
        ({"fp16": 1}, ["fp16", "1"]),
        ({"pre_layer_norm": "yes"}, ["pre_layer_norm", "'yes'"]),
        ({"fp16": True, "bf16": True}, ["fp16 and bf16"]),
        ({"fp16": True, "dtype": "float32"}, ["fp16 and dtype", "'float32'"]),
        ({"bf16": True, "dtype": "int8"}, ["bf16 and dtype", "'int8'"]),
        ({"dtype": "float64"}, ["dtype", "float64", "float16"]),
        ({"dtype": float}, ["dtype", "float"]),
        ({"dtype": 16}, ["dtype", "16"]),
        ({"dtype": False}, ["dtype: False", "wrong places"]),
        ({"norm_type": "GroupNorm"}, ["norm_type: GroupNorm", "LayerNorm"]),
        ({"norm_type": 2}, ["norm_type: GroupNorm"]),
        ({"norm_type": 0}, ["norm_type: UNKNOWN"]),
        ({"norm_type": 4}, ["norm_type", "4"]),
        ({"norm_type": True}, ["norm_type", "True"]),
        ({"norm_type": None}, ["norm_type", "None"]),
        ({"window_size": 0}, ["window_size", "0"]),
        ({"rotary_dim": -2}, ["rotary_dim", "-2"]),
        ({"rotary_dim": 3}, ["rotary_dim: 3", "8"]),
        ({"rotary_dim": 10}, ["rotary_dim: 10", "8"]),
        ({"rotary_dim": 4, "rotate_every_two": False}, ["rotary_dim: 4", "rotate_half"]),
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_theta": math.inf}, ["rope_theta", "inf"]),
        ({"rope_theta": 10**400}, ["rope_theta", "inf"]),
        ({"num_kv": 0}, ["num_kv", "0"]),
        ({"num_kv": 3}, ["num_kv: 3 does not divide heads 4"]),
        ({"mlp_after_attn": False}, ["mlp_after_attn"]),
        ({"mlp_act_func_type": 0}, ["mlp_act_func_type", "UNKNOWN"]),
        ({"mlp_act_func_type": 5}, ["mlp_act_func_type", "5", "GATED_SILU (4)"]),
        ({"mlp_act_func_type": "tanh"}, ["mlp_act_func_type", "'tanh'"]),
        ({"training_mp_size": 0}, ["training_mp_size", "0"]),
        ({"max_out_tokens": 0}, ["max_out_tokens", "0"]),
        ({"min_out_tokens": 9, "max_out_tokens": 8}, ["min_out_tokens: 9 exceeds max_out_tokens 8"]),
        ({"moe_experts": 0}, ["moe_experts", "0"]),
        ({"global_experts": -4}, ["global_experts", "-4"]),
        ({"moe_experts": 3, "global_experts": 8}, ["global_experts: 8 is not a multiple of moe_experts 3"]),
        ({"moe_experts": 8, "global_experts": 4}, ["global_experts: 4 is not a multiple of moe_experts 8"]),
        ({"k": 0}, ["k: ", "0"]),
        ({"k": 5, "moe_experts": 4}, ["k: 5", "4"]),
        ({"capacity_factor": 0}, ["capacity_factor", "0"]),
        ({"eval_capacity_factor": -1.0}, ["eval_capacity_factor", "-1.0"]),
        ({"eval_capacity_factor": math.inf}, ["eval_capacity_factor", "inf"]),
        ({"min_capacity": -1}, ["min_capacity", "-1"]),
        ({"noisy_gate_policy": "jitter"}, ["noisy_gate_policy", "'jitter'", "Jitter", "RSample"]),
        ({"noisy_gate_policy": 1}, ["noisy_gate_policy", "1"]),
        ({"mlp_type": "Residual"}, ["mlp_type", "'Residual'", "residual"]),
        ({"mlp_type": None}, ["mlp_type", "None"]),
        ({"drop_policy": "random"}, ["drop_policy", "'random'", "probs_upstream"]),
        ({"gelu": "exact"}, ["gelu", "'exact'", "erf"]),
        ({"quantize_groups": 0}, ["quantize_groups", "0"]),
        ({"quantize_groups": 3, "q_int8": True}, ["quantize_groups: 3", "32 x 32"]),
        (
            {"quantize_groups": 512, "q_int8": True, "intermediate_size": 16, "mlp_extra_grouping": True},
            ["1024", "16 x 32"],
        ),
        ({"merge_count": 3}, ["merge_count: 3"]),
    ],
)
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        build(**changes)
    for word in words:
        assert word in str(caught.value)


ODD = {"list": [1], "dict": {"a": 1}, "object": object(), "nan": math.nan, "text": "x", "number": -7.5}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MoEInferenceConfig)])
@pytest.mark.parametrize("odd", ODD)
def test_odd_types_are_refused_by_name(name, odd):
    with pytest.raises(ValueError, match=name):
        build(**{name: ODD[odd]})


@pytest.mark.parametrize(
    ("changes", "working", "quantized"),
    [
        ({}, "float32", False),
        ({"fp16": True}, "float16", False),
        ({"bf16": True}, "bfloat16", False),
        ({"q_int8": True}, "float32", True),
        ({"dtype": "int8"}, "float16", True),
        ({"dtype": "int8", "fp16": True}, "float16", True),
        ({"q_int8": True, "bf16": True}, "bfloat16", True),
        ({"dtype": "half", "fp16": True}, "float16", False),
        *(({"dtype": name}, "float16", False) for name in ("fp16", "float16", "half", "torch.float16")),
        *(({"dtype": name}, "float32", False) for name in ("fp32", "float32", "float", "torch.float32")),
        *(({"dtype": name}, "bfloat16", False) for name in ("bf16", "bfloat16", "bfloat", "torch.bfloat16")),
        *(({"dtype": d}, "float16", False) for d in (jnp.float16, np.float16, np.dtype("float16"))),
        *(({"dtype": d}, "bfloat16", False) for d in (jnp.bfloat16, jnp.dtype("bfloat16"))),
        *(({"dtype": d}, "float16", True) for d in (jnp.int8, np.int8, "torch.int8")),
    ],
)
def test_dtypes(changes, working, quantized):
    config = build(**changes)
    assert (config.working_dtype, config.q_int8) == (working, quantized)
    assert MoEInferenceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_torch_dtype_is_known_by_what_it_prints():
    class Dtype:
        def __repr__(self):
            return "torch.bfloat16"

    assert build(dtype=Dtype()).working_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "gelu", "name"),
    [
        (1, "tanh", "gelu_tanh"),
        ("gelu", "erf", "gelu"),
        (ActivationFuncType.ReLU, "tanh", "relu"),
        ("ReLU", "erf", "relu"),
        (3, "tanh", "geglu_tanh"),
        ("GATED_GELU", "erf", "geglu"),
        (np.int64(4), "tanh", "swiglu"),
        (enum.IntEnum("Theirs", {"GATED_SILU": 4})(4), "tanh", "swiglu"),
        ("ActivationFuncType.GATED_SILU", "erf", "swiglu"),
    ],
)
def test_activations(given, gelu, name):
    config = build(mlp_act_func_type=given, gelu=gelu)
    assert config.activation == Activation(name).name
