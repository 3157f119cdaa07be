"""Int8 kernels on disk: a tensor of int8 values under its usual name, and beside it `<name>_scale` in float32.

Scales lie as the values do (transposed, fused, experts in front), with blocks in place of inputs.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pallas_kernels.quantized import QuantizedArray, check_group_size, is_quantized

from ..config import ModelConfig
from ..weights import Parameter, parameters
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
        arrays = {name: array for name, array in flat.items() if is_quantized(array)}
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

    def blocks(self, width: int) -> int:
        """Scales of a row of `width` inputs."""
        return 1 if self.group_size is None else -(-width // self.group_size)


def format_of(config: ModelConfig) -> Int8Format | None:
    """The int8 format that a config announces."""
    hub = config.text if "quantization_config" in config.text else config.hub
    return Int8Format.of(hub.get("quantization_config"))


def stored_in_int8(plan: Iterable[Piece], tensors: Mapping[str, Any]) -> set[str]:
    """The parameters whose tensors are all int8 with scales."""
    plan = list(plan)
    is_int8 = lambda name: name + SCALE in tensors and name in tensors and tensors[name].dtype == "I8"
    plain = {piece.parameter for piece in plan if not (piece.kernel and is_int8(piece.name))}
    return {piece.parameter for piece in plan} - plain


def with_scales(
    plan: Iterable[Piece], config: ModelConfig, names: Collection[str], form: Int8Format | None
) -> Iterator[Piece]:
    """The plan with a piece of scales behind each piece of the int8 parameters `names`."""
    table = parameters(config.architecture)
    for piece in plan:
        if piece.parameter not in names:
            yield piece
            continue
        split = len(piece.shape) - table[piece.parameter].inputs
        out, width = piece.shape[:split], math.prod(piece.shape[split:])
        yield dataclasses.replace(piece, shape=(*out, width))
        on_disk = list(piece.disk_shape)
        on_disk[-2 if piece.tensor.transposed else -1] = form.blocks(width)
        yield dataclasses.replace(
            piece,
            parameter=piece.parameter + SCALE,
            name=piece.name + SCALE,
            shape=(*out, form.blocks(width)),
            disk_shape=tuple(on_disk),
        )


def stacks(name: str, parameter: Parameter, form: Int8Format) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of an int8 parameter's values and scales."""
    split = len(parameter.shape) - parameter.inputs
    out, width = parameter.shape[:split], math.prod(parameter.shape[split:])
    return {
        name: ((*out, width), np.dtype(np.int8)),
        name + SCALE: ((*out, form.blocks(width)), np.dtype(np.float32)),
    }


def joined(
    flat: dict[str, Any], config: ModelConfig, names: Collection[str], form: Int8Format | None, dtype: Any
) -> dict[str, Any]:
    """Values and scales of the int8 parameters `names` as arrays that stand for `dtype`."""
    table = parameters(config.architecture)
    for name in names:
        inputs = table[name].inputs
        tail = table[name].shape[-inputs:] if inputs > 1 else None
        flat[name] = QuantizedArray(flat[name], flat.pop(name + SCALE), np.dtype(dtype), tail, form.group_size)
    return flat


def separated(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `joined`: plain arrays only."""
    plain: dict[str, Any] = {}
    for name, array in flat.items():
        plain |= {name: array.values, name + SCALE: array.scales} if is_quantized(array) else {name: array}
    return plain
