"""Run every stored DeepSpeed case on this machine's default device and compare with DeepSpeed's outputs.

    python scripts/check_deepspeed.py

Gates, training layers, the inference layer in both data flows with decoding, checkpoints; float32 with the highest
matmul precision, at the tolerances of the golden arrays. Prints the worst difference of each kind; exits with 1 beyond.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moe_jax
from moe_jax import MoEInferenceConfig, router
from moe_jax.convert.deepspeed import layer_from_state_dict, load_checkpoint, moe_from_state_dict

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "deepspeed"
_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "experts": "moe_experts",
    "eps": "layer_norm_eps",
}
_FIELDS = {*_KEYS.values(), *MoEInferenceConfig.__dataclass_fields__}


def cases(kind: str) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Each case's description and arrays."""
    with np.load(FOLDER / f"{kind}.npz") as stored:
        arrays = dict(stored)
    for case in json.loads((FOLDER / f"{kind}.json").read_text()):
        prefix = case["name"] + "/"
        yield case, {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def weights_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case's state dict."""
    return {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}


def gates() -> Iterator[float]:
    """Differences of combine weights."""
    for kind in ("top1", "top2", "topk"):
        for case, arrays in cases(f"gating_{kind}"):
            numbers = case["capacity_factor"], case["min_capacity"]
            if kind == "top1":
                routing = router.top1_gating(arrays["logits"], *numbers, arrays.get("used_token"), case["drop_tokens"])
            elif kind == "top2":
                routing = router.top2_gating(arrays["logits"], *numbers, case["drop_tokens"])
            else:
                policy = {None: "probs", "probs": "probs_upstream"}.get(case["drop_policy"], case["drop_policy"])
                routing = router.topk_gating(arrays["logits"], case["k"], *numbers, case["drop_tokens"], policy)
            yield difference(routing.dense_combine_weights(), arrays["combine_weights"])


def training_layers() -> Iterator[float]:
    """Differences of outputs."""
    for case, arrays in cases("moe_layer"):
        y, _, _ = moe_from_state_dict(case, weights_of(arrays))(arrays["x"], arrays.get("used_token"))
        yield difference(y, arrays["output"])


def inference_layers() -> Iterator[float]:
    """Differences of outputs, at once and then token by token."""
    for case, arrays in cases("moe_inference_layer"):
        named = {_KEYS.get(name, name): value for name, value in case.items()}
        config = MoEInferenceConfig.from_dict({name: value for name, value in named.items() if name in _FIELDS})
        for flow in ("standard", "literal"):
            layer = layer_from_state_dict(config, weights_of(arrays), flow, case.get("layer_index", 0))
            y, past = layer(arrays["x"], arrays.get("mask"), use_cache=True)
            yield difference(y, arrays[f"{flow}/output"])
            for step in range(case.get("decode", 0)):
                token = arrays["decode_x"][:, step : step + 1]
                y, past = layer(token, layer_past=past, use_cache=True)
                yield difference(y, arrays[f"{flow}/decode_output"][:, step : step + 1])


def checkpoints() -> Iterator[float]:
    """Differences of logits."""
    for path in sorted(FOLDER.glob("checkpoint_*")):
        with np.load(path / "expected.npz") as expected:
            model = load_checkpoint(path, path / "config.json", dtype="float32")
            yield difference(model(expected["input_ids"]), expected["logits"])


def difference(got: Any, want: np.ndarray) -> float:
    """The largest absolute difference; infinite where shapes differ."""
    got = np.asarray(got)
    return float(np.abs(got - want).max()) if got.shape == want.shape else float("inf")


def main() -> int:
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"moe_jax {moe_jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    worst = {}
    for check, limit in ((gates, 2e-6), (training_layers, 2e-5), (inference_layers, 5e-5), (checkpoints, 5e-5)):
        found = list(check())
        worst[check.__name__] = max(found) / limit
        print(f"{check.__name__}: {len(found)} compared, within {max(found):.1e} (tolerance {limit:.0e})", flush=True)
    return int(max(worst.values()) > 1)


if __name__ == "__main__":
    sys.exit(main())
