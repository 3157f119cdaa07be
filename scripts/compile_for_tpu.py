"""Compile the TPU kernels for TPUs that are not here, by libtpu, and print what each takes of a core's memory.

    pip install -e '.[tpu]'
    python scripts/compile_for_tpu.py [--generations v5e,v5p,v6e] [--models mixtral,qwen3] [--tokens 1,1024] [--json F]

Every kernel on one layer of a stack of two, for the shapes of real models: the expert MLP in bfloat16 and int8,
routing, and ranks of choices where there are any (few tokens need none). Prints a Markdown table for each kernel
(docs/tpu.md); exits with 1 if anything does not compile.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.planning import open_topology  # noqa: E402
from moe_jax.planning.kernels import kernels  # noqa: E402
from pallas_kernels import Experts, make_plan, route, routed_mlp  # noqa: E402
from pallas_kernels.expert_mlp import tpu_tilings  # noqa: E402
from pallas_kernels.plan import tpu as plan_tpu  # noqa: E402
from pallas_kernels.quantized import QuantizedArray  # noqa: E402

#: One chip of each, in the least topology that libtpu knows.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7": "tpu7x:2x2x1"}
TOKENS = (1, 8, 64, 1024, 8192)


@dataclasses.dataclass(frozen=True)
class Model:
    """Widths, experts of a layer, choices of a token, and how its router chooses."""

    width: int
    hidden: int
    experts: int
    choices: int
    activation: str = "swiglu"
    biases: bool = False
    rule: tuple[tuple[str, Any], ...] = ()


_DEEPSEEK = (("score", "sigmoid"), ("groups", 8), ("top_groups", 4), ("scale", 2.5))
#: By short names. Of DeepSeek-V3's 256 experts the 32 that one of eight ranks holds: all do not fit in a v5e's memory.
MODELS = {
    "mixtral": Model(4096, 14336, 8, 2),
    "qwen3": Model(2048, 768, 128, 8),
    "olmoe": Model(2048, 1024, 64, 8, rule=(("renormalize", False),)),
    "gpt-oss": Model(2880, 2880, 32, 4, "swiglu_clamped", True),
    "deepseek-v3": Model(7168, 2048, 32, 8, rule=_DEEPSEEK),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one program: the kernel's bytes of a core's memory, how it is cut, and seconds to compile; or the error."""

    vmem: int
    cut: str
    seconds: float
    error: str = ""


@functools.cache
def mesh_of(generation: str) -> Mesh:
    """A mesh of one device."""
    return Mesh(np.array(open_topology(TOPOLOGIES[generation]).devices[:1]), ("x",))


def build(generation: str, function: Callable, name: str, *shapes: Any, cut: str = "") -> Result:
    """Compile `function` of arrays of these shapes for a device, and look for its kernel."""
    mesh, begin = mesh_of(generation), time.perf_counter()
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = jax.jit(function).lower(*jax.tree.map(place, shapes)).compile().as_text()
    except Exception as error:  # whatever a compiler says is a row of the table
        return Result(0, cut, time.perf_counter() - begin, str(error).strip().splitlines()[0])
    found = [one for one in kernels(text) if one.name == name]
    error = "" if found else f"no {name} in the program"
    return Result(max((one.vmem for one in found), default=0), cut, time.perf_counter() - begin, error)


def experts_of(model: Model, kind: str) -> Experts:
    """Shapes of two layers' experts, `kind` "bfloat16" or "int8"."""
    lead, dtype = (2, model.experts), jnp.bfloat16

    def kernel(out, inputs):
        if kind == "bfloat16":
            return jax.ShapeDtypeStruct((*lead, out, inputs), dtype)
        values, scales = ((*lead, out, inputs), jnp.int8), ((*lead, out, 1), jnp.float32)
        return QuantizedArray(jax.ShapeDtypeStruct(*values), jax.ShapeDtypeStruct(*scales), jnp.dtype(dtype))

    bias = lambda n: jax.ShapeDtypeStruct((*lead, n), dtype) if model.biases else None
    return Experts(
        gate=kernel(model.hidden, model.width),
        up=kernel(model.hidden, model.width),
        down=kernel(model.width, model.hidden),
        gate_bias=bias(model.hidden),
        up_bias=bias(model.hidden),
        down_bias=bias(model.width),
        activation=model.activation,
        layout="out_in",
    )


def expert_mlp(generation: str, model: Model, kind: str, tokens: int) -> Result:
    """The expert MLP of one layer of a stack."""
    experts, choices = experts_of(model, kind), (tokens, model.choices)
    run = lambda *given: routed_mlp(*given[:4], layer=given[4], implementation="tpu")
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        one = tpu_tilings.choose(tokens, tokens * model.choices, experts, 2, tpu_tilings.generation())
    cut = f"{'in place' if one.in_place else f'rows {one.rows}'}, {one.hidden}"
    shapes = (tokens, model.width), choices, choices
    x, ids, weights = map(jax.ShapeDtypeStruct, shapes, (jnp.bfloat16, jnp.int32, jnp.float32))
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return build(generation, run, "moe_jax_expert_mlp_tpu", x, ids, weights, experts, layer, cut=cut)


def routing(generation: str, model: Model, tokens: int) -> Result:
    """The choice of experts; of all 256 where a rank holds 32."""
    experts = 256 if model.experts == 32 and model.rule else model.experts
    run = lambda logits: route(logits, model.choices, **dict(model.rule), implementation="tpu")
    return build(generation, run, "moe_jax_routing_topk_tpu", jax.ShapeDtypeStruct((tokens, experts), jnp.float32))


def ranks(generation: str, model: Model, tokens: int) -> Result | None:
    """The plan in tiles of 128 rows; None for a plan in place."""
    ids = jax.ShapeDtypeStruct((tokens, model.choices), jnp.int32)
    if plan_tpu.refuse(ids, model.experts, 128):
        return None
    run = lambda ids: make_plan(ids, model.experts, 128, implementation="tpu")
    return build(generation, run, "moe_jax_routing_rank_tpu", ids)


def cases(generations: list[str], models: list[str], tokens: list[int]):
    """Kernel, model, kind, tokens, generation, and what compiles it."""
    for name in models:
        model = MODELS[name]
        for kind in ("bfloat16", "int8"):
            for count in tokens:
                for target in generations:
                    yield (
                        "expert MLP",
                        name,
                        kind,
                        count,
                        target,
                        functools.partial(expert_mlp, target, model, kind, count),
                    )
        for count in tokens:
            for target in generations:
                yield "routing", name, "float32", count, target, functools.partial(routing, target, model, count)
                yield "ranks", name, "int32", count, target, functools.partial(ranks, target, model, count)


def table(kernel: str, found: dict, generations: list[str]) -> str:
    """The results of one kernel in Markdown: VMEM of each generation, and how the kernel is cut where it varies."""
    lines = [f"| {kernel} | tokens | {' | '.join(generations)} |", "|---|---" + "|---" * len(generations) + "|"]
    for model, kind, tokens in dict.fromkeys((m, k, t) for n, m, k, t, _ in found if n == kernel):
        cells = [_cell(found[kernel, model, kind, tokens, target]) for target in generations]
        if any(cells):
            lines.append(f"| {model}, {kind} | {tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.error:
        return f"FAILED: {re.sub('[|]', '/', result.error)[:80]}"
    size = f"{result.vmem / 2**20:.1f} MiB" if result.vmem >= 1 << 20 else f"{result.vmem / 2**10:.0f} KiB"
    return size + (f" ({result.cut})" if result.cut else "")


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", default="v5e,v5p,v6e", help=f"of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all results there")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    generations, models = options.generations.split(","), options.models.split(",")
    for target in generations:
        mesh_of(target)
    found, begin = {}, time.perf_counter()

    def run(case):
        *key, compile_it = case
        result = compile_it()
        if result is not None:
            print(*key, result.error or f"{result.vmem / 2**20:.1f} MiB", f"{result.seconds:.1f} s", file=sys.stderr)
        return tuple(key), result

    with ThreadPoolExecutor(options.threads) as pool:
        found = dict(pool.map(run, cases(generations, models, list(map(int, options.tokens.split(","))))))
    for kernel in dict.fromkeys(key[0] for key in found):
        print(table(kernel, found, generations), end="\n\n")
    made = [result for result in found.values() if result is not None]
    failed = sum(bool(result.error) for result in made)
    print(f"{len(made)} programs in {time.perf_counter() - begin:.0f} s, {failed} failed")
    if options.json:
        names = "kernel", "model", "kind", "tokens", "generation"
        rows = [dict(zip(names, key, strict=True)) | dataclasses.asdict(one) for key, one in found.items() if one]
        options.json.write_text(json.dumps(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
