"""Quantised formats of released checkpoints, widened when read."""

import ml_dtypes
import numpy as np

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], -1)  # low nibble first


def widen_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 to float32: `blocks` uint8 `[E, out, in/32, 16]`, `scales` uint8 `[E, out, in/32]` -> `[E, in, out]`.

    Two values a byte, each a 4-bit float times `2^(scale - 127)` (OCP Microscaling Formats 1.0).
    """
    values = _PAIRS[blocks].reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return np.swapaxes(values.reshape(*blocks.shape[:2], -1), 1, 2)


def widen_fp8(weight: np.ndarray, inverse_scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """FP8 with one factor per block to float32: `weight [out, in]`, factors `[ceil(out/b0), ceil(in/b1)]`."""
    rows, columns = weight.shape
    wide = weight.astype(np.float32)
    factors = inverse_scale.astype(np.float32)
    factors = np.repeat(np.repeat(factors, block[0], 0)[:rows], block[1], 1)[:, :columns]
    return wide * factors


def convert(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array.astype(dtype)`; bfloat16 to float32 by shifting bits, several times faster than ml_dtypes' loop."""
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)
