"""Loading a made-up checkpoint: time against transformers, and peak memory. Each load runs in a process of its own."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import ModelConfig
from ..checkpoint.layout import pieces
from ..checkpoint.safetensors import write_file
from ..weights import parameters
from . import torch_baseline
from .decode import ModelShape
from .table import Row
from .timing import Setting, Timing, load_average

SHAPE = ModelShape(layers=1, width=1024, hidden=512, experts=64, top_k=8)
#: Peak memory asked for: at most this many times the model's size, plus its largest stacked tensor.
_PEAK = 1.25
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SHARD = 500 * 10**6
#: The parameters whose sums show that a load brought what was written: ours, on disk, in transformers.
_CHECKED = ("embedding", "moe.down")


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """A checkpoint on disk: bytes of its tensors, parameters, sums of the `_CHECKED` ones (the second's layer 0)."""

    nbytes: int
    parameters: int
    largest: int
    sums: tuple[float, float]


def run(nbytes: int, setting: Setting, shape: ModelShape = SHAPE, disk_dtype: str = "float32") -> list[Row]:
    """Time to load about `nbytes` bytes of `disk_dtype` as float32, ours and transformers' in turns.

    The page cache is warm: the files have just been written. Raises `OSError` if the disk is too small.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = make_checkpoint(Path(folder), shape, nbytes, disk_dtype)
        absent = torch_baseline.missing() if setting.torch else ""
        names = ["moe_jax"] + (["transformers"] if setting.torch and not absent else [])
        loads: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(setting.repeats):
            for name in names:
                loads[name].append(_load(name, folder, made))
    times = {name: Timing(tuple(one["seconds"] for one in found)) for name, found in loads.items()}
    rows = []
    for name in names:
        compared = name == "moe_jax" and "transformers" in times
        copied = made.nbytes + 4 * made.parameters
        rows.append(
            Row(
                case="load",
                implementation=name,
                device=setting.device,
                dtype=f"{disk_dtype} on disk, float32 loaded",
                shape=f"{made.nbytes / 1e9:.3g} GB on disk",
                steady_ms=1e3 * times[name].median,
                roofline=copied / (setting.ceilings.copy * 1e9) / times[name].median,
                baseline="transformers" if compared else None,
                speedup=times[name].faster_than(times["transformers"]) if compared else None,
                bar=1.0 if compared else None,
                values=_memory(loads[name], made) | {"load average": load_average()},
                note="page cache warm" + (f"; {absent}" if absent else ""),
            )
        )
    return rows


def peak(nbytes: int, setting: Setting, shape: ModelShape = SHAPE) -> list[Row]:
    """Peak memory of our loading about `nbytes` bytes of float32, beside what is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_checkpoint(Path(folder), shape, nbytes, "float32")
        found = [_load("moe_jax", folder, made)]
    limit = _PEAK * 4 * made.parameters + made.largest
    values = _memory(found, made) | {"asked for at most, GB": limit / 1e9}
    return [
        Row(
            case="load peak memory",
            implementation="moe_jax",
            device=setting.device,
            dtype="float32",
            shape=f"{made.nbytes / 1e9:.3g} GB on disk",
            steady_ms=1e3 * found[0]["seconds"],
            values=values,
            note="page cache warm; one load; " + ("kept" if 1e9 * values["peak, GB"] <= limit else "not kept"),
        )
    ]


def _memory(loads: list[dict[str, float]], made: MadeUp) -> dict[str, float]:
    """Most memory beyond what the process had after its imports, and the model's size."""
    return {
        "peak, GB": max(one["peak_bytes"] for one in loads) / 1e9,
        "model, GB": 4 * made.parameters / 1e9,
        "largest stack, GB": made.largest / 1e9,
    }


def make_checkpoint(folder: Path, shape: ModelShape, nbytes: int, dtype: str) -> MadeUp:
    """Write a sharded OLMoE checkpoint of random tensors, as many layers as come closest to `nbytes` bytes."""
    kind = _DTYPES[dtype]
    sizes = [_size(dataclasses.replace(shape, layers=layers)) * kind.itemsize for layers in (1, 2)]
    layers = max(1, 1 + round((nbytes - sizes[0]) / (sizes[1] - sizes[0])))
    config = _config(dataclasses.replace(shape, layers=layers))
    total = _size(dataclasses.replace(shape, layers=layers)) * kind.itemsize
    free = shutil.disk_usage(folder).free
    if free < 1.2 * total:
        raise OSError(f"{total / 1e9:.3g} GB of checkpoint and some room do not fit the {free / 1e9:.3g} GB free here")
    noise = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.05).astype(kind)
    shapes = {piece.name: piece.disk_shape for piece in pieces(config)}
    shards: list[dict[str, Any]] = [{}]
    for name, size in shapes.items():
        held = sum(math.prod(s) for _, s in shards[-1].values()) * kind.itemsize
        if shards[-1] and held + math.prod(size) * kind.itemsize > _SHARD:
            shards.append({})
        shards[-1][name] = (kind, size)
    index: dict[str, str] = {}
    for number, layout in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, layout, _arrays(layout, noise))
        index |= dict.fromkeys(layout, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return MadeUp(total, total // kind.itemsize, _largest(config), _sums(config, noise))


def _config(shape: ModelShape) -> ModelConfig:
    return ModelConfig.from_dict(shape.hub(context=64))


def _size(shape: ModelShape) -> int:
    return sum(math.prod(p.shape) for p in parameters(_config(shape).architecture).values())


def _largest(config: ModelConfig) -> int:
    return max(4 * math.prod(p.shape) for p in parameters(config.architecture).values())


def _tensor(name: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """Random values that depend on the name, cut from `noise` and repeated where it is too short."""
    start = sum(name.encode()) * 7919 % (len(noise) // 2)
    return np.resize(noise[start:], shape)


def _arrays(layout: dict[str, Any], noise: np.ndarray) -> Iterator[np.ndarray]:
    for name, (_, shape) in layout.items():
        yield _tensor(name, shape, noise)


def _sums(config: ModelConfig, noise: np.ndarray) -> tuple[float, float]:
    sums = dict.fromkeys(_CHECKED, 0.0)
    for piece in pieces(config):
        if piece.parameter in sums and piece.index[:1] in ((), (0,)):
            sums[piece.parameter] += float(_tensor(piece.name, piece.disk_shape, noise).astype(np.float64).sum())
    return sums[_CHECKED[0]], sums[_CHECKED[1]]


def _load(name: str, folder: str, made: MadeUp) -> dict[str, float]:
    """One load in a process of its own: `seconds`, `peak_bytes`. Raises if it fails or brings other weights."""
    command = [sys.executable, "-m", "moe_jax.benchmarks.load", name, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise RuntimeError(f"loading with {name} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not np.allclose(found["sums"], made.sums, rtol=1e-6, atol=1e-3):
        raise ValueError(f"{name}: loaded weights sum to {found['sums']}, written were {made.sums}")
    return found


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes, 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _child(name: str, folder: str) -> dict[str, Any]:
    run = {"moe_jax": _child_ours, "transformers": _child_transformers}[name]
    load, sums = run(folder)
    before = _status("VmRSS")
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": _status("VmHWM") - before, "sums": sums(model)}


def _child_ours(folder):
    import jax
    import jax.numpy as jnp

    from .. import load_pretrained

    jax.block_until_ready(jnp.ones(8) + 1)  # the runtime's own start

    def load():
        model = load_pretrained(folder, dtype="float32")
        jax.block_until_ready(model.arrays())
        return model

    def sums(model):
        weights = model.arrays()
        parts = np.asarray(weights["embedding"]), np.asarray(weights["moe"]["down"])[0]
        return [float(part.sum(dtype=np.float64)) for part in parts]

    return load, sums


def _child_transformers(folder):
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401  imports are no part of loading

    torch_baseline.torch()
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj"]
    return lambda: torch_baseline.load(folder, "float32"), lambda model: torch_baseline.sums(model, names)


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
