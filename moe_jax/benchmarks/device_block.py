"""The MoE block on an accelerator: `pallas_kernels.moe_block` and baselines, for shapes of models.

A program runs the block over several inputs, one after the other, so that weights do not stay in the cache, and is
started several times without waiting, so that the time to start it is not counted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Experts
from pallas_kernels.expert_mlp.api import OPERATION

from . import jax_baselines, recorded
from .inputs import PICKS, SCALE, Inputs, count
from .numerics import Standard, expected
from .programs import Compiler, Pace, back_to_back
from .shapes import MoEShape
from .table import Row
from .timing import Ceilings

OURS = "moe_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the accelerator benchmarks of a run share.

    `implementations`: of the experts, None is the default one; `baselines`: whether to time JAX's others.
    """

    device: jax.Device
    ceilings: Ceilings
    dtype: str = "bfloat16"
    implementations: tuple[str | None, ...] = (None,)
    baselines: bool = False
    threads: int = 12
    pace: Pace = Pace()

    @property
    def platform(self) -> str:
        """The device's platform as programs are lowered for it."""
        return "cuda" if self.device.platform == "gpu" else self.device.platform


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Something to time, or the `reason` why it cannot be; futures of its `program` and of one block by itself."""

    name: str
    ours: bool
    reason: str = ""
    program: Any = None
    single: Any = None


def run(shape: MoEShape, tokens: Sequence[int], options: Options) -> Iterator[list[Row]]:
    """The rows of each number of tokens, ours first; results are checked before they are timed.

    What fails, or is wrong, has no time and says why in its note.
    """
    with Compiler(options.device, options.threads) as compiler:
        structs = _structs(shape, options.dtype)
        singles = _singles(shape, tokens, structs[1:], options, compiler)
        draw = compiler.submit(functools.partial(_draw, _experts(shape, options.dtype)))
        standard = compiler.submit(expected(shape), *structs)
        cells = {g: _submit(shape, g, structs[1:], singles, options, compiler) for g in tokens}
        inputs = Inputs.draw(shape, tokens, options.dtype)  # while the threads compile
        picks = {g: inputs.picks(g) for g in tokens}
        wait(singles.values())
        for one in (one for cell in cells.values() for one in cell):  # compiling would disturb timing
            wait([one.program] if one.program else [])
        weights = jax.device_put(inputs.router, options.device), draw.result().call()
        for g, cell in cells.items():
            wanted = _standard(standard.result().call, inputs, g, picks[g], weights)
            rows = [_measure(shape, g, one, inputs, picks[g], wanted, weights, options) for one in cell]
            cell.clear()  # programs hold memory on the device
            yield rows


def _experts(shape: MoEShape, dtype: str) -> Experts:
    """Experts of the shape, as shapes only."""
    d, f, e = shape.width, shape.hidden, shape.experts
    struct = lambda *sizes: jax.ShapeDtypeStruct((e, *sizes), dtype)
    gated = shape.activation.gated
    return Experts(
        gate=struct(d, f) if gated else None,
        up=struct(d, f),
        down=struct(f, d),
        gate_bias=struct(f) if gated and shape.bias else None,
        up_bias=struct(f) if shape.bias else None,
        down_bias=struct(d) if shape.bias else None,
        activation=shape.activation,
    )


def _draw(like: Experts) -> Experts:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))  # rbg: the quickest on an accelerator
    drawn = [SCALE * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _structs(shape: MoEShape, dtype: str) -> tuple[Any, ...]:
    """Shapes of rows to check, of the router and of the experts."""
    struct = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    return struct(PICKS, shape.width), struct(shape.width, shape.experts), _experts(shape, dtype)


def ours(shape: MoEShape, implementation: str | None) -> Callable:
    """Our block `f(x, router, experts)` by the name of an implementation of the experts; None: the default one."""
    return lambda x, router, experts: pallas_kernels.moe_block(
        x,
        router,
        experts,
        shape.top_k,
        score=shape.score,
        renormalize=shape.renormalize,
        implementation=implementation,
    )


def chosen(shape: MoEShape, tokens: int, options: Options) -> str:
    """Which implementation of the experts runs on the device when none is named."""
    struct = jax.ShapeDtypeStruct
    choices = struct((tokens, shape.top_k), jnp.int32), struct((tokens, shape.top_k), jnp.float32)
    x = struct((tokens, shape.width), options.dtype)
    return OPERATION.chosen(options.platform, x, *choices, _experts(shape, options.dtype), None, None)


def _names(shape: MoEShape, tokens: int, options: Options) -> dict[str, str | None]:
    """What is asked for by the names of what will run."""
    return {name or chosen(shape, tokens, options): name for name in options.implementations}


def _singles(shape, tokens, weights, options, compiler) -> dict[tuple[int, str], Any]:
    """Programs of one block each, to see how long one takes to compile. Made first: later ones find parts traced."""
    singles = {}
    for g in tokens:
        x = jax.ShapeDtypeStruct((g, shape.width), options.dtype)
        for name, given in _names(shape, g, options).items():
            singles[g, f"{OURS} {name}"] = compiler.submit(ours(shape, given), x, *weights)
    return singles


def _submit(shape, tokens, weights, singles, options, compiler) -> list[_Candidate]:
    """Candidates of a cell, ours first, their programs on the way."""
    inputs = [jax.ShapeDtypeStruct((tokens, shape.width), options.dtype)] * count(tokens)
    named = _names(shape, tokens, options)
    found: list[tuple[str, Callable | str]] = [(f"{OURS} {name}", ours(shape, given)) for name, given in named.items()]
    if options.baselines:
        others = jax_baselines.blocks(shape, tokens)
        found += [(name, block) for name, block in others.items() if name not in named]
    cell = []
    for name, block in found:
        mine = name.startswith(OURS)
        if isinstance(block, str):
            cell.append(_Candidate(name, mine, block))
            continue
        program = compiler.submit(back_to_back(block), inputs, *weights)
        cell.append(_Candidate(name, mine, "", program, singles.get((tokens, name))))
    return cell


def _standard(program, inputs, tokens, picks, weights) -> Standard:
    stacked = inputs.stacked(tokens)
    rows = [stacked[pick] for pick in picks]
    padded = np.stack(rows + rows[:1] * (PICKS - len(rows)))
    exact, rounded = (np.asarray(y)[: len(rows)] for y in program(padded, *weights))
    return Standard(exact, float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)))


def _measure(shape, tokens, candidate, inputs, picks, standard, weights, options) -> Row:
    """One row: the program's results are looked at, then it is timed."""
    stacked = inputs.stacked(tokens)
    about = dict(
        case="block",
        implementation=candidate.name,
        device=options.device.platform,
        dtype=options.dtype,
        shape=f"{shape.name} G={tokens} {shape}",
        model=shape.name,
        tokens=tokens,
    )
    values: dict[str, float] = {"inputs": len(stacked), "active experts": inputs.active(tokens)}
    try:
        if candidate.reason:
            raise ValueError(candidate.reason)
        x = jax.device_put(list(stacked), options.device)
        call = functools.partial(candidate.program.result().call, x, *weights)
        # slicing happens on the host: each new shape would be compiled
        outputs = jax.device_get(call())
        values["relative error"] = standard.check(np.stack([outputs[i][row] for i, row in picks]), candidate.ours)
        time = options.pace.measure(call)
        compile_ms = 1e3 * candidate.single.result().seconds if candidate.single else None
    except Exception as error:  # also what XLA raises: a failure is a result, and others are still to be measured
        return failure(about | {"values": values}, error)
    seconds = time.median / len(stacked)
    values |= {"rounding's error": standard.rounding, "samples": len(time.samples)}
    note = f"without {', '.join(shape.left_out)}" if shape.left_out else ""
    row = Row(**about, steady_ms=1e3 * seconds, compile_ms=compile_ms, values=values, note=note)
    return judged(row, shape, options)


def failure(about: dict[str, Any], error: BaseException) -> Row:
    """The row of something that failed: no time, and the error as its note."""
    return Row(**about, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def of_torch(result: dict[str, Any], shape: MoEShape, options: Options) -> Row:
    """The row of a result of `torch_block.measure`."""
    row = Row(
        case="block",
        implementation=result["implementation"],
        device=options.device.platform,
        dtype=options.dtype,
        shape=f"{shape.name} G={result['tokens']} {shape}",
        model=shape.name,
        tokens=result["tokens"],
        note=result.get("note", "CUDA graph"),
    )
    if "seconds" not in result:
        return row
    values = {"samples": result["samples"], "relative error": result["error"], "active experts": result["active"]}
    return judged(dataclasses.replace(row, steady_ms=1e3 * result["seconds"], values=values), shape, options)


def judged(row: Row, shape: MoEShape, options: Options) -> Row:
    """The row with its shares of the roofline, by this run's ceilings and by fixed ones, and recorded figures."""
    itemsize = jnp.dtype(options.dtype).itemsize
    flops = shape.flops(row.tokens)
    nbytes = shape.nbytes(row.tokens, row.values["active experts"], itemsize)
    seconds = row.steady_ms / 1e3
    values = dict(row.values)
    if "H100" in options.device.device_kind and options.dtype == "bfloat16":
        values["share of fixed ceilings"] = max(flops / recorded.FLOPS, nbytes / recorded.READ) / seconds
        figures = recorded.figures(shape.name, row.tokens)
        if figures:
            values["times vLLM's speed (recorded)"] = figures[recorded.VLLM] / (1e6 * seconds)
            values["times the best's speed (recorded)"] = min(figures.values()) / (1e6 * seconds)
    return dataclasses.replace(row, values=values, roofline=options.ceilings.floor(flops, nbytes) / seconds)


def compared(rows: Sequence[Row]) -> list[Row]:
    """Rows of a cell, ours with their speed against the fastest of the others."""
    others = [row for row in rows if row.steady_ms and not row.implementation.startswith(OURS)]
    if not others:
        return list(rows)
    best = min(others, key=lambda row: row.steady_ms)
    return [
        dataclasses.replace(row, baseline=best.implementation, speedup=best.steady_ms / row.steady_ms)
        if row.steady_ms and row.implementation.startswith(OURS)
        else row
        for row in rows
    ]
