"""Whole models by name, at their real shapes and with random weights."""

from typing import Any

from jax.sharding import Mesh

from ..axes import RULES, Axes
from ..checkpoint.formats import quantization_of
from ..checkpoint.mxfp4 import METHOD
from ..config import ModelConfig
from ..model import Model
from .shapes import config_path

#: How weights may be asked for; without, they are as the model is released.
QUANTIZE = ("none", "int8", "mxfp4")
#: Short names of models, and their configs.
SHORT = {
    "olmoe": "olmoe-1b-7b-0924",
    "qwen3": "qwen3-30b-a3b",
    "gptoss": "gpt-oss-20b",
    "mixtral": "mixtral-8x7b",
}


def find_config(name: str, layers: int | None = None) -> ModelConfig:
    """The config of a short name, of `configs/NAME.json`, or at a path; cut to its first `layers`, if given.

    `ValueError` if there is none, or it has fewer layers.

    >>> len(find_config("gptoss", layers=4).architecture.layers)
    4
    """
    hub = ModelConfig.from_json_file(config_path(SHORT.get(name, name), SHORT)).to_dict()
    if layers is not None:
        text = hub if "num_hidden_layers" in hub else hub["text_config"]
        had = text["num_hidden_layers"]
        if not 1 <= layers <= had:
            raise ValueError(f"layers: {name} has {had}, not {layers}")
        lists = {key: value for key, value in text.items() if isinstance(value, list) and len(value) == had}
        text.update({key: value[:layers] for key, value in lists.items()}, num_hidden_layers=layers)
    return ModelConfig.from_dict(hub)


def stored_as(config: ModelConfig, quantize: str | None = None) -> str | None:
    """What `make` takes for a flag: None as the model is released, as far as weights can be made so; "none" None.

    >>> stored_as(find_config("gptoss")), stored_as(find_config("gptoss"), "none"), stored_as(find_config("olmoe"))
    ('mxfp4', None, None)
    """
    if quantize is None:
        released = (quantization_of(config) or {}).get("quant_method")
        return released if released == METHOD else None
    return None if quantize == "none" else quantize


def make(
    config: ModelConfig,
    dtype: Any,
    quantize: str | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    rules: Axes = RULES,
) -> Model:
    """A model with random weights, over `mesh` by `rules` or on the default device.

    `quantize`: None, "mxfp4", or "int8", one scale per output.
    """
    given = dict(dtype=dtype, quantize=quantize, implementation=implementation)
    return Model.initialize(config, mesh=mesh, rules=rules, **given)
