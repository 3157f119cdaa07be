"""Time training steps of a model with random weights, beside transformers on torch: model FLOP utilisation.

example: python scripts/bench_train.py --model olmoe --layers 4 --batch 8 --length 2048 --unroll 4 --torch grouped_mm
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Dense bfloat16 products of an H100 SXM, by its data sheet.
PEAK = 989e12
#: Steps of a profile.
_PROFILED = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[-1])
    parser.add_argument("--model", default="olmoe", help="olmoe, qwen3, mixtral, configs/NAME.json by name, or a path")
    parser.add_argument("--layers", type=int, default=4, help="the model's first layers only")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--dtype", default="bfloat16", help="of computation")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--unroll", type=int, default=1, help="layers that are compiled as one turn of the loop")
    parser.add_argument("--implementation", help="of the experts")
    parser.add_argument("--peak", type=float, default=PEAK, help="FLOP/s that utilisation is a share of")
    parser.add_argument("--torch", metavar="NAME,...", help="also transformers with these implementations of experts")
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step that take most time")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only-torch", metavar="EXPERTS:WEIGHTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_torch:
        print(json.dumps(of_torch(options, *options.only_torch.split(":"))))
        return 0
    rows = []
    if options.torch:  # each in a process of its own, which leaves the memory to the next one
        for experts in options.torch.split(","):
            for weights in ("bfloat16", "float32"):
                rows.append(apart(f"{experts}:{weights}"))
                print(json.dumps(rows[-1]), flush=True)
    rows.append(ours(options))
    print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        row["mfu"] = rows[-1]["flops"] / (1e-3 * row["ms"]) / options.peak if "ms" in row else None
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2))
    return 0


def ours(options) -> dict:
    import jax
    import numpy as np

    from moe_jax.benchmarks.kernels import kernels_of
    from moe_jax.benchmarks.models import find_config
    from moe_jax.benchmarks.work import prefill_flops
    from moe_jax.model import Model
    from moe_jax.train import Data, Optimizer, Settings, Training

    config = find_config(options.model, options.layers)
    data = Data(corpus="", length=options.length, batch_size=options.batch)
    more = dict(
        dtype=options.dtype,
        remat=options.remat,
        unroll=options.unroll,
        optimizer=Optimizer(warmup=2, learning_rate=1e-4),
    )
    settings = Settings(model=config.to_dict(), data=data, steps=1000, **more)
    training = Training(config.architecture, settings, implementation=options.implementation)
    state = training.start(Model.initialize(config, dtype="float32").arrays())
    vocab = config.architecture.vocab_size
    rng = np.random.default_rng(0)
    batches = [training.put(rng.integers(0, vocab, (options.batch, options.length + 1), np.int32)) for _ in range(4)]
    begin = time.perf_counter()
    step = training.step.lower(state, batches[0]).compile()
    compiled = time.perf_counter() - begin
    losses, samples = [], []
    for turn in range(options.steps + 3):
        begin = time.perf_counter()
        state, report = step(state, batches[turn % 4])
        losses.append(float(report.losses.cross_entropy))
        samples.append(time.perf_counter() - begin)
    if not np.isfinite(losses).all() or not losses[-1] < losses[0]:
        raise ValueError(f"losses: {losses}")
    begin = time.perf_counter()
    for turn in range(options.steps):  # as the loop of moe_jax.train runs them: one ahead
        state, report = step(state, batches[turn % 4])
    jax.block_until_ready(state)
    ahead = (time.perf_counter() - begin) / options.steps
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for turn in range(_PROFILED):
                    state, report = step(state, batches[turn])
                jax.block_until_ready(state)
            print(longest(kernels_of(folder, jax.devices()[0].platform != "cpu")), flush=True)
    flops = 3 * prefill_flops(config.architecture, options.batch, options.length)
    # prefill makes logits for one position of each row
    flops += 3 * 2 * vocab * config.architecture.block.width * options.batch * (options.length - 1)
    memory = step.memory_analysis()
    device = jax.devices()[0]
    return {
        "name": f"moe_jax{', remat' if options.remat else ''}, unroll {options.unroll}",
        "ms": 1e3 * ahead,
        "ms_waited_for": 1e3 * statistics.median(samples[3:]),
        "compile_s": compiled,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "peak_gb": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        "losses": [losses[0], losses[-1]],
        "flops": flops,
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
    }


def longest(kernels) -> str:
    """A table of kernels by name: milliseconds and launches of a step."""
    seconds, counts = collections.Counter(), collections.Counter(kernel.name for kernel in kernels)
    for kernel in kernels:
        seconds[kernel.name] += kernel.seconds
    lines = ["| kernel | ms a step | launches |", "| --- | --- | --- |"]
    for name, total in seconds.most_common(40):
        lines.append(f"| {name[:70]} | {1e3 * total / _PROFILED:.3f} | {counts[name] / _PROFILED:.1f} |")
    return "\n".join(
        [*lines, f"| all | {1e3 * sum(seconds.values()) / _PROFILED:.3f} | {len(kernels) / _PROFILED:.1f} |"]
    )


def apart(only: str) -> dict:
    """`of_torch` in another process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only-torch", only]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        return {"name": f"transformers {only}", "note": "no result in 150 s"}
    if done.returncode:
        return {"name": f"transformers {only}", "note": " ".join(done.stderr.split())[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def of_torch(options, experts: str, weights: str) -> dict:
    """transformers' model trained with torch's fused AdamW; weights in bfloat16, or in float32 under autocast."""
    import torch
    import transformers

    from moe_jax.benchmarks.models import find_config

    hub = find_config(options.model, options.layers).to_dict()
    config = transformers.AutoConfig.for_model(**hub)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    kind = dict(dtype=getattr(torch, weights), attn_implementation="sdpa", experts_implementation=experts)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, **kind)
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
    rows = [torch.randint(0, config.vocab_size, (options.batch, options.length), device=device) for _ in range(4)]
    auto = weights == "float32" and options.dtype == "bfloat16"

    def step(ids):
        with torch.autocast(device, torch.bfloat16, enabled=auto):
            loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    losses = [float(step(rows[turn % 4])) for turn in range(4)]
    wait()
    begin = time.perf_counter()
    for turn in range(options.steps):
        loss = step(rows[turn % 4])
    wait()
    seconds = (time.perf_counter() - begin) / options.steps
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    kind = "autocast" if auto else weights
    found = {"name": f"transformers {experts}, {kind}", "ms": 1e3 * seconds, "peak_gb": peak, "versions": versions}
    return found | {"losses": [losses[0], float(loss)]}


def table(rows: list[dict]) -> str:
    lines = ["| step | ms | utilisation | peak GB | compile s |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['name']} | {row['note']} | | | |")
            continue
        compiled = f"{row['compile_s']:.0f}" if "compile_s" in row else ""
        lines.append(f"| {row['name']} | {row['ms']:.1f} | {row['mfu']:.1%} | {row['peak_gb']:.1f} | {compiled} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
