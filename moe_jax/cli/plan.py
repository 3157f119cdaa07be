"""`moe-jax plan`: what a model needs on devices that need not be there, from its compiled programs."""

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from ..axes import NAMED
from ..benchmarks.models import QUANTIZE, find_config, stored_as
from ..exchange import EXCHANGES
from ..planning import Job, Plan, Topology, as_json, as_text, make_plan, open_topology, search
from ..planning.devices import parse
from ..planning.report import estimates_as_text
from ..sharding.mesh import mesh_sizes
from .common import note

EXAMPLE = "moe-jax plan --model deepseek-v3 --topology v5p:8x8x4 --mesh expert=32,model=8 --batch 256 --context 4096"
#: Meshes that are compiled for in a search, if those before do not fit.
_TRIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--model", required=True, metavar="NAME|PATH", help="configs/NAME.json, a config.json, a folder"
    )
    where = "devices: v5e, v5p, v6e or tpu7x and a shape (v5p:8x8x8), h100 or h200 or cpu and a number (h100:8)"
    parser.add_argument("--topology", required=True, help=where)
    mesh = "sizes of data, expert and model, such as expert=32,model=8; their product is all devices"
    parser.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...", help=mesh)
    parser.add_argument("--search", action="store_true", help="try all meshes by a formula, compile for the best")
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="rows that run at once")
    parser.add_argument(
        "--context", type=int, default=4096, metavar="TOKENS", help="of each row, the new ones among it"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="how many of them are generated")
    parser.add_argument("--dtype", help="of weights and cache; bfloat16 if unset, on a CPU float32")
    parser.add_argument("--quantize", choices=QUANTIZE, help="weights (default: as released, none: as --dtype)")
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs per int8 scale; a row if unset")
    parser.add_argument("--kv-cache-dtype", choices=["int8"], help="keys and values in int8")
    parser.add_argument("--exchange", choices=list(EXCHANGES), help="between experts (default: by size)")
    rules = "tokens spread over the ranks that hold experts (default), or together on all; a search tries both"
    parser.add_argument("--rules", choices=list(NAMED), help=rules)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Plan, print. Returns 1 if the model does not fit."""
    if options.search == (options.mesh is not None):
        raise ValueError("mesh: give --mesh or --search, one of them")
    kind, _ = parse(options.topology)
    job = _job(options, kind)
    # The planned programs are nobody's to keep, and no device of this machine is needed.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(options.topology)
    if topology.note:
        note(topology.note)
    tables = (options.rules,) if options.rules else tuple(NAMED)
    plan = _search(job, topology, tables) if options.search else make_plan(job, topology, options.mesh, note)
    print(json.dumps(as_json(plan)) if options.json else as_text(plan))
    return 0 if plan.fits else 1


def _job(options: argparse.Namespace, kind: str) -> Job:
    path = Path(options.model)
    config = find_config(str(path / "config.json") if path.is_dir() else options.model)
    return Job(
        name=options.model,
        config=config,
        batch=options.batch,
        context=options.context,
        new=options.max_new_tokens,
        dtype=options.dtype or ("float32" if kind == "cpu" else "bfloat16"),
        quantize=stored_as(config, options.quantize),
        group_size=options.group_size,
        cache=options.kv_cache_dtype,
        exchange=options.exchange,
        rules=options.rules or "spread",
    )


def _search(job: Job, topology: Topology, tables: tuple[str, ...]) -> Plan:
    """The first of the likely best meshes whose programs fit; if none does, the last one that was tried."""
    found = search(job, topology, tables)
    note(f"{len(found)} meshes, by formula:\n{estimates_as_text(found, topology.device.memory)}")
    for one in found[:_TRIES]:
        note(f"mesh {', '.join(f'{name} {size}' for name, size in one.sizes.items())}, tokens {one.rules}")
        plan = make_plan(dataclasses.replace(job, rules=one.rules), topology, one.sizes, note)
        if plan.fits:
            break
        note("does not fit")
    return plan
