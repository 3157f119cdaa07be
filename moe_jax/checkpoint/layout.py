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
    """One tensor's share in a parameter: `index` into the stacked parameter, shape on disk, shape of the share."""

    parameter: str
    tensor: Tensor
    name: str
    index: tuple[int, ...]
    disk_shape: tuple[int, ...]
    shape: tuple[int, ...]


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
    lead = (parameter.layers is not None) + each_expert
    shape = parameter.shape[lead:]
    stacked = parameter.experts > 0 and not each_expert
    disk_shape = _disk_shape(name, shape, tensor, stacked)
    for place, layer in enumerate(parameter.layers or (None,)):
        for expert in range(parameter.experts) if each_expert else (None,):
            index = (() if layer is None else (place,)) + (() if expert is None else (expert,))
            on_disk = prefix + tensor.name.format(layer=layer, expert=expert)
            yield Piece(name, tensor, on_disk, index, disk_shape, shape)


def _disk_shape(name: str, shape: tuple[int, ...], tensor: Tensor, stacked: bool) -> tuple[int, ...]:
    """Shape on disk of a parameter's share of `shape`: heads flattened, output first for a Linear, parts together."""
    experts, rest = (shape[:1], shape[1:]) if stacked else ((), shape)
    count = tensor.part[1]
    if tensor.linear or (stacked and len(rest) == 2):
        inputs, outputs = _in_out(name, rest)
        outputs *= count
        rest = (outputs, inputs) if tensor.linear else (inputs, outputs)
    elif name in FLATTENED or stacked:
        rest = (math.prod(rest) * count,)
    return ((1,) if tensor.leading_one else ()) + experts + rest


#: Parameters with several axes that are one axis on disk.
FLATTENED = frozenset(f"attention.{name}" for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"))


def _in_out(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a kernel; the attention's output projection has its heads on the input side."""
    split = len(shape) - 1 if name == "attention.o" else 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def from_disk(piece: Piece, array: np.ndarray) -> np.ndarray:
    """The parameter's share of a tensor as read."""
    index, count = piece.tensor.part
    if count > 1:
        axis = array.ndim - (2 if piece.tensor.linear else 1)
        size = array.shape[axis] // count
        cut = slice(index, None, count) if piece.tensor.interleaved else slice(index * size, (index + 1) * size)
        array = array[(slice(None),) * axis + (cut,)]
    if piece.tensor.linear:
        array = np.swapaxes(array, -1, -2)
    return array.reshape(piece.shape)


def to_disk(parts: list[tuple[Piece, np.ndarray]]) -> np.ndarray:
    """The tensor on disk out of all its parameters' shares: the inverse of `from_disk`."""
    first, _ = parts[0]
    tensor, count = first.tensor, first.tensor.part[1]
    axis = len(first.disk_shape) - (2 if tensor.linear else 1)
    one = list(first.disk_shape)
    one[axis] //= count
    shares = []
    for piece, array in sorted(parts, key=lambda part: part[0].tensor.part[0]):
        if piece.tensor.linear:
            shape = (*one[:-2], one[-1], one[-2])
            shares.append(np.swapaxes(array.reshape(shape), -1, -2))
        else:
            shares.append(array.reshape(one))
    if count == 1:
        return shares[0]
    if tensor.interleaved:
        return np.stack(shares, axis + 1).reshape(first.disk_shape)
    return np.concatenate(shares, axis)
