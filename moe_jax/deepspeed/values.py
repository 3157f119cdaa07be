"""Reading single values of a DeepSpeed configuration: enums, numbers, flags and dtypes, checked and made plain."""

import enum
import json
import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {
    "float16": ("float16", "fp16", "half"),
    "float32": ("float32", "fp32", "float"),
    "bfloat16": ("bfloat16", "bf16", "bfloat"),
    "int8": ("int8",),
}
_CANONICAL = {alias: name for name, aliases in _DTYPES.items() for alias in aliases}


class Numbered(enum.StrEnum):
    """Names that compare as strings and can be found by DeepSpeed's numbers, which count from 0 in this order."""

    @classmethod
    def _missing_(cls, value: object) -> "Numbered | None":
        entries = list(cls)
        if isinstance(value, str):
            name = value.rsplit(".", 1)[-1].lower()  # str() of an older Python's IntEnum has the class's name
            return next((entry for entry in entries if entry.lower() == name), None)
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return dict(enumerate(entries)).get(int(value))
        return None


class ActivationFuncType(Numbered):
    """An expert's activation.

    >>> ActivationFuncType(4), ActivationFuncType("gelu") == "GELU"
    (<ActivationFuncType.GATED_SILU: 'GATED_SILU'>, True)
    """

    UNKNOWN = "UNKNOWN"
    GELU = "GELU"
    ReLU = "ReLU"
    GATED_GELU = "GATED_GELU"
    GATED_SILU = "GATED_SILU"


class NormType(Numbered):
    """A normalisation. GroupNorm and UNKNOWN are refused."""

    UNKNOWN = "UNKNOWN"
    LayerNorm = "LayerNorm"
    GroupNorm = "GroupNorm"
    RMSNorm = "RMSNorm"


def read_json(path: str | Path) -> Any:
    """The JSON value in a file. `OSError` if it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # among them UnicodeDecodeError and JSONDecodeError
        raise OSError(f"{path}: not a JSON file ({error})") from error


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as a plain Python `bool`, `int` or `float`; other kinds pass. A bool is no number, nor the reverse.

    >>> typed("k", 2, int), typed("layer_norm_eps", 0, float)
    (2, 0.0)
    """
    if kind is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name}: {value!r} is not true or false")
        return bool(value)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}: {value!r} is not an integer")
        return int(value)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name}: {value!r} is not a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value!r} is not finite")
    return value


def at_least(low: int, owner: Any, *names: str, prefix: str = "") -> None:
    """Raise for a field that is less than `low`."""
    for name in names:
        value = getattr(owner, name)
        if value < low:
            what = {0: "expected zero or more", 1: "expected a positive integer"}[low]
            raise ValueError(f"{prefix}{name}: {what}, got {value}")


def above_zero(owner: Any, *names: str) -> None:
    """Raise for a field that is not greater than zero."""
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueError(f"{name}: expected more than 0, got {getattr(owner, name)}")


def one_of(name: str, value: Any, choices: tuple) -> None:
    """Raise for a value that is not among `choices`."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")


def member(name: str, value: Any, kind: type[Numbered]) -> str:
    """The name in `kind` that is meant by a number, a name in any case, or another library's enum.

    >>> member("norm_type", 3, NormType), member("norm_type", "layernorm", NormType)
    ('RMSNorm', 'LayerNorm')
    """
    try:
        return kind(value).value
    except (ValueError, TypeError):
        known = ", ".join(f"{entry} ({number})" for number, entry in enumerate(kind))
        raise ValueError(f"{name}: {value!r} is not one of {known}") from None


def dtype_name(value: Any) -> str:
    """One of `float16`, `float32`, `bfloat16`, `int8`, from a name or a dtype of NumPy, JAX or torch.

    >>> dtype_name("torch.float16"), dtype_name("half"), dtype_name(np.float32)
    ('float16', 'float16', 'float32')
    """
    if isinstance(value, bool):
        raise ValueError(
            f"dtype: {value} is no dtype (a DeepSpeedMoEInferenceConfig that DeepSpeed printed has its values in the "
            "wrong places: dtype holds fp16; give the arguments that it was built from)"
        )
    name = None
    if isinstance(value, (str, np.dtype)) or not isinstance(value, type):
        name = str(value)  # torch's dtypes print their names, so that torch need not be imported
    elif issubclass(value, np.generic) or isinstance(getattr(value, "dtype", None), np.dtype):
        name = np.dtype(value).name
    found = _CANONICAL.get(name.removeprefix("torch.")) if name else None
    if found is None:
        raise ValueError(f"dtype: {value!r} is not one of {', '.join(_CANONICAL)}")
    return found
