"""Stacked weights back into a checkpoint's tensors, in shards."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..weights import Weights, flattened, parameters
from .formats import formats_of_weights, separated, split
from .layout import Piece, pieces, to_disk
from .mxfp4 import on_disk, stored_dtype
from .safetensors import write_file

_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def write_weights(folder: Path, config: ModelConfig, weights: Weights, max_shard_bytes: int) -> None:
    """Write all tensors under the family's names, one at a time, in files of at most `max_shard_bytes`.

    Quantised kernels are written as they are, each as its arrays (see `int8.py`, `mxfp4.py`).
    """
    flat = flattened(weights)
    formats = formats_of_weights(flat)
    plan = split(pieces(config), parameters(config.architecture), formats)
    flat = separated(flat, formats)
    tensors: dict[str, list[Piece]] = {}
    for piece in plan:
        tensors.setdefault(piece.name, []).append(piece)
    shards = _shards(tensors, flat, max_shard_bytes)
    index: dict[str, str] = {}
    for number, layout in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_file(folder / name, layout, _arrays(layout, tensors, flat))
        index |= dict.fromkeys(layout, name)
    if len(shards) > 1:
        size = sum(_nbytes(layout) for layout in shards)
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    _remove_old(folder, keep={*index.values(), *([_INDEX] if len(shards) > 1 else [])})


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, under its name only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _nbytes(layout) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())


def _shards(tensors, flat, limit):
    shards, size = [{}], 0
    for name, parts in tensors.items():
        entry = (stored_dtype(flat[parts[0].parameter].dtype), parts[0].disk_shape)
        nbytes = _nbytes({name: entry})
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += nbytes
    return shards


def _arrays(layout, tensors, flat) -> Iterator[np.ndarray]:
    for name in layout:
        yield to_disk([(piece, on_disk(np.asarray(flat[piece.parameter][piece.index]))) for piece in tensors[name]])


def _remove_old(folder: Path, keep: set[str]) -> None:
    """An earlier save's weights would be read in place of, or beside, the new ones."""
    for path in folder.glob("model*.safetensors*"):
        if path.name not in keep and _WEIGHTS.fullmatch(path.name):
            path.unlink()
