"""Scores as integers, for kernels that take the best expert again and again.

Integers order as float32 scores do, NaN highest; below every score are an expert outside the best groups, and one that
is taken or does not exist. Their maximum is one instruction on a GPU, and sees NaN everywhere.
"""

import jax
import jax.numpy as jnp
from jax import lax

_NAN, OUTSIDE, TAKEN = 2**31 - 1, -(2**31) + 0x7FFFFF, -(2**31)


def as_rank(score: jax.Array) -> jax.Array:
    """Integers in the order of float32 scores, NaN highest.

    >>> as_rank(jnp.array([-1.0, 0.0, 2.0, jnp.nan])).tolist() == sorted(as_rank(jnp.array([jnp.nan, 2.0, -1.0, 0.0])))
    True
    """
    bits = lax.bitcast_convert_type(score, jnp.int32)
    return jnp.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


def as_score(rank: jax.Array) -> jax.Array:
    """The inverse of `as_rank`, for what is a number."""
    return lax.bitcast_convert_type(rank ^ ((rank >> 31) & 0x7FFFFFFF), jnp.float32)
