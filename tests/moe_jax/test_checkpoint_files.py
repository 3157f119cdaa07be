"""Checkpoint files beyond the usual: huge, odd, malformed or misfitting ones; layouts both ways; quantised experts."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import golden_cases
from core_models import folder, golden_model, tensors_of
from test_config_values import CONFIGS, TINY

import moe_jax
from moe_jax import ModelConfig
from moe_jax.checkpoint import safetensors
from moe_jax.checkpoint.layout import from_disk, pieces, to_disk
from moe_jax.checkpoint.quantized import convert, widen_fp8
from moe_jax.checkpoint.safetensors import write_file
from moe_jax.checkpoint.source import Checkpoint


def write(path, tensors):
    write_file(path, {n: (a.dtype, a.shape) for n, a in tensors.items()}, tensors.values())


def write_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.fixture
def copied(tmp_path):
    return lambda case: shutil.copytree(folder(case), tmp_path / case)


def edit_config(where, **changes):
    path = where / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_opening_reads_the_header_only(tmp_path, monkeypatch):
    """A sparse file of 64 GiB opens at once; a small tensor at its end is read alone."""
    size, path = 1 << 36, tmp_path / "model.safetensors"
    header = {"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header["small"] = {"dtype": "U8", "shape": [2, 3], "data_offsets": [size, size + 6]}
    write_header(path, header)
    start = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(start + size + 6)
        file.seek(start + size)
        file.write(bytes(range(6)))
    taken, pread, preadv = [], os.pread, os.preadv
    monkeypatch.setattr(safetensors.os, "pread", lambda fd, n, at: taken.append(n) or pread(fd, n, at))
    monkeypatch.setattr(safetensors.os, "preadv", lambda fd, to, at: taken.append(len(to[0])) or preadv(fd, to, at))
    checkpoint = Checkpoint(tmp_path)
    assert sum(taken) == start and checkpoint.tensors["big"].shape == (size // 4,)
    np.testing.assert_array_equal(checkpoint.read("small"), [[0, 1, 2], [3, 4, 5]])
    assert sum(taken) == start + 6
    checkpoint.close()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "no tensor has"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "no tensor has"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "no tensor has"),
        ({"dtype": 7, "shape": [1], "data_offsets": [0, 4]}, "no tensor has"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fill 4 bytes"),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}, "malformed"),
        ({"dtype": "F32", "shape": [1]}, "malformed"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "malformed"),
        ([], "malformed"),
    ],
)
def test_malformed_headers(tmp_path, entry, words):
    write_header(tmp_path / "model.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(OSError, match=words):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("header", [b"[1]", b"null", b"\xff\xfe", b'{"x": 1'])
def test_headers_that_are_no_dictionary(tmp_path, header):
    write_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(OSError, match="malformed safetensors header"):
        Checkpoint(tmp_path)


def test_unknown_dtype_is_named_when_it_is_needed(copied, tmp_path):
    where = copied("mixtral")
    raw = (where / "model.safetensors").read_bytes()
    assert raw.count(b'"dtype":"F32"') > 10
    changed = raw.replace(b'"dtype":"F32"', b'"dtype":"F4X"', 1)
    (where / "model.safetensors").write_bytes(changed)
    with pytest.raises(OSError, match="tensor 'lm_head.weight' has dtype F4X, which is not supported"):
        moe_jax.load_pretrained(where)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 5}}', "{", '{"weight_map": []}']
)
def test_malformed_indexes(copied, text):
    where = copied("qwen3_moe_sharded")
    (where / "model.safetensors.index.json").write_text(text)
    with pytest.raises(OSError, match="malformed index"):
        moe_jax.load_pretrained(where)


@pytest.mark.parametrize("name", ["/etc/hostname", "../other.safetensors", "sub/x.safetensors"])
def test_an_index_names_only_files_of_its_folder(copied, name):
    where = copied("qwen3_moe_sharded")
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(OSError, match=f"outside the folder: {name}"):
        moe_jax.load_pretrained(where)


def test_one_shard_is_truncated(copied):
    where = copied("qwen3_moe_sharded")
    path = where / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="model-00002-of-00004.safetensors: truncated"):
        moe_jax.load_pretrained(where)


def test_scales_that_do_not_fit_are_named_with_the_rest(copied):
    """FP8 factors of a wrong shape, and factors without a matrix, stand in the one error about all tensors."""
    where = copied("minimax_m2")
    edit_config(where, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    tensors = tensors_of(where / "model.safetensors")
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    tensors[q] = tensors[q].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{q}_scale_inv"] = np.ones((99, 1), np.float32)
    tensors[f"{k}_scale_inv"] = np.ones((1, 1), np.float32)
    del tensors["model.norm.weight"]
    write(where / "model.safetensors", tensors)
    with pytest.raises(OSError) as error:
        moe_jax.load_pretrained(where)
    assert "missing (1): model.norm.weight" in str(error.value)
    assert f"unexpected (2): {k}_scale_inv, {q}_scale_inv" in str(error.value)


def test_mxfp4_scales_that_do_not_fit(copied):
    where = copied("gpt_oss_mxfp4")
    tensors = tensors_of(where / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1].copy()
    write(where / "model.safetensors", tensors)
    with pytest.raises(OSError) as error:
        moe_jax.load_pretrained(where)
    assert f"missing (1): {name};" in str(error.value)
    assert f"unexpected (2): {name}_blocks, {name}_scales" in str(error.value)


def test_mxfp4_checkpoint_against_another_decoder():
    """Sign, two exponent bits, one mantissa bit, decoded by formula; gate and up alternate along the outputs."""
    raw = tensors_of(folder("gpt_oss_mxfp4") / "model.safetensors")
    blocks = raw["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    scales = raw["model.layers.1.mlp.experts.gate_up_proj_scales"].astype(np.float64)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32).astype(np.int64)
    sign, exponent, mantissa = 1 - 2 * (codes >> 3), (codes >> 1) & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    wide = (sign * size * 2.0 ** (scales[..., None] - 127)).reshape(*blocks.shape[:2], -1)  # [E, 2F, D]
    moe = moe_jax.dequantize(golden_model("gpt_oss_mxfp4")).arrays()["moe"]
    np.testing.assert_array_equal(moe["gate"][1], wide[:, 0::2])
    np.testing.assert_array_equal(moe["up"][1], wide[:, 1::2])


@pytest.mark.parametrize(("shape", "block"), [((5, 7), (2, 3)), ((128, 130), (128, 128)), ((3, 2), (128, 128))])
def test_fp8_sizes_that_are_no_multiple_of_the_block(shape, block):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    factors = rng.uniform(0.5, 2, [-(-n // b) for n, b in zip(shape, block, strict=True)]).astype(np.float32)
    wide = widen_fp8(weight, factors, block)
    assert wide.dtype == np.float32
    for i, j in np.ndindex(shape):
        assert wide[i, j] == np.float32(weight[i, j]) * factors[i // block[0], j // block[1]]


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "fp8"}, "fp8 without weight_block_size is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: fp8, mxfp4"),
        ("fp8", "'fp8' is not a dictionary"),
    ],
)
def test_quantisation_settings_that_are_refused(copied, quantization, words):
    where = copied("mixtral")
    edit_config(where, quantization_config=quantization)
    with pytest.raises(ValueError, match=words):
        moe_jax.load_pretrained(where)


def test_bfloat16_is_widened_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    wide = convert(every, np.dtype(np.float32))
    finite = ~np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(wide[finite], every.astype(np.float32)[finite])
    assert wide.dtype == np.float32 and np.isnan(wide[~finite]).all() and (~finite).sum() == 254


@pytest.mark.parametrize("name", TINY)
def test_layouts_are_inverse_both_ways(name):
    """Shares to disk and back: fused, interleaved, transposed, flattened heads, an axis of one in front."""
    rng, tensors = np.random.default_rng(0), {}
    for piece in pieces(ModelConfig.from_json_file(CONFIGS / "tiny" / f"{name}.json")):
        tensors.setdefault(piece.name, []).append(piece)
    for parts in tensors.values():
        shares = [(piece, rng.normal(size=piece.shape)) for piece in parts]
        disk = to_disk(shares)
        assert disk.shape == parts[0].disk_shape and disk.size == sum(share.size for _, share in shares)
        for piece, share in shares:
            np.testing.assert_array_equal(from_disk(piece, disk), share)


@pytest.mark.parametrize(
    "case", [case for case in golden_cases() if case.startswith(("gpt", "ernie", "llama4", "hun"))]
)
def test_saved_bytes_equal_the_original_tensors(case, tmp_path):
    """Where the layout is peculiar, the values stand where they stood, not only under the same names."""
    moe_jax.save_pretrained(golden_model(case), tmp_path, max_shard_bytes=60_000)
    before, after = Checkpoint(folder(case)), Checkpoint(tmp_path)
    for name in after.tensors:
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(np.float32), err_msg=name)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {name: entry.nbytes for file in after.files.values() for name, entry in file.entries.items()}
    assert set(index["weight_map"]) == set(stored) and len(after.files) > 2
    assert index["metadata"]["total_size"] == sum(stored.values())
    before.close()
    after.close()


def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path):
    moe_jax.save_pretrained(golden_model("mixtral"), tmp_path, max_shard_bytes=50_000)
    many = {p.name for p in tmp_path.iterdir()}
    moe_jax.save_pretrained(golden_model("mixtral"), tmp_path, max_shard_bytes=200_000)
    few = {p.name for p in tmp_path.iterdir()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert few == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        *index["weight_map"].values(),
    }
    assert 4 < len(few) < len(many) and not any(name.endswith(".partial") for name in few)
    assert moe_jax.load_pretrained(tmp_path).config == ModelConfig.from_json_file(tmp_path / "config.json")


def test_dtype_of_a_save(tmp_path):
    """The correction bias stays float32 in a bfloat16 model, and config.json says bfloat16."""
    moe_jax.save_pretrained(golden_model("deepseek_v3", "bfloat16"), tmp_path)
    kinds = {name: stored.dtype for name, stored in Checkpoint(tmp_path).tensors.items()}
    assert {kind for name, kind in kinds.items() if "e_score_correction_bias" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "e_score_correction_bias" not in name} == {"BF16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_generation_settings_that_are_no_object(copied, text):
    where = copied("mixtral")
    (where / "generation_config.json").write_text(text)
    with pytest.raises(OSError, match="generation_config.json"):
        moe_jax.load_pretrained(where)
