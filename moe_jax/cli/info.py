"""`moe-jax info`: what a checkpoint or config holds, read from headers only."""

import argparse
import json
import math
from pathlib import Path

from ..cache import entry_shapes
from ..checkpoint.gguf import GGUFFile
from ..checkpoint.gguf_llama import GGUFCheckpoint
from ..checkpoint.hub import resolve
from ..checkpoint.source import Checkpoint
from ..config import ModelConfig
from ..weights import parameters

EXAMPLE = "moe-jax info configs/qwen3-30b-a3b.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("path", help="a model folder, hub id, config.json or Llama .gguf file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    config, sizes = _open(options.path)
    rows = describe(config) | ({"bytes on disk": sizes} if sizes else {})
    if options.json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {_shown(value)}")
    return 0


def _open(path: str) -> tuple[ModelConfig, dict[str, int]]:
    """The config, and bytes by dtype where there are weights."""
    sizes: dict[str, int] = {}
    if path.endswith(".gguf"):
        config = ModelConfig(GGUFCheckpoint(path).config)
        for tensor in GGUFFile(path).tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        return config, sizes
    if Path(path).is_file():
        return ModelConfig.from_json_file(path), {}
    folder = resolve(path)
    config = ModelConfig.from_json_file(folder / "config.json")
    checkpoint = Checkpoint(folder, config.text if "quantization_config" in config.text else config.hub)
    for file in checkpoint.files.values():
        for entry in file.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    checkpoint.close()
    return config, sizes


def describe(config: ModelConfig) -> dict[str, object]:
    """What a config says: family, sizes, parameters in all and per token, KV-cache bytes per token in bfloat16."""
    architecture, block = config.architecture, config.architecture.block
    table = parameters(architecture)
    total = sum(math.prod(p.shape) for p in table.values())
    experts = sum(math.prod(p.shape) for p in table.values() if p.experts)
    counts = architecture.expert_counts
    idle = experts * (1 - len(counts) * block.router.top_k / sum(counts)) if counts else 0
    head = "" if architecture.tied else ", separate head"
    attention = block.attention
    kind = "latent" if attention.latent else f"{attention.num_kv_heads} key/value heads"
    rows: dict[str, object] = {
        "family": config.model_type,
        "layers": f"{config.num_layers} ({len(architecture.moe_layers)} MoE)",
        "width": block.width,
        "vocabulary": f"{architecture.vocab_size}{head}",
        "context": architecture.context,
        "attention": f"{attention.num_heads} heads of {attention.head_dim}, {kind}",
    }
    if block.router and architecture.moe_layers:
        shared = f", shared {block.shared.hidden}" if block.shared else ""
        rows |= {
            "experts": f"{' or '.join(map(str, sorted(set(counts))))} of hidden width {block.experts.hidden}{shared}",
            "top-k": block.router.top_k,
        }
    rows |= {"parameters": total, "active parameters": round(total - idle)}
    entries = entry_shapes(attention).values()
    rows["KV bytes per token (bf16)"] = 2 * config.num_layers * sum(map(math.prod, entries))
    return rows


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{dtype} {_shown(size)}" for dtype, size in sorted(value.items()))
    if isinstance(value, int) and value >= 10**6:
        return f"{value:,} ({value / 1e9:.2f} B)"
    return f"{value:,}" if isinstance(value, int) and value >= 10**5 else str(value)
