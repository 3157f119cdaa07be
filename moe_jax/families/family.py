"""What a family file exports."""

import dataclasses
from collections.abc import Callable

from ..block_config import Architecture
from .hub import Hub
from .tensors import Table


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: how its config reads and what its tensors are called.

    `architecture` translates a hub config; `tensors` maps our parameters to names on disk (it may name more than an
    architecture has); `ignored` are regular expressions of tensors on disk that the model does not need;
    `nested_config` names the sub-dictionary that holds the text model's config, `prefix` what its tensors' names then
    begin with, `beside_nested` the keys around it that are of no use here; `next_token_layers`: checkpoints carry
    extra layers behind the last one for multi-token prediction.
    """

    model_types: tuple[str, ...]
    architecture: Callable[[Hub], Architecture]
    tensors: Table
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    nested_config: str | None = None
    prefix: str = ""
    beside_nested: tuple[str, ...] = ()
    next_token_layers: bool = False
