"""A GGUF file of architecture `llama` as a checkpoint under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .gguf import GGUFFile
from .source import Stored


class GGUFCheckpoint:
    """What `Checkpoint` is to a folder: named tensors with shapes, read one by one, widened to float32.

    `config` is Hugging Face's `LlamaConfig` as a dictionary. Raises `OSError` for damaged files; `ValueError` for other
    architectures than `llama` (named), for mixtures of experts, split files and rope scaling other than linear, and
    for missing, misshapen or left-over tensors. Source: convert_hf_to_gguf.py of llama.cpp.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self.file = GGUFFile(path)
        self.config, self._readers, shapes = _translate(self.file)
        self.config = {"model_type": "llama"} | self.config
        self.tensors = {name: Stored(shape, "gguf", "GGUF", 0) for name, shape in shapes.items()}

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """The tensor as float32 `[out, in]`, never in `into`: all of them are converted."""
        del into
        return self._readers[name]()

    def view(self, name: str) -> np.ndarray:
        """The tensor: all of it is converted."""
        return self.read(name)

    def close(self) -> None:
        """Nothing to close: the file is mapped, and unmapped with the last array."""


def _field(metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Gives a metadata value of the wanted type, or the default; raises ValueError naming the key."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"GGUF metadata {key!r} must be {kind.__name__}, got {value!r}")
    # Files hold float32: its shortest decimal (1e-05) is what the model's authors wrote.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama_config(gguf: GGUFFile) -> dict[str, Any]:
    """Translates the metadata; everything that a plain Llama lacks is refused rather than dropped."""
    meta = gguf.metadata
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"general.architecture is {meta.get('general.architecture')!r}; only 'llama' is translated")
    scaling = meta.get("llama.rope.scaling.type", "none")
    for key, plain in (("llama.expert_count", 0), ("split.count", 1)):
        if meta.get(key, plain) not in (0, plain):
            raise ValueError(f"GGUF metadata {key!r} is {meta[key]!r}; only one-file models without it are translated")
    if scaling not in ("none", "linear"):
        raise ValueError(f"GGUF metadata 'llama.rope.scaling.type' is {scaling!r}; 'none' and 'linear' are translated")
    hidden, heads = _field(meta, "llama.embedding_length", int), _field(meta, "llama.attention.head_count", int)
    width = meta.get("llama.attention.key_length", meta.get("llama.rope.dimension_count", hidden // max(heads, 1)))
    if (rotary := meta.get("llama.rope.dimension_count", width)) != width or width % 2 or heads < 1:
        raise ValueError(f"GGUF head width is {width} for {heads} heads with rotary width {rotary}; they must agree")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "attention_bias": False, "mlp_bias": False, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": _field(meta, "llama.attention.head_count_kv", int, heads), "head_dim": width,
        "intermediate_size": _field(meta, "llama.feed_forward_length", int),
        "num_hidden_layers": _field(meta, "llama.block_count", int),
        "max_position_embeddings": _field(meta, "llama.context_length", int),
        "rms_norm_eps": _field(meta, "llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": _field(meta, "llama.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }  # fmt: skip
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _field(meta, "llama.rope.scaling.factor", float)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _plain_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order of q and k: it pairs rows (2i, 2i + 1) for rotary, Hugging Face (i, i + half)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _translate(gguf: GGUFFile):
    """Config, readers and shapes by Hugging Face name."""
    config = _llama_config(gguf)
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    queries, keys = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    vocab = gguf.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in gguf.tensors else 0
    config["vocab_size"] = vocab
    wanted: dict[str, tuple[str, tuple[int, ...], int]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden), 0),
        "output_norm.weight": ("model.norm.weight", (hidden,), 0),
    }
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = ("lm_head.weight", (vocab, hidden), 0)
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours, shape, permuted in (
            ("attn_norm", "input_layernorm", (hidden,), 0),
            ("attn_q", "self_attn.q_proj", (queries, hidden), heads),
            ("attn_k", "self_attn.k_proj", (keys, hidden), config["num_key_value_heads"]),
            ("attn_v", "self_attn.v_proj", (keys, hidden), 0),
            ("attn_output", "self_attn.o_proj", (hidden, queries), 0),
            ("ffn_norm", "post_attention_layernorm", (hidden,), 0),
            ("ffn_gate", "mlp.gate_proj", (wide, hidden), 0),
            ("ffn_up", "mlp.up_proj", (wide, hidden), 0),
            ("ffn_down", "mlp.down_proj", (hidden, wide), 0),
        ):
            wanted[f"blk.{layer}.{theirs}.weight"] = (f"model.layers.{layer}.{ours}.weight", shape, permuted)
    if odd := sorted(set(wanted) ^ set(gguf.tensors)):
        raise ValueError(f"{gguf.path}: {len(odd)} tensors are missing or not those of a plain Llama, as {odd[:3]}")

    def reader(name: str, heads: int) -> Callable[[], np.ndarray]:
        return lambda: _plain_rows(gguf.read(name), heads) if heads else gguf.read(name)

    readers, shapes = {}, {}
    for name, (ours, expected, permuted) in wanted.items():
        if (found := gguf.tensors[name].shape) != expected:
            raise ValueError(f"{gguf.path}: tensor {name!r} has shape {found}, expected {expected}")
        readers[ours], shapes[ours] = reader(name, permuted), expected
    return config, readers, shapes
