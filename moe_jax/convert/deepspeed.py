"""From DeepSpeed: state dicts of its layers, checkpoints of its engine, its int8 weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ..axes import RULES, Axes
from ..checkpoint.load import load_weights
from ..checkpoint.source import Stored
from ..config import ModelConfig
from ..deepspeed.config import MoEInferenceConfig
from ..deepspeed.layer import MoEInference
from ..deepspeed.moe import MoE
from ..deepspeed.translate import DataFlow
from ..model import Model, named_implementations
from ..pretrained import working_dtype
from ..sharding import sharding_of
from .deepspeed_files import DeepSpeedFiles, open_checkpoint, stack_state_dicts
from .deepspeed_int8 import quantize_groups
from .deepspeed_settings import checkpoint_version, hub_config, read_settings

__all__ = ["layer_from_state_dict", "load_checkpoint", "load_layers", "moe_from_state_dict", "quantize_groups"]


def layer_from_state_dict(
    config: MoEInferenceConfig | Mapping[str, Any],
    weights: Mapping[str, Any],
    data_flow: DataFlow = "standard",
    layer_index: int = 0,
    implementation: str | None = None,
) -> MoEInference:
    """A `MoEInference` layer from the state dict of upstream's `DeepSpeedMoEInference`.

    `config`: the layer's, or its dictionary; `weights`: arrays under upstream's names, kernels `[in, out]`; the rest
    as in `MoEInference`. Raises `ValueError` that names what is missing, unknown or misshapen.

    >>> config = MoEInferenceConfig(hidden_size=4, heads=2, moe_experts=1, return_tuple=False)
    >>> shapes = {"attention.attn_qkvw": (4, 12), "attention.attn_qkvb": (12,), "attention.attn_ow": (4, 4),
    ...     "mlp.0.inter_w": (4, 16), "mlp.0.inter_b": (16,), "mlp.0.output_w": (16, 4), "moe_gate.wg.weight": (1, 4)}
    >>> shapes |= {n: (4,) for n in "norm_w norm_b attn_nw attn_nb attention.attn_ob mlp.0.output_b".split()}
    >>> layer = layer_from_state_dict(config, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    >>> layer(np.ones((1, 2, 4), np.float32)).shape
    (1, 2, 4)
    """
    if not isinstance(config, MoEInferenceConfig):
        config = MoEInferenceConfig.from_dict(config)
    return MoEInference(config, weights, data_flow=data_flow, layer_index=layer_index, implementation=implementation)


#: Names of an expert's two linear maps: Megatron's, then those of common modules.
_EXPERT_NAMES = (("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"), ("wi", "wo"), ("linear1", "linear2"), ("0", "2"))


def moe_from_state_dict(
    config: MoEInferenceConfig | Mapping[str, Any], weights: Mapping[str, Any], implementation: str | None = None
) -> MoE:
    """A layer from the state dict of upstream's `deepspeed.moe.layer.MoE`, residual or not.

    `config`: a `MoEInferenceConfig`, or a dictionary of the arguments of upstream's `MoE` (`k`, `eval_capacity_factor`,
    `min_capacity`, `drop_tokens`, `use_residual`, ...), of `drop_policy` (where "probs" is upstream's, our
    `probs_upstream`) and of `gelu` (`tanh` or `erf`). Sizes come from the weights; stated ones must agree.
    `weights`: kernels `[out, in]`, as torch's Linear; names may have a prefix. Experts are two linear maps with biases
    under one of the usual pairs of names.
    Raises `ValueError` that names what is missing, unknown or misshapen.
    """
    found = _without_prefix({name: np.asarray(value) for name, value in weights.items()})
    settings = read_settings(config)
    router = _pop(found, "deepspeed_moe.gate.wg.weight")
    count, width = router.shape
    experts = [_linear_pair(found, f"deepspeed_moe.experts.deepspeed_experts.{e}.") for e in range(count)]
    for e, expert in enumerate(experts):
        odd = {name: w.shape for name, w in expert.items() if w.shape != experts[0][name].shape}
        if odd:
            raise ValueError(f"weights: expert {e} has {odd}, unlike expert 0")
    hidden, residual = experts[0]["up"].shape[0], "coefficient.weight" in found
    _check_sizes(settings.sizes, hidden_size=width, intermediate_size=hidden, num_experts=count, use_residual=residual)
    given: dict[str, Any] = {"gate": router, "experts": {n: np.stack([e[n] for e in experts]) for n in experts[0]}}
    if residual:
        mix = {"mix": _pop(found, "coefficient.weight"), "mix_bias": _pop(found, "coefficient.bias")}
        given["residual"] = _linear_pair(found, "mlp.") | mix
    if found:
        raise ValueError(f"weights: unknown {sorted(found)} for {count} experts")
    return MoE(
        width,
        hidden,
        num_experts=count,
        activation=settings.activation,
        use_residual=residual,
        implementation=implementation,
        dtype=router.dtype,
        weights=given,
        **settings.gate,
    )


def _without_prefix(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names from `deepspeed_moe.`, `mlp.` and `coefficient.` on, whatever module the layer stood in."""
    gates = [name for name in weights if name.endswith("deepspeed_moe.gate.wg.weight")]
    if len(gates) != 1:
        raise ValueError(f"weights: expected one deepspeed_moe.gate.wg.weight, found {gates or sorted(weights)}")
    prefix = gates[0].removesuffix("deepspeed_moe.gate.wg.weight")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _pop(found: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in found:
        raise ValueError(f"weights: missing {name}")
    return found.pop(name)


def _linear_pair(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """An MLP's two linear maps with biases under one of the known pairs of names, taken out of `found`."""
    for first, second in _EXPERT_NAMES:
        if f"{prefix}{first}.weight" in found:
            names = {"up": f"{first}.weight", "up_bias": f"{first}.bias"}
            names |= {"down": f"{second}.weight", "down_bias": f"{second}.bias"}
            return {ours: _pop(found, prefix + theirs) for ours, theirs in names.items()}
    raise ValueError(f"weights: no pair of linear maps under {prefix}: known are {_EXPERT_NAMES}")


def _check_sizes(stated: Mapping[str, Any], **found: Any) -> None:
    for name, value in found.items():
        if stated.get(name, value) != value:
            raise ValueError(f"{name}: {stated[name]} in the config, {value} in the weights")


def load_checkpoint(
    path: str | os.PathLike,
    config: MoEInferenceConfig | Mapping[str, Any] | str | os.PathLike,
    tag: str | None = None,
    dtype: Any = "auto",
    implementation: str | Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
    rules: Axes = RULES,
) -> Model:
    """A whole model out of the files that DeepSpeed's engine saved for a Megatron GPT with MoE layers.

    Args: `path`: the folder with `latest`, or of one tag. `config`: what the files do not say: a
    `MoEInferenceConfig`, or a dictionary (or its JSON file) with `heads`, `k`, `eval_capacity_factor`,
    `min_capacity`, `drop_tokens`, `drop_policy`, `layer_norm_eps`, `gelu`, `checkpoint_version`, under these or
    Megatron's names; sizes in it must agree with the files. `tag`: which save, if not the latest. `dtype`,
    `implementation`, `mesh`, `rules`: as in `load_pretrained`.

    Slices of several model-parallel ranks are merged; no pickle is ever executed. Save the model with
    `save_pretrained` as a safetensors folder, which `load_pretrained` reads. Raises `OSError` for files, `ValueError`
    for a config, that do not fit.

    >>> folder = "tests/golden/deepspeed/checkpoint_standard"
    >>> model = load_checkpoint(folder, folder + "/config.json")
    >>> model.config.hub["num_experts"], model([[1, 2, 3]]).shape
    ([0, 4, 0, 4], (1, 3, 96))
    """
    settings = read_settings(config)
    dtype = working_dtype(dtype)
    _, exchange = named_implementations(implementation)  # refuses unknown names before anything is read
    heads, version = settings.rest.get("heads"), checkpoint_version(settings)
    files = open_checkpoint(Path(path), tag, num_heads=heads, checkpoint_version=version)
    try:
        source = _Source(files)
        model_config = ModelConfig.from_dict(hub_config(settings, files))
        sharding = sharding_of(mesh, rules, exchange)
        loaded = load_weights(source, model_config, dtype, sharding=sharding)
    finally:
        files.close()
    return Model(model_config, loaded.weights, implementation=implementation, sharding=loaded.sharding)


class _Source:
    """The engine's files as the loader's `TensorSource`."""

    def __init__(self, files: DeepSpeedFiles):
        self.folder, self._tensors = files.folder, files.tensors
        self.tensors = {
            name: Stored(tuple(t.shape), "plain", str(t.dtype), int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize)
            for name, t in files.tensors.items()
        }

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        return self._tensors[name].read()

    def view(self, name: str) -> np.ndarray:
        return self.read(name)

    def close(self) -> None:
        pass


def load_layers(
    path: str | os.PathLike,
    config: MoEInferenceConfig | Mapping[str, Any],
    data_flow: DataFlow = "standard",
    tag: str | None = None,
) -> list[MoEInference]:
    """A stack of `MoEInference` layers out of an engine's files that hold such a stack, in order.

    Each layer's index is its place in the stack. Raises `OSError` for files and `ValueError` for weights that do not
    fit.
    """
    states = stack_state_dicts(Path(path), tag)
    return [layer_from_state_dict(config, state, data_flow, index) for index, state in enumerate(states)]
