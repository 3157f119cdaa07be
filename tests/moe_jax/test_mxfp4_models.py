"""gpt-oss as it is released: 4-bit experts kept while loading, running, saving and beside int8."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from core_models import folder, golden_arrays, golden_model, only, tensors_of

import moe_jax
from moe_jax.checkpoint import load
from moe_jax.cli import main
from moe_jax.model import Model
from moe_jax.weights import flattened
from pallas_kernels import MXFP4Array, QuantizedArray
from pallas_kernels.quantized import is_quantized

CASE = "gpt_oss_mxfp4"
EXPERTS = {"moe.gate", "moe.up", "moe.down"}
PREFIX = "model.layers.{}.mlp.experts."


@pytest.fixture(scope="module")
def wide():
    return moe_jax.dequantize(golden_model(CASE))


def four_bits(model):
    return {name for name, array in flattened(model.arrays()).items() if isinstance(array, MXFP4Array)}


def equal(one, other):
    a, b = flattened(one.arrays()), flattened(other.arrays())
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_bytes_are_the_weights(dtype):
    model, raw = golden_model(CASE, dtype), tensors_of(folder(CASE) / "model.safetensors")
    assert four_bits(model) == EXPERTS
    moe = model.arrays()["moe"]
    for layer in range(2):
        for part, attribute in (("_blocks", "blocks"), ("_scales", "scales")):
            both = raw[PREFIX.format(layer) + "gate_up_proj" + part]
            both = both.reshape(*both.shape[:2], -1)
            down = raw[PREFIX.format(layer) + "down_proj" + part].reshape(4, 64, -1)
            for name, want in (("gate", both[:, 0::2]), ("up", both[:, 1::2]), ("down", down)):
                got = np.asarray(getattr(moe[name], attribute)[layer])
                np.testing.assert_array_equal(got.view(np.uint8), want)
    assert moe["up"].shape == (2, 4, 32, 64) and moe["down"].shape == (2, 4, 64, 32)
    assert {moe[n].dtype for n in ("gate", "up", "down")} == {np.dtype(model.dtype)} == {jax.numpy.dtype(dtype)}


def test_nothing_of_the_experts_is_widened_while_loading(monkeypatch):
    def refuse(*_):
        raise AssertionError("widened")

    monkeypatch.setattr("moe_jax.checkpoint.source.widen_mxfp4", refuse)
    assert four_bits(moe_jax.load_pretrained(folder(CASE))) == EXPERTS


def test_loaded_layer_by_layer_as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(load.jax, "default_backend", lambda: "gpu")
    equal(moe_jax.load_pretrained(folder(CASE), dtype="float32"), golden_model(CASE))


def test_logits_are_those_of_the_widened_weights(wide):
    model, arrays = golden_model(CASE), golden_arrays(CASE)
    for way in ("right", "left"):
        ids, mask = arrays[f"{way}.input_ids"], arrays[f"{way}.attention_mask"]
        got, want = (np.asarray(m(ids, mask))[mask > 0] for m in (model, wide))
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", only(["xla_ragged"], ["xla_tiles", "xla_ragged"]))
def test_implementations_agree(implementation, wide):
    model = golden_model(CASE)
    model = Model(model.config, model.arrays(), implementation=implementation)
    ids = golden_arrays(CASE)["input_ids"]
    np.testing.assert_allclose(model(ids), wide(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_as_it_was_released(dtype, tmp_path):
    model, source = golden_model(CASE, dtype), folder(CASE)
    moe_jax.save_pretrained(model, tmp_path, max_shard_bytes=50_000)
    before = tensors_of(source / "model.safetensors")
    after = {}
    for path in tmp_path.glob("*.safetensors"):
        after |= tensors_of(path)
    assert after.keys() == before.keys()
    for name, array in before.items():
        kind = np.uint8 if array.dtype == np.uint8 else np.dtype(model.dtype)
        assert after[name].dtype == kind and after[name].shape == array.shape
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    want = json.loads((source / "config.json").read_text())
    assert config["quantization_config"] == want["quantization_config"]
    equal(moe_jax.load_pretrained(tmp_path, dtype=dtype), model)


def test_a_config_without_settings_gets_the_method(tmp_path):
    model = golden_model(CASE)
    values = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    moe_jax.save_pretrained(Model(moe_jax.ModelConfig.from_dict(values), model.arrays()), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"quant_method": "mxfp4"}


def test_widened_models_are_saved_as_floats(tmp_path, wide):
    assert not any(map(is_quantized, flattened(wide.arrays()).values()))
    assert wide.arrays()["moe"]["up"].dtype == wide.dtype == np.float32
    moe_jax.save_pretrained(wide, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    equal(moe_jax.load_pretrained(tmp_path, dtype="float32"), wide)


def test_widened_in_bfloat16_is_exact(wide):
    narrow = moe_jax.dequantize(golden_model(CASE, "bfloat16")).arrays()["moe"]
    assert narrow["gate"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(narrow["gate"], np.float32), wide.arrays()["moe"]["gate"])


def test_int8_leaves_4_bit_experts_alone(tmp_path):
    source = golden_model(CASE)
    model = moe_jax.quantize(source, group_size=16)
    assert four_bits(model) == EXPERTS
    flat = flattened(model.arrays())
    int8 = {name for name, array in flat.items() if isinstance(array, QuantizedArray)}
    assert int8 == {"embedding", "head.kernel", *(f"attention.{n}" for n in "qkvo")}
    np.testing.assert_array_equal(flat["moe.up"].blocks, source.arrays()["moe"]["up"].blocks)
    ids = golden_arrays(CASE)["input_ids"]
    np.testing.assert_allclose(model(ids), moe_jax.dequantize(model)(ids), atol=1e-4)
    moe_jax.save_pretrained(model, tmp_path)
    equal(moe_jax.load_pretrained(tmp_path, dtype="float32"), model)
    equal(moe_jax.load_pretrained(folder(CASE), dtype="float32", quantize="int8", group_size=16), model)


def test_one_layer_of_floats_among_4_bit_ones_widens_all(tmp_path, wide):
    """The stack has one form."""
    moe_jax.save_pretrained(wide, tmp_path)
    floats = tensors_of(tmp_path / "model.safetensors")
    tensors = tensors_of(folder(CASE) / "model.safetensors")
    name = PREFIX.format(0) + "down_proj"
    tensors = {n: a for n, a in tensors.items() if n not in (f"{name}_blocks", f"{name}_scales")}
    tensors[name] = floats[name]
    layout = {n: (a.dtype, a.shape) for n, a in tensors.items()}
    moe_jax.checkpoint.safetensors.write_file(tmp_path / "model.safetensors", layout, tensors.values())
    model = moe_jax.load_pretrained(tmp_path, dtype="float32")
    assert four_bits(model) == EXPERTS - {"moe.down"}
    np.testing.assert_array_equal(model.arrays()["moe"]["down"], wide.arrays()["moe"]["down"])


def test_the_command_line_widens_on_request(tmp_path):
    convert = ["convert", "--model", str(folder(CASE)), "--dtype", "bfloat16", "--output"]
    assert main([*convert, str(tmp_path / "same")]) == 0
    assert main([*convert, str(tmp_path / "wide"), "--dequantize"]) == 0
    same, wide = (tensors_of(tmp_path / n / "model.safetensors") for n in ("same", "wide"))
    name = PREFIX.format(1) + "gate_up_proj"
    assert same[f"{name}_blocks"].shape == (4, 64, 2, 16) and name not in same
    assert wide[name].dtype == ml_dtypes.bfloat16 and wide[name].shape == (4, 64, 64)
