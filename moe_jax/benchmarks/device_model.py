"""Whole models on one device, as `moe_jax.generate` runs them: decoding and prefill, compiling, memory."""

import contextlib
import dataclasses
import gc
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from .. import generate
from ..axes import NAMED
from ..generation import Generated, _Run  # prefill and steps apart, which `generate` does not show
from ..model import Model
from .models import find_config, make
from .table import Row
from .timing import Ceilings, Timing, in_turns, once
from .work import active_experts, cache_bytes, prefill_flops, recorded, step_bytes, uniform_routing, weights_of

#: How far below the largest logit, in standard deviations, the first token may be: rounding in other orders.
_TOLERANCE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured: `case` "decode" or "prefill" (which is `new` 1), and of what models.

    `quantized`: None (as `dtype`), "int8" or "mxfp4"; `layers`: of each model, None for all; `repeats`: calls of which
    medians are taken; `mesh`: devices to spread models over by the table `rules`, None for `device` alone; `routing`:
    "uniform" for choices of experts that are given, of which all are as likely, None for those of the random routers.
    """

    device: jax.Device
    case: str = "decode"
    batches: tuple[int, ...] = (1, 32)
    prompt: int = 128
    new: int = 128
    dtype: str = "bfloat16"
    quantized: str | None = None
    implementation: str | None = None
    layers: int | None = None
    repeats: int = 5
    mesh: Mesh | None = None
    rules: str = "spread"
    routing: str | None = None

    def __post_init__(self):
        if self.case == "decode" and self.new < 2:
            raise ValueError(f"new: decoding takes at least 2 new tokens, not {self.new}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds, and what was moved meanwhile.

    `cold` and `warm`: first calls; `whole` calls; `first`: until the first token stands; `steps`: from then on to the
    last, None without any; `peak`: bytes, None: not known.
    """

    batch: int
    cold: float
    warm: float
    whole: Timing
    first: Timing
    steps: Timing | None
    nbytes: float
    flops: float
    active: float | None
    peak: int | None
    weights: int
    cache: int


def run(name: str, options: Options) -> list[Measured | tuple[int, str]]:
    """Measurements of one model at each batch size, or the batch size and what went wrong; the model is freed."""
    config, before = find_config(name, options.layers), _peak(options.device)
    batches = sorted(options.batches)
    found: list[Measured | tuple[int, str]] = []
    with _fresh_cache():
        try:
            about = options.dtype, options.quantized, options.implementation, options.mesh, NAMED[options.rules]
            model = make(config, *about)
            jax.block_until_ready(model.arrays())
        except RuntimeError as error:  # no memory
            return [(batch, _note(error)) for batch in batches]
        for batch in batches:
            try:
                found.append(_at(model, batch, options, before))
            except Exception as error:  # the others are still to be measured
                found.append((batch, _note(error)))
            before = _peak(options.device)  # checking needs memory too
    del model
    gc.collect()
    return found


def _note(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _at(model: Model, batch: int, options: Options, before: int) -> Measured:
    prompt, new = options.prompt, 1 if options.case == "prefill" else options.new
    vocab = model.architecture.vocab_size
    ids = np.random.default_rng(batch).integers(min(2, vocab - 1), vocab, (batch, prompt), dtype=np.int32)
    routing = uniform_routing(model, batch, prompt + new) if options.routing == "uniform" else None
    call = lambda turn=0: generate(model, ids, max_new_tokens=new, eos_token_id=(), routing=routing)
    firsts = []
    for _ in range(2):
        jax.clear_caches()
        made, seconds = once(call)
        firsts.append(seconds)
    peak = _peak(options.device)
    record = recorded(model, ids, new, routing) if model.architecture.moe_layers else None
    _check(model, ids, made, record, routing)
    whole = in_turns({new: call}, options.repeats)[new]
    apart = [_phases(model, ids, new, routing) for _ in range(options.repeats)]
    first, steps = (Timing(samples) for samples in zip(*apart, strict=True))
    active = active_experts(record, new) if new > 1 and record is not None else None
    return Measured(
        batch=batch,
        cold=firsts[0],
        warm=firsts[1],
        whole=whole,
        first=first,
        steps=steps if new > 1 else None,
        nbytes=step_bytes(model, batch, prompt, new, active or 0.0) if new > 1 else 0.0,
        flops=prefill_flops(model.architecture, batch, prompt),
        active=active,
        peak=peak if peak > before else None,
        weights=weights_of(model).total,
        cache=cache_bytes(model, batch, prompt, new),
    )


def _phases(model: Model, ids: np.ndarray, new: int, routing: Any) -> tuple[float, float]:
    """Seconds of a call of `generate` until its first token stands, and from then on to its last."""

    def start():
        run.append(_Run(model, ids, None, new, (), routing=routing))
        run[0].start()
        return run[0].state

    def rest():
        run[0].advance(new)
        return run[0].state

    run: list[_Run] = []
    return once(start)[1], once(rest)[1]


def _check(model: Model, ids: np.ndarray, made: np.ndarray, record: Generated | None, routing: Any) -> None:
    """`ValueError` unless the first row's first new token has, up to rounding, the largest logit of a plain call.

    The plain call takes the recorded experts: a random router's scores lie so close that rounding alone changes some
    choices, and each change moves the logits by a tenth of their spread or more. DeepSpeed's gates drop by capacity, so
    that what was dropped is not to be had from a record: all rows run then, with the same `routing`.
    """
    router = model.architecture.block.router
    part = lambda rows, layers: None if layers is None else [layer[:rows, : ids.shape[1]] for layer in layers]
    if router is not None and router.rule is not None:
        out: Any = model(ids, routing=part(len(ids), routing), logits_to_keep=1)
    else:
        out = model(ids[:1], routing=part(1, record and record.expert_ids), logits_to_keep=1)
    logits = np.asarray(out[0, -1])
    off = float(logits.max() - logits[made[0, ids.shape[1]]]) / float(logits.std())
    if not off <= _TOLERANCE:
        raise ValueError(f"wrong first token: its logit is {off:.2g} standard deviations below the largest")


def _peak(device: jax.Device) -> int:
    """Most bytes of the device's memory that this process held so far; 0 where the device does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """With JAX's cache of compiled programs in an empty folder, and everything kept in it."""
    wanted: dict[str, Any] = {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted["jax_compilation_cache_dir"] = folder
        before = {name: jax.config.values[name] for name in wanted}
        try:
            _configure(wanted)
            yield
        finally:
            _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it looks at the settings once


def rows(name: str, options: Options, found: list[Measured | tuple[int, str]], ceilings: Ceilings) -> list[Row]:
    """What `run` found as rows.

    `steady_ms`: a step of decoding, the median; or a prefill with its first token.
    `roofline`: bytes that a step must move over the measured bandwidth of reading, or a prefill's operations over the
    measured rate of products, as a share of that time. `compile_ms`: what a first call takes beyond a later one.
    """
    return [_row(name, options, one, ceilings) for one in found]


def _row(name: str, options: Options, one: Measured | tuple[int, str], ceilings: Ceilings) -> Row:
    batch = one[0] if isinstance(one, tuple) else one.batch
    decode = options.case == "decode"
    about: dict[str, Any] = {
        "case": options.case,
        "implementation": "moe_jax",
        "device": options.device.platform,
        "dtype": options.dtype + (f", {options.quantized} weights" if options.quantized else ""),
        "model": name if options.layers is None else f"{name}, {options.layers} layers",
        "shape": f"B={batch} prompt {options.prompt}" + (f" new {options.new}" if decode else "") + _how(options),
    }
    if isinstance(one, tuple):
        return Row(**about, note=one[1])
    new = options.new if decode else 1
    seconds = one.first.median if one.steps is None else one.steps.median / (new - 1)
    least = one.nbytes / (ceilings.read * 1e9) if decode else one.flops / (ceilings.matmul * 1e9)
    return Row(
        **about,
        steady_ms=1e3 * seconds,
        compile_ms=1e3 * (one.cold - one.whole.median),
        roofline=least / seconds,
        values=_values(one, batch * (new if decode else options.prompt), batch / seconds if decode else None),
        note="" if one.peak else "peak memory: not reported, or something earlier needed more",
    )


def _how(options: Options) -> str:
    """Over how many devices, " on 2 (expert)", and whose choices of experts; "" for one device and the routers'."""
    text = ""
    if options.mesh is not None:
        long = [f"{name} {size}" for name, size in options.mesh.shape.items() if size > 1]
        text = f" on {options.mesh.size} ({', '.join(long)}; tokens {options.rules})"
    return text + (f", {options.routing} routing" if options.routing else "")


def _values(one: Measured, tokens: int, rate: float | None) -> dict[str, float]:
    """`rate`: tokens per second by steps, None of a prefill."""
    gigabytes = {"weights, GB": one.weights / 1e9, "cache, GB": one.cache / 1e9}
    if one.peak:
        gigabytes |= {"peak, GB": one.peak / 1e9, "peak over": one.peak / (one.weights + one.cache + 1e9)}
    work = {"GB a step": one.nbytes / 1e9} if rate else {"TFLOP": one.flops / 1e12}
    if one.active is not None:
        work["active experts"] = one.active
    return {
        "tokens/s": tokens / one.whole.median,
        **({"by steps": rate, "first token, ms": 1e3 * one.first.median} if rate else {}),
        "compile from cache, s": one.warm - one.whole.median,
        **work,
        **gigabytes,
    }
