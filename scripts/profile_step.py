"""Profile decode steps (or a prefill) of a model with random weights: time by stage, launches, gaps, one layer.

example: python scripts/profile_step.py --model olmoe --layers 4 --batch 32 --check 1
"""

import argparse
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.benchmarks.hlo import weight_movements  # noqa: E402
from moe_jax.benchmarks.models import QUANTIZE, find_config, make, stored_as  # noqa: E402
from moe_jax.benchmarks.profile import profile, summary  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[-1])
    parser.add_argument(
        "--model", required=True, help="olmoe, qwen3, gptoss, mixtral, configs/NAME.json by name, or a path"
    )
    parser.add_argument("--layers", type=int, help="the model's first layers only")
    parser.add_argument("--what", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=10, help="decode steps in the trace")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=QUANTIZE, help="weights (default: as released; none: as --dtype)")
    parser.add_argument("--implementation", help="of the experts")
    parser.add_argument("--trace", metavar="DIR", help="keep the trace here")
    parser.add_argument("--program", metavar="FILE", help="write the compiled program here")
    parser.add_argument("--check", type=float, metavar="MB", help="fail if the program copies pieces of so many MB")
    options = parser.parse_args()
    try:
        config = find_config(options.model, options.layers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    form = stored_as(config, options.quantize)
    model = make(config, options.dtype, form, options.implementation)
    found = profile(model, options.batch, options.prompt, options.steps, options.what, options.trace)
    about = f"{options.dtype}{f', {form} weights' if form else ''}"
    sizes = f"{found.layers} layers, B={options.batch}, prompt {options.prompt}"
    print(f"{options.what} of {options.model}, {sizes}, {about}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(*summary(found), sep="\n")
    if options.program:
        Path(options.program).write_text(found.program)
    moved = [] if options.check is None else weight_movements(found.program, int(1e6 * options.check))
    print(*(f"MOVED {one}" for one in moved), sep="\n")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
