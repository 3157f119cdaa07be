"""What an accelerator gives: bytes copied, bytes read and products, through XLA, in bursts like the benchmarks'."""

import functools

import jax
import jax.numpy as jnp

from .programs import Compiler, Pace
from .timing import Ceilings

_COLUMNS = 4096


def accelerator_ceilings(
    dtype: str, compiler: Compiler, pace: Pace, gigabytes: float = 4.0, size: int = 8192
) -> Ceilings:
    """Medians of a copy and a sum over `gigabytes` GB and of a product `size`^3 of random numbers.

    The copy negates, and counts bytes read and written; of two ways to add up, the faster counts. Nothing of this
    size stays in a cache.
    """
    rows = max(1, int(gigabytes * 1e9) // (4 * _COLUMNS))
    key = lambda: jax.random.key(0, impl="rbg")
    long = jax.ShapeDtypeStruct((rows, _COLUMNS), jnp.float32)
    square = jax.ShapeDtypeStruct((size, size), dtype)
    draw = lambda like: compiler.submit(lambda: jax.random.normal(key(), like.shape, like.dtype))
    made = [draw(long), draw(square)]
    copy = compiler.submit(lambda x: -x, long)
    reads = [compiler.submit(lambda x, axis=axis: x.sum(axis), long) for axis in (1, None)]
    product = compiler.submit(lambda x: x @ x, square)
    futures = [*made, copy, *reads, product]
    programs = [future.result() for future in futures]  # all before the first is timed
    x, w = (program.call() for program in programs[:2])
    seconds = [pace.measure(functools.partial(p.call, x)).median for p in programs[2:5]]
    nbytes = x.nbytes
    x.delete()
    matmul = pace.measure(lambda: programs[5].call(w)).median
    return Ceilings(
        copy=2 * nbytes / seconds[0] / 1e9,
        read=nbytes / min(seconds[1:]) / 1e9,
        matmul=2 * size**3 / matmul / 1e9,
        dtype=dtype,
    )
