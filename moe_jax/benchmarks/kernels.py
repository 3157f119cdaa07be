"""What an accelerator's kernels take by themselves, from JAX's profiler: without what lies between them."""

import glob
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

#: A benchmark's value of that name: a program of very small kernels takes as long as the host takes to start them.
ALONE = "kernels alone, us"


def kernel_seconds(call: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Seconds per call of every kernel that `call` runs on GPUs, by name, longest first; empty where there is none.

    >>> kernel_seconds(lambda: jax.numpy.zeros(3), calls=1)
    {}
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for _ in range(calls)])
        found: defaultdict[str, float] = defaultdict(float)
        for file in glob.glob(str(Path(folder, "**", "*.xplane.pb")), recursive=True):
            for plane in jax.profiler.ProfileData.from_file(file).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    for event in line.events if line.name.startswith("Stream") else ():
                        found[event.name] += 1e-9 * event.duration_ns / calls
    return dict(sorted(found.items(), key=lambda item: -item[1]))
