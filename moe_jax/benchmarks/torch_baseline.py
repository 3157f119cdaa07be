"""What we compare with: transformers on torch, imported only when asked for; on GPUs `torch_block` does it."""

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
#: `batched_mm` copies the weights of every routed row; beyond this many bytes it is not worth waiting for.
_COPY_LIMIT = 2 * 10**9


def missing() -> str:
    """Which of torch and transformers are absent, "" if none: "transformers: not installed"."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)}: not installed" if absent else ""


def versions() -> dict[str, str]:
    """Versions of torch and transformers, "not installed" where absent."""
    found = {}
    for name in ("torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def torch() -> Any:
    """The module, with as many threads as there are cores."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def feasible(rows: int, width: int, hidden: int) -> tuple[str, ...]:
    """Expert implementations worth timing for `rows` routed rows of float32.

    >>> feasible(rows=8, width=2048, hidden=1024), feasible(rows=4096, width=2048, hidden=1024)
    (('eager', 'grouped_mm', 'batched_mm'), ('eager', 'grouped_mm'))
    """
    return IMPLEMENTATIONS if rows * 3 * width * hidden * 4 <= _COPY_LIMIT else IMPLEMENTATIONS[:2]


def olmoe_config(values: Mapping[str, Any]) -> Any:
    """transformers' configuration of an OLMoE model from a hub dictionary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import OlmoeConfig

        return OlmoeConfig(**{name: value for name, value in values.items() if name != "model_type"})


class Block:
    """transformers' `OlmoeSparseMoeBlock` with given weights.

    `router [E, D]`, `gate` and `up` `[E, F, D]`, `down [E, D, F]`, float32; `values`: the hub configuration.
    """

    def __init__(self, values: Mapping[str, Any], router: Any, gate: Any, up: Any, down: Any):
        self._torch = torch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
        config = olmoe_config(values)
        with self._torch.device("meta"):
            self._block = OlmoeSparseMoeBlock(config).eval()
        tensor = lambda array: self._torch.nn.Parameter(self._torch.from_numpy(np.array(array)), requires_grad=False)
        self._block.gate.weight = tensor(router)
        self._block.experts.gate_up_proj = tensor(np.concatenate([gate, up], 1))
        self._block.experts.down_proj = tensor(down)

    def __call__(self, implementation: str, x: Any) -> Any:
        """The block's output `[G, D]` for a tensor `[G, D]`."""
        self._block.experts.config._experts_implementation = implementation
        with self._torch.no_grad():
            return self._block(x[None])[0]

    def tensor(self, array: Any) -> Any:
        """An array as a tensor."""
        return self._torch.from_numpy(np.array(array))


class Decoder:
    """transformers' model of a folder in float32, for greedy generation."""

    def __init__(self, folder: str | Path):
        self._torch = torch()
        self._model = load(folder, "float32").eval()
        self._model.generation_config.eos_token_id = None  # never stop: both sides make the same number of tokens

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits `[B, T, V]` of prompts `[B, T]`."""
        with self._torch.no_grad():
            return self._model(self._torch.from_numpy(ids).long()).logits.numpy()

    def generate(self, implementation: str, cache: str, ids: np.ndarray, new: int) -> np.ndarray:
        """Greedy ids `[B, T + new]`; `cache`: "dynamic" or "static"."""
        self._model.set_experts_implementation(implementation)
        prompt = self._torch.from_numpy(ids).long()
        out = self._model.generate(
            prompt,
            attention_mask=self._torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,  # what `generate` does by itself on a CPU
        )
        return out.numpy()


def load(folder: str | Path, dtype: str) -> Any:
    """transformers' model of a folder with its weights in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch(), dtype))


def sums(model: Any, names: Sequence[str]) -> list[float]:
    """Sums of parameters in float64, to see that loading brought what was written."""
    parameters = dict(model.named_parameters())
    return [float(parameters[name].double().sum()) for name in names]
