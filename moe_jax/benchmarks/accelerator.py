"""A run of the accelerator's benchmarks: baselines of torch first, ceilings, then block and routing, model by model."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax

from . import device_block, device_routing, torch_block
from .ceilings import accelerator_ceilings
from .grid import comparison, failures, grids
from .programs import Compiler, Pace
from .recorded import TOKENS
from .shapes import SHORT, MoEShape, find
from .table import Report, Row, heading, machine, write_json
from .timing import Ceilings

#: What there is to measure.
WHAT = ("block", "routing")
#: Short names of shapes.
MODELS = tuple(SHORT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured. `implementations`: of the experts, empty: the default one; `samples`: bursts."""

    device: jax.Device
    what: tuple[str, ...] = WHAT
    models: tuple[str, ...] = ("mixtral", "qwen3", "olmoe", "gptoss")
    tokens: tuple[int, ...] = TOKENS
    dtype: str = "bfloat16"
    implementations: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    samples: int = 20

    @property
    def pace(self) -> Pace:
        """The usual bursts, `samples` of them."""
        return pace_of(self.device, self.samples)


def pace_of(device: jax.Device, samples: int = 20) -> Pace:
    """The usual bursts on an accelerator; on a CPU, which has nothing to start ahead, short ones."""
    return Pace(samples) if device.platform != "cpu" else Pace(samples, burst=1e-3, warm=0.0)


def ceilings_of(device: jax.Device, dtype: str, pace: Pace) -> Ceilings:
    """What `device` gives, measured with arrays that its caches do not hold (on a CPU with small ones)."""
    gigabytes, size = (0.05, 512) if device.platform == "cpu" else (4.0, 8192)
    with Compiler(device) as compiler:
        return accelerator_ceilings(dtype, compiler, pace, gigabytes, size)


def run(request: Request, json: str | None = None) -> int:
    """Measure, print grids, and write the JSON file after each model. Returns 1 if anything of ours failed, else 0.

    `ValueError` for models and implementations that there are not.
    """
    shapes = [find(name) for name in request.models]
    for name in request.implementations:
        device_block.OPERATION.check(name)
    begin = time.perf_counter()
    say = lambda text: print(f"{time.perf_counter() - begin:4.0f} s  {text}", file=sys.stderr, flush=True)
    with _nothing_cached():
        rivals = _torch(request, say)
        ceilings = ceilings_of(request.device, request.dtype, request.pace)
        say("ceilings measured")
        about, rows = machine(request.device.platform), []
        for row in _rows(request, shapes, ceilings, rivals):
            rows.append(row)
            figure = f"{1e3 * row.steady_ms:.1f} us" if row.steady_ms is not None else row.note
            say(f"{row.case} {row.model} T={row.tokens} {row.implementation}: {figure}")
            if json:
                write_json(Report(about, ceilings, tuple(rows)), json)
    print(heading(Report(about, ceilings, tuple(rows))))
    print("", grids(rows), "", *comparison(rows), sep="\n")
    for row in (bad := failures(rows)):
        print(f"{row.case} {row.model} T={row.tokens} {row.implementation}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """Without JAX's cache of compiled programs: the time to compile is among what is measured."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _torch(request: Request, say) -> dict[tuple[str, int], list[dict]]:
    """Torch's results by model and tokens, measured while JAX holds next to no memory of the device."""
    found: dict[tuple[str, int], list[dict]] = {}
    if "torch" not in request.baselines or "block" not in request.what:
        return found
    say("measuring torch ...")
    device = "cuda" if request.device.platform == "gpu" else request.device.platform
    for result in torch_block.measure(request.models, request.tokens, request.dtype, device, request.pace):
        found.setdefault((result["model"], result["tokens"]), []).append(result)
    return found


def _rows(request: Request, shapes: list[MoEShape], ceilings: Ceilings, rivals) -> Iterator[Row]:
    options = device_block.Options(
        device=request.device,
        ceilings=ceilings,
        dtype=request.dtype,
        implementations=request.implementations or (None,),
        baselines="jax" in request.baselines,
        pace=request.pace,
    )
    for name, shape in zip(request.models, shapes, strict=True):
        if "block" in request.what:
            for cell in device_block.run(shape, request.tokens, options):
                theirs = rivals.get((name, cell[0].tokens), ())
                yield from device_block.compared(
                    [*cell, *(device_block.of_torch(result, shape, options) for result in theirs)]
                )
        if "routing" in request.what:
            yield from device_routing.run(shape, request.tokens, options)
