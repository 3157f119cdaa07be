"""Int8 kernels on disk: a tensor of int8 values under its usual name, and beside it `<name>_scale` in float32.

Scales lie as the values do (transposed, fused, experts in front), with blocks in place of inputs.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pallas_kernels.quantized import QuantizedArray, check_group_size

from ..weights import Parameter
from .layout import Piece

METHOD = "moe_jax_int8"
SCALE = "_scale"


@dataclasses.dataclass(frozen=True)
class Int8Format:
    """What a config says of int8 kernels: inputs per scale, None for one scale per output channel."""

    group_size: int | None = None

    @classmethod
    def of(cls, quantization: Any) -> "Int8Format | None":
        """From a `quantization_config`; None for any other method; `ValueError` for values that we never write."""
        if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
            return None
        if quantization.get("bits") != 8:
            raise ValueError(f"quantization_config: {METHOD} with bits {quantization.get('bits')!r}, expected 8")
        try:
            check_group_size(quantization.get("group_size"))
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from None
        return cls(quantization.get("group_size"))

    @classmethod
    def of_weights(cls, flat: Mapping[str, Any]) -> "Int8Format | None":
        """Of a model's weights; None without int8; `ValueError` for arrays that a file of ours cannot hold."""
        arrays = {name: array for name, array in flat.items() if isinstance(array, QuantizedArray)}
        runs = [name for name, array in arrays.items() if array.runs]
        if runs:
            raise ValueError(f"scales over runs of a flattened matrix cannot be saved: {', '.join(runs)}")
        sizes = {array.group_size for array in arrays.values()}
        if len(sizes) > 1:
            raise ValueError(f"group_size: a saved model has one, these weights have {sizes}")
        return cls(*sizes) if sizes else None

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config`."""
        return {"quant_method": METHOD, "bits": 8, "group_size": self.group_size}

    @property
    def blocks_stored(self) -> tuple[int, int | None]:
        """Inputs that an element of the values and of the scales stands for; None: all of a row."""
        return 1, self.group_size

    def blocks(self, width: int) -> int:
        """Scales of a row of `width` inputs."""
        return 1 if self.group_size is None else -(-width // self.group_size)

    @staticmethod
    def stores(piece: Piece, tensors: Mapping[str, Any]) -> bool:
        """Whether the piece is a kernel that lies so in a checkpoint."""
        stored = tensors.get(piece.name)
        return piece.kernel and piece.name + SCALE in tensors and stored is not None and stored.dtype == "I8"

    def split(self, piece: Piece, parameter: Parameter) -> Iterator[Piece]:
        """The piece as one of values and one of scales."""
        *out, width = piece.shape
        yield piece
        on_disk = list(piece.disk_shape)
        on_disk[-2 if piece.tensor.transposed else -1] = self.blocks(width)
        yield dataclasses.replace(
            piece,
            parameter=piece.parameter + SCALE,
            name=piece.name + SCALE,
            shape=(*out, self.blocks(width)),
            disk_shape=tuple(on_disk),
        )

    def stacks(self, name: str, parameter: Parameter) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of a parameter's values and scales."""
        *out, width = parameter.shape
        return {
            name: (parameter.shape, np.dtype(np.int8)),
            name + SCALE: ((*out, self.blocks(width)), np.dtype(np.float32)),
        }

    def join(self, flat: dict[str, Any], name: str, parameter: Parameter, dtype: Any) -> QuantizedArray:
        """The array out of its parts, which leave `flat`."""
        return QuantizedArray(flat.pop(name), flat.pop(name + SCALE), np.dtype(dtype), self.group_size)

    def separate(self, name: str, array: QuantizedArray) -> dict[str, Any]:
        """The inverse of `join`."""
        return {name: array.values, name + SCALE: array.scales}
