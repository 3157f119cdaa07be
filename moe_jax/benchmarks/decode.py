"""Greedy decoding of a made-up OLMoE model, against transformers with the same weights."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import ModelConfig, generate, save_pretrained
from ..generation import bucket
from ..model import Model
from ..weights import flattened
from . import torch_baseline
from .block import check_close
from .table import Row
from .timing import Setting, Timing, in_turns, load_average, once, share
from .work import active_experts, recorded

_BARS = {1: 2.0, 8: 2.5}
#: Tokens that the probe which picks transformers' best setting makes.
_PROBE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of an OLMoE model: layers `L`, widths `D` and `F`, experts `E`, choices `k`, vocabulary `V`, heads."""

    layers: int = 16
    width: int = 512
    hidden: int = 256
    experts: int = 32
    top_k: int = 4
    vocab: int = 32000
    heads: int = 8

    def __str__(self):
        return f"L={self.layers} D={self.width} F={self.hidden} E={self.experts} k={self.top_k} V={self.vocab}"

    def hub(self, context: int) -> dict[str, Any]:
        """The hub dictionary, for sequences of up to `context` tokens."""
        return {
            "model_type": "olmoe",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": context,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """How much is generated: `prompt` and `new` tokens in each row."""

    prompt: int = 32
    new: int = 128


def run(shape: ModelShape, batches: Sequence[int], run: Run, setting: Setting) -> list[Row]:
    """Rows of ours and of transformers' best setting for each batch size, float32.

    Logits of the prompt must agree, else `ValueError`; where greedy ids part, if they do, is reported.
    """
    if run.new < 2 or run.prompt < 1:
        raise ValueError(f"decode: {run.new} new tokens after {run.prompt}; at least 2 and 1 are needed")
    model = Model.initialize(ModelConfig.from_dict(shape.hub(2 * (run.prompt + run.new))), seed=0)
    peer = None
    if setting.torch and not torch_baseline.missing():
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder)
            peer = torch_baseline.Decoder(folder)
    rows = []
    for batch in batches:
        rows += _at(shape, batch, run, model, peer, setting)
    return rows


def _at(shape: ModelShape, batch: int, run: Run, model: Model, peer: Any, setting: Setting) -> list[Row]:
    ids = np.random.default_rng(batch).integers(2, shape.vocab, (batch, run.prompt), dtype=np.int32)
    ours = lambda new: generate(model, ids, max_new_tokens=new, eos_token_id=())
    made, first_seconds = once(lambda: ours(run.new))
    calls, note, best = {"moe_jax": ours}, torch_baseline.missing() if setting.torch else "", None
    if peer is not None:
        check_close("logits of the prompt", np.asarray(model(ids)), peer.logits(ids), 1e-3)
        best, theirs = _best(peer, ids, run.new)
        calls[best] = theirs
        note = _agreement(made[:, run.prompt :], theirs(run.new)[:, run.prompt :])
    # Prefill and one token apart: the difference is what `new - 1` steps take.
    timed = {f"{name} {new}": lambda turn, c=c, new=new: c(new) for name, c in calls.items() for new in (run.new, 1)}
    times = in_turns(timed, setting.repeats)
    active = active_experts(recorded(model, ids, run.new), run.new)
    rows = []
    for name in calls:
        whole, prefill = times[f"{name} {run.new}"], times[f"{name} 1"]
        steps = [(a - b) / (run.new - 1) for a, b in zip(whole.samples, prefill.samples, strict=True)]
        step = Timing(tuple(steps)).median
        mine = name == "moe_jax"
        compared = mine and best is not None
        rows.append(
            Row(
                case="decode",
                implementation=name,
                device=setting.device,
                dtype="float32",
                shape=f"B={batch} {shape} prompt {run.prompt} new {run.new}",
                compile_ms=1e3 * (first_seconds - whole.median) if mine else None,
                steady_ms=1e3 * step,
                roofline=share(setting, step, *_work(model, batch, active, run)),
                baseline=best if compared else None,
                speedup=whole.faster_than(times[f"{best} {run.new}"]) if compared else None,
                bar=_BARS.get(batch) if compared else None,
                values={
                    "tokens/s": batch * run.new / whole.median,
                    "prefill and first token, ms": 1e3 * prefill.median,
                    "load average": load_average(),
                },
                note=note if mine else "steady: ms a step",
            )
        )
    return rows


def _best(peer: Any, ids: np.ndarray, new: int):
    """transformers' fastest setting for these prompts, by a short probe: its name and the call."""
    calls = {}
    for implementation in torch_baseline.IMPLEMENTATIONS:
        for cache in ("dynamic", "static"):
            name = f"transformers {implementation}, {cache} cache"
            calls[name] = lambda new, i=implementation, c=cache: peer.generate(i, c, ids, new)
    probe = {name: lambda turn, c=call: c(min(_PROBE, new)) for name, call in calls.items()}
    times = in_turns(probe, repeats=3)
    best = min(times, key=lambda name: times[name].median)
    return best, calls[best]


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Whether new tokens `[B, new]` are the same, and where they part.

    >>> _agreement(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]]))
    'greedy ids part in 1 of 2 rows, first at new token 1 (rounding: logits agree)'
    """
    apart = ours != theirs
    if not apart.any():
        return f"all {ours.size} greedy ids agree"
    first = int(np.argmax(apart.any(0)))
    rows = int(apart.any(1).sum())
    return f"greedy ids part in {rows} of {len(ours)} rows, first at new token {first} (rounding: logits agree)"


def _work(model: Model, batch: int, active: float, run: Run) -> tuple[float, float]:
    """Operations and bytes of one step: every weight outside the experts, active experts and the cache, once."""
    block = model.architecture.block
    sizes = {name: a.size for name, a in flattened(model.arrays()).items()}
    experts = sum(sizes[f"moe.{name}"] for name in ("gate", "up", "down"))
    per_expert = experts / (len(model.architecture.moe_layers) * block.router.num_experts)
    plain = sum(sizes.values()) - experts - sizes["embedding"]
    layers, attention = len(model.architecture.layers), block.attention
    columns = bucket(run.prompt) + run.new / 2
    cached = 2 * layers * batch * columns * attention.num_kv_heads * attention.head_dim
    chosen = block.router.top_k * len(model.architecture.moe_layers)
    return 2 * batch * (plain + chosen * per_expert) + 2 * cached, 4 * (plain + active * per_expert + cached)
