"""Checkpoint files: formats, errors that name everything, quantised tensors."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from core_models import tensors_of

import moe_jax
from moe_jax.checkpoint.hub import resolve
from moe_jax.checkpoint.quantized import widen_fp8, widen_mxfp4
from moe_jax.checkpoint.safetensors import TensorFile, write_file
from moe_jax.checkpoint.source import Checkpoint


@pytest.fixture
def copy(tmp_path):
    def make(case):
        return shutil.copytree(GOLDEN / "hf" / case, tmp_path / case)

    return make


def rewrite(path, tensors):
    write_file(path, {n: (a.dtype, a.shape) for n, a in tensors.items()}, tensors.values())


def test_write_then_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "c": np.zeros((2, 0), np.float16),
        "d": rng.integers(0, 255, (2, 3), np.uint8),
        "e": np.float32(3.0).reshape(()),
    }
    rewrite(tmp_path / "x.safetensors", tensors)
    for name, array in tensors_of(tmp_path / "x.safetensors").items():
        assert array.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array, tensors[name])


def test_damaged_files(copy):
    folder = copy("mixtral")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(OSError, match="truncated.*incomplete tensors: model.norm.weight"):
        moe_jax.load_pretrained(folder)
    for garbage in (b"", b"1234", b"\xff" * 64, (50).to_bytes(8, "little") + b"{" * 60):
        path.write_bytes(garbage)
        with pytest.raises(OSError, match="safetensors"):
            moe_jax.load_pretrained(folder)
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(OSError, match="does not fill"):
        TensorFile(path)


def test_one_error_names_all_tensors(copy):
    folder = copy("mixtral")
    tensors = tensors_of(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    rewrite(folder / "model.safetensors", tensors)
    with pytest.raises(OSError) as error:
        moe_jax.load_pretrained(folder)
    for part in (
        "missing (2): lm_head.weight, model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "unexpected (1): model.layers.0.self_attn.q_proj.bias",
        "misshapen (1): model.norm.weight (31,), expected (32,)",
    ):
        assert part in str(error.value)


def test_shards_and_index(copy):
    folder = copy("qwen3_moe_sharded")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    (folder / "model-00003-of-00004.safetensors").rename(folder / "elsewhere")
    with pytest.raises(OSError, match="missing: model-00003-of-00004"):
        Checkpoint(folder)
    (folder / "elsewhere").rename(folder / "model-00003-of-00004.safetensors")
    wrong = values["weight_map"] | {"lm_head.weight": "model-00002-of-00004.safetensors"}
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(OSError, match="lack tensors that the index puts there: lm_head.weight"):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(OSError, match="outside the folder"):
        Checkpoint(folder)
    index.write_text("[]")
    with pytest.raises(OSError, match="malformed index"):
        Checkpoint(folder)


def test_no_pickle_is_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(OSError, match="never read"):
        Checkpoint(tmp_path)
    with pytest.raises(OSError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


def test_extra_layers_and_tables_are_ignored(copy, caplog):
    folder = copy("deepseek_v3")
    tensors = tensors_of(folder / "model.safetensors")
    more = {f"model.layers.3.{part}": np.ones(3, np.float32) for part in ("eh_proj.weight", "enorm.weight")}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    rewrite(folder / "model.safetensors", tensors | more)
    with caplog.at_level("INFO"):
        model = moe_jax.load_pretrained(folder)
    assert model.config.num_layers == 3
    assert all(name in caplog.text for name in more)


def test_tied_head_is_ignored(copy):
    folder = copy("granitemoe_tied")
    tensors = tensors_of(folder / "model.safetensors")
    rewrite(folder / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    moe_jax.load_pretrained(folder)


def test_fp8_blocks(copy):
    """A checkpoint in block-scaled FP8 loads as the matrix that its values and factors stand for."""
    folder = copy("minimax_m2")
    rng, tensors, want = np.random.default_rng(0), {}, {}
    for name, array in tensors_of(folder / "model.safetensors").items():
        if not name.endswith("proj.weight") and ".experts." not in name:
            tensors[name] = array
            continue
        values = (array * 8).astype(ml_dtypes.float8_e4m3fn)
        rows, columns = (-(-n // 12) for n in array.shape)  # blocks of 12: no size is a multiple
        factors = rng.uniform(0.1, 0.2, (rows, columns)).astype(np.float32)
        tensors |= {name: values, name + "_scale_inv": factors}
        block = np.kron(factors, np.ones((12, 12), np.float32))[: array.shape[0], : array.shape[1]]
        want[name] = values.astype(np.float32) * block
    rewrite(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [12, 12]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    model = moe_jax.load_pretrained(folder)
    q = np.asarray(model.arrays()["attention"]["q"][1])
    np.testing.assert_array_equal(q.reshape(-1, q.shape[-1]), want["model.layers.1.self_attn.q_proj.weight"])
    w2 = model.arrays()["moe"]["down"][0, 2]
    np.testing.assert_array_equal(w2, want["model.layers.0.block_sparse_moe.experts.2.w2.weight"])

    alone = {name: array for name, array in tensors.items() if not name.endswith("k_proj.weight_scale_inv")}
    rewrite(folder / "model.safetensors", alone)
    with pytest.raises(OSError, match="without their weight_scale_inv: model.layers.0.self_attn.k_proj.weight"):
        moe_jax.load_pretrained(folder)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "awq"])
def test_other_quantisations_are_refused_by_name(copy, method):
    folder = copy("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"quant_method '{method}' is not supported"):
        moe_jax.load_pretrained(folder)


def test_widening():
    fp8 = widen_fp8(np.ones((3, 5), ml_dtypes.float8_e4m3fn), np.array([[1, 2, 3], [4, 5, 6]], np.float32), (2, 2))
    np.testing.assert_array_equal(fp8, [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]])
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 3, 2, 16), np.uint8), rng.integers(120, 130, (2, 3, 2), np.uint8)
    got = widen_mxfp4(blocks, scales)
    assert got.shape == (2, 64, 3)
    for e, o, g, i in np.ndindex(2, 3, 2, 32):
        code = int(blocks[e, o, g, i // 2]) >> (4 * (i % 2)) & 15
        value = table[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[e, o, g]) - 127)
        assert got[e, g * 32 + i, o] == value


def test_hub_ids(monkeypatch, tmp_path):
    import sys

    assert resolve(tmp_path) == tmp_path
    for name in ("", "no-slash", "a/b/c", "-x/y", "some folder/that is not"):
        with pytest.raises(OSError, match="neither a folder nor a hub id"):
            resolve(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match=r"pip install 'moe-jax\[hub\]'"):
        resolve("mistralai/Mixtral-8x7B-v0.1")

    class Offline:
        @staticmethod
        def snapshot_download(name, allow_patterns, ignore_patterns):
            assert "*.safetensors" in allow_patterns and ignore_patterns == "*/*"  # no second copy in a folder
            raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Offline)
    with pytest.raises(OSError, match="could not be fetched from the hub.*no route"):
        resolve("mistralai/Mixtral-8x7B-v0.1")
