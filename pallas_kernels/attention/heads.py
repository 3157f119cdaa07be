"""Inside a Triton kernel: heads of a new token, normed and rotated."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_F32, _I32 = jnp.float32, jnp.int32
LEAST = 16  # rows of a product on tensor cores


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program works: row of the batch, layer, and components of a head (padded), `first` being component 0."""

    batch: Any
    layer: Any
    component: Any
    size: int
    first: int = 0

    @property
    def real(self):
        """Which components there are."""
        return self.component < self.size


def padded(size: int) -> int:
    """Components that a program holds of `size`."""
    return max(LEAST, pl.next_power_of_2(size))


def prepared(ref, heads, place, norm, rotary):
    """Normed and rotated `[heads, H padded]` of `ref [B, heads, H]`, in float32, rounded as the plain operations do.

    `norm`: scales, a stack of them for one head or for all together, and epsilon; None for none.
    """

    def load(component, real):
        shape = heads.shape[0], component.shape[0]
        where = place.batch, heads[:, None], place.first + component[None, :]
        at = tuple(jnp.broadcast_to(i, shape) for i in where)
        mask = jnp.broadcast_to(real[None, :], shape)
        return pltriton.load(ref.at[at], mask=mask, other=0.0).astype(_F32)

    rounded = lambda x: x.astype(ref.dtype).astype(_F32)
    x = load(place.component, place.real)
    scaled = lambda x, component: x
    if norm is not None:
        scales, epsilon = norm
        together = len(scales.shape) == 3
        share = (
            _share(ref, place, epsilon)
            if together
            else lax.rsqrt(jnp.sum(x * x, axis=1) / place.size + epsilon)[:, None]
        )

        def scaled(x, component):
            shape = (heads.shape[0], component.shape[0]) if together else (1, component.shape[0])
            lead = (place.layer, heads[:, None]) if together else (place.layer,)
            at = [jnp.broadcast_to(i, shape) for i in (*lead, component[None, :])]
            real = jnp.broadcast_to((component < place.size)[None, :], shape)
            return rounded(x * share * pltriton.load(scales.at[tuple(at)], mask=real, other=0.0).astype(_F32))

    x = scaled(x, place.component)
    if rotary is None:
        return x
    half = rotary.cos.shape[1]
    c = place.component
    if rotary.interleaved:
        angle, partner, second = c >> 1, c ^ 1, (c & 1) == 1
    else:
        second = c >= half
        angle, partner = jnp.where(second, c - half, c), jnp.where(second, c - half, c + half)
    turned = c < 2 * half
    angle, partner = jnp.where(turned, angle, 0), jnp.where(turned, partner, 0)
    at = jnp.full(c.shape, place.batch, _I32), angle
    cos, sin = pltriton.load(rotary.cos.at[at]), pltriton.load(rotary.sin.at[at])
    other = scaled(load(partner, turned), partner)
    y = x * cos[None, :] + jnp.where(second, sin, -sin)[None, :] * other
    return rounded(jnp.where(turned[None, :], y, x))


def _share(ref, place, epsilon):
    """One over the root mean square of all heads of a row together."""
    heads, size = ref.shape[1:]
    head = lax.iota(_I32, pl.next_power_of_2(heads))
    shape = head.shape[0], place.component.shape[0]
    at = [jnp.broadcast_to(i, shape) for i in (place.batch, head[:, None], place.component[None, :])]
    x = pltriton.load(ref.at[tuple(at)], mask=(head < heads)[:, None] & place.real[None, :], other=0.0).astype(_F32)
    return lax.rsqrt(jnp.sum(x * x) / (heads * size) + epsilon)
