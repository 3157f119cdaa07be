"""Checks and times the GPU kernels of routing and planning against XLA.

python scripts/bench_routing.py --json routing.json     on one GPU, under two minutes
python scripts/bench_routing.py --check                 tiny shapes, interpreted on a CPU, nothing is timed

Repetitions with different inputs are chained in one program: each kernel takes what the repetition before put out as
operands that it does not read, XLA's chain takes them through an optimization barrier. Every program's last
repetition is checked (ids and plans exactly, weights to 1e-6), XLA's as well, before it is timed.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.plan import make_plan, tile_bound
from pallas_kernels.plan import triton as plan_triton
from pallas_kernels.routing import triton, xla

SHAPES = [(128, 8), (64, 8), (8, 2), (32, 4)]
TOKENS = [1, 8, 32, 128, 1024, 4096, 16384]
RULE = dict(score="softmax", renormalize=True, bias=None, groups=1, top_groups=1, scale=1.0, jitter=0.01, forced=None)
NAMED = {"implementation": "xla"} if "implementation" in inspect.signature(make_plan).parameters else {}
xla_plan = functools.partial(make_plan, **NAMED)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: `stage` "route", "plan" or "both"; `run(logits or ids, interpret)` gives a tuple of arrays."""

    stage: str
    name: str
    tile_rows: int
    run: Callable
    kernels: bool = True


# ---------------------------------------------------------------- cases


def fields(plan):
    """What kernels read of a plan."""
    return plan.slot, plan.tile_expert, plan.num_tiles, *(() if plan.in_place else (plan.row_choice,))


def routed(logits, k, block, interpret):
    return triton.route(logits, k, **RULE, interpret=interpret, block=block)[:2]


def cases(experts: int, k: int, tokens: int, full: bool) -> list[Case]:
    """Everything to be timed for one shape; `full`: all variants, else the defaults and few others."""
    tiles = (
        sorted({max(8, 1 << (tokens - 1).bit_length()), 16})
        if tokens <= 32
        else [64 if tokens * k < 64 * experts else 128]
    )
    plan_of = lambda how, rows: lambda ids, interpret: fields(how(ids, experts, rows))
    out = [
        Case("route", "xla top_k", 0, lambda x, _: xla_top_k(x, k), False),
        Case("route", "xla route", 0, lambda x, _: xla.route(x, k, **RULE)[:2], False),
    ]
    for block in route_blocks(experts, tokens, full):
        name = "default" if block is None else "{} tokens {} warps".format(*block)
        out.append(Case("route", name, 0, lambda x, i, block=block: routed(x, k, block, i)))
    for rows in tiles:
        out.append(Case("plan", "xla", rows, plan_of(xla_plan, rows), False))
        out.append(Case("both", "xla", rows, lambda x, _, rows=rows: xla_both(x, k, experts, rows), False))
        for block in plan_blocks(experts, tokens * k, full):
            name = "default"
            if block is not None:
                name = f"{block.choices}/{block.step} {block.warps}w" + (" apart" if block.apart else "")
            run = lambda ids, i, block=block, rows=rows: fields(
                plan_triton.make_plan(ids, experts, rows, interpret=i, block=block)
            )
            out.append(Case("plan", name, rows, run))
        out.append(Case("both", "default", rows, lambda x, i, rows=rows: triton_both(x, k, experts, rows, i)))
    return out


def xla_top_k(logits, k):
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    return ids, weights / weights.sum(-1, keepdims=True)


def xla_both(logits, k, experts, rows):
    ids, weights, _ = xla.route(logits, k, **RULE)
    return ids, weights, *fields(xla_plan(ids, experts, rows))


def triton_both(logits, k, experts, rows, interpret):
    ids, weights = routed(logits, k, None, interpret)
    return ids, weights, *fields(plan_triton.make_plan(ids, experts, rows, interpret=interpret))


def route_blocks(experts, tokens, full):
    """Tokens per program and warps."""
    if tokens <= 32:
        blocks = [(1, 1), (2, 1), (4, 4), (4, 1)]
    else:
        most = max(1, 2048 // experts)
        blocks = [(most, 4), (most, 8), (2 * most, 4), (most // 2, 2), (most // 4, 1), (most // 8, 1)]
    blocks = [b for b in blocks if 1 <= b[0] <= 256]
    return [None] + (blocks if full else blocks[:2])


def plan_blocks(experts, choices, full):
    """Blocks with counts in the same launch where choices are few, and apart where they are many."""
    out, step = [None], max(16, min(128, 8192 // experts))
    for divisor in (1, 4, 16) if choices * experts <= 1 << 18 else ():
        size = max(16, 1 << (-(-choices // divisor) - 1).bit_length())
        out += [plan_triton.Block(size, min(size, step), warps, False) for warps in (4, 8)]
    for divisor in (16, 64, 128) if choices * experts >= 1 << 16 else ():
        size = max(step, 1 << (-(-choices // divisor) - 1).bit_length())
        out += [
            plan_triton.Block(size, min(size, at), warps, True) for at, warps in ((step, 8), (step, 4), (step // 2, 4))
        ]
    out = list(dict.fromkeys(out))
    return out if full else out[:1] + out[-1:]


# ---------------------------------------------------------------- chains

after = threading.local()
call_kernel = triton.call_triton


def call_after(kernel, name, grid, outputs, warps, interpret, operands):
    """`call_triton` that takes the arrays in `after` as operands that the kernel does not read; once."""
    unread, after.arrays = getattr(after, "arrays", ()), ()

    def without(*refs):
        return kernel(*refs[: len(operands)], *refs[len(operands) + len(unread) :])

    without.__name__ = name
    return call_kernel(without, name, grid, outputs, warps, interpret, [*operands, *unread])


triton.call_triton = plan_triton.call_triton = call_after


def chain(case: Case, inputs, loops: int, interpret: bool):
    """`case` on every input in turn, `loops` times over; gives what the last one gave."""

    @jax.jit
    def one(x, last):
        if case.kernels:
            after.arrays = last
        else:
            x, _ = jax.lax.optimization_barrier((x, last))
        return tuple(case.run(x, interpret))

    def program(last, *inputs):
        for x in inputs:
            last = one(x, last)
        return last

    def looped(last, *inputs):
        return jax.lax.fori_loop(0, loops, lambda _, last: program(last, *inputs), last)

    last = tuple(
        jnp.zeros(o.shape, o.dtype) for o in jax.eval_shape(lambda x: tuple(case.run(x, interpret)), inputs[0])
    )
    program = looped if loops > 1 else program
    return jax.jit(program).lower(last, *inputs).compile(), last


# ---------------------------------------------------------------- checks and times


def wrong(case: Case, experts: int, k: int, logits, ids, got) -> str | None:
    """What is wrong with the results for the last input, None if nothing is."""
    if case.stage != "plan":
        scores = np.exp(logits.astype(np.float64))
        scores /= scores.sum(1, keepdims=True)
        ids, weights, *got = got
        want_ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        mine, theirs = np.take_along_axis(scores, ids, 1), np.take_along_axis(scores, want_ids, 1)
        if any(len(set(row)) != k for row in ids.tolist()):
            return "an id twice in a token"
        if not np.allclose(mine, theirs, rtol=1e-6, atol=0):  # equal to float32's precision: either may come first
            return f"{(ids != want_ids).mean():.2%} of ids wrong"
        error = np.abs(weights / (mine / mine.sum(1, keepdims=True)) - 1).max()
        if not error <= 1e-6:
            return f"weights off by {error:.1e}"
    if case.stage != "route":
        names = ("slot", "tile_expert", "num_tiles", "row_choice")
        for name, one, other in zip(names, got, host_plan(ids, experts, case.tile_rows), strict=False):
            if one.shape != other.shape or (one != other).any():
                return f"{(one != other).mean():.2%} of {name} wrong"
    return None


def host_plan(ids, experts, rows):
    """The plan in NumPy, by a sort."""
    tokens, k = ids.shape
    flat, choices = ids.reshape(-1), np.arange(ids.size)
    counts = np.bincount(flat, minlength=experts)
    tiles_of = np.minimum(counts, 1) if rows >= tokens else -(-counts // rows)
    order, inside = np.argsort(flat, kind="stable"), np.empty_like(choices)
    inside[order] = choices - (np.cumsum(counts) - counts)[flat[order]]
    slot = (np.cumsum(tiles_of) - tiles_of)[flat] * rows + (choices // k if rows >= tokens else inside)
    tiles = tile_bound(ids.size, experts, rows)
    tile_expert, row_choice = np.full(tiles, experts - 1), np.full(tiles * rows, ids.size)
    tile_expert[: tiles_of.sum()] = np.repeat(np.arange(experts), tiles_of)
    row_choice[slot] = choices
    return slot.reshape(tokens, k), tile_expert, tiles_of.sum(), row_choice


def microseconds(program, last, inputs, repetitions: int, budget: float) -> float:
    """Median time of one repetition over several calls."""
    run = lambda: jax.block_until_ready(program(last, *inputs))
    run()
    begin = time.perf_counter()
    run()
    calls = int(min(20, max(1, budget / 5 / (time.perf_counter() - begin))))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            out = program(last, *inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / calls / repetitions * 1e6)
    return float(np.median(times))


def measure(args, log) -> list[dict]:
    """One row per case."""
    rng, pool, jobs = np.random.default_rng(0), ThreadPoolExecutor(args.threads), []
    shapes = [(8, 2), (60, 4)] if args.check else SHAPES
    for experts, k in shapes:
        for tokens in [3, 40] if args.check else TOKENS:
            number = 2 if args.check else 8 if tokens <= 1024 else 4
            loops = 4 if tokens <= 128 and not args.check else 1
            logits = [jnp.asarray(rng.standard_normal((tokens, experts), np.float32)) for _ in range(number)]
            ids = [jnp.asarray(np.argsort(-np.asarray(one), axis=1)[:, :k].astype(np.int32)) for one in logits]
            for case in cases(experts, k, tokens, full=(experts, k) == shapes[0]):
                if args.only in f"{case.stage} {case.name}":
                    inputs = ids if case.stage == "plan" else logits
                    future = pool.submit(chain, case, inputs, loops, args.check)
                    jobs.append((experts, k, tokens, case, logits[-1], ids[-1], inputs, number * loops, future))
    rows = []
    for *_, future in jobs:
        future.exception()
    log(f"{len(jobs)} programs compiled")
    for experts, k, tokens, case, logits, ids, inputs, repetitions, future in jobs:
        row = dict(E=experts, k=k, G=tokens, stage=case.stage, tile_rows=case.tile_rows, name=case.name)
        try:
            program, last = future.result()
            got = [np.asarray(v) for v in program(last, *inputs)]
            row["wrong"] = wrong(case, experts, k, np.asarray(logits), np.asarray(ids), got)
            if not args.check:
                row["us"] = round(microseconds(program, last, inputs, repetitions, 0.05), 2)
        except Exception as error:  # a variant that does not compile is a result, too
            row["wrong"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        if row["wrong"]:
            log(f"WRONG {row}")
    return rows


def report(rows: list[dict]) -> None:
    """The times of each shape, the fastest kernel beside the default, and XLA over kernels."""
    cells: dict = {}
    for row in rows:
        if "us" in row and not row["wrong"]:
            cells.setdefault((row["E"], row["k"], row["G"]), {}).setdefault(
                (row["stage"], row["tile_rows"]), []
            ).append(row)
    print("   E  k      G stage  tile      xla  default     best  xla/default  best variant (microseconds)")
    for (experts, k, tokens), stages in cells.items():
        for (stage, tile_rows), found in stages.items():
            of_xla = min((r["us"] for r in found if r["name"].startswith("xla")), default=float("nan"))
            kernels = [r for r in found if not r["name"].startswith("xla")]
            if not kernels:
                continue
            best = min(kernels, key=lambda r: r["us"])
            default = next((r["us"] for r in kernels if r["name"] == "default"), float("nan"))
            print(
                f"{experts:>4}{k:>3}{tokens:>7} {stage:<6}{tile_rows:>5}{of_xla:>9.1f}{default:>9.1f}{best['us']:>9.1f}"
                f"  {of_xla / default:>10.1f}x  {best['name']}"
            )
    print(f"{sum(bool(row['wrong']) for row in rows)} failed or wrong of {len(rows)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="", help="file for all times")
    parser.add_argument("--check", action="store_true", help="tiny shapes in interpret mode on a CPU, no times")
    parser.add_argument("--only", default="", help="cases whose 'stage name' contains this")
    parser.add_argument("--threads", type=int, default=15)
    args = parser.parse_args()
    begin = time.perf_counter()
    log = lambda text: print(f"[{time.perf_counter() - begin:6.1f}s] {text}", flush=True)
    warnings.filterwarnings("ignore", message="The Pallas Triton backend")
    if args.check:
        jax.config.update("jax_platforms", "cpu")
    rows = measure(args, log)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rows": rows}, file, indent=0)
    report(rows)
    log("done")


if __name__ == "__main__":
    main()
