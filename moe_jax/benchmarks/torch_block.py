"""MoE blocks on torch, as CUDA graphs, in a process of their own: torch and JAX would share the device's memory.

    python -m moe_jax.benchmarks.torch_block < request.json

prints one line of JSON for each result: what `measure` returns.
"""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import torch_baseline
from .inputs import SCALE, Inputs, count
from .numerics import Standard
from .programs import Pace
from .shapes import MoEShape, find

HANDWRITTEN, TRANSFORMERS = "torch._grouped_mm", "transformers grouped_mm"
_ABOUT = "torch"


def measure(
    models: Sequence[str], tokens: Sequence[int], dtype: str, device: str, pace: Pace, seconds: float = 900
) -> list[dict[str, Any]]:
    """Results of a process of its own, which may take `seconds`: dictionaries with `model`, `tokens` and
    `implementation`, and then `seconds` of a block, `samples` and `error`, or a `note` that says what failed.
    """
    if torch_baseline.missing().startswith("torch"):
        return [_failure(model, g, _ABOUT, "torch: not installed") for model in models for g in tokens]
    request = dict(models=list(models), tokens=list(tokens), dtype=dtype, device=device, pace=dataclasses.asdict(pace))
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "moe_jax.benchmarks.torch_block"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, env=environment, timeout=seconds
        )
        output, failure = done.stdout, f"its process ended with status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, failure = (error.stdout or b"").decode(), f"stopped after {seconds:.0f} s"
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    done_cells = {(result["model"], result["tokens"]) for result in results}
    if failure:
        missing = [(model, g) for model in models for g in tokens if (model, g) not in done_cells]
        results += [_failure(model, g, _ABOUT, failure) for model, g in missing]
    return results


def _failure(model: str, tokens: int, implementation: str, note: str) -> dict[str, Any]:
    return {"model": model, "tokens": tokens, "implementation": implementation, "note": note}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors: `router [E, D]`, `gate_up [E, 2 F, D]`, `down [E, D, F]`, the storage of checkpoints."""

    router: Any
    gate_up: Any
    down: Any


def handwritten(shape: MoEShape, weights: Weights) -> Callable:
    """The block over `torch._grouped_mm`: sort, gather, one product for gate and up, SwiGLU, product, weighted sum."""
    torch = torch_baseline.torch()
    experts = torch.arange(shape.experts, device=weights.router.device)

    def block(x):
        scores = torch.softmax(x @ weights.router.T, -1, dtype=torch.float32)
        gates, ids = scores.topk(shape.top_k, -1)
        if shape.renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        of_row, order = ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(of_row, experts, right=True).int()
        both = torch._grouped_mm(x[order // shape.top_k], weights.gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, -1)
        out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, weights.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.bmm(gates.to(x.dtype)[:, None], out[back].view(*ids.shape, -1))[:, 0]

    return block


def of_transformers(shape: MoEShape, weights: Weights) -> Callable:
    """transformers' OLMoE block with its `grouped_mm` experts."""
    torch = torch_baseline.torch()
    hub = {
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": shape.renormalize,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(torch_baseline.olmoe_config(hub)).eval()
    parameter = lambda tensor: torch.nn.Parameter(tensor, requires_grad=False)
    block.gate.weight = parameter(weights.router)
    block.experts.gate_up_proj, block.experts.down_proj = parameter(weights.gate_up), parameter(weights.down)
    block.experts.config._experts_implementation = "grouped_mm"
    return lambda x: block(x[None])[0]


def _weights(shape: MoEShape, router: Any) -> Weights:
    randn = torch_baseline.torch().randn
    draw = lambda *sizes: SCALE * randn(shape.experts, *sizes, device=router.device, dtype=router.dtype)
    return Weights(router.T.contiguous(), draw(2 * shape.hidden, shape.width), draw(shape.width, shape.hidden))


_BLOCKS = {HANDWRITTEN: handwritten, TRANSFORMERS: of_transformers}


def expected(shape: MoEShape, weights: Weights, x: Any) -> np.ndarray:
    """The block's output for a few rows by float32 products, expert by expert.

    Only the logits are in x's dtype, as in the blocks: rounded otherwise, they could choose other experts.
    """
    torch = torch_baseline.torch()
    gates, ids = torch.softmax(x @ weights.router.T, -1, dtype=torch.float32).topk(shape.top_k, -1)
    x = x.float()
    if shape.renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for row in range(len(x)):
        for gate, expert in zip(gates[row], ids[row].tolist(), strict=True):
            hidden, up = (weights.gate_up[expert].float() @ x[row]).chunk(2)
            hidden = torch.nn.functional.silu(hidden) * up
            total[row] += gate * (weights.down[expert].float() @ hidden)
    return total.cpu().numpy()


def results(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of a request, one model and number of tokens after the other."""
    torch = torch_baseline.torch()
    pace, dtype = Pace(**request["pace"]), getattr(torch, request["dtype"])
    for model in request["models"]:
        shape = find(model)
        if not shape.plain:
            why = "computes softmax, SwiGLU, no biases only"
            yield from (_failure(model, g, HANDWRITTEN, why) for g in request["tokens"])
            continue
        inputs = Inputs.draw(shape, request["tokens"], request["dtype"])
        to = lambda array: torch.from_numpy(array.astype(np.float32)).to(request["device"], dtype)
        weights = _weights(shape, to(inputs.router))
        for g in request["tokens"]:
            picks = inputs.picks(g)
            x = to(inputs.stacked(g))
            exact = expected(shape, weights, torch.stack([x[pick] for pick in picks]))
            for name in _BLOCKS:
                about = {"model": model, "tokens": g, "implementation": name, "active": inputs.active(g)}
                try:
                    yield about | _one(_BLOCKS[name](shape, weights), list(x), picks, exact, pace)
                except Exception as error:  # a baseline that fails is a note, the others are still to be measured
                    yield _failure(model, g, name, f"{type(error).__name__}: {str(error)[:300]}")


def _one(block: Callable, x: list[Any], picks, exact: np.ndarray, pace: Pace) -> dict[str, Any]:
    torch = torch_baseline.torch()
    replay, outputs = captured(lambda: [block(one) for one in x], x[0].is_cuda)
    replay()
    got = torch.stack([outputs()[i][row] for i, row in picks]).float().cpu().numpy()
    error = Standard(exact, 0.0).check(got, ours=False)
    time = pace.measure(*(_awaited(replay) if x[0].is_cuda else (replay, lambda _: None)))
    return {"seconds": time.median / count(len(x[0])), "samples": len(time.samples), "error": error}


def _awaited(replay: Callable) -> tuple[Callable, Callable]:
    """`replay` as a call that returns an event, and what waits for that."""

    def call():
        replay()
        event = torch_baseline.torch().cuda.Event()
        event.record()
        return event

    return call, lambda event: event.synchronize()


def captured(run: Callable, cuda: bool) -> tuple[Callable, Callable]:
    """What replays `run`, as a CUDA graph on a GPU, and what gives the outputs of the last replay."""
    torch = torch_baseline.torch()
    last: list[Any] = []
    if not cuda:
        return lambda: last.__setitem__(slice(None), run()), lambda: last
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything to have run once, outside the default stream
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last += run()
    return graph.replay, lambda: last


if __name__ == "__main__":
    with torch_baseline.torch().no_grad():
        for result in results(json.load(sys.stdin)):
            print(json.dumps(result), flush=True)
            figure = f"{1e6 * result['seconds']:.1f} us" if "seconds" in result else result["note"]
            print(f"{result['model']} T={result['tokens']} {result['implementation']}: {figure}", file=sys.stderr)
