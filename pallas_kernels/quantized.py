"""Weights that are stored smaller than they are: what they have in common, and `QuantizedArray`, which is int8."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .dims import Array as AnyArray


class Quantized:
    """A kernel `[..., in]` that is stored in fewer bytes, accepted wherever a kernel is; the contraction is last.

    A pytree of arrays that share their leading axes, so that `jax.tree.map` of an operation on leading axes (a slice, a
    reshape) acts on the kernel as a whole. `scales` is the one with the fewest axes, `dtype` what the kernel stands for
    and `dequantize` gives. `shape`, `ndim` and `size` are those of the kernel, `nbytes` what is stored.
    """

    scales: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        raise NotImplementedError

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that this stands for, `[...]` in `dtype` (None: its own)."""
        raise NotImplementedError

    @property
    def runs(self) -> bool:
        """Whether scales cross rows, so that a matrix can only be taken whole."""
        return False

    @property
    def packed(self) -> bool:
        """Whether several inputs share a byte: XLA then unpacks some rows sooner than it multiplies in place."""
        return False

    @property
    def ndim(self) -> int:
        """Axes of the array that this stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(part.nbytes for part in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> Any:
        """By integers, slices and arrays along leading axes; `IndexError` beyond those that the scales share."""
        parts = index if isinstance(index, tuple) else (index,)
        parts = parts[:-1] if parts and parts[-1] is Ellipsis else parts
        if len(parts) >= self.scales.ndim or any(part is None or part is Ellipsis for part in parts):
            kind, lead = type(self).__name__, self.scales.ndim - 1
            raise IndexError(f"index {index}: a {kind} {self.shape} has {lead} leading axes")
        return jax.tree.map(lambda w: w[parts], self) if parts else self


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(Quantized):
    """A kernel `[..., in]` in int8: `values * scales`, symmetric, the contraction last.

    `values` int8 `[..., in]`. `scales` float32, in one of two layouts that their axes tell apart:

    - blocks along the contraction, `[..., ceil(in / group_size)]`: one scale for `group_size` consecutive inputs of a
      row, the last block possibly shorter; `group_size` None: one for the whole row (per output channel);
    - DeepSpeed's runs, fewer axes than `values`, `[*lead, groups]`: the matrix behind the leading axes, flattened, in
      `groups` equal runs.

    `dtype`: what the array stands for; see `Quantized` for what it has in common with other forms.

    >>> w = quantize(jnp.array([[1.0, -0.5], [0.0, 4.0]]))
    >>> w.shape, w.values.tolist(), w[0].dequantize().round(2).tolist()
    ((2, 2), [[127, -64], [0, 127]], [1.0, -0.5])
    """

    values: Any
    scales: Any
    dtype: Any = np.dtype(np.float32)
    group_size: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return self.values.shape

    @property
    def runs(self) -> bool:
        """Whether scales are DeepSpeed's, over runs of the flattened matrix."""
        return self.scales.ndim < self.values.ndim

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that this stands for, `[...]` in `dtype` (None: its own); products are formed in float32."""
        values = jnp.asarray(self.values, jnp.float32)
        width, blocks = values.shape[-1], self.scales.shape[-1]
        if self.runs:
            wide = values.reshape(*self.scales.shape, -1) * self.scales[..., None]
        elif blocks == 1:
            wide = values * self.scales
        elif width == blocks * self.group_size:
            wide = values.reshape(*self.scales.shape, self.group_size) * self.scales[..., None]
        else:
            wide = values * jnp.repeat(self.scales, self.group_size, axis=-1)[..., :width]
        return wide.reshape(self.shape).astype(dtype or self.dtype)

    def tree_flatten_with_keys(self):
        names = "values", "scales"
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names)
        return children, (self.dtype, self.group_size)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


def is_quantized(w: Any) -> bool:
    """Whether `w` is a kernel in a smaller form; the `is_leaf` of `jax.tree.map` over whole kernels."""
    return isinstance(w, Quantized)


def dense(w: Any, dtype: Any = None) -> Any:
    """`w` as it is, or dequantised to `dtype` if it is `Quantized`: the door between storage and maths.

    Callers take what they need first (one layer, one expert, some rows), so that no stack is ever widened.
    """
    return w.dequantize(dtype) if is_quantized(w) else w


def quantize(w: AnyArray, group_size: int | None = None) -> QuantizedArray:
    """Symmetric int8 of a kernel `[..., in]`, the contraction last: `round(w / scale)`, half to even.

    `scale = max|w| / 127` over blocks of `group_size` consecutive inputs, the last one possibly shorter, or over the
    whole row for None. All-zero blocks give zeros; what is not finite gives nonsense. Raises `ValueError` for a
    `group_size` that is not a positive integer. Source: symmetric absmax quantisation as in LLM.int8()
    (arXiv:2208.07339, section 2).

    >>> quantize(jnp.ones((3, 100)), group_size=64).scales.shape
    (3, 2)
    """
    check_group_size(group_size)
    w = jnp.asarray(w)
    *lead, width = w.shape
    size = width if group_size is None else min(group_size, width)
    blocks = -(-width // size)
    padded = jnp.pad(w.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, blocks * size - width)])
    padded = padded.reshape(*lead, blocks, size)
    scales = jnp.abs(padded).max(-1) / 127
    divisor = jnp.where(scales < jnp.finfo(jnp.float32).tiny, jnp.inf, scales)
    values = jnp.clip(jnp.round(padded / divisor[..., None]), -127, 127).astype(jnp.int8)
    return QuantizedArray(values.reshape(*lead, blocks * size)[..., :width], scales, np.dtype(w.dtype), group_size)


def check_group_size(group_size: Any) -> None:
    """`ValueError` for what is neither None nor a positive integer."""
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: {group_size!r} is neither None nor a positive integer")


def quantize_runs(w: AnyArray, groups: int, lead: int = 0) -> QuantizedArray:
    """DeepSpeed's int8 of the matrix behind `lead` leading axes: `groups` equal runs of it, flattened.

    Values are `clip(round(w * 256 / (2 * max|w| + 1e-5)), -128, 127)`, half to even, scales the reciprocal
    `(2 * max|w| + 1e-5) / 256`; both in float32. Raises `ValueError` where the runs do not come out even. Source:
    DeepSpeed 0.16, `deepspeed/runtime/weight_quantizer.py`.

    >>> quantize_runs(jnp.ones((2, 4, 6)), groups=3, lead=1).scales.shape
    (2, 3)
    """
    w = jnp.asarray(w)
    count = math.prod(w.shape[lead:])
    if groups < 1 or count % groups:
        raise ValueError(f"groups: {count} elements of shape {w.shape[lead:]} do not divide into {groups} runs")
    runs = w.astype(jnp.float32).reshape(*w.shape[:lead], groups, -1)
    span = 2 * jnp.abs(runs).max(-1, keepdims=True) + jnp.float32(1e-5)
    values = jnp.clip(jnp.round(runs * (256 / span)), -128, 127).astype(jnp.int8)
    return QuantizedArray(values.reshape(w.shape), 1 / (256 / span[..., 0]), np.dtype(w.dtype))


def rows_of(kernels: Any, index: jax.Array, first: Any, size: int) -> Any:
    """Rows `[first, first + size)` of kernel `index` out of a stack `[E, out, in]`: `[size, in]`, quantised as it is.

    DeepSpeed's runs cross rows: such a kernel comes whole, `size` must be `out`.
    """

    def cut(w):
        return jax.lax.dynamic_slice(w, (index, first, jnp.zeros_like(index)), (1, size, w.shape[2]))[0]

    if is_quantized(kernels) and kernels.runs:
        return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), kernels)
    return jax.tree.map(cut, kernels)
