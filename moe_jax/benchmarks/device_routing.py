"""Routing and plan on an accelerator: every implementation against the chain of XLA operations."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

import jax
import numpy as np

import pallas_kernels
from pallas_kernels.plan.api import OPERATION as PLAN
from pallas_kernels.routing.api import OPERATION as ROUTE

from .device_block import OURS, Options, failure
from .kernels import ALONE, kernel_seconds
from .programs import Compiler, back_to_back
from .shapes import MoEShape
from .table import Row

#: The chain that the others are compared with: softmax, top-k, sort.
CHAIN = "xla"
_OUTPUTS = ("ids", "weights", "slot", "row_choice", "tile_expert", "num_tiles")
#: Logits closer than this may be ranked either way.
_TIE = 1e-5


def implementations(platform: str) -> tuple[str, ...]:
    """Names that both operations run by on a platform, the chain first.

    >>> implementations("cpu")[0]
    'xla'
    """
    runs = lambda one: one.by_choice and one.platform in (None, platform)
    names = [name for name, one in ROUTE.implementations.items() if runs(one)]
    both = [name for name in names if name in PLAN.implementations and runs(PLAN.implementations[name])]
    return (CHAIN, *(name for name in both if name != CHAIN))


def step(shape: MoEShape, tokens: int, implementation: str | None) -> Callable:
    """`f(logits [G, E])`: the routing and its plan as a tuple of arrays; tiles of 16 rows for few tokens, else 128.

    The counts of choices are not asked for, since a block does not read them.
    """
    rows = 16 if tokens <= 32 else 128

    def run(logits):
        ids, weights, _ = pallas_kernels.route(
            logits, shape.top_k, shape.score, shape.renormalize, implementation=implementation
        )
        plan = pallas_kernels.make_plan(ids, shape.experts, rows, implementation=implementation)
        return ids, weights, plan.slot, plan.row_choice, plan.tile_expert, plan.num_tiles

    return run


def run(shape: MoEShape, tokens: Sequence[int], options: Options) -> list[Row]:
    """A row for each implementation and number of tokens; equality with the chain is checked before timing."""
    names = implementations(options.platform)
    draw = {g: _logits(shape, g) for g in tokens}
    with Compiler(options.device, options.threads) as compiler:
        futures = {(g, name): _submit(shape, draw[g], name, compiler) for g in tokens for name in names}
        for programs in futures.values():
            wait(programs.values())
    rows = []
    for g in tokens:
        wanted: list[Any] = []
        cell = [_measure(shape, draw[g], name, futures.pop((g, name)), wanted, options) for name in names]
        rows += [_compared(row, cell[0]) for row in cell]
    return rows


def _logits(shape: MoEShape, tokens: int) -> np.ndarray:
    n = 64 if tokens <= 128 else 16 if tokens <= 1024 else 4
    return np.random.default_rng(tokens).standard_normal((n, tokens, shape.experts), np.float32)


def _submit(shape: MoEShape, logits: np.ndarray, name: str, compiler: Compiler) -> dict[str, Any]:
    n, tokens, _ = logits.shape
    one = jax.ShapeDtypeStruct(logits.shape[1:], logits.dtype)
    run = step(shape, tokens, name)
    return {"all": compiler.submit(back_to_back(run), [one] * n), "single": compiler.submit(run, one)}


def _measure(shape, logits, name, futures, wanted, options) -> Row:
    n, tokens, _ = logits.shape
    about = dict(
        case="routing",
        implementation=name if name == CHAIN else f"{OURS} {name}",
        device=options.device.platform,
        dtype="float32",
        shape=f"{shape.name} G={tokens} E={shape.experts} k={shape.top_k}",
        model=shape.name,
        tokens=tokens,
    )
    try:
        call = functools.partial(futures["all"].result().call, jax.device_put(list(logits), options.device))
        got = jax.device_get(call())
        if not wanted:
            check_choices(shape, logits, got)
            wanted += got
        check_equal(wanted, got)
        time = options.pace.measure(call)
        gpu = options.device.platform == "gpu"
        alone = {ALONE: 1e6 * sum(kernel_seconds(call).values()) / n} if gpu else {}
    except Exception as error:  # a failure is a result, and others are still to be measured
        return failure(about, error)
    return Row(
        **about,
        steady_ms=1e3 * time.median / n,
        compile_ms=1e3 * futures["single"].result().seconds,
        values={"inputs": n} | alone,
    )


def check_choices(shape: MoEShape, logits: np.ndarray, got: Sequence[Sequence[np.ndarray]]) -> None:
    """`ValueError` unless ids are those of the largest logits, best first, but for ties."""
    for one, (ids, *_) in zip(logits, got, strict=True):
        best = -np.sort(-one, 1)[:, : shape.top_k]
        if not np.allclose(np.take_along_axis(one, ids, 1), best, rtol=0, atol=_TIE):
            raise ValueError("wrong result: chosen experts are not those of the largest logits")


def check_equal(wanted: Sequence[Sequence[np.ndarray]], got: Sequence[Sequence[np.ndarray]]) -> None:
    """`ValueError` naming the first output that is not the chain's: weights to rounding, all else exactly."""
    for want, have in zip(wanted, got, strict=True):
        for name, a, b in zip(_OUTPUTS, want, have, strict=True):
            if not (np.allclose(a, b, rtol=1e-5, atol=1e-7) if name == "weights" else np.array_equal(a, b)):
                raise ValueError(f"wrong result: {name} differs from the chain's")


def _compared(row: Row, chain: Row) -> Row:
    if row is chain or not (row.steady_ms and chain.steady_ms):
        return row
    return dataclasses.replace(row, baseline=chain.implementation, speedup=chain.steady_ms / row.steady_ms)
