"""`ModelConfig`: a hub `config.json`, validated and translated."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .block_config import Architecture
from .families import family_of
from .families.family import Family
from .families.hub import Hub


class ModelConfig:
    """A model's configuration in the hub's spelling, and the `Architecture` that it describes. Frozen.

    Build it with `from_dict` or `from_json_file`. Every key is honoured, known to be irrelevant, or refused with a
    `ValueError` that names it; an unsupported `model_type` is refused with the list of supported ones.

    >>> config = ModelConfig.from_dict({"model_type": "mixtral", "vocab_size": 32, "hidden_size": 16,
    ...     "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_local_experts": 4,
    ...     "max_position_embeddings": 64})
    >>> config.num_layers, config.architecture.block.router.top_k, config.to_dict()["hidden_size"]
    (2, 2, 16)
    """

    __slots__ = ("architecture", "family", "hub")
    hub: Mapping[str, Any]
    family: Family
    architecture: Architecture

    def __init__(self, hub: Mapping[str, Any]):
        if not isinstance(hub, Mapping):
            raise ValueError(f"config: expected a dictionary, got {type(hub).__name__}")
        model_type = hub.get("model_type")
        if not isinstance(model_type, str):
            raise ValueError(f"config: key 'model_type' is {model_type!r}, expected a string")
        family = family_of(model_type)
        text = hub
        if family.nested_config:
            text = hub.get(family.nested_config)
            if not isinstance(text, Mapping):
                raise ValueError(f"{model_type}: config key {family.nested_config!r} is missing")
        reader = Hub(text, model_type)
        architecture = family.architecture(reader)
        reader.finish()
        if text is not hub:
            around = Hub(hub, model_type)
            around.ignore(family.nested_config, *family.beside_nested)
            around.require("tie_word_embeddings", architecture.tied)
            around.finish()
        for name, value in (
            ("hub", MappingProxyType(copy.deepcopy(dict(hub)))),
            ("family", family),
            ("architecture", architecture),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """From a dictionary as in a hub `config.json`."""
        return cls(values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "ModelConfig":
        """From a `config.json`. `OSError` if it cannot be read or is not JSON."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise OSError(f"{path}: not a JSON file ({error})") from error
        return cls(values)

    def to_dict(self) -> dict[str, Any]:
        """The hub dictionary that this was built from."""
        return json.loads(json.dumps(dict(self.hub)))

    @property
    def model_type(self) -> str:
        """The hub's name of the family."""
        return self.hub["model_type"]

    @property
    def text(self) -> Mapping[str, Any]:
        """The text model's part of the hub dictionary."""
        return self.hub[self.family.nested_config] if self.family.nested_config else self.hub

    @property
    def num_layers(self) -> int:
        """Number of transformer layers, `L`."""
        return len(self.architecture.layers)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The special token ids `name` ("eos", "bos", "pad"), none or several."""
        value = self.text.get(f"{name}_token_id")
        if value is None:
            value = self.hub.get(f"{name}_token_id")
        if value is None:
            return ()
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    def __setattr__(self, name, value):
        raise AttributeError(f"ModelConfig is frozen; build a new one to change {name}")

    def __eq__(self, other):
        return isinstance(other, ModelConfig) and self.to_dict() == other.to_dict()

    def __hash__(self):
        return hash((self.model_type, self.architecture))

    def __repr__(self):
        block = self.architecture.block
        experts = f", experts={block.router.num_experts}, top_k={block.router.top_k}" if block.router else ""
        return f"ModelConfig({self.model_type}, layers={self.num_layers}, width={block.width}{experts})"
