"""The model that a run begins with."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.quantized import is_quantized

from ..config import ModelConfig
from ..demo import fetch_demo
from ..model import Model
from ..pretrained import load_pretrained
from ..shard import shard
from ..upcycle import upcycle
from ..weights import flattened
from .settings import Settings


def initial_model(settings: Settings, vocab_size: int, mesh: Mesh | None, implementation: Any) -> Model:
    """Random weights for a config, or those of a checkpoint, upcycled if the settings say so, in float32 on `mesh`.

    Raises `ValueError` for a vocabulary smaller than the tokenizer's.
    """
    source = settings.model
    if isinstance(source, str) and not source.endswith(".json"):
        path = str(fetch_demo()) if source == "demo" else source
        given = {"dtype": jnp.float32, "implementation": implementation}
        model = load_pretrained(path, mesh=mesh if settings.upcycle is None else None, **given)
    else:
        config = ModelConfig.from_json_file(Path(source)) if isinstance(source, str) else ModelConfig(source)
        own = mesh if settings.upcycle is None else None
        model = Model.initialize(config, settings.seed, mesh=own, implementation=implementation)
    if odd := sorted(name for name, w in flattened(model.arrays()).items() if is_quantized(w)):
        raise ValueError(f"model: {odd[0]} is quantised; training takes floats (moe_jax.dequantize makes them)")
    if settings.upcycle is not None:
        model = upcycle(model, **{"seed": settings.seed} | dict(settings.upcycle))
        model = model if mesh is None else shard(model, mesh)
    if (vocabulary := model.architecture.vocab_size) < vocab_size:
        raise ValueError(f"model: a vocabulary of {vocabulary}, but the tokenizer has {vocab_size}")
    if (context := model.architecture.context) < settings.data.length:
        raise ValueError(f"length: {settings.data.length} tokens, but the model's context is {context}")
    return model
