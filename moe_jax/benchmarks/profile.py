"""Where the time of a model's steps goes: kernels by stage of the flow, launches, gaps, the order in one layer."""

import collections
import contextlib
import dataclasses
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..generation import _Run  # prefill and steps apart, which `generate` does not show
from ..model import Model
from .hlo import parse
from .kernels import Kernel, kernels_of
from .stages import STAGES, Stages


@dataclasses.dataclass(frozen=True)
class Profile:
    """The kernels of `steps` equal steps of `layers` layers, the stage of each, and the program's text."""

    kernels: tuple[Kernel, ...]
    stages: tuple[str, ...]
    steps: int
    layers: int
    program: str

    @property
    def gaps(self) -> list[float]:
        """Seconds before each kernel in which none ran; of the first one 0."""
        gaps, end = [], None
        for kernel in self.kernels:
            gaps.append(0.0 if end is None else max(0.0, kernel.start - end))
            end = max(end or 0.0, kernel.start + kernel.seconds)
        return gaps

    @property
    def span(self) -> float:
        """Seconds from the first kernel's start to the last one's end."""
        return max(k.start + k.seconds for k in self.kernels) - self.kernels[0].start


def profile(model: Model, batch: int, prompt: int, steps: int, what: str, folder: str | None = None) -> Profile:
    """Trace `steps` decode steps after a prefill, or for `what` "prefill" one prefill; all is compiled before.

    `folder`: where the trace is to stay, for TensorBoard or Perfetto.
    """
    vocab, device = model.architecture.vocab_size, next(iter(jax.tree.leaves(model.arrays())[0].devices()))
    ids = np.random.default_rng(0).integers(min(2, vocab - 1), vocab, (batch, prompt), dtype=np.int32)
    jax.clear_caches()
    others = device.client.live_executables()
    run = _Run(model, ids, None, 2 * steps + 1, ())
    run.start()
    if what == "decode":
        run.advance(steps + 1)
    jax.block_until_ready(run.state)
    text = _program([one for one in device.client.live_executables() if one not in others], what)
    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
        with jax.profiler.trace(place):
            if what == "decode":
                run.advance(2 * steps + 1)
            else:
                run.start()
            jax.block_until_ready(run.state)
        kernels = kernels_of(place, device.platform != "cpu")
    stages = Stages(parse(text)).of([(kernel.name, kernel.instruction) for kernel in kernels])
    layers = len(model.architecture.layers)
    return Profile(tuple(kernels), tuple(stages), steps if what == "decode" else 1, layers, text)


def _program(executables: Sequence[Any], what: str) -> str:
    """The text of the compiled program that does it; `generate` keeps its programs to itself."""
    name = "decode|step" if what == "decode" else what  # a loop, or on a GPU a step by itself
    modules = [module for one in executables for module in one.hlo_modules()]
    texts = [module.to_string() for module in modules if re.fullmatch(rf"jit_+({name})", module.name)]
    if len(texts) != 1:
        raise ValueError(f"profile: {len(texts)} compiled programs of {what}, among {[m.name for m in modules]}")
    return texts[0]


def by_stage(found: Profile) -> str:
    """A Markdown table of stages: microseconds of a step and its share of the span, kernels of a step.

    >>> kernels = Kernel("a", 0.0, 3e-6), Kernel("b", 4e-6, 1e-6)
    >>> print(by_stage(Profile(kernels, ("attention", "router"), 1, 1, "")))
    | stage | us a step | of the span | kernels a step |
    |---|---|---|---|
    | attention | 3.0 | 60.0% | 1.0 |
    | router | 1.0 | 20.0% | 1.0 |
    | gaps | 1.0 | 20.0% | - |
    | all | 5.0 | 100.0% | 2.0 |
    """
    seconds, counts = _totals(found, found.stages), collections.Counter(found.stages)
    rows: list[tuple[str, float, int | None]]
    rows = [(stage, seconds[stage], counts[stage]) for stage in STAGES if stage in seconds]
    rows += [("gaps", sum(found.gaps), None), ("all", found.span, len(found.kernels))]
    lines = ["| stage | us a step | of the span | kernels a step |", "|---|---|---|---|"]
    for name, time, count in rows:
        launches = "-" if count is None else f"{count / found.steps:.1f}"
        lines.append(f"| {name} | {1e6 * time / found.steps:.1f} | {100 * time / found.span:.1f}% | {launches} |")
    return "\n".join(lines)


def _totals(found: Profile, names: Sequence[str]) -> dict[str, float]:
    """Seconds of all kernels by name, which stands for each in `names`."""
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for kernel, name in zip(found.kernels, names, strict=True):
        seconds[name] += kernel.seconds
    return seconds


def one_layer(found: Profile) -> list[tuple[Kernel, str, float]]:
    """Kernels of one layer from the middle of the trace, with stage and the gap before; empty where it is not seen."""
    places = _layers(found)
    if not places:
        return []
    first, last = places[len(places) // 2]
    return list(zip(found.kernels[first:last], found.stages[first:last], found.gaps[first:last], strict=True))


def layer_kernels(found: Profile) -> float | None:
    """Kernels of a layer, the median; None where layers are not told apart."""
    return statistics.median(last - first for first, last in _layers(found)) if _layers(found) else None


def _layers(found: Profile) -> list[tuple[int, int]]:
    """Where layers begin and end, but for each step's first one, before which the step begins.

    They end with a kernel that runs once in each: the last of the expert MLP, or else which takes most time.
    """
    names = [kernel.name for kernel in found.kernels]
    seconds, counts = _totals(found, names), collections.Counter(names)
    once = [name for name, count in counts.items() if count == found.steps * found.layers]
    if not once:
        return []
    own = [name for name in once if name.startswith("moe_jax_expert_down")] or once
    mark = max(own, key=lambda name: seconds[name])
    ends = [i + 1 for i, name in enumerate(names) if name == mark]
    return [(ends[i - 1], ends[i]) for i in range(1, len(ends)) if i % found.layers]


def summary(found: Profile) -> Iterator[str]:
    """Lines: the table of stages, launches and gaps, one layer."""
    yield by_stage(found)
    layer = layer_kernels(found)
    per_layer = "layers not told apart" if layer is None else f"{layer:.0f} a layer"
    yield f"kernels: {len(found.kernels) / found.steps:.1f} a step, {per_layer}"
    gaps = [1e6 * gap for gap in found.gaps]
    a_step, median = sum(gaps) / found.steps, statistics.median(gaps)
    yield f"gaps: {a_step:.1f} us a step, median {median:.2f} us, longest {max(gaps):.1f} us"
    yield from _listed(one_layer(found))


def _listed(layer: Sequence[tuple[Kernel, str, float]]) -> Iterator[str]:
    if layer:
        yield f"one layer, {1e6 * sum(k.seconds + gap for k, _, gap in layer):.1f} us (gap before, us; time, us):"
    for kernel, stage, gap in layer:
        yield f"{1e6 * gap:8.2f} {1e6 * kernel.seconds:8.2f}  {stage:10} {kernel.name[:100]}"
