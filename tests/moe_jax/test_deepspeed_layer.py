"""`MoEInference` against DeepSpeed's own outputs and an independent float64 layer; masks, caches, dtypes, refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from core_models import one_in
from deepspeed_oracle import layer as oracle_layer
from deepspeed_oracle import random_weights, shapes
from flax import nnx

from moe_jax import MoEInferenceConfig
from moe_jax.convert.deepspeed import layer_from_state_dict, quantize_groups
from moe_jax.deepspeed import MoEInference

CASES = {case["name"]: case for case in json.loads((GOLDEN / "deepspeed" / "moe_inference_layer.json").read_text())}
with np.load(GOLDEN / "deepspeed" / "moe_inference_layer.npz") as stored:
    ARRAYS = dict(stored)

SMALL = dict(hidden_size=16, intermediate_size=24, heads=4, moe_experts=4, layer_norm_eps=1e-5, return_tuple=False)
FREE = SMALL | dict(k=2, drop_tokens=False)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def _small_layer(options):
    options = dict(options)
    return layer_from_state_dict(options, random_weights(options, 1))


def small_layer(**options):
    return _small_layer(tuple((FREE | options).items()))


def golden_config(case):
    names = dict(hidden="hidden_size", intermediate="intermediate_size", experts="moe_experts", eps="layer_norm_eps")
    fields = {field.name for field in dataclasses.fields(MoEInferenceConfig)}
    found = {names.get(key, key): value for key, value in case.items()}
    return MoEInferenceConfig.from_dict({key: value for key, value in found.items() if key in fields})


def test_no_golden_case_is_left_out():
    assert len(CASES) == 15 and {name.split("/")[0] for name in ARRAYS} == set(CASES)
    assert sum("decode" in case for case in CASES.values()) == 2


FLOWS = [(name, data_flow) for name in reversed(CASES) for data_flow in ("standard", "literal")]


@pytest.mark.parametrize("which", one_in(5, FLOWS), ids="-".join)
def test_deepspeeds_own_outputs(which):
    name, data_flow = which
    case, prefix = CASES[name], f"{name}/weights/"
    weights = {key.removeprefix(prefix): array for key, array in ARRAYS.items() if key.startswith(prefix)}
    layer = layer_from_state_dict(golden_config(case), weights, data_flow, case.get("layer_index", 0))
    y, past = layer(ARRAYS[f"{name}/x"], ARRAYS.get(f"{name}/mask"), use_cache=True)
    np.testing.assert_allclose(y, ARRAYS[f"{name}/{data_flow}/output"], rtol=0, atol=5e-5)
    steps = ARRAYS.get(f"{name}/decode_x", np.zeros((2, 0, 32), np.float32))
    assert steps.shape[1] == case.get("decode", 0)
    for i in range(steps.shape[1]):
        y, past = layer(steps[:, i : i + 1], layer_past=past, use_cache=True)
        want = ARRAYS[f"{name}/{data_flow}/decode_output"][:, i : i + 1]
        np.testing.assert_allclose(y, want, rtol=0, atol=5e-5)


# every query sees a real token: of others the -10000 in float32 keeps three digits (test_deepspeed_attention)
GAPS = np.array([[1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
RIGHT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
# options, and beside them what the call takes: `mask`, `data_flow`, `layer_index`
OPTIONS = {
    "one expert per token": dict(),
    "room to spare": dict(eval_capacity_factor=0.25, min_capacity=2),
    "literal, residual, norms last": dict(mlp_type="residual", k=2, pre_layer_norm=False, data_flow="literal"),
    "norms last": dict(pre_layer_norm=False, drop_tokens=False),
    "RMSNorm": dict(norm_type="RMSNorm", layer_norm_eps=0.1),
    "RMSNorm last, literal": dict(norm_type="RMSNorm", pre_layer_norm=False, data_flow="literal"),
    "three experts, DeepSpeed's ranking": dict(k=3, eval_capacity_factor=0.6),
    "three experts, by logit": dict(k=3, eval_capacity_factor=0.6, drop_policy="probs"),
    "three experts, by probability": dict(k=3, eval_capacity_factor=0.6, drop_policy="gate"),
    "three experts, by position": dict(k=3, eval_capacity_factor=0.6, drop_policy="position"),
    "grouped heads, halves rotated in part": dict(num_kv=2, hidden_size=32, rotary_dim=4, rotate_half=True),
    "one key head, pairs rotated": dict(num_kv=1, rotary_dim=4, rope_theta=100.0),
    "pairs rotated in part": dict(hidden_size=32, rotary_dim=6),
    "window": dict(local_attention=True, window_size=3),
    "window without a triangle": dict(local_attention=True, window_size=2, triangular_masking=False),
    "padding between": dict(mask=GAPS),
    "padding on the right, no triangle": dict(mask=RIGHT, triangular_masking=False, pre_layer_norm=False),
    "additive mask": dict(mask=2 * numbers(2, 4, 6, 6, seed=7), triangular_masking=False),
    "Bloom": dict(bigscience_bloom=True, mask=1 - GAPS, invert_mask=False),
    "Bloom, three heads": dict(bigscience_bloom=True, hidden_size=18, heads=3),
    "muP, inverse layer index": dict(use_mup=True, scale_attn_by_inverse_layer_idx=True, layer_index=3),
    "no scaling": dict(scale_attention=False, scale_attn_by_inverse_layer_idx=True, use_mup=True, layer_index=1),
    "ReLU": dict(mlp_act_func_type="ReLU"),
    "exact GELU": dict(gelu="erf"),
    "gated GELU": dict(mlp_act_func_type="GATED_GELU", mlp_type="residual"),
    "gated GELU by tanh": dict(mlp_act_func_type="GATED_GELU", gelu="tanh"),
    "gated SiLU": dict(mlp_act_func_type="GATED_SILU"),
}


@pytest.mark.parametrize("name", one_in(3, OPTIONS))
def test_an_independent_layer_in_float64(name):
    options = SMALL | OPTIONS[name]
    call = {key: options.pop(key) for key in ("mask", "data_flow", "layer_index") if key in options}
    weights, x = random_weights(options, len(name)), numbers(2, 6, options["hidden_size"], seed=2)
    mask = call.pop("mask", None)
    want, present, chances = oracle_layer(options, weights, x, mask=mask, **call)
    layer = layer_from_state_dict(options, weights, **call)
    y, cache, got = layer(x, mask, get_present=True, output_attentions=True)
    np.testing.assert_allclose(got, chances, rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(cache, present, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


CACHED = {
    "plain": {},
    "grouped, rotated": dict(num_kv=2, rotary_dim=4, mlp_type="residual"),
    "window": dict(local_attention=True, window_size=3),
    "Bloom": dict(bigscience_bloom=True),
    "norms last": dict(pre_layer_norm=False),
}


@pytest.mark.parametrize("name", one_in(2, CACHED))
def test_token_by_token_equals_one_pass(name):
    layer, x = small_layer(**CACHED[name]), numbers(2, 7, 16)
    whole, cache = layer(x, get_present=True)
    parts, past = [], None
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):  # two new tokens see each other causally too
        part, past = layer(x[:, start:end], layer_past=past, use_cache=True)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(past, cache, rtol=1e-5, atol=5e-6)


def test_masks_of_every_kind_and_shape_mean_the_same():
    layer, x = small_layer(), numbers(2, 6, 16)
    want, _, _ = oracle_layer(FREE, random_weights(FREE, 1), x, mask=GAPS)
    added = np.where(GAPS == 1, 0.0, -10000.0).astype(np.float32)
    for mask in (
        *(GAPS.astype(dtype) for dtype in (bool, np.int8, np.int32, np.int64, np.uint8)),
        GAPS[:, None, None],
        np.broadcast_to(GAPS[:, None, None] == 1, (2, 4, 6, 6)),
        added,
        added[:, None, None],
        np.broadcast_to(added[:, None, None], (2, 1, 6, 6)).astype(np.float16),
        jnp.asarray(added, jnp.bfloat16)[:, None, None],
    ):
        np.testing.assert_allclose(layer(x, mask), want, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(layer(x, attention_mask=mask), layer(x, mask))
    np.testing.assert_array_equal(layer(x, 1 - GAPS, GAPS), layer(x, GAPS))  # attention_mask wins


def test_what_is_returned_is_what_was_asked_for():
    x = numbers(1, 3, 16)
    bare, wrapped = small_layer(), small_layer(return_tuple=True)
    y = bare(x)
    assert isinstance(y, jax.Array) and isinstance(wrapped(x), tuple) and len(wrapped(x)) == 1
    np.testing.assert_array_equal(wrapped(x)[0], y)
    for name in ("get_present", "get_key_value", "use_cache"):
        out = bare(x, **{name: True})
        assert len(out) == 2 and [a.shape for a in out[1]] == [(1, 4, 3, 4)] * 2
        assert len(wrapped(x, **{name: True})) == 2
    out = wrapped(x, get_present=True, use_cache=True, output_attentions=True)
    assert len(out) == 3 and out[2].shape == (1, 4, 3, 3)
    (_, chances) = bare(x, output_attentions=True)
    np.testing.assert_allclose(chances.sum(-1), np.ones((1, 4, 3)), rtol=1e-6)
    y, chances = bare(x[:, 2:], layer_past=bare(x[:, :2], use_cache=True)[1], output_attentions=True)
    assert y.shape == (1, 1, 16) and chances.shape == (1, 4, 1, 3)
    np.testing.assert_allclose(chances[:, :, 0], out[2][:, :, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("working", one_in(3, [dict(), dict(fp16=True), dict(bf16=True), dict(dtype="int8")]))
@pytest.mark.parametrize("dtype", one_in(2, ["float32", "float16", "bfloat16"]))
def test_the_output_has_the_inputs_dtype(working, dtype):
    layer, x = small_layer(**working), jnp.asarray(numbers(2, 4, 16), dtype)
    y, present = layer(x, get_present=True)
    assert y.dtype == x.dtype and {a.dtype.name for a in present} == {layer.config.working_dtype}
    want, _, _ = oracle_layer(FREE, random_weights(FREE, 1), x)
    coarse = max(np.finfo(np.float32).eps, *(float(jnp.finfo(d).eps) for d in (dtype, layer.config.working_dtype)))
    assert np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2)) < (0.1 if layer.config.q_int8 else 8 * coarse)


@pytest.mark.parametrize("grouping", [dict(), dict(quantize_groups=2, mlp_extra_grouping=True, merge_count=2)])
def test_int8_values_are_deepspeeds(grouping):
    options = FREE | dict(mlp_type="residual", mlp_act_func_type="GATED_SILU")
    weights, x = random_weights(options, 1), numbers(2, 5, 16)
    layer = layer_from_state_dict(options | dict(q_int8=True) | grouping, weights)
    groups = 4 if grouping else 1
    own, near = layer.weights, dict(weights)

    def check(name, values, groups):
        q, scale = quantize_groups(weights[name].T, groups)
        np.testing.assert_array_equal(values, q)
        near[name] = (q.reshape(groups, -1) / scale).reshape(q.shape).T.astype(np.float32)

    values = lambda group, name: np.asarray(own[group][name][...].values)[0]
    qkv = [values("attention", name).reshape(16, 16) for name in "qkv"]
    check("attention.attn_qkvw", np.concatenate(qkv), groups)
    check("attention.attn_ow", values("attention", "o").reshape(16, 16), groups)
    for prefix, place in [("res_mlp.", ("shared", ...))] + [(f"mlp.{e}.", ("moe", e)) for e in range(4)]:
        group, e = place
        first = np.concatenate([values(group, "up")[e], values(group, "gate")[e]])
        check(prefix + "inter_w", first, groups * (2 if grouping else 1))
        check(prefix + "output_w", values(group, "down")[e], groups * (2 if grouping else 1))
    np.testing.assert_allclose(layer(x), layer_from_state_dict(options, near)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_int8_groups_follow_blooms_order_of_heads(groups):
    options = FREE | dict(
        bigscience_bloom=True, q_int8=True, quantize_groups=groups, hidden_size=12, intermediate_size=24
    )
    weights = random_weights(options, 1)
    own = layer_from_state_dict(options, weights).weights["attention"]
    heads = np.stack([np.asarray(own[name][...].values)[0] for name in "qkv"], 1)
    want, _ = quantize_groups(weights["attention.attn_qkvw"].T, groups)
    np.testing.assert_array_equal(heads.reshape(36, 12), want)


def test_a_shared_config_is_left_as_it_is():
    config = MoEInferenceConfig(**FREE, mp_size=2, scale_attn_by_inverse_layer_idx=True)
    before, weights = config.to_dict(), random_weights(FREE, 1)
    first, second = (layer_from_state_dict(config, weights, layer_index=i) for i in (0, 1))
    first(numbers(1, 2, 16))
    assert config.to_dict() == before and first.config is config and second.config is config


WRONG_CALLS = {
    "head_mask": (dict(head_mask=np.ones(4)), "head_mask"),
    "encoder": (dict(encoder_hidden_states=1, enc_dec_attn_mask=1), "enc_dec_attn_mask, encoder_hidden_states"),
    "encoder's output and mask": (
        dict(encoder_output=1, encoder_attention_mask=1),
        "encoder_output, encoder_attention_",
    ),
    "width": (dict(input=np.ones((2, 3, 15), np.float32)), r"input: .*15.*expected floats \[B, T, 16\]"),
    "integers": (dict(input=np.ones((2, 3, 16), int)), "input: int32"),
    "mask's keys": (dict(input_mask=np.ones((2, 4), int)), r"input_mask: .*\(2, 1, 1, 4\).* 3 keys"),
    "mask's heads": (dict(input_mask=np.ones((2, 3, 1, 3))), "input_mask: .* 4 heads"),
    "mask's values": (dict(input_mask=np.full((2, 3), 2)), "input_mask: integers other than 0 and 1"),
    "past's heads": (dict(layer_past=[np.ones((2, 3, 1, 4))] * 2), r"layer_past: .*expected.*\(2, 4, P, 4\)"),
    "past's lengths": (dict(layer_past=[np.ones((2, 4, 1, 4)), np.ones((2, 4, 2, 4))]), "layer_past"),
    "past without values": (dict(layer_past=[np.ones((2, 4, 1, 4))]), "layer_past"),
    "too many tokens": (dict(layer_past=[np.ones((2, 4, 8, 4))] * 2), "8 earlier and 3 new tokens.*max_out_tokens 10"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused(name):
    given, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message):
        small_layer(max_out_tokens=10)(**(dict(input=numbers(2, 3, 16)) | given))


def test_wrong_weights_are_refused_by_name():
    good = random_weights(FREE, 1)
    for change, message in (
        ({"attention.attn_ow": None}, "missing .*attention.attn_ow"),
        ({"moe_gate.wg.weight": None, "norm_w": None}, "missing .*moe_gate.wg.weight.*norm_w"),
        ({"mlp.4.inter_w": np.ones((16, 24))}, "unknown .*mlp.4.inter_w"),
        ({"attn_nw": np.ones(15)}, r"attn_nw: shape \(15,\), expected \(16,\)"),
        ({"attention.attn_qkvw": np.ones((16, 47))}, r"attn_qkvw: shape \(16, 47\), expected \(16, 48\)"),
        ({"mlp.2.output_w": np.ones((24, 15))}, r"mlp\.2\.output_w: shape \(24, 15\), expected \(24, 16\)"),
        ({"mlp.0.inter_w": np.ones((16, 24), np.int8)}, r"no floats in \['mlp\.0\.inter_w'\]"),
    ):
        wrong = {name: value for name, value in (good | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            layer_from_state_dict(FREE, wrong)
    # upstream's MLPs carry norms they do not use
    layer_from_state_dict(FREE, good | {"mlp.0.attn_nw": np.ones(16), "res_mlp.attn_nb": np.ones(16)})


def test_wrong_options_are_refused():
    config, weights = MoEInferenceConfig(**FREE), random_weights(FREE, 1)
    with pytest.raises(ValueError, match="fastest"):
        layer_from_state_dict(config, weights, implementation="fastest")
    with pytest.raises(ValueError, match="data_flow: 'both'"):
        layer_from_state_dict(config, weights, data_flow="both")
    for index in (-1, True, 1.0):
        with pytest.raises(ValueError, match="layer_index"):
            layer_from_state_dict(config, weights, layer_index=index)
    for given in (dict(), dict(weights=weights, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="weights, rngs"):
            MoEInference(config, **given)


def test_random_weights_have_the_shapes_of_a_state_dict():
    layer = MoEInference(MoEInferenceConfig(**SMALL), rngs=nnx.Rngs(0))
    count = sum(p[...].size for p in jax.tree.leaves(layer.weights, is_leaf=lambda p: isinstance(p, nnx.Variable)))
    assert count == sum(np.prod(shape) for shape in shapes(SMALL).values())
    assert np.isfinite(layer(numbers(2, 6, 16))).all()
