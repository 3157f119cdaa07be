"""Check and time the backward pass of the expert MLP on a Hopper GPU, whole and kernel by kernel over tilings.

    python scripts/bench_backward.py --shapes olmoe,qwen3,mixtral --json backward.json

All gradients of random inputs under random routing are compared with those of `xla_tiles` in float32 at the highest
precision, and then timed: a forward pass, a forward and backward pass and its stages; for the shapes of `--tune` each
kernel over tilings; for those of `--baselines` `xla_tiles`' loop, automatic differentiation of `jax.lax.ragged_dot` and
JAX's own kernel for gradients of kernels. Prints kind, what, seconds to compile, relative error, microseconds (median),
their spread, useful TFLOP/s (padding is not counted), the share of 989, MB of temporaries. What is found goes into
`pallas_kernels/expert_mlp/mosaic_tilings.py` by hand.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Experts, compat, make_plan, prepare, routed_mlp
from pallas_kernels.expert_mlp import mosaic_backward, mosaic_gpu, xla_tiles
from pallas_kernels.expert_mlp.combine import combine
from pallas_kernels.expert_mlp.mosaic_kernel import Product, Tiling, grouped_product
from pallas_kernels.expert_mlp.mosaic_tilings import choose, choose_backward, trained_rows
from pallas_kernels.expert_mlp.mosaic_weight_gradient import Contraction, GradientTiling, spans_of, weight_gradient
from pallas_kernels.expert_mlp.mosaic_weights import Plain

#: D, F, E, k, tokens
SHAPES = {
    "olmoe": (2048, 1024, 64, 8, 16384),
    "qwen3": (2048, 768, 128, 8, 16384),
    "mixtral": (4096, 14336, 8, 2, 16384),
    "small": (576, 1536, 8, 2, 4096),
    "tiny": (256, 256, 8, 2, 2048),
}
_PEAK = 989e12
#: References are not tuned: that would take most of a run's time.
_reference = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})


@dataclasses.dataclass
class Job:
    """Something to time: `flops` that are useful; `check(result)` gives a relative error, or None."""

    kind: str
    label: str
    flops: float
    run: Callable[..., Any]
    args: tuple
    check: Callable[[Any], Any] = lambda result: None


class Problem:
    """Random inputs of one shape."""

    def __init__(self, shape, seed=0):
        self.shape = shape
        self.D, self.F, self.E, self.k, self.G = D, F, E, k, G = SHAPES[shape]
        rng = np.random.default_rng(seed)
        order = np.argsort(rng.random((G, E), np.float32), 1)
        self.ids = jnp.asarray(order[:, :k], jnp.int32)
        self.weights = jnp.asarray(rng.dirichlet(np.ones(k), G), jnp.float32)
        keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 8))
        draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
        self.x, self.d_y = draw(G, D), draw(G, D)
        self.experts = Experts(
            gate=draw(E, F, D) * D**-0.5,
            up=draw(E, F, D) * D**-0.5,
            down=draw(E, D, F) * F**-0.5,
            activation="swiglu",
            layout="out_in",
        )
        self.rows = trained_rows(G, G * k / E)
        self.plan = jax.jit(lambda ids: make_plan(ids, E, self.rows))(self.ids)
        self.product_flops = 2.0 * G * k * D * F
        self.args = self.x, self.weights, self.experts, self.ids, self.d_y

    @functools.cached_property
    def exact(self):
        return exact(self.args)

    @functools.cached_property
    def laid_out(self):
        """Rows of x and d_y in the plan, and random hidden rows, zeros where it pads."""

        @jax.jit
        def rows(x, d_y, plan, key):
            real = (plan.row_choice < self.G * self.k)[:, None]
            taken = [a.at[plan.row_choice // self.k].get(mode="fill", fill_value=0) for a in (x, d_y)]
            hidden = jax.random.normal(key, (3, len(real), self.F), jnp.bfloat16)
            return *taken, *jnp.where(real, hidden, 0)

        return rows(self.x, self.d_y, self.plan, jax.random.key(9, impl="rbg"))


def value_and_gradients(implementation, layer=None):
    def run(x, weights, experts, ids, d_y):
        apply = lambda *args: routed_mlp(args[0], ids, *args[1:], layer=layer, implementation=implementation)
        y, pull = jax.vjp(apply, x, weights, experts)
        return y, pull(d_y)

    return run


# --- numerics -------------------------------------------------------------------------------------------------------


def exact(args, layer=None):
    """Gradients in float32."""
    wide = lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a
    with jax.default_matmul_precision("highest"):
        return _reference(value_and_gradients("xla_tiles", layer))(*jax.tree.map(wide, args))[1]


@jax.jit
def _relative(got, want):
    return jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)


def worst(got, want):
    """The largest relative error of the gradients."""
    return max(float(_relative(*pair)) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


#: What the shapes do not cover: activation, layout, layers, whether there are biases, D.
VARIANTS = {
    "in_out, stack, biases": ("geglu", "in_out", (3,), True, 64),
    "out_in, no gate, biases, the only layer": ("gelu_tanh", "out_in", (1,), True, 192),
    "in_out, no gate": ("relu", "in_out", (), False, 320),
}


def check_variant(name: str) -> float:
    """The error with experts without rows, with few and with many."""
    activation, layout, layers, biases, width = VARIANTS[name]
    keys = iter(jax.random.split(jax.random.key(len(name), impl="rbg"), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32).astype(jnp.bfloat16)
    kernel = lambda m, n: draw(*layers, 5, *((m, n) if layout == "in_out" else (n, m))) * m**-0.5
    bias = lambda n: draw(*layers, 5, n) if biases else None
    gated = activation == "geglu"
    experts = Experts(
        gate=kernel(width, 448) if gated else None,
        up=kernel(width, 448),
        down=kernel(448, width),
        gate_bias=bias(448) if gated else None,
        up_bias=bias(448),
        down_bias=bias(width),
        activation=activation,
        layout=layout,
    )
    ids = jnp.asarray(np.random.default_rng(2).choice([0, 1, 3, 3, 3, 9, -1], (700, 2)), jnp.int32)
    args = draw(700, width), jax.random.uniform(next(keys), (700, 2)), experts, ids, draw(700, width)
    layer = jnp.int32(layers[0] - 1) if layers else None
    return worst(jax.jit(value_and_gradients("mosaic_gpu", layer))(*args)[1], exact(args, layer))


# --- whole passes and their stages ----------------------------------------------------------------------------------


def passes(p: Problem) -> Iterator[Job]:
    forward = lambda x, weights, experts, ids, d_y: routed_mlp(x, ids, weights, experts, implementation="mosaic_gpu")
    yield Job("forward", "mosaic_gpu", 3 * p.product_flops, forward, p.args)
    both, check = value_and_gradients("mosaic_gpu"), lambda result: worst(result[1], p.exact)
    yield Job("forward+backward", "mosaic_gpu", 9 * p.product_flops, both, p.args, check)


def backward_passes(p: Problem) -> Iterator[Job]:
    keeping = jax.jit(
        lambda x, weights, *args: mosaic_gpu._forward(x, args[1], weights, args[0], None, None, None, False)
    )
    _, saved = keeping(*p.args)
    for gathers in (True, False):
        tilings = dataclasses.replace(choose_backward(p.G, p.k, p.experts, p.rows), gathers=gathers)
        back = functools.partial(mosaic_backward.gradients, tilings=tilings)
        label = "rows gathered by kernels" if gathers else "rows gathered beforehand"
        yield Job("backward", label, 6 * p.product_flops, back, (saved, p.d_y), lambda got: worst(got, p.exact))


def stages(p: Problem) -> Iterator[Job]:
    """What is no product."""
    x_rows, _, hidden, gate, up = p.laid_out
    size = p.G * p.k
    rows = lambda x, plan: x.at[plan.row_choice // p.k].get(mode="fill", fill_value=0)
    yield Job("stage", "rows of x gathered by XLA", 0, rows, (p.x, p.plan))

    def through(gate, up, d_hidden, weights, plan):
        real = (plan.row_choice < size)[:, None]
        weight = weights.reshape(-1).at[plan.row_choice].get(mode="fill", fill_value=0)[:, None]
        return mosaic_backward._through_activation(p.experts.activation, [gate, up], d_hidden, weight, real)

    yield Job("stage", "activation backwards", 0, through, (gate, up, hidden, p.weights, p.plan))
    add = lambda rows, plan: combine(rows, plan.slot, jnp.ones(plan.slot.shape), rows.dtype)
    yield Job("stage", "rows of x summed up", 0, add, (x_rows, p.plan))
    yield Job("stage", "plan", 0, lambda ids: make_plan(ids, p.E, p.rows), (p.ids,))


def baselines(p: Problem) -> Iterator[Job]:
    tiles = lambda x, weights, experts, ids, d_y: xla_tiles.gradients(x, ids, weights, experts, None, d_y)
    yield Job("backward", "xla_tiles", 6 * p.product_flops, tiles, p.args)
    if p.shape in ("small", "tiny"):  # XLA multiplies every row by every expert: others do not fit
        experts = prepare(p.experts, "xla_ragged")
        args, ragged = (p.x, p.weights, experts, p.ids, p.d_y), value_and_gradients("xla_ragged")
        yield Job("forward+backward", "xla_ragged", 9 * p.product_flops, ragged, args)
    yield from transposed_ragged_dot(p)


def transposed_ragged_dot(p: Problem) -> Iterator[Job]:
    """JAX's kernel, on rows without padding between experts."""
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
    x_rows, _, hidden, *_ = p.laid_out
    counts = jnp.bincount(p.ids.reshape(-1), length=p.E)
    size = p.G * p.k

    def run(a, b, sizes, steps, grid):
        return module.transposed_ragged_dot(
            a, b, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=steps, grid_block_n=grid
        )

    for steps, grid in ((4, 1), (4, 8), (6, 8)):
        args, label = (hidden[:size], x_rows[:size], counts), f"jax's 128x128x64 st{steps} g{grid}"
        yield Job("in_kernel", label, p.product_flops, functools.partial(run, steps=steps, grid=grid), args)


# --- kernels over tilings -------------------------------------------------------------------------------------------


def products(p: Problem) -> Iterator[Job]:
    """Grouped products of forward and backward pass."""
    x_rows, d_rows, *hidden = p.laid_out
    base = choose(p.G, p.k, p.experts, p.rows)
    shared = dict(choices=p.k, experts=p.E, num_sms=compat.num_sms(), overlap=False)
    kernels, layer = p.experts, jnp.zeros(1, jnp.int32)
    columns = lambda most: min(256, most // 64 * 64)

    def job(kind, tiling, activation, source, x, given, stored, factor, **options):
        product = Product(
            f"moe_jax_expert_{kind}", tiling, activation, source, weights=Plain(stored), **shared, **options
        )
        run = lambda x, given, plan, layer: grouped_product(product, x, given, [], plan, layer)
        note = f"{source}{', kept' if options.get('keeps') else ''}"
        return Job(kind, f"{_name(tiling)} {note}", factor * p.product_flops, run, (x, given, p.plan, layer))

    for keeps, stages in ((False, 4), (True, 4), (True, 3)):
        given, tiling = [kernels.gate, kernels.up], dataclasses.replace(base.up, stages=stages)
        yield job("up", tiling, kernels.activation, "gathered", p.x, given, True, 2, keeps=keeps)
    yield job("down", base.down, None, "tiled", hidden[0], [kernels.down], True, 1)
    for group in (4, 8, 16):
        tiling = Tiling(p.rows, columns(p.F), group=group)
        for source, rows in (("tiled", d_rows), ("gathered", p.d_y)):
            yield job("d_hidden", tiling, None, source, [rows], [kernels.down], False, 1, added=True)
        tiling = Tiling(p.rows, columns(p.D), group=group)
        yield job("d_x", tiling, None, "tiled", hidden[:2], [kernels.gate, kernels.up], False, 2, added=True)


def gradient_tilings(rows: int, columns: int) -> list[GradientTiling]:
    found = [GradientTiling(128, 256, group=group) for group in (1, 4, 8, 16)]
    found += [GradientTiling(256, 128, group=group) for group in (1, 2, 4, 16)]
    return [t for t in found if t.rows <= rows and t.columns <= columns]


def weight_gradients(p: Problem) -> Iterator[Job]:
    x_rows, d_rows, hidden, *_ = p.laid_out
    cases = [
        ("in_kernel", None, hidden, x_rows),
        ("in_kernel", 1, hidden, p.x),
        ("out_kernel", None, d_rows, hidden),
        ("out_kernel", 0, p.d_y, hidden),
    ]
    tile = np.asarray(p.plan.tile_expert)[: int(p.plan.num_tiles)]
    times = _reference(lambda a, b: jnp.matmul(a.T, b, precision="highest"))

    @functools.cache
    def wanted(kind, e):
        own = jnp.asarray(np.flatnonzero(np.repeat(tile == e, p.rows)))
        a, b = (hidden, x_rows) if kind == "in_kernel" else (d_rows, hidden)
        return times(a[own].astype(jnp.float32), b[own].astype(jnp.float32))

    def checked(kind, out):
        return max(float(_relative(out[e], wanted(kind, e))) for e in (0, p.E - 1))

    for kind, gathered, a, b in cases:
        for tiling in gradient_tilings(a.shape[1], b.shape[1]):
            call = Contraction(f"moe_jax_expert_d_{kind}", tiling, gathered, p.k, compat.num_sms())

            def run(a, b, plan, call=call):
                spans = spans_of(plan, p.G * p.k, p.E, call.tiling.depth)
                return weight_gradient(call, a, b, spans, plan.row_choice)

            label = f"{_name(tiling)} {'tiled' if gathered is None else 'gathered'}"
            yield Job(kind, label, p.product_flops, run, (a, b, p.plan), functools.partial(checked, kind))


def _name(t) -> str:
    return f"{t.rows}x{t.columns}x{t.depth} st{t.stages} c{t.consumers} g{t.group}"


# --- running --------------------------------------------------------------------------------------------------------


def burst(program, args, calls):
    """Seconds of a call in a stream of calls."""
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    for _ in range(calls):
        out = program(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def measure(jobs, compiled, rounds=7, seconds=0.02) -> list[dict[str, Any]]:
    """Checks each job, then times them in turns, so that the card's clock moves under all alike."""
    rows, ready = [], []
    for job, future in zip(jobs, compiled, strict=True):
        row: dict[str, Any] = {"kind": job.kind, "label": job.label}
        rows.append(row)
        try:
            program, row["compile"] = future.result()
            error = job.check(program(*job.args))
            row["error"] = None if error is None else round(error, 5)
            once = burst(program, job.args, 1)
            ready.append((job, row, program, max(1, min(50, int(seconds / once))), 1 if once > 0.2 else rounds))
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error)[:300]}"
    times: dict[int, list[float]] = {n: [] for n in range(len(ready))}
    for turn in range(rounds):
        for n, (job, _, program, calls, turns) in enumerate(ready):
            if turn < turns:
                times[n].append(burst(program, job.args, calls))
    for n, (job, row, program, *_) in enumerate(ready):
        took = float(np.median(times[n]))
        row["us"], row["spread"] = round(1e6 * took, 1), round((max(times[n]) - min(times[n])) / took, 3)
        if job.flops:
            row["tflops"], row["share"] = round(job.flops / took / 1e12, 1), round(job.flops / took / _PEAK, 3)
        memory = program.memory_analysis()
        row["temporaries, MB"] = round(memory.temp_size_in_bytes / 1e6) if memory else None
    return rows


def jobs_of(problem: Problem, tune: bool, compare: bool) -> Iterator[Job]:
    yield from passes(problem)
    yield from stages(problem)
    if tune:
        yield from products(problem)
        yield from weight_gradients(problem)
    if compare:
        yield from baselines(problem)
    yield from backward_passes(problem)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="olmoe,qwen3,mixtral,small,tiny")
    parser.add_argument("--tune", default="", help="shapes for which each kernel is timed over tilings")
    parser.add_argument("--baselines", default="", help="shapes for which baselines are timed")
    parser.add_argument("--json", default="")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds after which nothing more is begun")
    parser.add_argument("--threads", type=int, default=14)
    options = parser.parse_args()
    begin, results = time.time(), []
    pool = ThreadPoolExecutor(options.threads)

    def compile_job(job):
        start = time.time()
        if start - begin > options.deadline:
            raise TimeoutError("deadline")
        return jax.jit(job.run).lower(*job.args).compile(), round(time.time() - start, 1)

    variants = {name: pool.submit(check_variant, name) for name in VARIANTS}
    for shape in options.shapes.split(","):
        problem = Problem(shape)
        jobs, compiled = [], []
        for job in jobs_of(problem, shape in options.tune.split(","), shape in options.baselines.split(",")):
            jobs.append(job)
            compiled.append(pool.submit(compile_job, job))
        wait([*compiled, *variants.values()])  # a busy host would delay calls
        print(shape, f"compiled {time.time() - begin:.0f} s", flush=True)
        for row in measure(jobs, compiled):
            results.append({"at": round(time.time() - begin), "shape": shape, **row})
            print(*results[-1].values(), sep="  ", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(results))
        del problem, jobs, compiled
    for name, error in variants.items():
        print(name, error.exception() or f"{error.result():.5f}")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
