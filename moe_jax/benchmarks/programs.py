"""Programs of many steps: made, compiled in threads, and timed without the time it takes to start them."""

import collections
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from .timing import Timing

#: Seconds of work that a device has before it when it is timed.
_AHEAD = 0.005


def back_to_back(step: Callable) -> Callable:
    """A program of one step per input: `run(inputs, *rest)` gives the list of `step(x, *rest)`.

    The step is traced once. All outputs are returned: XLA drops what nobody reads. A barrier keeps XLA from joining
    steps with each other, since layers of a model could not be joined.

    >>> [int(y) for y in jax.jit(back_to_back(lambda x, c: x + c))([1, 2], 10)]
    [11, 12]
    """
    one = jax.jit(step)

    def run(inputs, *rest):
        outputs: list[Any] = []
        for x in inputs:
            if outputs:
                x, _ = jax.lax.optimization_barrier((x, outputs[-1]))
            outputs.append(one(x, *rest))
        return outputs

    return run


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and the seconds that tracing, lowering and compiling it took."""

    call: Callable
    seconds: float


class Compiler:
    """Compiles programs for `device` in threads.

    Tracing and lowering take turns, so that their seconds are not those of waiting for Python's lock; XLA's share
    runs beside that of others, on cores of its own if there are enough.

    >>> with Compiler(jax.devices("cpu")[0], threads=2) as compiler:
    ...     program = compiler.submit(lambda x: 2 * x, jax.ShapeDtypeStruct((), "float32")).result()
    >>> float(program.call(3.0))
    6.0
    """

    def __init__(self, device: jax.Device, threads: int = 12):
        self._device = device
        self._pool = ThreadPoolExecutor(min(threads, os.cpu_count() or 1))
        self._lock = threading.Lock()

    def submit(self, function: Callable, *args: Any) -> Future:
        """A future `Program` of `function` for arguments of these shapes."""
        return self._pool.submit(self._compile, function, args)

    def _compile(self, function, args):
        with jax.default_device(self._device):
            with self._lock:
                start = time.perf_counter()
                lowered = jax.jit(function).lower(*args)
                seconds = time.perf_counter() - start
            start = time.perf_counter()
            return Program(lowered.compile(), seconds + time.perf_counter() - start)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._pool.shutdown(cancel_futures=kind is not None)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long is measured: at least `samples` stretches of a stream of calls, each of `burst` seconds or more.

    Calls are started before those ahead of them have ended, so that the device never waits: neither the time to start
    a call is counted, nor the clocks of a card that was idle (a block of olmoe for 32 tokens took an H100 308 us in
    single calls, 288 in bursts of 50 ms, 281 in a stream). `warm`: seconds of the stream before it is measured. A
    program so slow that all this takes more than `limit` seconds is measured by fewer stretches, `least` of them.
    """

    samples: int = 20
    burst: float = 0.05
    warm: float = 0.2
    limit: float = 4.0
    least: int = 5

    def measure(self, call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> Timing:
        """Seconds of a call in the stream. `wait` waits for what one call has returned.

        >>> len(Pace(samples=3, burst=1e-4, warm=0.0).measure(lambda: None).samples)
        3
        """
        wait(call())
        start = time.perf_counter()
        wait(call())
        once = max(time.perf_counter() - start, 1e-7)
        calls = min(1000, max(2, math.ceil(self.burst / once)))
        under_way = collections.deque(call() for _ in range(min(16, max(2, math.ceil(_AHEAD / once)))))

        def stretch():
            start = time.perf_counter()
            for _ in range(calls):
                under_way.append(call())
                wait(under_way.popleft())
            return (time.perf_counter() - start) / calls

        seconds: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < self.warm:
            stretch()
        begin = time.perf_counter()
        while len(seconds) < self.samples:
            seconds.append(stretch())
            if time.perf_counter() - begin > self.limit and len(seconds) >= self.least:
                break
        wait(under_way.pop())
        return Timing(tuple(seconds))
