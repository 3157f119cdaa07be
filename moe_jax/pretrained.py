"""`load_pretrained` and `save_pretrained`: whole models from and to Hugging Face folders."""

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.quantized import check_group_size

from .axes import RULES, Axes
from .checkpoint.formats import formats_of_weights, quantization_to_write
from .checkpoint.gguf_llama import GGUFCheckpoint
from .checkpoint.hub import resolve
from .checkpoint.load import load_weights
from .checkpoint.save import write_json, write_weights
from .checkpoint.source import Checkpoint, TensorSource
from .config import ModelConfig
from .model import Model, named_implementations
from .placement import Placement
from .quantize import encoder
from .shard import gather
from .sharding import sharding_of
from .weights import flattened

_log = logging.getLogger(__name__)
_DTYPES = ("float32", "bfloat16", "float16")


def load_pretrained(
    path_or_id: str | os.PathLike,
    dtype: Any = "auto",
    mesh: Mesh | None = None,
    implementation: str | Mapping[str, str] | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    rules: Axes = RULES,
    placement: Placement | None = None,
) -> Model:
    """Load a model from a folder with `config.json` and safetensors, from the hub by id, or a Llama `.gguf` file.

    Args: `dtype`: float32, bfloat16 or float16; "auto" is bfloat16, and float32 on a CPU. `mesh`: devices
    (`moe_jax.make_mesh`) over which the model is spread by `rules` and `placement`, see `moe_jax.shard`; each part is
    read from its range of the files to where it will stay, by the process that it belongs to. `implementation`: name of
    the expert MLP's implementation, or a mapping from operation (`routed_mlp`, `exchange`) to name. `quantize`: "int8"
    makes kernels int8 while they are loaded, the same as `moe_jax.quantize` of the loaded model with this
    `group_size`, but only one layer of a stack is ever held wide.
    MXFP4 experts stay in 4 bits and int8 kernels that `save_pretrained` wrote stay int8, `dtype` being that of
    everything else (`moe_jax.dequantize` widens them). FP8 block-scaled tensors are widened while they are read.
    Raises `ValueError` for an unsupported family, config key or quantisation, and for int8 of what is int8 already;
    `OSError` for files that are missing, truncated or do not fit the config, naming all tensors concerned.

    >>> import tempfile
    >>> from moe_jax.model import Model, tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(Model.initialize(tiny_config()), folder)
    ...     load_pretrained(folder).config.num_layers
    2
    """
    dtype = working_dtype(dtype)
    _, exchange = named_implementations(implementation)  # refuses unknown names before anything is read
    sharding = sharding_of(mesh, rules, exchange, placement=placement)
    encode = _encoder(quantize, group_size)
    checkpoint: TensorSource
    if os.fspath(path_or_id).endswith(".gguf"):
        gguf = GGUFCheckpoint(Path(path_or_id))
        config, generation, checkpoint = ModelConfig(gguf.config), None, gguf
    else:
        folder = resolve(path_or_id)
        config, generation = ModelConfig.from_json_file(folder / "config.json"), _settings(folder)
        checkpoint = Checkpoint(folder, config.text if "quantization_config" in config.text else config.hub)
    try:
        loaded = load_weights(checkpoint, config, dtype, encode, sharding, group_size)
    finally:
        checkpoint.close()
    if loaded.ignored:
        _log.info("%s: %d tensors are not needed: %s", path_or_id, len(loaded.ignored), ", ".join(loaded.ignored))
    return Model(config, loaded.weights, generation, implementation, loaded.sharding)


def _encoder(quantize: str | None, group_size: int | None) -> Any:
    """What the loader turns kernels into; None: nothing."""
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize: {quantize!r} is neither None nor 'int8'")
    check_group_size(group_size)
    if quantize is None and group_size is not None:
        raise ValueError(f"group_size: {group_size}, but quantize is None")
    return functools.partial(encoder, group_size=group_size) if quantize else None


def _settings(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise OSError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def save_pretrained(model: Model, path: str | os.PathLike, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model in the Hugging Face layout of its family: safetensors, `config.json`, generation settings.

    Tensors keep the model's dtype, so that loading them again gives equal weights; transformers reads the folder
    too. MXFP4 experts are written as they were released. A model of `moe_jax.quantize` is written in int8, a tensor
    `<name>_scale` beside each kernel, and `quantization_config` says so ("moe_jax_int8"): such a folder only we can
    read, transformers cannot. Each file appears under its name when it is whole; weights of an earlier save are removed
    after the new ones stand. Raises `OSError` if the folder cannot be written.

    >>> import tempfile
    >>> from moe_jax.model import Model, tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(Model.initialize(tiny_config()), folder)
    ...     sorted(p.name for p in Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    folder, model = Path(path), gather(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, model.config, model.arrays(), max_shard_bytes)
    quantization = quantization_to_write(model.config, formats_of_weights(flattened(model.arrays())))
    hub = model.config.to_dict()
    for values in (hub, hub.get(model.config.family.nested_config or "", {})):
        values.pop("quantization_config", None)  # fp8 is written widened
        values.pop("dtype", None)
        if values:
            values["torch_dtype"] = str(model.dtype)
    if quantization is not None:
        hub["quantization_config"] = quantization
    write_json(folder / "config.json", hub)
    if model.generation:
        write_json(folder / "generation_config.json", model.generation)
    else:  # an empty one would hide the stop tokens of `config.json` from transformers
        (folder / "generation_config.json").unlink(missing_ok=True)


def working_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of a loaded model: float32, bfloat16 or float16; "auto" is bfloat16, and float32 on a CPU."""
    if isinstance(dtype, str) and dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype: {dtype!r} is not one of auto, {', '.join(_DTYPES)}") from None
    if found.name not in _DTYPES:
        raise ValueError(f"dtype: {found.name} is not one of auto, {', '.join(_DTYPES)}")
    return found
