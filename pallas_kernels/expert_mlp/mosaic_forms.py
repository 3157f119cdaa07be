"""Which kernels the grouped product takes, and as what."""

from typing import Any

import jax.numpy as jnp

from ..mxfp4 import MXFP4Array
from ..quantized import QuantizedArray, is_quantized
from .mosaic_int8 import Int8, Int8Groups
from .mosaic_mxfp4 import MXFP4
from .mosaic_weights import DEPTH, Plain

_DTYPES = (jnp.bfloat16, jnp.float16)


def refuse(x: Any, experts: Any) -> str | None:
    """Why these kernels cannot be multiplied by rows of x; None if they can."""
    given = [w for w in (experts.gate, experts.up, experts.down) if w is not None]
    plain = [w for w in given if not is_quantized(w)]
    if x.dtype not in _DTYPES or any(w.dtype != x.dtype for w in plain):
        kinds = ", ".join(sorted({str(w.dtype) for w in plain or given}))
        return f"x and kernels must both be bfloat16 or both float16, got {x.dtype} and {kinds}"
    if reason := next(filter(None, (_refuse(w, x.dtype) for w in given)), None):
        return reason
    if experts.gate is not None and form_of(experts.gate, experts.layout) != form_of(experts.up, experts.layout):
        return "gate and up must be stored alike, with groups of the same size"
    return None


def _refuse(kernel, dtype):
    if isinstance(kernel, MXFP4Array):
        return None if dtype == jnp.bfloat16 else f"MXFP4 kernels are multiplied by bfloat16, got {dtype}"
    if not isinstance(kernel, QuantizedArray):
        return f"kernels stored as {type(kernel).__name__}" if is_quantized(kernel) else None
    if kernel.runs:
        return "scales over runs of a flattened matrix are not applied here"
    group = _group(kernel)
    return f"groups must be multiples of {DEPTH} inputs, got {group}" if group is not None and group % DEPTH else None


def form_of(kernel: Any, layout: str) -> Any:
    """How a kernel that is not refused is stored."""
    if isinstance(kernel, MXFP4Array):
        return MXFP4()
    if not is_quantized(kernel):
        return Plain(layout == "out_in")
    group = _group(kernel)
    return Int8() if group is None else Int8Groups(group)


def _group(kernel):
    return None if kernel.scales.shape[-1] == 1 else kernel.group_size
