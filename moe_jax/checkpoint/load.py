"""Streaming a checkpoint into stacked weights, tensor by tensor."""

import concurrent.futures
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..config import ModelConfig
from ..sharding import Sharding
from ..weights import Parameter, Weights, nested, parameters
from .formats import as_stored, formats_on_disk, joined, split
from .int8 import SCALE, Int8Format
from .layout import Piece, from_disk, pieces
from .load_shards import Reader, aligned, encoded_stack, sharded_stack
from .mxfp4 import on_disk
from .quantized import convert
from .source import Stored, TensorSource

#: Steers the choice of experts by differences far below bfloat16's resolution.
_KEEP_FLOAT32 = ("moe.selection_bias",)
_THREADS = 4


#: What a stack's layers, or a whole parameter, become before they are kept, and whether all of it was finite.
Encode = Callable[[jax.Array], tuple[Any, Any]]


class Loaded(NamedTuple):
    """The parameters; names of tensors that were left out because the family ignores them; how they lie on a mesh."""

    weights: Weights
    ignored: list[str]
    sharding: Sharding | None


def load_weights(
    checkpoint: TensorSource,
    config: ModelConfig,
    dtype: Any,
    encoder: Callable[[str, Parameter], Encode | None] | None = None,
    sharding: Sharding | None = None,
    group_size: int | None = None,
) -> Loaded:
    """All parameters in `dtype`, on the default device or each part where `sharding` puts it.

    Experts in MXFP4 stay so, and kernels that the config says are int8, and that are. `encoder` names what a parameter
    that is read in `dtype` is turned into, layer by layer, with `group_size` inputs to a scale. Every stack is
    allocated once and filled in place, so that host memory holds the model (of a `sharding`, this process' part), the
    stack in work and a few single tensors. Raises `OSError` that names all missing, unexpected and misshapen tensors,
    `ValueError` for weights that an encoder finds not finite, and for int8 weights if there is one.
    """
    plan, table = list(pieces(config)), parameters(config.architecture)
    formats = formats_on_disk(plan, checkpoint.tensors, config)
    if encoder and any(isinstance(form, Int8Format) for form in formats.values()):
        raise ValueError("quantize: the checkpoint's weights are int8 already")
    found = as_stored(checkpoint.tensors, plan, formats)
    plan = list(split(plan, table, formats))
    ignored = _check(checkpoint.folder, found, config, plan)
    _check_tied_head(checkpoint, config)
    by_parameter: dict[str, list[Piece]] = {}
    for piece in plan:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    layout: dict[str, Any] = {}
    owner: dict[str, tuple[str, int | None]] = {}
    for name, parameter in table.items():
        kind = np.dtype(np.float32 if name in _KEEP_FLOAT32 else dtype)
        plain = {name: (parameter.shape, kind)}
        stacks = formats[name].stacks(name, parameter) if name in formats else plain
        blocks = formats[name].blocks_stored if name in formats else (1,)
        layout |= stacks
        owner |= {stack: (name, block) for stack, block in zip(stacks, blocks, strict=True)}
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in layout.values())
    shares = {}
    if sharding is not None:
        units = [form.blocks_stored[1] or 1 for name, form in formats.items() if name.endswith(".down")]
        sharding = dataclasses.replace(sharding, unit=max([1, group_size or 1, *units]))
        shares = sharding.shares(config.architecture)
    weights: dict[str, Any] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=2, leave=False) as bar,
    ):
        for name, parts in by_parameter.items():
            encode = encoder(name, table[name]) if encoder and name in table else None
            reader, (shape, kind) = Reader(checkpoint, pool, bar), layout[name]
            if sharding is None:
                weights[name] = _stack(reader, parts, shape, kind, encode)
                continue
            kernel, block = owner[name]
            share, full = shares[kernel], table[kernel].shape
            if encode is not None:
                run = functools.partial(_encoded, piece=parts[0], encode=encode)
                blocks = 1, group_size
                weights[name] = encoded_stack(reader, parts, full, kind, share, sharding, run, blocks)
                continue
            if kernel in formats:
                share = share.of_stored(kernel, full, block, sharding.sizes)
            weights[name] = sharded_stack(reader, parts, shape, kind, share, sharding)
    weights = joined(weights, table, formats, dtype)
    if sharding is not None:
        weights |= sharding.tables()
    return Loaded(nested(weights), ignored, sharding)


def _check(folder: Path, found: Mapping[str, Stored], config: ModelConfig, plan: list[Piece]) -> list[str]:
    """Compare names and shapes with what is on disk, before reading anything."""
    wanted = {piece.name: piece.disk_shape for piece in plan}
    missing = sorted(set(wanted) - set(found))
    misshapen = sorted(
        f"{name} {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    )
    extra = sorted(set(found) - set(wanted))
    ignored = [name for name in extra if _ignorable(name, config)]
    extra = sorted(set(extra) - set(ignored))
    alone = sorted(n for n in wanted if n in found and found[n].dtype == "I8" and n + SCALE not in wanted)
    problems = [
        f"{what} ({len(names)}): {', '.join(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("misshapen", misshapen),
            ("int8 without scales or a quantization_config that says so", alone),
        )
        if names
    ]
    if problems:
        raise OSError(f"{folder}: tensors do not fit {config!r}; " + "; ".join(problems))
    return ignored


def _check_tied_head(checkpoint: TensorSource, config: ModelConfig) -> None:
    """A head that is stored although the config ties it to the embedding must be a copy of it."""
    head, embedding = (config.family.prefix + config.family.tensors[n].name for n in ("head.kernel", "embedding"))
    if not config.architecture.tied or head not in checkpoint.tensors:
        return
    if not np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
        raise OSError(f"{checkpoint.folder}: tie_word_embeddings is true, but {head} is not equal to {embedding}")


def _ignorable(name: str, config: ModelConfig) -> bool:
    name = name.removeprefix(config.family.prefix)
    if any(re.fullmatch(pattern, name) for pattern in config.family.ignored):
        return True
    if config.architecture.tied and name.removesuffix(SCALE) == config.family.tensors["head.kernel"].name:
        return True  # a copy of the embedding
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return bool(config.family.next_token_layers and layer and int(layer[1]) >= config.num_layers)


def _stack(reader: Reader, parts: list[Piece], shape, dtype, encode: Encode | None) -> Any:
    """One stacked parameter: on a CPU filled where it will stay, elsewhere layer by layer into a donated buffer."""

    def fill(target: np.ndarray, piece: Piece, index: tuple[Any, ...]) -> None:
        room = target[index + (...,)]
        plain = piece.tensor.part[1] == 1 and not piece.tensor.transposed
        into = room.reshape(piece.disk_shape) if plain and room.flags.c_contiguous else None
        array = reader.checkpoint.read(piece.name, into)
        if array is not into:
            target[index] = convert(from_disk(piece, array), target.dtype)
        reader.bar.update(room.nbytes)

    ranges = any(isinstance(i, slice) for piece in parts for i in piece.index)  # a pyramid's routers: small
    if ranges or (jax.default_backend() == "cpu" and encode is None):
        host = aligned(shape, dtype)
        reader.all(functools.partial(fill, on_disk(host), piece, piece.index) for piece in parts)
        return jax.device_put(host)
    buffer = None
    for layer in dict.fromkeys(piece.index[:1] for piece in parts):
        host = np.empty(shape[len(layer) :], dtype)
        own_parts = (piece for piece in parts if piece.index[:1] == layer)
        reader.all(functools.partial(fill, on_disk(host), piece, piece.index[1:]) for piece in own_parts)
        own = _encoded(host, parts[0], encode)
        if not layer:
            return own
        if buffer is None:
            buffer = jax.tree.map(lambda w: jnp.zeros((shape[0], *w.shape), w.dtype), own)
        buffer = _put(buffer, own, layer[0])
    return buffer


def _encoded(array: np.ndarray, piece: Piece, encode: Encode | None) -> Any:
    if encode is None:
        return jnp.asarray(array)
    encoded, finite = encode(jnp.asarray(array))
    if not finite:
        raise ValueError(f"quantize: {piece.parameter} holds values that are not finite")
    return encoded


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer, layer, index):
    return jax.tree.map(lambda w, own: jax.lax.dynamic_update_index_in_dim(w, own, index, 0), buffer, layer)
