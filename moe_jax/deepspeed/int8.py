"""Int8 weights of a `MoEInference` layer, with upstream's groups over each flattened matrix."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedArray
from pallas_kernels.quantized import quantize_runs

from .config import MoEInferenceConfig


def quantize_layer(config: MoEInferenceConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters `{dotted name: [1, ...]}` with the kernels of attention and of MLPs in int8.

    Each matrix has `quantize_groups * merge_count` groups, twice as many in MLPs with `mlp_extra_grouping`; queries,
    keys and values are one matrix, as upstream stores them (Bloom's: head by head). Raises `ValueError` where rows of
    that matrix do not divide into its groups.
    """
    groups = config.quantize_groups * config.merge_count
    of_mlp = groups * (2 if config.mlp_extra_grouping else 1)
    made = dict(weights)
    order = None
    if config.bigscience_bloom:
        rows = np.arange(3 * config.hidden_size).reshape(3, config.heads, config.head_dim)
        order = rows.swapaxes(0, 1).reshape(-1)
    made |= _fused({f"attention.{name}": weights[f"attention.{name}"] for name in "qkv"}, groups, order=order)
    made["attention.o"] = quantize_runs(weights["attention.o"], groups, lead=1)
    for group, lead in (("moe", 2), ("shared", 1)):
        kernels = {name: w for name, w in weights.items() if name.startswith(f"{group}.") and name.endswith(_KERNELS)}
        made |= {name: quantize_runs(w, of_mlp, lead) for name, w in kernels.items() if name.endswith("down")}
        first = {name: w for name, w in kernels.items() if not name.endswith("down")}
        if first:
            made |= _fused(first, of_mlp, lead)
    return made


_KERNELS = (".up", ".down", ".gate")


def _fused(
    kernels: dict[str, Any], groups: int, lead: int = 1, order: np.ndarray | None = None
) -> dict[str, QuantizedArray]:
    """Kernels `[*lead, *out, in]` quantised as the one matrix that they are rows of.

    `order`: which of their rows, counted one kernel after another, stands in each row of that matrix; None: as counted.
    """
    rows = {name: w.reshape(*w.shape[:lead], -1, w.shape[-1]) for name, w in kernels.items()}
    whole = jnp.concatenate(list(rows.values()), axis=lead)
    count = whole.shape[lead]
    if count % groups:
        raise ValueError(f"quantize_groups: {groups} do not divide the {count} rows of {', '.join(kernels)}")
    order = np.arange(count) if order is None else order
    quantized = quantize_runs(whole[..., order, :], groups, lead)
    scales = jnp.repeat(quantized.scales, count // groups, axis=-1)[..., None]  # one for each row
    values, scales = (a[..., np.argsort(order), :] for a in (quantized.values, scales))
    parts, start = {}, 0
    for name, w in kernels.items():
        end = start + rows[name].shape[lead]
        part, scale = (a[..., start:end, :].reshape(*w.shape[:-1], -1) for a in (values, scales))
        parts[name] = QuantizedArray(part, scale, quantized.dtype)
        start = end
    return parts
