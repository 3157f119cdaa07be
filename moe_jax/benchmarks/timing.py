"""Timers and ceilings. Calls that are compared take turns, so that a shared machine's drift hits all of them."""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

#: Seconds of rest before each timed call: worker threads of the call before, torch's too, spin for a while.
_REST = 0.02


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    def faster_than(self, other: "Timing") -> float:
        """How many times as fast as `other`: the median over rounds of the ratio within a round.

        >>> Timing((1.0, 2.0, 1.0)).faster_than(Timing((2.0, 4.0, 3.0)))
        2.0
        """
        return statistics.median(b / a for a, b in zip(self.samples, other.samples, strict=True))


def in_turns(calls: Mapping[Any, Callable[[int], Any]], repeats: int, warmups: int = 1) -> dict[Any, Timing]:
    """Time `calls` in turns, A B A B ...: each call takes the number of its round and returns arrays to wait for.

    `warmups` rounds go untimed before `repeats` timed ones. Raises `ValueError` for fewer than one round.

    >>> sorted(in_turns({"a": lambda turn: turn, "b": lambda turn: -turn}, repeats=2))
    ['a', 'b']
    """
    if repeats < 1:
        raise ValueError(f"repeats: {repeats} is less than 1")
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(-warmups, repeats):
        for name, call in calls.items():
            time.sleep(_REST)
            seconds = once(functools.partial(call, max(0, turn)))[1]
            if turn >= 0:
                samples[name].append(seconds)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def once(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of one call, waited for, and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def compiled(function: Callable, *args: Any) -> tuple[Callable, float]:
    """`function` compiled for `args` ahead of time, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine gave JAX in this run: `copy` and `read` in GB/s, `matmul` in GFLOP/s of `dtype`."""

    copy: float
    read: float
    matmul: float
    dtype: str = "float32"

    def floor(self, flops: float, nbytes: float) -> float:
        """Least seconds for `flops` operations that read or write `nbytes` of memory (roofline).

        >>> Ceilings(copy=10.0, read=20.0, matmul=100.0).floor(flops=1e9, nbytes=4e9)
        0.2
        """
        return max(flops / (self.matmul * 1e9), nbytes / (max(self.copy, self.read) * 1e9))


def measure_ceilings(repeats: int = 7, megabytes: int = 256, size: int = 2048) -> Ceilings:
    """Ceilings from `repeats` rounds, medians: a copy and a product with a vector over `megabytes` MB, `size`^3.

    The copy counts bytes read and written; it runs in place, so that it does not measure page faults.
    """
    rows = max(1, megabytes * 10**6 // (4 * 2048))
    keys = jax.random.split(jax.random.key(0), 3)
    held = [jax.random.normal(keys[0], (rows, 2048))]
    vector, square = (
        jax.random.normal(key, shape) for key, shape in zip(keys[1:], ((1, 2048), (size, size)), strict=True)
    )
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    product = jax.jit(lambda x, w: x @ w.T)

    def copy(turn):
        held[0] = negate(held[0])
        return held[0]

    calls = {
        "copy": copy,
        "read": lambda turn: product(vector, held[0]),
        "matmul": lambda turn: product(square, square),
    }
    times = in_turns(calls, repeats, warmups=2)
    nbytes = held[0].nbytes
    return Ceilings(
        copy=2 * nbytes / times["copy"].median / 1e9,
        read=nbytes / times["read"].median / 1e9,
        matmul=2 * size**3 / times["matmul"].median / 1e9,
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all benchmarks of a run share. `torch`: whether to compare with transformers."""

    device: str
    ceilings: Ceilings
    repeats: int = 7
    torch: bool = True


def load_average() -> float:
    """Processes that wanted a core over the last minute, 0 where the system does not say.

    >>> load_average() >= 0
    True
    """
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def share(setting: Setting, seconds: float, flops: float, nbytes: float) -> float:
    """Which part of the roofline `seconds` reach, 1 at best."""
    return setting.ceilings.floor(flops, nbytes) / seconds


def draw(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Random float32 weights of standard deviation `fan_in**-0.5`: zeros and constants would flatter caches."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
