"""Time tilings of the expert MLP's kernels on a GPU, one shape and number of tokens after the other.

    python scripts/tune_expert_mlp.py --shapes qwen3,olmoe --tokens 1,8,32 --json tilings.json

Every tiling is checked against float32 products of some rows before it is timed. Each program runs the kernel several
times over different routings, so that weights do not stay in the L2 cache; programs are compiled in threads. What is
found goes into `pallas_kernels/expert_mlp/mosaic_tilings.py` by hand.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Experts, compat, make_plan
from pallas_kernels.expert_mlp.mosaic_kernel import Product, Tiling, grouped_product
from pallas_kernels.expert_mlp.mosaic_weights import Plain

#: D, F, E, k
SHAPES = {
    "mixtral": (4096, 14336, 8, 2),
    "qwen3": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "gptoss": (2880, 2880, 32, 4),
    "dsv3ep": (7168, 2048, 32, 1),
    "tiny": (128, 128, 4, 2),
}


def row_sizes(tokens: int, mean: float) -> list[int]:
    """Rows per tile worth trying: room for an expert's likely rows in one, two, ... equal tiles."""
    if tokens <= 8:
        return [8]
    room = mean + 2 * math.sqrt(mean)
    if room <= 64:
        return sorted({min(64, 8 * math.ceil(room * part / 8)) for part in (0.75, 1, 1.4)})
    tiles = math.ceil(room / 160)
    equal = (8 * math.ceil(room / count / 8) for count in (tiles, tiles + 1, tiles + 2))
    return sorted({128, 144, 160} if mean > 600 else set(equal) | ({136, 144} if mean > 100 else set()))


def candidates(tokens: int, mean: float) -> tuple[list[Tiling], list[Tiling]]:
    """Tilings of gate/up and of down worth trying."""
    up, down = [], []
    for rows in row_sizes(tokens, mean):
        if rows <= 96:
            up += [
                Tiling(rows, 64, 128, 4, 1, 1),
                Tiling(rows, 64, 64, 4, 1, 1, 2),
                Tiling(rows, 128, 64, 5, 2, 1),
                Tiling(rows, 64, 128, 3, 1, 1),
            ]
            down += [
                Tiling(rows, 64, 128, 6, 1, 1),
                Tiling(rows, 64, 128, 4, 1, 1),
                Tiling(rows, 128, 64, 7, 2, 1),
                Tiling(rows, 128, 64, 4, 2, 1, 2),
                Tiling(rows, 256, 64, 5, 2, 1),
            ]
        if rows >= 48:
            up += [Tiling(rows, 128, 64, 4), Tiling(rows, 128, 64, 3), Tiling(rows, 128, 64, 4, group=16)]
            down += [Tiling(rows, 256, 64, 4), Tiling(rows, 256, 64, 3), Tiling(rows, 128, 64, 6)]
            down += [Tiling(rows, 256, 64, 4, group=16)]
    return up, down


def name(t: Tiling) -> str:
    return f"{t.rows}x{t.columns}x{t.depth} st{t.stages} c{t.consumers} g{t.group} b{t.blocks}"


class Cell:
    """One shape and number of tokens: inputs, routings, and what to time."""

    def __init__(self, shape, tokens, weights, repeats, seed=0):
        self.shape, self.tokens, self.weights, self.repeats = shape, tokens, weights, repeats
        D, F, E, k = SHAPES[shape]
        rng = np.random.default_rng(seed)
        self.x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.bfloat16)
        self.ids = [jnp.asarray(np.argsort(rng.random((tokens, E)), 1)[:, :k], jnp.int32) for _ in range(repeats)]
        self.gates = jnp.asarray(rng.dirichlet(np.ones(k), tokens), jnp.float32)
        self.active = np.mean([len(np.unique(ids)) for ids in self.ids])
        self.mean = tokens * k / E

    @functools.cached_property
    def picked(self):
        """A few choices, and their experts' kernels on the host in float32."""
        rng = np.random.default_rng(1)
        pairs = [(rng.integers(self.tokens), rng.integers(SHAPES[self.shape][3])) for _ in range(3)]
        experts = [int(self.ids[-1][token, a]) for token, a in pairs]
        one = lambda w, e: np.asarray(w[e]).astype(np.float32)
        w = self.weights
        return [
            (token, a, *(one(kernel, e) for kernel in (w.gate, w.up, w.down)))
            for (token, a), e in zip(pairs, experts, strict=True)
        ]

    def check(self, kind, plan, out):
        """Relative error of a few rows against float32 products; `ValueError` if they are wrong."""
        slots, out, x = np.asarray(plan.slot), np.asarray(out), np.asarray(self.x)
        got, want = [], []
        for token, a, gate, up, down in self.picked:
            slot = slots[token, a]
            got.append(out[slot])
            if kind == "down":
                want.append(drawn_rows(down.shape[0])[slot % _PERIOD].astype(np.float32) @ down)
            else:
                row = x[token].astype(np.float32)
                g = row @ gate
                want.append(g / (1 + np.exp(-g)) * (row @ up))
        error = relative(np.stack(got), np.stack(want))
        if not error < 0.01:
            raise ValueError(f"wrong: relative error {error:.3g}")
        return round(error, 5)

    def product(self, kind, tiling, source, overlap=True):
        _, _, E, k = SHAPES[self.shape]
        activation = self.weights.activation if kind == "up" else None
        return Product(f"moe_jax_expert_{kind}", tiling, activation, source, k, Plain(), E, overlap, compat.num_sms())

    def chain(self, kind, tiling, rows_in=None):
        """A program: the kernel over each routing's plan in turn."""
        experts = self.weights
        kernels = [experts.gate, experts.up] if kind == "up" else [experts.down]
        layer = jnp.zeros(1, jnp.int32)

        @jax.jit  # traced once for all routings
        def one(x, kernels, plan):
            source = "tiled" if kind == "down" else "in_place" if plan.in_place else "gathered"
            return grouped_product(self.product(kind, tiling, source), x, kernels, [], plan, layer)

        # all outputs are returned: XLA drops what nobody reads
        return lambda x, kernels, plans: [one(x, kernels, plan) for plan in plans], kernels


@functools.partial(jax.jit, static_argnums=(1, 2))
def _plan(ids, experts, rows):
    return make_plan(ids, experts, rows)


def plan_on_cpu(ids, experts, rows):
    """The plan, made where compiling takes no time."""
    cpu, gpu = jax.devices("cpu")[0], ids.device
    with jax.default_device(cpu):
        return jax.device_put(_plan(jax.device_put(ids, cpu), experts, rows), gpu)


_PERIOD = 257


@functools.cache
def drawn_rows(width):
    return np.random.default_rng(3).standard_normal((_PERIOD, width), np.float32).astype(jnp.bfloat16)


@functools.lru_cache(4)
def hidden_rows(rows, width):
    return jnp.asarray(np.resize(drawn_rows(width), (rows, width)))


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def timed(program, args, calls, rounds=7):
    jax.block_until_ready(program(*args))
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = program(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return float(np.median(samples))


def make_weights(shape, seed=0):
    D, F, E, _ = SHAPES[shape]
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    draw = jax.jit(lambda key, *, n: jax.random.normal(key, n, jnp.bfloat16) * 0.02, static_argnames="n")
    return Experts(gate=draw(keys[0], n=(E, D, F)), up=draw(keys[1], n=(E, D, F)), down=draw(keys[2], n=(E, F, D)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3,olmoe,mixtral,gptoss")
    parser.add_argument("--tokens", default="1,8,32,128,1024,4096,16384")
    parser.add_argument("--json", default="")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds after which nothing more is timed")
    parser.add_argument("--threads", type=int, default=14)
    options = parser.parse_args()
    begin, results = time.time(), []
    left = lambda: options.deadline - (time.time() - begin)
    pool = ThreadPoolExecutor(options.threads)

    def compile_later(function, args):
        def go():
            if left() < 10:
                raise TimeoutError("deadline")
            start = time.time()
            program = jax.jit(function).lower(*args).compile()
            return program, time.time() - start

        return pool.submit(go)

    for shape in options.shapes.split(","):
        D, F, E, k = SHAPES[shape]
        weights = make_weights(shape)
        jobs = []
        for tokens in map(int, options.tokens.split(",")):
            cell = Cell(shape, tokens, weights, repeats=8 if tokens <= 1024 else 2)
            plans = {}
            for kind, tilings in zip(("up", "down"), candidates(tokens, cell.mean), strict=True):
                for tiling in tilings:
                    if tiling.columns > (F if kind == "up" else D):
                        continue
                    if tiling.rows not in plans:
                        plans[tiling.rows] = [plan_on_cpu(ids, E, tiling.rows) for ids in cell.ids]
                    plan = plans[tiling.rows]
                    run, kernels = cell.chain(kind, tiling)
                    x = cell.x
                    if kind == "down":
                        x = hidden_rows(plan[0].max_tiles * tiling.rows, F)
                    args = (x, kernels, plan)
                    jobs.append((cell, kind, tiling, args, compile_later(run, args)))
        for cell, kind, tiling, args, future in jobs:
            row = dict(
                at=round(time.time() - begin),
                shape=shape,
                tokens=cell.tokens,
                kind=kind,
                tiling=name(tiling),
                spec=dataclasses.asdict(tiling),
            )
            try:
                program, row["compile"] = future.result()
                row["compile"] = round(row["compile"], 1)
                row["error"] = cell.check(kind, args[2][-1], program(*args)[-1])
                if left() < 4:
                    raise TimeoutError("deadline")
                seconds = timed(program, args, calls=4 if cell.tokens <= 1024 else 3)
                row["us"] = round(1e6 * seconds / cell.repeats, 2)
                flops = (4 if kind == "up" else 2) * cell.tokens * k * D * F
                row["tflops"] = round(flops / row["us"] / 1e6, 1)
                row["gbs"] = round(cell.active * D * F * (4 if kind == "up" else 2) / row["us"] / 1e3)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {str(error)[:300]}"
            results.append(row)
            print(
                *(
                    f"{row.get(n, '')}"
                    for n in (
                        "at",
                        "compile",
                        "shape",
                        "tokens",
                        "kind",
                        "tiling",
                        "us",
                        "tflops",
                        "gbs",
                        "error",
                        "failure",
                    )
                ),
                flush=True,
            )
        if options.json:
            Path(options.json).write_text(json.dumps(results))
        jobs.clear()
        del weights
        print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
