"""What a device's kernels take, from JAX's profiler."""

import dataclasses
import glob
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

#: A benchmark's value of that name: a program of very small kernels takes as long as the host takes to start them.
ALONE = "kernels alone, us"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of a kernel: `start` and `seconds` in seconds; `instruction`: of the program, where that is recorded."""

    name: str
    start: float
    seconds: float
    instruction: str = ""


def kernel_seconds(call: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Seconds per call of every kernel that `call` runs on GPUs, by name, longest first; empty where there is none.

    >>> kernel_seconds(lambda: jax.numpy.zeros(3), calls=1)
    {}
    """
    jax.block_until_ready(call())
    found: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for _ in range(calls)])
        for kernel in kernels_of(folder, gpu=True):
            found[kernel.name] += kernel.seconds / calls
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kernels_of(folder: str, gpu: bool) -> list[Kernel]:
    """The kernels of the newest trace that `jax.profiler.trace` wrote to a folder, in the order of their start.

    Of GPUs what ran on their streams; of a CPU the steps of compiled programs, loops left out.
    """
    found: list[Kernel] = []
    files = [Path(file) for file in glob.glob(str(Path(folder, "**", "*.xplane.pb")), recursive=True)]
    newest = max(files, key=lambda file: file.stat().st_mtime).parent if files else None
    for file in (file for file in files if file.parent == newest):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/host" if gpu else "/device"):
                continue
            for line in plane.lines:
                if not gpu or line.name.startswith("Stream"):
                    found += filter(None, (_kernel(event, gpu) for event in line.events))
    return sorted(found, key=lambda kernel: kernel.start)


def _kernel(event: Any, gpu: bool) -> Kernel | None:
    instruction = _instruction(event)
    if not gpu and (not instruction or instruction.startswith(("while", "call", "conditional"))):
        return None
    return Kernel(event.name, 1e-9 * event.start_ns, 1e-9 * event.duration_ns, instruction)


def _instruction(event: Any) -> str:
    with warnings.catch_warnings():
        # "builtin type event_stats has no __module__ attribute", of the extension module
        warnings.simplefilter("ignore", DeprecationWarning)
        return next((str(value) for name, value in event.stats if name == "hlo_op"), "")
