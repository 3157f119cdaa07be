"""Which parameters are stored quantised, and how: what the loader and the writer ask, whatever the format."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pallas_kernels import MXFP4Array
from pallas_kernels.quantized import is_quantized

from ..config import ModelConfig
from ..weights import Parameter, parameters
from .int8 import Int8Format
from .layout import Piece
from .mxfp4 import METHOD, MXFP4Format
from .source import Stored

#: A format splits a kernel's piece into one for each array of its type, knows their stacks, joins and separates them.
Format = Int8Format | MXFP4Format
#: Parameters that keep a quantised form; the others are arrays of floats.
Formats = Mapping[str, Format]


def formats_on_disk(plan: Iterable[Piece], tensors: Mapping[str, Stored], config: ModelConfig) -> Formats:
    """The parameters all of whose tensors a checkpoint holds in one format that is not widened."""
    table = parameters(config.architecture)
    by_parameter: dict[str, list[Piece]] = {}
    for piece in plan:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    int8 = Int8Format.of(quantization_of(config))
    found: dict[str, Format] = {}
    for name, parts in by_parameter.items():
        if int8 and all(int8.stores(piece, tensors) for piece in parts):
            found[name] = int8
        elif all(MXFP4Format.stores(piece, table[name], tensors) for piece in parts):
            found[name] = MXFP4Format()
    return found


def formats_of_weights(flat: Mapping[str, Any]) -> Formats:
    """The formats that hold a model's quantised weights; `ValueError` for arrays that no file of ours can hold."""
    int8 = Int8Format.of_weights(flat)
    kept = {name: array for name, array in flat.items() if is_quantized(array)}
    return {name: MXFP4Format() if isinstance(array, MXFP4Array) else int8 for name, array in kept.items()}


def quantization_of(config: ModelConfig) -> Any:
    """The `quantization_config` of a model's config, wherever the family has it."""
    hub = config.text if "quantization_config" in config.text else config.hub
    return hub.get("quantization_config")


def quantization_to_write(config: ModelConfig, formats: Formats) -> dict[str, Any] | None:
    """The `quantization_config` of a folder with these formats: released settings stay, as far as they still hold."""
    for form in formats.values():
        if isinstance(form, Int8Format):
            return form.to_dict()
    if not formats:
        return None
    given = quantization_of(config) or {}
    return dict(given) if given.get("quant_method") == METHOD else {"quant_method": METHOD}


def split(plan: Iterable[Piece], table: Mapping[str, Parameter], formats: Formats) -> Iterator[Piece]:
    """The plan with the pieces of quantised parameters split into those of their arrays."""
    for piece in plan:
        form = formats.get(piece.parameter)
        yield from (piece,) if form is None else form.split(piece, table[piece.parameter])


def as_stored(tensors: Mapping[str, Stored], plan: Iterable[Piece], formats: Formats) -> dict[str, Stored]:
    """What the files hold, for a plan that is `split`: tensors that are not widened stand as their parts."""
    found = dict(tensors)
    for name in {piece.name for piece in plan if piece.parameter in formats}:
        if name in found and found[name].parts:
            found |= found.pop(name).parts
    return found


def joined(flat: dict[str, Any], table: Mapping[str, Parameter], formats: Formats, dtype: Any) -> dict[str, Any]:
    """Loaded arrays with those of quantised parameters put together; they stand for `dtype`."""
    for name, form in formats.items():
        flat[name] = form.join(flat, name, table[name], dtype)
    return flat


def separated(flat: Mapping[str, Any], formats: Formats) -> dict[str, Any]:
    """The inverse of `joined`: plain arrays only."""
    plain: dict[str, Any] = {}
    for name, array in flat.items():
        plain |= formats[name].separate(name, array) if name in formats else {name: array}
    return plain
