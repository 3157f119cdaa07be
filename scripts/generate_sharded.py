"""Generate with a model over many devices, in one process or several: one program for all of them.

    python scripts/generate_sharded.py FOLDER --mesh expert=8 --emulate 8
    JAX_COORDINATOR_ADDRESS=localhost:9911 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python scripts/generate_sharded.py ...
    srun -n 4 python scripts/generate_sharded.py FOLDER --mesh data=2,expert=8

Processes find each other as `moe_jax.distributed.initialize` says: by these variables, or by Slurm, Open MPI, Cloud TPU
or Kubernetes. The first one prints the ids, one row a line. `--emulate N`: N CPU devices in each process.
"""

import argparse
import itertools
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moe_jax
from moe_jax.distributed import initialize
from moe_jax.sharding.mesh import mesh_sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a model as `moe_jax.load_pretrained` takes it")
    parser.add_argument(
        "--mesh", type=mesh_sizes, default={}, metavar="AXIS=N,...", help="sizes of data, expert, model"
    )
    parser.add_argument(
        "--prompt", type=_ids, action="append", metavar="ID,...", help="token ids of a row; several rows"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--exchange", help="how tokens meet experts (default: by size)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--emulate", type=int, metavar="N", help="N CPU devices in each process")
    parser.add_argument("--repeat", type=int, default=1, help="how often; 0: until the end of the process")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for all processes")
    options = parser.parse_args()
    if options.emulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.emulate)
    initialize(timeout=options.timeout)
    named = {"exchange": options.exchange} if options.exchange else None
    mesh = moe_jax.make_mesh(**options.mesh)
    model = moe_jax.load_pretrained(options.folder, options.dtype, mesh, named)
    width = max(map(len, options.prompt or [[1]]))
    prompt = [[0] * (width - len(row)) + row for row in options.prompt or [[1]]]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in options.prompt or [[1]]]
    given = dict(max_new_tokens=options.max_new_tokens, eos_token_id=())
    for turn in itertools.count(1):
        ids = moe_jax.generate(model, prompt, mask, **given)
        if jax.process_index() == 0 and turn == 1:
            print(*(" ".join(map(str, row)) for row in ids[:, width:].tolist()), sep="\n", flush=True)
        if turn == options.repeat:
            return 0


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
