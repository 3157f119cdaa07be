"""Inside a Triton kernel: heads of a new token, normed and rotated."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import LEAST

_F32, _I32 = jnp.float32, jnp.int32


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


def prepare(ref, heads, place, norm, rotary):
    """Normed and rotated `[heads, H padded]` of `ref [B, heads, H]`, as a function of a zero.

    What it needs is on its way when this returns: a program prepares all of its vectors, asks for a
    `zero_behind_a_barrier` and then for the first vector, and so waits for memory once. They are in float32, rounded as
    the plain operations do. `norm`: scales, a stack of them for one head or for all together, and epsilon; None for
    none.
    """
    scales, epsilon = norm or (None, None)
    together = norm is not None and len(scales.shape) == 3

    def load(ref, lead, component, real=None):
        """`ref[lead, component]` for all heads, each thread what it multiplies: nothing changes hands later."""
        shape = heads.shape[0], component.shape[0]
        at = ref.at[tuple(jnp.broadcast_to(i, shape) for i in (*lead, component[None, :]))]
        mask = {} if real is None else dict(mask=jnp.broadcast_to(real[None, :], shape), other=0.0)
        return pltriton.load(at, **mask).astype(_F32)

    def read(component, real):
        """Components of the heads, and their scales."""
        x = load(ref, (place.batch, heads[:, None]), place.first + component, real)
        if norm is None:
            return x, None
        lead = (place.layer, heads[:, None]) if together else (place.layer,)
        return x, load(scales, lead, component, component < place.size)

    pairs, c = [read(place.component, place.real)], place.component
    every = _all_heads(ref, place) if together else None
    if rotary is not None:
        half = rotary.cos.shape[1]
        if rotary.interleaved:
            angle, partner, second = c >> 1, c ^ 1, (c & 1) == 1
        else:
            second = c >= half
            angle, partner = jnp.where(second, c - half, c), jnp.where(second, c - half, c + half)
        turned = c < 2 * half
        eights = not rotary.interleaved and half % 8 == 0
        angle, partner = (jnp.where(turned, i, c & 7 if eights else 0) for i in (angle, partner))
        if eights:
            angle, partner = _in_order(angle), _in_order(partner)
        pairs.append(read(partner, turned))
        cos, sin = (load(table, (place.batch,), angle) for table in (rotary.cos, rotary.sin))

    def finish(zero):
        (x, scale), *other = ((x + zero, scale) for x, scale in pairs)
        rounded = lambda x: x.astype(ref.dtype).astype(_F32)
        if together:
            share = lax.rsqrt(jnp.sum(jnp.square(every + zero)) / (ref.shape[1] * ref.shape[2]) + epsilon)
        elif norm is not None:
            share = lax.rsqrt(jnp.sum(x * x, axis=1) / place.size + epsilon)[:, None]
        scaled = lambda x, scale: x if norm is None else rounded(x * share * scale)
        x = scaled(x, scale)
        if rotary is None:
            return x
        y = x * cos + jnp.where(second[None, :], sin, -sin) * scaled(*other[0])
        return rounded(jnp.where(turned[None, :], y, x))

    return finish


def _in_order(components):
    """Components of which each eight follow each other: Triton reads them at once, and does not see it by itself."""
    return pltriton.max_contiguous(pl.multiple_of(components, 8), 8)


def _all_heads(ref, place):
    """All heads of a row, in float32."""
    heads, size = ref.shape[1:]
    head = lax.iota(_I32, pl.next_power_of_2(heads))
    shape = head.shape[0], place.component.shape[0]
    at = [jnp.broadcast_to(i, shape) for i in (place.batch, head[:, None], place.component[None, :])]
    return pltriton.load(ref.at[tuple(at)], mask=(head < heads)[:, None] & place.real[None, :], other=0.0).astype(_F32)
