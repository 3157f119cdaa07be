"""DeepSpeed's int8 weights against arrays that DeepSpeed 0.16.5 itself made."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from moe_jax.convert.deepspeed_int8 import (
    as_quantized,
    dequantize_merged,
    quantize_for_injection,
    quantize_groups,
    quantize_megatron,
    quantize_shards,
)
from pallas_kernels.quantized import quantize_runs

CASES = {case["name"]: case for case in json.loads((GOLDEN / "deepspeed" / "int8_weight.json").read_text())}
with np.load(GOLDEN / "deepspeed" / "int8_weight.npz") as stored:
    ARRAYS = dict(stored)


def named(kind):
    return [name for name in CASES if name.startswith(kind)]


def arrays(name):
    """The arrays of a case by their own names."""
    return {key.split("/", 1)[1]: array for key, array in ARRAYS.items() if key.startswith(f"{name}/")}


def same_scales(got, want):
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_case_is_left_out():
    kinds = ("data_", "quantize_", "state_dict_", "group_", "dequant_merge_")
    assert sum(len(named(kind)) for kind in kinds) == len(CASES) == 38


@pytest.mark.parametrize("name", named("data_"))
def test_one_matrix(name):
    case, want = CASES[name], arrays(name)
    q, scale = quantize_groups(want["w"], case["groups"], bits=case["bits"])
    assert q.dtype == np.int8
    np.testing.assert_array_equal(q, want["q"])
    same_scales(scale, want["data_scale"])
    wide = np.asarray(as_quantized(q, scale).dequantize())
    np.testing.assert_allclose(wide, want["dequantised"], rtol=1e-6)
    array = quantize_runs(jnp.asarray(want["w"]), case["groups"])
    np.testing.assert_array_equal(array.values, want["q"])
    np.testing.assert_allclose(array.scales, 1 / want["data_scale"][:, 0], rtol=1e-6)


@pytest.mark.parametrize("name", named("quantize_"))
def test_shards(name):
    case, want = CASES[name], arrays(name)
    shards = [want[f"w{i}"] for i in range(case["shards"])]
    values, scales = quantize_shards(shards, case["groups_asked"], case["merge_dim"], case["mlp_extra_grouping"])
    for i, q in enumerate(values):
        np.testing.assert_array_equal(q, want[f"q{i}"])
    assert scales.size == case["shards"] * case["groups_used"]
    same_scales(scales, want["q_scale"])


@pytest.mark.parametrize("name", named("state_dict_"))
def test_a_megatron_state_dict(name):
    case, want = CASES[name], arrays(name)
    weights = {key[3:]: array for key, array in want.items() if key.startswith("in/")}
    out, scales = quantize_megatron(weights, case["groups"], case["mlp_extra_grouping"])
    assert list(out) == list(weights)
    for key, array in out.items():
        assert array.dtype == want[f"out/{key}"].dtype
        np.testing.assert_array_equal(array, want[f"out/{key}"])
    same_scales(scales, want["scales"])
    del out[next(key for key in weights if "layers.1.mlp.dense_h_to_4h" in key)]
    with pytest.raises(ValueError, match=r"every layer needs the four kernels.*mlp.dense_h_to_4h.weight': 1"):
        quantize_megatron(out, case["groups"])


@pytest.mark.parametrize("name", named("group_"))
def test_injection(name):
    case, want = CASES[name], arrays(name)
    by_rows = case["group_size"] * case["num_groups"] == case["shape"][0]
    for given in ({"num_groups": case["num_groups"]}, *[{"group_size": case["group_size"]}] * by_rows):
        q, scales = quantize_for_injection(want["w"], **given)
        np.testing.assert_array_equal(q, want["q"])
        same_scales(scales, want["scale"])
    runs = q.reshape(case["num_groups"], -1) * scales.reshape(3, -1)[0][:, None]
    np.testing.assert_allclose(runs.reshape(q.shape), want["dequantised"], rtol=1e-6)


@pytest.mark.parametrize("name", named("dequant_merge_"))
def test_merged_shards(name):
    case, want = CASES[name], arrays(name)
    got = dequantize_merged(want["q"], want["qscale"], case["groups"], case["merge_count_log2"])
    np.testing.assert_allclose(got, want["dequantised"], rtol=1e-6)


def test_shards_come_back_merged():
    """The two conventions meet: shards quantised along the input axis, merged, dequantised."""
    w = np.random.default_rng(3).standard_normal((6, 16)).astype(np.float32)
    values, scales = quantize_shards(np.split(w, 4, axis=1), 3, merge_dim=1, mlp_extra_grouping=False)
    wide = dequantize_merged(np.concatenate(values, axis=1).T, scales, groups=3, merge_count=2)
    error = np.abs(wide.T - w)
    assert error.max() <= 1.01 * scales.max()  # the largest value of a run is cut from 128 to 127
    assert np.quantile(error, 0.9) <= 0.5 * scales.max()


def test_fewer_bits_and_half_to_even():
    w = np.array([[1.0, -1.0, 0.3, 0.0]], np.float32)
    q, scale = quantize_groups(w, 1, bits=4)
    assert q.tolist() == [[7, -8, 2, 0]] and scale == pytest.approx(8.0, rel=1e-4)
    q, scales = quantize_for_injection(np.array([[128, 0.5, 1.5, 2.5], [-1, 0, 0, 0]], np.float32), num_groups=1)
    assert q.tolist() == [[127, 0, 2, 2], [-1, 0, 0, 0]] and scales[0, 0] == 1.0


def test_zeros_stay_zeros():
    for q, scale in (quantize_groups(np.zeros((2, 4)), 2), quantize_for_injection(np.zeros((2, 4)))):
        assert (q == 0).all() and np.isfinite(scale).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize_groups(w, 5), r"24 elements of shape \(4, 6\) do not divide into 5 runs"),
        (lambda w: quantize_groups(w, 0), "into 0 runs"),
        (lambda w: quantize_groups(w, 2, bits=9), "bits: 9"),
        (lambda w: quantize_shards([w], 2, merge_dim=2), "merge_dim: 2"),
        (lambda w: quantize_for_injection(w[:3], num_groups=1), r"axis 0 of \(3, 6\) does not halve"),
        (lambda w: dequantize_merged(w, np.ones(3), 2), "3 scales do not fit 2 groups of each of 1 shards"),
        (lambda w: quantize_runs(w, 7), "do not divide into 7 runs"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 6), np.float32))
