"""MXFP4 kernels on disk: tensors `<name>_blocks` and `<name>_scales`, experts in front, as gpt-oss is released."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pallas_kernels.mxfp4 import GROUP, WORD, MXFP4Array

from ..weights import Parameter
from .layout import Piece

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_WORD, _BYTE = np.dtype(np.uint32), np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class MXFP4Format:
    """Stacks of experts whose bytes stay as they are on disk: `[E, out, in/32, 16]` and `[E, out, in/32]`."""

    #: Inputs that an element of the blocks and of the scales stands for.
    blocks_stored = WORD, GROUP

    @staticmethod
    def stores(piece: Piece, parameter: Parameter, tensors: Mapping[str, Any]) -> bool:
        """Whether the piece is a stack of experts that lies so in a checkpoint."""
        stored = tensors.get(piece.name)
        plain = parameter.experts > 0 and parameter.counts is None and piece.tensor.transposed
        return plain and stored is not None and (stored.kind, stored.shape) == (METHOD, piece.disk_shape)

    def split(self, piece: Piece, parameter: Parameter) -> Iterator[Piece]:
        """The piece as one of blocks and one of scales; on disk their contraction is last."""
        del parameter
        experts, width, total = piece.disk_shape
        tensor = dataclasses.replace(piece.tensor, transposed=False)
        groups = width // GROUP
        for part, size, tail in ((BLOCKS, width // 2, (groups, GROUP // 2)), (SCALES, groups, (groups,))):
            yield dataclasses.replace(
                piece,
                parameter=piece.parameter + part,
                tensor=tensor,
                name=piece.name + part,
                shape=(*piece.shape[:-1], size),
                disk_shape=(experts, total, *tail),
                axis=1,
            )

    def stacks(self, name: str, parameter: Parameter) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of a parameter's blocks and scales."""
        *lead, width = parameter.shape
        return {name + BLOCKS: ((*lead, width // WORD), _WORD), name + SCALES: ((*lead, width // GROUP), _BYTE)}

    def join(self, flat: dict[str, Any], name: str, parameter: Parameter, dtype: Any) -> MXFP4Array:
        """The array out of its parts, which leave `flat`."""
        del parameter
        return MXFP4Array(flat.pop(name + BLOCKS), flat.pop(name + SCALES), np.dtype(dtype))

    def separate(self, name: str, array: MXFP4Array) -> dict[str, Any]:
        """The inverse of `join`."""
        return {name + BLOCKS: array.blocks, name + SCALES: array.scales}


def on_disk(array: np.ndarray) -> np.ndarray:
    """The array, its words as the bytes that files hold: a view."""
    return array.view(stored_dtype(array.dtype))


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """What an array of a model has in a file; only blocks are of words."""
    return _BYTE if dtype == _WORD else dtype
