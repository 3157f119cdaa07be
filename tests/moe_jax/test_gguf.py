"""The GGUF reader against known answers, damaged files, and the translation to a Hugging Face Llama."""

import hashlib
import struct

import numpy as np
import pytest

from moe_jax.checkpoint.gguf import GGUFFile
from moe_jax.checkpoint.gguf_llama import GGUFCheckpoint

NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q6_K": 14,
    "BF16": 30,
}
CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
# type: elements and bytes of a block, places of its float16 scales, sha256 of the float32 values of `pattern` as the
# gguf package (0.19.0, quants.dequantize) gives them.
KNOWN = {
    "Q4_0": (32, 18, (0,), "d320b13a205a9fb7"),
    "Q4_1": (32, 20, (0, 2), "c3431ec22691de5b"),
    "Q5_0": (32, 22, (0,), "3d4b53319e42b732"),
    "Q5_1": (32, 24, (0, 2), "3265ed32e685082a"),
    "Q8_0": (32, 34, (0,), "2eebad3e56d40c74"),
    "Q4_K": (256, 144, (0, 2), "350efdce722c89f6"),
    "Q6_K": (256, 210, (208,), "9af7b01230ee9d99"),
    "BF16": (1, 2, (), "55074cb58de9f89a"),
}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(kind, value):
    """One metadata value; a kind (9, k) is an array of kind k."""
    if isinstance(kind, tuple):
        return struct.pack("<IQ", kind[1], len(value)) + b"".join(packed(kind[1], item) for item in value)
    return text(value) if kind == 8 else struct.pack("<" + CODES[kind], value)


def gguf_bytes(metadata=(), tensors=(), version=3, alignment=32):
    """A GGUF file of metadata (key, kind, value) and tensors (name, type number, logical shape, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, kind, value in metadata:
        out += text(key) + struct.pack("<I", 9 if isinstance(kind, tuple) else kind) + packed(kind, value)
    data = b""
    for name, number, shape, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, len(data))
        data += raw
    return out + b"\0" * (-len(out) % alignment) + data


def opened(tmp_path, raw):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return GGUFFile(path)


def pattern(size, halves):
    """Six blocks of varied bytes with finite scales."""
    raw = (
        (np.arange(6 * size, dtype=np.uint32) * 167 % 251 + np.arange(6 * size) // 7).astype(np.uint8).reshape(6, size)
    )
    for block in range(6):
        for k, place in enumerate(halves):
            raw[block, place : place + 2] = np.array([(-1) ** (block + k) * (block + 0.37 + k)], "<f2").view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", KNOWN)
def test_dequantises_as_the_gguf_package(tmp_path, kind):
    elements, size, halves, expected = KNOWN[kind]
    raw = pattern(size, halves)
    file = opened(tmp_path, gguf_bytes(tensors=[("x", NUMBERS[kind], (2, 3 * elements), raw.tobytes())]))
    assert file.tensors["x"].type == kind and file.tensors["x"].shape == (2, 3 * elements)
    values = file.read("x")
    assert values.dtype == np.float32 and values.shape == (2, 3 * elements) and values.flags.writeable
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == expected
    try:
        from gguf import quants
    except ImportError:
        return  # the fixed answer above is enough where the package is absent
    theirs = quants.dequantize(raw, quants.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values.reshape(-1), theirs.reshape(-1))


def test_blocks_computed_by_hand(tmp_path):
    half = np.array([0.5], "<f2").tobytes()
    minimum = np.array([-2.0], "<f2").tobytes()
    nibbles = bytes(i | (15 - i) << 4 for i in range(16))
    first, second = np.arange(16), 15 - np.arange(16)
    # Bit 4 is set for elements 0 and 31.
    tensors = [
        ("q4_0", 2, (32,), half + nibbles),
        ("q4_1", 3, (32,), half + minimum + nibbles),
        ("q5_0", 6, (32,), half + struct.pack("<I", 1 | 1 << 31) + nibbles),
        ("q8_0", 8, (32,), half + bytes(range(240, 256)) + bytes(range(16))),
    ]
    file = opened(tmp_path, gguf_bytes(tensors=tensors))
    numbers = np.concatenate([first, second]).astype(np.float32)
    np.testing.assert_array_equal(file.read("q4_0"), (numbers - 8) / 2)
    np.testing.assert_array_equal(file.read("q4_1"), numbers / 2 - 2)
    numbers[[0, 31]] += 16
    np.testing.assert_array_equal(file.read("q5_0"), (numbers - 16) / 2)
    np.testing.assert_array_equal(file.read("q8_0"), np.arange(-16, 16, dtype=np.float32) / 2)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_metadata_and_plain_tensors(tmp_path, version, alignment):
    values = [(k, 7 if c in "BbHhIiQq" else True if c == "?" else 1.5) for k, c in CODES.items()]
    metadata = [(f"key{k}", k, v) for k, v in values] + [
        ("general.alignment", 4, alignment),
        ("name", 8, "añ🙂"),
        ("list", (9, 8), ["a", "", "ç"]),
        ("numbers", (9, 5), [-1, 2]),
    ]
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    tensors = [
        ("x", 0, (3, 2), x.tobytes()),
        ("h", 1, (6,), x.astype("<f2").tobytes()),
        ("s", 0, (), x[:1, :1].tobytes()),
    ]
    file = opened(tmp_path, gguf_bytes(metadata, tensors, version, alignment))
    assert file.metadata == {key: value for key, _, value in metadata}
    np.testing.assert_array_equal(file.read("x"), x)
    np.testing.assert_array_equal(file.read("h"), x.reshape(-1))
    assert file.read("s").shape == () and file.tensors["h"].offset % alignment == 0


def test_every_truncation_is_refused(tmp_path):
    raw = gguf_bytes([("a", 8, "text"), ("b", (9, 4), [1, 2])], [("x", 8, (2, 32), bytes(68))])
    path = tmp_path / "cut.gguf"
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(OSError, match="not a GGUF file" if size < 4 else "truncated in .* of " + str(size)):
            GGUFFile(path)


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"PK\3\4" + bytes(60), "not a GGUF file: it starts with b'PK"),
        (gguf_bytes(version=1), "version 1; 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (HEADER + struct.pack("<I", 99), "'k' has type 99"),
        (HEADER + struct.pack("<IIQ", 9, 4, 1 << 60), "truncated in k"),
        (HEADER + struct.pack("<IIQ", 9, 8, 1 << 60), "truncated in k"),
        (HEADER + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + bytes(60), "'k' has type 9 at depth 4"),
        (HEADER + struct.pack("<IQ", 8, 1) + b"\xff", "k is not UTF-8"),
        (gguf_bytes([("k", 0, 1), ("k", 0, 2)]), "'k' occurs twice"),
        (gguf_bytes([("general.alignment", 4, 0)]), "general.alignment is 0"),
        (gguf_bytes(tensors=[("x", 0, (1,) * 5, bytes(4))]), "'x' has 5 dimensions"),
        (gguf_bytes(tensors=[("x", 0, (1,), bytes(4))] * 2), "'x'.*twice"),
        (gguf_bytes(tensors=[("x", 8, (2, 16), bytes(34))]), "'x', Q8_0 .*not whole blocks"),
        (gguf_bytes(tensors=[("x", 0, (1 << 62, 1 << 62), bytes(4))]), "truncated in tensor 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_refused(tmp_path, raw, message):
    with pytest.raises(OSError, match=message):
        opened(tmp_path, raw)


def test_unknown_types_and_names(tmp_path):
    file = opened(tmp_path, gguf_bytes(tensors=[("x", 13, (256,), bytes(176)), ("y", 77, (1,), bytes(4))]))
    with pytest.raises(ValueError, match="'x' has type Q5_K; supported are F32, F16, Q4_0"):
        file.read("x")
    with pytest.raises(ValueError, match="'y' has type number 77"):
        file.read("y")
    with pytest.raises(ValueError, match="no tensor 'z' among its 2"):
        file.read("z")
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "absent.gguf")


HEADS, KV, WIDTH, HIDDEN, WIDE, VOCAB = 4, 2, 6, 24, 8, 5
LLAMA = {
    "general.architecture": (8, "llama"),
    "llama.block_count": (4, 1),
    "llama.context_length": (4, 64),
    "llama.embedding_length": (4, HIDDEN),
    "llama.feed_forward_length": (4, WIDE),
    "llama.attention.head_count": (4, HEADS),
    "llama.attention.head_count_kv": (4, KV),
    "llama.attention.layer_norm_rms_epsilon": (6, 1e-5),
    "llama.rope.dimension_count": (4, WIDTH),
    "llama.rope.freq_base": (6, 500000.0),
    "tokenizer.ggml.eos_token_id": (4, 2),
}
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HEADS * WIDTH, HIDDEN),
    "blk.0.attn_k": (KV * WIDTH, HIDDEN),
    "blk.0.attn_v": (KV * WIDTH, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * WIDTH),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (WIDE, HIDDEN),
    "blk.0.ffn_up": (WIDE, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, WIDE),
}


def llama(tmp_path, changes=(), shapes=SHAPES):
    metadata = [(key, *pair) for key, pair in (LLAMA | dict(changes)).items() if pair]
    tensors = []
    for k, (name, shape) in enumerate(shapes.items()):
        values = np.arange(np.prod(shape), dtype=np.float32) + 1000 * k
        tensors.append((f"{name}.weight", 0, shape, values.tobytes()))
    return GGUFCheckpoint(opened(tmp_path, gguf_bytes(metadata, tensors)).path)


def test_llama_config_and_names(tmp_path):
    found = llama(tmp_path)
    config = found.config
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (HIDDEN, WIDE, VOCAB)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV, WIDTH)
    assert (config["rms_norm_eps"], config["rope_theta"], config["max_position_embeddings"]) == (1e-5, 500000.0, 64)
    assert config["tie_word_embeddings"] and config["eos_token_id"] == 2 and config["bos_token_id"] is None
    assert len(found.tensors) == len(SHAPES)
    assert found.read("model.layers.0.mlp.down_proj.weight").shape == (HIDDEN, WIDE)


def test_rotary_rows_of_queries_and_keys_are_put_back(tmp_path):
    found = llama(tmp_path)
    for name, heads, base in (("q", HEADS, 3000), ("k", KV, 4000)):
        rows = (found.read(f"model.layers.0.self_attn.{name}_proj.weight")[:, 0] - base) / HIDDEN
        # llama.cpp's rows 0 1 2 3 4 5 of a head are Hugging Face's 0 3 1 4 2 5.
        expected = [head * WIDTH + row for head in range(heads) for row in (0, 2, 4, 1, 3, 5)]
        np.testing.assert_array_equal(rows, expected)
    values = found.read("model.layers.0.self_attn.v_proj.weight")[:, 0]
    np.testing.assert_array_equal(values, 5000 + HIDDEN * np.arange(KV * WIDTH))


def test_untied_head_and_linear_scaling(tmp_path):
    changes = {"llama.rope.scaling.type": (8, "linear"), "llama.rope.scaling.factor": (6, 4.0)}
    found = llama(tmp_path, changes, SHAPES | {"output": (VOCAB, HIDDEN)})
    assert not found.config["tie_word_embeddings"] and found.read("lm_head.weight").shape == (VOCAB, HIDDEN)
    assert found.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({"general.architecture": (8, "qwen2")}, SHAPES, "'qwen2'; only 'llama'"),
        ({"general.architecture": None}, SHAPES, "is None; only 'llama'"),
        ({"llama.expert_count": (4, 8)}, SHAPES, "'llama.expert_count' is 8"),
        ({"split.count": (2, 3)}, SHAPES, "'split.count' is 3"),
        ({"llama.rope.scaling.type": (8, "yarn")}, SHAPES, "'yarn'; 'none' and 'linear'"),
        ({"llama.rope.dimension_count": (4, 3)}, SHAPES, "width is 3 for 4 heads"),
        ({"llama.attention.key_length": (4, 8)}, SHAPES, "width is 8 for 4 heads with rotary width 6"),
        ({"llama.block_count": None}, SHAPES, "'llama.block_count' must be int, got None"),
        ({"llama.attention.head_count": ((9, 4), [4])}, SHAPES, r"must be int, got \[4\]"),
        ({}, SHAPES | {"rope_freqs": (3,)}, "1 tensors are missing or not those.*rope_freqs.weight"),
        ({"llama.block_count": (4, 2)}, SHAPES, "9 tensors are missing"),
        ({}, {"output_norm": (HIDDEN,)}, "10 tensors are missing"),
        ({}, SHAPES | {"output_norm": (7,)}, r"'output_norm.weight' has shape \(7,\), expected \(24,\)"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, shapes, message):
    with pytest.raises(ValueError, match=message):
        llama(tmp_path, changes, shapes)
