"""Check the kernels of this machine's accelerator against oracles: values, edge cases, routing, whole models.

    python scripts/check_kernels.py [--only values,models] [--implementation NAME] [--quick]

Expert MLPs against float64 products on the host, with the project's standard: at most 1.2 times the error of plain
float32 accumulation with rounding to the working dtype in between. Routing and plan against XLA's, exactly. Then: a
token's output by itself and in batches (bitwise), NaN rows, gradients, and models of `configs/` with random weights
through `save_pretrained` and `load_pretrained`. `--implementation mosaic_gpu_interpreted` tries the script without a
GPU. Prints one line for each kind of check; exits with 1 if anything is wrong.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pallas_kernels")]

from expert_oracle import error, make_experts, make_tokens, oracle  # noqa: E402

import moe_jax  # noqa: E402
from pallas_kernels import ACTIVATIONS, make_plan, route, route_tokens, routed_mlp  # noqa: E402
from pallas_kernels.expert_mlp.mosaic_tilings import TILE_ROWS  # noqa: E402

HALF = ml_dtypes.bfloat16
#: E, k and options of gate rules; a sigmoid gets a bias.
RULES = {
    "softmax": (8, 2, {}),
    "E=60": (60, 4, dict(renormalize=False, scale=2.5)),
    "E=128": (128, 8, {}),
    "sigmoid, groups, bias": (256, 8, dict(score="sigmoid", groups=8, top_groups=4, scale=2.5)),
    "groups": (160, 6, dict(groups=8, top_groups=3, renormalize=False)),
    "k = E": (8, 8, {}),
    "E=512": (512, 10, {}),
}
_STANDARD = 1.2
_FEW = 24  # tokens that the oracle computes


#: What was tried, and what computes how far off it is.
Case = tuple[str, Callable[[], float]]


class Checks:
    """Runs checks in threads, since compiling takes most of the time; prints a line for each, counts failures."""

    def __init__(self, threads: int | None):
        self.failed = 0
        self._pool = ThreadPoolExecutor(threads)

    def run(self, name: str, cases: Iterable[Case], limit: float) -> None:
        """More than `limit` is wrong, and so is an error."""
        begin = time.perf_counter()
        futures = [(case, self._pool.submit(compute)) for case, compute in cases]
        worst, wrong = ("-", 0.0), []
        for case, future in futures:
            try:
                off = future.result()
                worst = max(worst, (case, off), key=lambda pair: pair[1])
                wrong += [] if off <= limit else [f"{case}: {off:.3g}"]
            except Exception as error:  # the others are still to be looked at
                wrong.append(f"{case}: {type(error).__name__}: {str(error)[:300]}")
        self.failed += bool(wrong)
        state = f"WRONG: {'; '.join(wrong)}" if wrong else "ok"
        about = f"{len(futures)} cases, worst {worst[1]:.3g} of {limit:g}: {worst[0]}"
        print(f"{name}: {state} ({about}, {time.perf_counter() - begin:.0f} s)", flush=True)


@functools.partial(jax.jit, static_argnames=("tile_rows", "implementation"))
def mlp(x, ids, weights, experts, layer, implementation, tile_rows=None):
    """`routed_mlp`, with a plan of `tile_rows` if given."""
    plan = None if tile_rows is None else make_plan(ids, experts.num_experts, tile_rows)
    return routed_mlp(x, ids, weights, experts, plan=plan, layer=layer, implementation=implementation)


def against_oracle(x, ids, weights, experts, layer=None, **static) -> float:
    """Error of the first `_FEW` tokens over that of rounding."""
    got = mlp(x, ids, weights, experts, None if layer is None else jnp.asarray(layer), **static)
    x, ids, weights = (np.asarray(a)[:_FEW] for a in (x, ids, weights))
    want = oracle(x, ids, weights, experts, layer)
    off = error(np.asarray(got)[:_FEW], want)
    unavoidable = error(oracle(x, ids, weights, experts, layer, np.float32, x.dtype), want)
    return 0.0 if off == 0 else float("inf") if np.isnan(off) else off / unavoidable


def values(name: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """Every activation with biases, in both dtypes; both layouts, all regimes, a stack of layers with a traced one."""
    check = functools.partial(against_oracle, implementation=name)
    for i, activation in enumerate(ACTIVATIONS):
        for dtype in (HALF, np.float16):
            layout = ("in_out", "out_in")[i % 2]
            experts = make_experts(6, 128, 192, activation=activation, dtype=dtype, layout=layout, biases=True)
            for count in (7, 150)[: len(tokens)]:
                operands = *make_tokens(count, 128, 6, 2, dtype), experts
                yield f"{activation} {np.dtype(dtype)} T={count}", functools.partial(check, *operands)
    for layout in ("in_out", "out_in"):
        experts = make_experts(5, 64, 128, layers=(3,), dtype=HALF, layout=layout)
        for count in tokens:
            operands = *make_tokens(count, 64, 5, 2, HALF), experts
            yield f"layer of a stack {layout} T={count}", functools.partial(check, *operands, layer=1)


def edges(name: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """Loads that are anything but even."""
    check = functools.partial(against_oracle, implementation=name)
    for num, choices in ((60, 4), (4, 4), (128, 8), (1, 1)):
        experts = make_experts(num, 128, 64, dtype=HALF)
        for count in tokens:
            x, ids, weights = make_tokens(count, 128, num, choices, HALF)
            yield f"E={num} k={choices} T={count}", functools.partial(check, x, ids, weights, experts)
            if num == 60:
                few = jnp.tile(jnp.arange(choices), (count, 1)).at[:, 0].set(59)
                yield f"a few experts take all, T={count}", functools.partial(check, x, few, weights, experts)
                none = ids.at[::2].set(-1).at[1::3, 1].set(num)
                yield f"ids that are none, T={count}", functools.partial(check, x, none, weights, experts)


def every_tile_size(name: str) -> Iterator[Case]:
    """Plans that were made elsewhere, of every size of tile that the kernels take."""
    experts = make_experts(5, 128, 128, dtype=HALF)
    operands = *make_tokens(203, 128, 5, 3, HALF), experts
    for rows in TILE_ROWS:
        yield f"tiles of {rows}", functools.partial(against_oracle, *operands, implementation=name, tile_rows=rows)


def not_a_number(name: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """A token of NaN stays by itself, and so do the kernels of an expert that nobody chose (elements that differ)."""
    experts = make_experts(6, 128, 64, dtype=HALF)
    spoiled = jax.tree.map(lambda w: w.at[5].set(jnp.nan), experts)

    def idle(x, ids, weights):
        clean, got = (np.asarray(mlp(x, ids, weights, e, None, name)) for e in (experts, spoiled))
        return float((got != clean).sum())

    def token(x, ids, weights):
        at = len(x) // 2
        clean, got = (np.asarray(mlp(row, ids, weights, experts, None, name)) for row in (x, x.at[at].set(jnp.nan)))
        return float((np.delete(got, at, 0) != np.delete(clean, at, 0)).sum() + (~np.isnan(got[at])).sum())

    for count in tokens:
        operands = make_tokens(count, 128, 5, 2, HALF)
        yield f"idle expert T={count}", functools.partial(idle, *operands)
        yield f"token T={count}", functools.partial(token, *operands)


def batches(name: str) -> Iterator[Case]:
    """A token's output does not depend on the batch that it is in (elements that differ)."""

    def compare(experts, count, *tokens):
        alone = np.concatenate([mlp(*(a[g : g + 1] for a in tokens), experts, None, name) for g in range(8)])
        got = np.asarray(mlp(*(a[:count] for a in tokens), experts, None, name))[:8]
        return float((got != alone[: len(got)]).sum())

    for num, width, hidden, choices in ((8, 256, 512, 2), (60, 512, 192, 4), (8, 256, 2048, 2), (4, 192, 2880, 3)):
        experts, tokens = make_experts(num, width, hidden, dtype=HALF), make_tokens(128, width, num, choices, HALF)
        for count in (2, 8, 9, 16, 32, 64, 128):
            yield f"E={num} D={width} F={hidden} T={count}", functools.partial(compare, experts, count, *tokens)


def gradients(name: str) -> Iterator[Case]:
    """Of input, weights and kernels, against those through the tile loop (relative, bfloat16); few tokens take it too.

    With experts of 64 and 256 hidden units and rows of 64 to 576, calls have few steps and many.
    """

    def loss(x, weights, experts, ids, name):
        return (routed_mlp(x, ids, weights, experts, implementation=name).astype(jnp.float32) ** 2).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=4)

    def worst(x, weights, experts, ids):
        found = [jax.tree.leaves(grads(x, weights, experts, ids, one)) for one in (name, "xla_tiles")]
        pairs = ([np.asarray(a).astype(np.float64) for a in pair] for pair in zip(*found, strict=True))
        return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)

    for tokens, width, hidden in ((40, 128, 64), (200, 64, 256), (700, 128, 448), (700, 576, 256)):
        experts = make_experts(5, width, hidden, dtype=HALF, biases=True)
        x, ids, weights = make_tokens(tokens, width, 5, 2, HALF)
        yield f"T={tokens} D={width} F={hidden}", functools.partial(worst, x, weights, experts, ids)


def routing(name: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """Ids (but in rows of NaN), counts and plans as XLA's, exactly; weights to 1e-6."""

    def both(operation, *args):
        runs = (jax.jit(functools.partial(operation, implementation=one)) for one in (name, "xla"))
        return [[np.asarray(leaf) for leaf in jax.tree.leaves(run(*args))] for run in runs]

    def choice(num, k, options, logits):
        got, want = both(functools.partial(route, k=k, **options), logits)
        clean = ~np.isnan(logits).any(1)
        off = (got[0] != want[0])[clean].sum() + (np.bincount(got[0].ravel(), minlength=num) != got[2]).sum()
        return float(off + (~np.isclose(got[1], want[1], rtol=1e-6, atol=1e-7, equal_nan=True)).sum())

    def plan(num, rows, ids):
        plans = both(functools.partial(make_plan, num_experts=num, tile_rows=rows), ids)
        return float(sum((a != b).sum() for a, b in zip(*plans, strict=True)))

    for rule, (num, k, options) in RULES.items():
        if options.get("score") == "sigmoid":
            options = options | {"bias": np.random.default_rng(1).standard_normal(num).astype(np.float32) / 4}
        for count in tokens:
            rng = np.random.default_rng(count)
            drawn = rng.standard_normal((count, num)).astype(np.float32)
            spoiled = np.where(rng.random((count, 1)) < 0.3, np.nan, drawn).astype(np.float32)
            for kind, logits in {"": drawn, "ties ": np.round(drawn), "NaN rows ": spoiled}.items():
                yield f"{rule} {kind}T={count}", functools.partial(choice, num, k, options, logits)
            ids = np.argsort(-drawn, 1)[:, :k].astype(np.int32)
            for rows in (8, 128):
                yield f"plan E={num} rows {rows} T={count}", functools.partial(plan, num, rows, ids)


def router_products(name: str) -> Iterator[Case]:
    """`route_tokens` for few tokens: weights of the same choices, against float32 products."""

    def compare(width, num, k, count):
        rng = np.random.default_rng(count)
        x = jnp.asarray(rng.standard_normal((count, width)), HALF)
        router = jnp.asarray(rng.standard_normal((width, num)) / np.sqrt(width), HALF)
        exact = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
        ids, weights, _ = jax.jit(functools.partial(route_tokens, k=k, implementation=name))(x, router)
        best = -np.sort(-np.asarray(exact), 1)[:, :k]
        ranked = np.abs(np.take_along_axis(np.asarray(exact), np.asarray(ids), 1) - best).max()
        return float(max(np.abs(weights - route(exact, k, forced=ids)[1]).max(), ranked))

    for width, num, k in ((2048, 128, 8), (2880, 32, 4), (4096, 8, 2), (192, 60, 4)):
        for count in (1, 2, 8, 33, 64):
            yield f"D={width} E={num} T={count}", functools.partial(compare, width, num, k, count)


def models(names: Iterable[str]) -> Iterator[Case]:
    """Two layers of real models, saved and loaded in bfloat16: the error of logits by what is chosen by default over
    that by the tile loop, both against float32."""
    for name in names:
        table = dict(moe_jax.ModelConfig.from_json_file(ROOT / "configs" / f"{name}.json").hub)
        few = {"num_hidden_layers": 2, "vocab_size": 512}
        few |= {"layer_types": table["layer_types"][:2]} if table.get("layer_types") else {}
        few |= {key: 1 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if table.get(key) is not None}
        model = moe_jax.Model.initialize(moe_jax.ModelConfig(table | few), dtype=HALF)
        with tempfile.TemporaryDirectory() as folder:
            moe_jax.save_pretrained(model, folder)
            exact = moe_jax.load_pretrained(folder, dtype="float32")
            loaded = [moe_jax.load_pretrained(folder, dtype="bfloat16", implementation=i) for i in (None, "xla_tiles")]

        def compare(ids, exact=exact, loaded=loaded):
            record = exact(ids, return_record=True)
            want = np.asarray(record.logits, np.float64)
            default, loop = (error(one(ids, routing=record), want) for one in loaded)
            return default / loop

        for count in (1, 30, 300):
            ids = np.random.default_rng(0).integers(2, 512, (1, count))
            yield f"{name} T={count}", functools.partial(compare, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", default="mosaic_gpu", help="of the expert MLP")
    parser.add_argument("--routing", default="triton", help="implementation of routing and plan")
    parser.add_argument("--models", default="olmoe-1b-7b-0924,qwen3-30b-a3b,gpt-oss-20b")
    parser.add_argument("--only", help="checks whose titles begin so, such as values,models")
    parser.add_argument("--quick", action="store_true", help="few numbers of tokens")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
    name = options.implementation
    checks = Checks(1 if name.endswith("interpreted") else os.cpu_count())  # the interpreter runs one kernel at a time
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {name}, {options.routing}")
    tokens = (1, 20) if options.quick else (1, 7, 8, 37, 150, 611)
    many = (1, 20) if options.quick else (1, 5, 32, 77, 1000, 4099, 16384)
    todo = {
        "values of the expert MLP, error over rounding's": (lambda: values(name, tokens), _STANDARD),
        "edges: uneven loads, error over rounding's": (lambda: edges(name, tokens), _STANDARD),
        "tiles of every size": (lambda: every_tile_size(name), _STANDARD),
        "nan, elements that differ": (lambda: not_a_number(name, tokens), 0),
        "batches: a token by itself and in others, elements that differ": (lambda: batches(name), 0),
        "gradients, relative to the tile loop's": (lambda: gradients(name), 0.01),
        "routing and plan, elements that differ": (lambda: routing(options.routing, many), 0),
        "router product, weights and logits": (lambda: router_products(options.routing), 2e-5),
        "models, error over the tile loop's": (lambda: models(options.models.split(",")), _STANDARD),
    }
    wanted = options.only.split(",") if options.only else [""]
    for one in wanted:
        if not any(title.startswith(one) for title in todo):
            parser.error(f"--only: no check's title begins with {one!r}; there are: {'; '.join(todo)}")
    for title, (cases, limit) in todo.items():
        if any(title.startswith(one) for one in wanted):
            checks.run(title, cases(), limit)
    return int(checks.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
