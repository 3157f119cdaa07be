"""The MoE block by itself, against transformers' OLMoE block; and its cost as experts are added."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Experts

from . import torch_baseline
from .table import Row
from .timing import Setting, compiled, draw, in_turns, load_average, share

#: Different inputs that rounds take in turn, so that one token's experts do not stay in the cache.
_INPUTS = 4
#: Largest error that passes as rounding, relative to the largest output.
_TOLERANCE = 1e-4
#: How many times as fast as transformers the block is to be, by number of tokens; others: as fast.
_BARS = {1: 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Widths `D` and `F`, experts `E`, choices per token `k`; OLMoE-1B-7B's by default."""

    width: int = 2048
    hidden: int = 1024
    experts: int = 64
    top_k: int = 8

    def __post_init__(self):
        if min(self.width, self.hidden, self.experts, self.top_k) < 1 or self.top_k > self.experts:
            raise ValueError(f"block: {self} has sizes below 1 or more choices than experts")

    def __str__(self):
        return f"D={self.width} F={self.hidden} E={self.experts} k={self.top_k}"

    def work(self, tokens: int, active: float) -> tuple[float, float]:
        """Operations, and bytes moved when `active` experts' weights and each token are read or written once."""
        flops = 6 * tokens * self.top_k * self.width * self.hidden + 2 * tokens * self.width * self.experts
        floats = 3 * active * self.width * self.hidden + self.width * self.experts + 2 * tokens * self.width
        return flops, 4 * floats

    def hub(self) -> dict[str, Any]:
        """The hub dictionary of an OLMoE model with such blocks."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
        }


@dataclasses.dataclass(frozen=True)
class _Weights:
    """`router [D, E]` and the experts, in the storage that the default implementation prefers."""

    router: jax.Array
    experts: Experts


def _make(shape: BlockShape, seed: int = 0) -> _Weights:
    keys = jax.random.split(jax.random.key(seed), 4)
    width, hidden, count = shape.width, shape.hidden, shape.experts
    experts = Experts(
        gate=draw(keys[0], (count, hidden, width), width),
        up=draw(keys[1], (count, hidden, width), width),
        down=draw(keys[2], (count, width, hidden), hidden),
        layout="out_in",
    )
    return _Weights(draw(keys[3], (width, count), width), pallas_kernels.prepare(experts))


def _inputs(shape: BlockShape, tokens: int) -> list[jax.Array]:
    return [jax.random.normal(key, (tokens, shape.width)) for key in jax.random.split(jax.random.key(9), _INPUTS)]


def _ours(top_k: int) -> Callable:
    return lambda x, router, experts: pallas_kernels.moe_block(x, router, experts, top_k, renormalize=False)


def run(shape: BlockShape, tokens: Sequence[int], setting: Setting) -> list[Row]:
    """Rows of ours and of every implementation of transformers, for each number of tokens, float32.

    Outputs are compared with a float64 product and with each other first. Raises `ValueError` if they differ.
    """
    weights, peer = _make(shape), None
    if setting.torch and not torch_baseline.missing():
        arrays = (np.asarray(a) for a in (weights.experts.gate, weights.experts.up, weights.experts.down))
        peer = torch_baseline.Block(shape.hub(), weights.router.T, *arrays)
    rows = []
    for count in tokens:
        rows += _at(shape, count, weights, peer, setting)
    return rows


def _at(shape: BlockShape, tokens: int, weights: _Weights, peer: Any, setting: Setting) -> list[Row]:
    inputs = _inputs(shape, tokens)
    program, compile_seconds = compiled(_ours(shape.top_k), inputs[0], weights.router, weights.experts)
    ours = lambda turn: program(inputs[turn % _INPUTS], weights.router, weights.experts)
    tensors: list[Any] = []
    run_peer = lambda name, turn: peer(name, tensors[turn % _INPUTS])
    calls: dict[str, Any] = {"moe_jax": ours}
    _check_against_float64(shape, inputs[0], weights, np.asarray(ours(0)))
    if peer is not None:
        tensors += [peer.tensor(x) for x in inputs]
        for name in torch_baseline.feasible(tokens * shape.top_k, shape.width, shape.hidden):
            calls[f"transformers {name}"] = functools.partial(run_peer, name)
            check_close(f"transformers {name}", calls[f"transformers {name}"](0).numpy(), np.asarray(ours(0)))
    times = in_turns(calls, setting.repeats)
    best = min((name for name in calls if name != "moe_jax"), key=lambda name: times[name].median, default=None)
    active = float(np.mean([_active(shape, x, weights.router) for x in inputs]))
    rows = []
    for name, time in times.items():
        mine = name == "moe_jax"
        compared = mine and best is not None
        rows.append(
            Row(
                case="block",
                implementation=name,
                device=setting.device,
                dtype="float32",
                shape=f"G={tokens} {shape}",
                compile_ms=1e3 * compile_seconds if mine else None,
                steady_ms=1e3 * time.median,
                roofline=share(setting, time.median, *shape.work(tokens, active)),
                baseline=best if compared else None,
                speedup=time.faster_than(times[best]) if compared else None,
                bar=_BARS.get(tokens, 1.0) if compared else None,
                values={"active experts": float(active), "load average": load_average()},
                note=torch_baseline.missing() if setting.torch else "",
            )
        )
    return rows


def _choices(shape: BlockShape, x: jax.Array, router: jax.Array):
    return pallas_kernels.route(x @ router, shape.top_k, renormalize=False)


def _active(shape: BlockShape, x: jax.Array, router: jax.Array) -> int:
    return int((_choices(shape, x, router)[2] > 0).sum())


def check_close(name: str, got: np.ndarray, want: np.ndarray, tolerance: float = _TOLERANCE) -> None:
    """Raise `ValueError` unless `got` is `want` up to rounding; nothing is timed that computes something else.

    >>> check_close("same", np.ones(3), np.ones(3))
    """
    error = float(np.max(np.abs(got.astype(np.float64) - want)) / np.max(np.abs(want)))
    if not error <= tolerance:
        raise ValueError(f"{name}: differs by {error:.1e} of the largest value, more than rounding ({tolerance:.0e})")


def _check_against_float64(shape: BlockShape, x: jax.Array, weights: _Weights, got: np.ndarray) -> None:
    """Compare a few tokens with plain float64 products."""
    ids, gates, _ = (np.asarray(a) for a in _choices(shape, x, weights.router))
    some = range(0, x.shape[0], max(1, x.shape[0] // 4))
    want = np.zeros((len(some), shape.width))
    for row, token in enumerate(some):
        one = np.asarray(x[token], np.float64)
        for expert, gate in zip(ids[token], gates[token], strict=True):
            take = lambda name, e=int(expert): np.asarray(getattr(weights.experts, name)[e], np.float64)
            hidden = take("gate") @ one
            hidden = hidden / (1 + np.exp(-hidden)) * (take("up") @ one)
            want[row] += gate * (take("down") @ hidden)
    check_close("moe_jax", got[list(some)], want)


#: Experts that take part in the scaling benchmark, however many there are.
_ACTIVE = 8
#: Widths of the scaling benchmark; 128 such experts take 0.8 GB.
SCALING = BlockShape(width=1024, hidden=512, experts=128, top_k=2)


def scaling(shape: BlockShape, tokens: Sequence[int], setting: Setting) -> list[Row]:
    """Cost at equal active work as experts are added: 8 experts in all, and the same 8 among `shape.experts`.

    The router of the larger block never chooses the others. Outputs must agree. At most 1.5 times the cost is asked
    for, a speedup of 0.67.
    """
    few = dataclasses.replace(shape, experts=min(_ACTIVE, shape.experts), top_k=min(shape.top_k, _ACTIVE))
    small = _make(few)
    spread = np.arange(few.experts) * (shape.experts // few.experts)
    place = lambda w: draw(jax.random.key(1), (shape.experts, *w.shape[1:]), w.shape[-1]).at[spread].set(w)
    large = _Weights(
        jnp.zeros((shape.width, shape.experts)).at[:, spread].set(small.router), jax.tree.map(place, small.experts)
    )
    reach = jnp.full(shape.experts, -jnp.inf).at[spread].set(0.0)

    def block(x, reach, weights):
        ids, gates, _ = pallas_kernels.route(x @ weights[0] + reach, few.top_k, renormalize=False)
        return pallas_kernels.routed_mlp(x, ids, gates, weights[1])

    rows = []
    for count in tokens:
        inputs, calls, compile_seconds = _inputs(few, count), {}, {}
        for size, weights, mask in ((few.experts, small, reach[spread]), (shape.experts, large, reach)):
            arguments = mask, (weights.router, weights.experts)
            program, compile_seconds[size] = compiled(block, inputs[0], *arguments)
            calls[size] = lambda turn, p=program, a=arguments, x=inputs: p(x[turn % _INPUTS], *a)
        check_close("scaling", np.asarray(calls[shape.experts](0)), np.asarray(calls[few.experts](0)))
        times = in_turns(calls, setting.repeats)
        for size, time in times.items():
            rows.append(_scaling_row(dataclasses.replace(few, experts=size), count, time, times[few.experts], setting))
            rows[-1] = dataclasses.replace(rows[-1], compile_ms=1e3 * compile_seconds[size])
    return rows


def _scaling_row(shape: BlockShape, tokens: int, time, base, setting: Setting) -> Row:
    active = min(_ACTIVE, tokens * shape.top_k)
    compared = shape.experts > _ACTIVE
    return Row(
        case="scaling",
        implementation="moe_jax",
        device=setting.device,
        dtype="float32",
        shape=f"G={tokens} {shape}",
        steady_ms=1e3 * time.median,
        roofline=share(setting, time.median, *shape.work(tokens, active)),
        baseline=f"moe_jax E={_ACTIVE}" if compared else None,
        speedup=time.faster_than(base) if compared else None,
        bar=1 / 1.5 if compared else None,
        note="routed to the same 8 experts" if compared else "",
    )
