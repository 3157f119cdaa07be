"""`MXFP4Array`: weights of four bits with a power of two for each 32 of them, as gpt-oss is released."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .quantized import Quantized

#: Inputs of a row that share a scale.
GROUP = 32
#: Inputs in a word of blocks.
WORD = 8


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Array(Quantized):
    """A kernel `[..., out, in]` of 4-bit floats (e2m1), each 32 consecutive inputs times a power of two (e8m0).

    `blocks` uint32 `[..., out, in/8]`: input `8 * j + i` is in bits `4 * i` to `4 * i + 3` of word `j`, which is how a
    little-endian machine sees the bytes of gpt-oss checkpoints (docs/decisions.md says why words). A value's bits are
    sign, exponent (2), mantissa (1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. `scales` uint8
    `[..., out, in/32]`: the factor is `2**(scale - 127)`, NaN for 255. `dtype`: what the array stands for; see
    `Quantized` for what it has in common with other forms. Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3
    and 5.4.1.

    >>> w = MXFP4Array(np.full((1, 4), 0x72727272, np.uint32), np.full((1, 1), 128, np.uint8))
    >>> w.shape, w.nbytes, w.dequantize()[0, :4].tolist()
    ((1, 32), 17, [2.0, 12.0, 2.0, 12.0])
    """

    blocks: Any
    scales: Any
    dtype: Any = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return (*self.blocks.shape[:-1], WORD * self.blocks.shape[-1])

    @property
    def packed(self) -> bool:
        """Eight inputs share a word."""
        return True

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that this stands for, `[...]` in `dtype` (None: its own); exact in float32 and bfloat16.

        What is too large becomes infinite; subnormal numbers are kept.
        """
        dtype = jnp.dtype(dtype or self.dtype)
        words = jnp.asarray(self.blocks).reshape(*self.scales.shape, -1, 1)
        scales = jnp.asarray(self.scales).astype(jnp.uint32)[..., None, None]
        place = jnp.arange(8, dtype=jnp.uint32)
        # XLA would move 4 * place out of a loop, into memory: 4 to 6 times as slow on a CPU.
        codes = words >> place >> place >> place >> place & 15
        bits = _float32_bits(codes, scales).reshape(self.shape)
        if dtype == jnp.bfloat16:  # the upper half of float32; the lower is zero
            return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)

    def tree_flatten_with_keys(self):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("blocks", "scales"))
        return children, (self.dtype,)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


def _float32_bits(codes, scales):
    """The bits of `codes * 2**(scales - 127)` in float32, put together as integers: no table, no rounding to zero.

    Exponent and mantissa of a code of 2 or more, moved to float32's place, add to the scale's exponent. `least` is
    what code 1 (a half) stands for, and the maximum corrects the codes that become subnormal under scale 0.
    """
    size, exponent = codes & 7, (scales - 1) << 23
    least = jnp.where(scales > 1, exponent, (scales + 1) << 21)
    nan = jnp.where(scales == 255, jnp.uint32(0x7FFF0000), 0)
    bits = jnp.minimum(jnp.maximum(exponent + (size << 22), size << 21), jnp.uint32(0x7F800000))
    return jnp.where(size > 1, bits, -size & least) | nan | (codes & 8) << 28
