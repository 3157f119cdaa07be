"""Between a parameter and the tensors on disk that hold it: names, shapes, and the transforms both ways."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ..config import ModelConfig
from ..families.tensors import Tensor
from ..weights import Parameter, parameters


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor's share in a parameter: `index` into the stacked parameter, shape on disk, shape of the share.

    `kernel`: whether the share has an input axis. `axis`: the one on disk along which outputs, or a vector's
    components, lie.
    """

    parameter: str
    tensor: Tensor
    name: str
    index: tuple[int | slice, ...]
    disk_shape: tuple[int, ...]
    shape: tuple[int, ...]
    kernel: bool
    axis: int


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """Every piece of a model, parameter by parameter, layer by layer, expert by expert.

    Raises `ValueError` if the family's table does not name a parameter that the architecture has.
    """
    table, prefix = config.family.tensors, config.family.prefix
    for name, parameter in parameters(config.architecture).items():
        if name not in table:
            raise ValueError(f"{config.model_type}: the family's table has no tensor for parameter {name!r}")
        yield from _pieces_of(name, parameter, table[name], prefix)


def _pieces_of(name: str, parameter: Parameter, tensor: Tensor, prefix: str) -> Iterator[Piece]:
    each_expert = "{expert}" in tensor.name
    if parameter.counts is not None:
        yield from _pyramid(name, parameter, tensor, prefix)
        return
    lead = (parameter.layers is not None) + each_expert
    shape = parameter.shape[lead:]
    stacked = parameter.experts > 0 and not each_expert
    disk_shape = _disk_shape(shape, parameter.contracted, tensor, stacked)
    axis = _output_axis(disk_shape, parameter, tensor)
    for place, layer in enumerate(parameter.layers or (None,)):
        for expert in range(parameter.experts) if each_expert else (None,):
            index = (() if layer is None else (place,)) + (() if expert is None else (expert,))
            on_disk = prefix + tensor.name.format(layer=layer, expert=expert)
            yield Piece(name, tensor, on_disk, index, disk_shape, shape, parameter.contracted, axis)


def _pyramid(name: str, parameter: Parameter, tensor: Tensor, prefix: str) -> Iterator[Piece]:
    """Pieces of a parameter that holds the experts of all layers one after another."""
    each_expert, first = "{expert}" in tensor.name, 0
    for layer, count in zip(parameter.layers, parameter.counts, strict=True):
        for expert in range(count) if each_expert else (None,):
            whole = slice(first, first + count)
            index = (whole if expert is None else first + expert,)
            shape = parameter.shape[1:] if each_expert else (count, *parameter.shape[1:])
            stacked = parameter.experts > 0 and not each_expert
            disk_shape = _disk_shape(shape, parameter.contracted, tensor, stacked)
            axis = _output_axis(disk_shape, parameter, tensor)
            on_disk = prefix + tensor.name.format(layer=layer, expert=expert)
            yield Piece(name, tensor, on_disk, index, disk_shape, shape, parameter.contracted, axis)
        first += count


def _disk_shape(shape: tuple[int, ...], contracted: bool, tensor: Tensor, stacked: bool) -> tuple[int, ...]:
    """Shape on disk of a share of `shape`: heads flattened into `[out, in]`, parts together, experts in front."""
    experts, rest = (shape[:1], shape[1:]) if stacked else ((), shape)
    inputs = rest[-1:] if contracted else ()
    kernel = (math.prod(rest[: len(rest) - len(inputs)]) * tensor.part[1], *inputs)
    if tensor.transposed:
        kernel = kernel[::-1]
    return ((1,) if tensor.leading_one else ()) + experts + kernel


def _output_axis(disk_shape: tuple[int, ...], parameter: Parameter, tensor: Tensor) -> int:
    return len(disk_shape) - (2 if parameter.contracted and not tensor.transposed else 1)


def from_disk(piece: Piece, array: np.ndarray) -> np.ndarray:
    """The parameter's share of a tensor as read."""
    index, count = piece.tensor.part
    if count > 1:
        axis = piece.axis
        size = array.shape[axis] // count
        cut = slice(index, None, count) if piece.tensor.interleaved else slice(index * size, (index + 1) * size)
        array = array[(slice(None),) * axis + (cut,)]
    if piece.tensor.transposed:
        array = np.swapaxes(array, -1, -2)
    return array.reshape(piece.shape)


def to_disk(parts: list[tuple[Piece, np.ndarray]]) -> np.ndarray:
    """The tensor on disk out of all its parameters' shares: the inverse of `from_disk`."""
    first, _ = parts[0]
    tensor, axis = first.tensor, first.axis
    one = list(first.disk_shape)
    one[axis] //= tensor.part[1]
    shares = []
    for _, array in sorted(parts, key=lambda part: part[0].tensor.part[0]):
        if tensor.transposed:
            array = np.swapaxes(array.reshape(*one[:-2], one[-1], one[-2]), -1, -2)
        shares.append(array.reshape(one))
    if tensor.interleaved:
        return np.stack(shares, axis + 1).reshape(first.disk_shape)
    return shares[0] if len(shares) == 1 else np.concatenate(shares, axis)
