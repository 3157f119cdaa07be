"""DeepSpeed's int8 weights, value for value: NumPy in, NumPy out.

Every quantiser cuts a matrix, flattened, into `groups` equal runs and rounds each symmetrically, half to even.
DeepSpeed itself has two conventions for the scale: `data_scale`, which multiplies a weight to give its integer, and
its reciprocal, which multiplies the integer to give the weight. Each function says which one it returns.
Source: DeepSpeed 0.16, `runtime/weight_quantizer.py`, `module_inject/replace_module.py` and `dequantize.cu`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.dims import Array
from pallas_kernels.quantized import QuantizedArray

#: Kernels of a Megatron layer in the order of their scales, by a part of their name.
MEGATRON_KERNELS = (
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)


def quantize_groups(w: Array, groups: int, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """`WeightQuantization.quantize_data`: `q` int8 in the shape of `w`, and `data_scale` float32 `[groups, 1]`.

    `data_scale = 2^bits / (2 * max|w| + 1e-5)` of a run is what multiplies: `q = clip(round(w * data_scale))` and
    `w` is about `q / data_scale`. Computed in float32. Raises `ValueError` for `bits` outside 2 to 8 and for groups
    that do not divide the elements.

    >>> q, scale = quantize_groups(np.array([[1.0, -0.5], [0.25, 0.0]]), groups=2)
    >>> q.tolist(), scale.round(1).tolist()
    ([[127, -64], [127, 0]], [[128.0], [512.0]])
    """
    runs = _runs(w, groups, bits)
    span = 2 * np.abs(runs).max(1, keepdims=True) + np.float32(1e-5)
    scale = np.float32(2**bits) / span
    return _rounded(runs * scale, bits).reshape(np.shape(w)), scale


def quantize_shards(
    shards: Sequence[Array],
    groups: int,
    merge_dim: int = 0,
    mlp_extra_grouping: bool = True,
    model_parallel: int = 1,
    bits: int = 8,
) -> tuple[list[np.ndarray], np.ndarray]:
    """`WeightQuantization.Quantize`: a matrix in `shards`, each quantised by itself, and reciprocal scales `[1, n]`.

    `n = shards * groups`, ordered by shard, then group for `merge_dim` 0; by group, then shard for 1. With
    `mlp_extra_grouping` a matrix whose whole sides are 4 to 1 gets twice the groups: a side counts `model_parallel`
    times the shards as large as the first shard's. Raises as `quantize_groups`, and for a `merge_dim` beside 0 and 1.

    >>> w = np.arange(1, 17, dtype=np.float32).reshape(2, 8)
    >>> values, scales = quantize_shards([w, -w], groups=2)
    >>> [q.shape for q in values], scales.shape
    ([(2, 8), (2, 8)], (1, 4))
    """
    if merge_dim not in (0, 1):
        raise ValueError(f"merge_dim: {merge_dim!r} is neither 0 nor 1")
    if mlp_extra_grouping and _is_mlp(np.shape(shards[0]), model_parallel * len(shards)):
        groups *= 2
    pairs = [quantize_groups(shard, groups, bits) for shard in shards]
    scales = np.concatenate([scale for _, scale in pairs], axis=merge_dim)
    return [q for q, _ in pairs], 1 / scales.reshape(1, -1)


def _is_mlp(shape: tuple[int, ...], parts: int) -> bool:
    rows, columns = shape
    return parts * rows == 4 * columns or parts * columns == 4 * rows


def quantize_megatron(
    weights: Mapping[str, Array], groups: int, mlp_extra_grouping: bool = True, bits: int = 8
) -> tuple[dict[str, Array], np.ndarray]:
    """`sd_quantize_megatron`: a Megatron state dict with int8 kernels, and reciprocal scales `[layers, 4, n]`.

    The second axis is query/key/value, attention output, first and second MLP kernel; shorter rows end in zeros.
    Layers are counted in the order of the dictionary. Everything else passes as it is. Raises as `quantize_groups`,
    and where layers lack a kernel.

    >>> names = [f"layers.0.{name}" for name in MEGATRON_KERNELS]
    >>> out, scales = quantize_megatron({name: np.ones((4, 4)) for name in names}, groups=2)
    >>> out[names[0]].dtype, scales.shape
    (dtype('int8'), (1, 4, 2))
    """
    out = dict(weights)
    found: dict[str, list[np.ndarray]] = {kernel: [] for kernel in MEGATRON_KERNELS}
    for name, array in weights.items():
        kernel = next((k for k in MEGATRON_KERNELS if k in name), None)
        if kernel is not None:
            (out[name],), scales = quantize_shards([array], groups, 0, mlp_extra_grouping, bits=bits)
            found[kernel].append(scales[0])
    counts = {kernel: len(rows) for kernel, rows in found.items()}
    if len(set(counts.values())) != 1 or not counts[MEGATRON_KERNELS[0]]:
        raise ValueError(f"weights: every layer needs the four kernels of Megatron, found {counts}")
    longest = max(len(row) for rows in found.values() for row in rows)
    layers = zip(*found.values(), strict=True)
    return out, np.stack([[np.pad(row, (0, longest - len(row))) for row in layer] for layer in layers])


def quantize_for_injection(
    w: Array, group_size: int = 1, num_groups: int = 0, bits: int = 8, parallel_dim: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`GroupQuantizer.quantize`: `q` int8, and float32 scales `[groups, 3]`, which multiply the integers.

    `num_groups`, or if 0 the rows by `group_size`. Without the 1e-5 of `quantize_groups`: `scale = 2 * max|w| /
    2^bits`. The scales are three lists, of the whole matrix and of its two halves along `parallel_dim` (each half in
    `groups` runs of its own), written one after another and reshaped: the first list is `scales.reshape(3, groups)[0]`.
    A run of zeros gives zeros (DeepSpeed divides by zero there). Raises as `quantize_groups`, and for sides that do
    not halve.

    >>> q, scales = quantize_for_injection(np.array([[1.0, -0.5], [0.25, 0.0]]))
    >>> q.tolist(), scales.reshape(3, 2)[0].tolist()
    ([[127, -64], [127, 0]], [0.0078125, 0.001953125])
    """
    w = np.asarray(w, np.float32)
    groups = num_groups or w.shape[0] // group_size
    if w.shape[parallel_dim] % 2:
        raise ValueError(f"parallel_dim: axis {parallel_dim} of {w.shape} does not halve")

    def scale_of(part):
        return np.abs(_runs(part, groups, bits)).max(1, keepdims=True) * np.float32(2) / np.float32(2**bits)

    scales = [scale_of(part) for part in (w, *np.split(w, 2, parallel_dim))]
    divisor = np.where(scales[0] > 0, scales[0], np.float32(1))
    q = _rounded(_runs(w, groups, bits) / divisor, bits).reshape(w.shape)
    return q, np.concatenate(scales, axis=None).reshape(groups, 3)


def dequantize_merged(q: Array, scales: Array, groups: int, merge_count: int = 0) -> np.ndarray:
    """The inference kernels' dequantisation: `q` int8 `[in, out]` of `2^merge_count` shards merged along `in`, float32.

    `scales` (reciprocal, group by group, shard after shard: those of `quantize_shards` with `merge_dim=1`) hold
    `groups` per shard; a shard's runs go over its untransposed `[out, in / shards]`. Raises `ValueError` for numbers
    that do not divide.

    >>> dequantize_merged(np.ones((4, 2), np.int8), np.array([1.0, 2.0]), groups=1, merge_count=1)[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    q, scales = np.asarray(q), np.asarray(scales, np.float32).reshape(-1)
    (rows, out), shards = q.shape, 1 << merge_count
    if rows % shards or scales.size != groups * shards or rows // shards * out % groups:
        raise ValueError(f"q {q.shape}: {scales.size} scales do not fit {groups} groups of each of {shards} shards")
    factors = np.repeat(scales.reshape(groups, shards).T, rows // shards * out // groups, axis=1)
    factors = factors.reshape(shards, out, rows // shards)
    return np.swapaxes(factors, 1, 2).reshape(rows, out) * q.astype(np.float32)


def as_quantized(q: Array, data_scale: Array, dtype: Any = np.float32) -> QuantizedArray:
    """What `quantize_groups` gives as a `QuantizedArray`, which kernels accept; `dtype`: what it stands for.

    >>> wide = as_quantized(*quantize_groups(np.eye(4), groups=2)).dequantize()
    >>> bool(abs(wide - np.eye(4)).max() < 0.01)
    True
    """
    return QuantizedArray(np.asarray(q), 1 / np.asarray(data_scale, np.float32).reshape(-1), np.dtype(dtype))


def _runs(w: Array, groups: int, bits: int) -> np.ndarray:
    """`w` flattened into `groups` equal runs `[groups, -1]` in float32."""
    w = np.asarray(w, np.float32)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits!r} is not a whole number of 2 to 8")
    if groups < 1 or w.size == 0 or w.size % groups:
        raise ValueError(f"groups: {w.size} elements of shape {w.shape} do not divide into {groups} runs")
    return w.reshape(groups, -1)


def _rounded(scaled: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(scaled), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
