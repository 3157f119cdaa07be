"""`MoEInferenceConfig`: DeepSpeed's configuration of a MoE inference layer, by its own keys, frozen and checked."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checks, keys, values
from .keys import WITHOUT_EFFECT
from .values import ActivationFuncType, NormType

__all__ = ["ALIASES", "WITHOUT_EFFECT", "ActivationFuncType", "MoEInferenceConfig", "NormType"]

_log = logging.getLogger(__name__)

#: Second names of keys: DeepSpeed stores `layer_norm_eps` as `epsilon`, so dumped dictionaries have that.
ALIASES = {"epsilon": "layer_norm_eps"}

# (function, form of the GELU): its name for `pallas_kernels.Activation`
_ACTIVATIONS = {
    ("GELU", "tanh"): "gelu_tanh",
    ("GELU", "erf"): "gelu",
    ("GATED_GELU", "tanh"): "geglu_tanh",
    ("GATED_GELU", "erf"): "geglu",
    ("ReLU", "tanh"): "relu",
    ("ReLU", "erf"): "relu",
    ("GATED_SILU", "tanh"): "swiglu",
    ("GATED_SILU", "erf"): "swiglu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEInferenceConfig:
    """All keys of DeepSpeed's `DeepSpeedMoEInferenceConfig` and `DeepSpeedInferenceConfig`, with their defaults.

    `hidden_size` and `heads` are needed; `num_hidden_layers` -1 means not stated. `intermediate_size <= 0` becomes
    `4 * hidden_size`. Of `moe_experts` (experts of one rank) and `global_experts` (all) one suffices: while the other
    is 1 it takes the same number. `dtype` takes the names of DeepSpeed and dtypes of NumPy, JAX and torch; `int8` sets
    `q_int8` and computes in float16. `norm_type` and `mlp_act_func_type` take names or DeepSpeed's numbers and hold
    names. A query sees its own and the `window_size - 1` positions before it, if `local_attention`. With
    `rotary_dim > 0`, `rotate_half` wins over `rotate_every_two`, which is true by default. Of the two capacity factors
    inference uses `eval_capacity_factor`.

    Keys of our own: `drop_policy` (what a full expert keeps where `k` is above 2: `probs` higher logits, `gate` higher
    probabilities, `position` earlier tokens; the default `probs_upstream` is DeepSpeed's faulty ranking, under which
    its models were trained), `gelu` (`tanh` or `erf`; None: tanh for GELU and erf for GATED_GELU, as DeepSpeed's
    kernels), and with `q_int8` `quantize_groups` (per weight), `mlp_extra_grouping` (twice as many in MLPs),
    `merge_count` (slices that were merged into one weight, each with its own groups).

    Wrong values are `ValueError`s. Keys in `WITHOUT_EFFECT` are accepted, and logged if they are not at their default.

    >>> config = MoEInferenceConfig(hidden_size=32, heads=4, global_experts=8, k=2, fp16=True)
    >>> config.intermediate_size, config.moe_experts, config.head_dim, config.activation, config.working_dtype
    (128, 8, 8, 'gelu_tanh', 'float16')
    >>> MoEInferenceConfig(hidden_size=32, heads=5)
    Traceback (most recent call last):
    ValueError: heads: 5 does not divide hidden_size 32
    """

    hidden_size: int = -1
    intermediate_size: int = -1
    heads: int = -1
    num_hidden_layers: int = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    mp_size: int = 1
    fp16: bool = False
    bf16: bool = False
    dtype: Any = None
    q_int8: bool = False
    pre_layer_norm: bool = True
    norm_type: Any = "LayerNorm"
    stochastic_mode: bool = False
    scale_attention: bool = True
    triangular_masking: bool = True
    local_attention: bool = False
    window_size: int = 256
    rotary_dim: int = -1
    rotate_half: bool = False
    rotate_every_two: bool = True
    return_tuple: bool = True
    return_single_tuple: bool = False
    mlp_after_attn: bool = True
    mlp_act_func_type: Any = "GELU"
    training_mp_size: int = 1
    bigscience_bloom: bool = False
    max_out_tokens: int = 1024
    min_out_tokens: int = 1
    enable_qkv_quantization: bool = False
    use_mup: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    set_empty_params: bool = False
    transposed_mode: bool = False
    use_triton: bool = False
    triton_autotune: bool = False
    num_kv: int = -1
    rope_theta: float = 10000.0
    invert_mask: bool = True
    moe_experts: int = 1
    global_experts: int = 1
    k: int = 1
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0
    min_capacity: int = 1
    noisy_gate_policy: str | None = None
    drop_tokens: bool = True
    use_rts: bool = False
    mlp_type: str = "standard"
    drop_policy: str = "probs_upstream"
    gelu: str | None = None
    quantize_groups: int = 1
    mlp_extra_grouping: bool = False
    merge_count: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, values.typed(field.name, getattr(self, field.name), field.type))
        checks.resolve(self)
        checks.check_sizes(self)
        checks.check_attention(self)
        checks.check_experts(self)
        checks.check_quantization(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in WITHOUT_EFFECT and value != field.default:
                _log.info("%s=%r has no effect: %s", field.name, value, WITHOUT_EFFECT[field.name])

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "MoEInferenceConfig":
        """From a dictionary of keys, such as DeepSpeed dumps or `to_dict` gives.

        `epsilon` is a second name of `layer_norm_eps`, `layer_id` is dropped (see `WITHOUT_EFFECT`). An unknown key, or
        one of the inference engine's configuration, is a `ValueError` that says where it belongs.

        >>> MoEInferenceConfig.from_dict({"hidden_size": 32, "heads": 4, "epsilon": 1e-5}).layer_norm_eps
        1e-05
        """
        if not isinstance(entries, Mapping):
            raise ValueError(f"config: expected a dictionary, got {type(entries).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {}
        for key, value in entries.items():
            name = ALIASES.get(key, key)
            if key == "layer_id":
                if values.typed(key, value, int) != -1:
                    _log.info("%s=%r has no effect: %s", key, value, WITHOUT_EFFECT[key])
                continue
            if (name not in names and key in keys.engine_top_level()) or (
                key == "moe_experts" and isinstance(value, (list, tuple))
            ):
                raise ValueError(
                    f"{key}: belongs to the configuration of DeepSpeed's inference engine; use "
                    "EngineConfig.from_dict(...).layer_config(hidden_size=..., heads=...)"
                )
            if name not in names:
                raise keys.unknown_key(key, names | ALIASES.keys() | {"layer_id"}, cls.__name__)
            if name in known and known[name] != value:
                raise ValueError(f"{name}: {known[name]!r} and {value!r} are given, the key has two names")
            known[name] = value
        return cls(**known)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "MoEInferenceConfig":
        """From a JSON file with these keys. `OSError` if it cannot be read or is not JSON."""
        return cls.from_dict(values.read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """All keys as plain JSON values; `from_dict` gives an equal configuration.

        >>> config = MoEInferenceConfig(hidden_size=32, heads=4, dtype="half")
        >>> entries = config.to_dict()
        >>> entries["dtype"], entries["norm_type"], MoEInferenceConfig.from_dict(entries) == config
        ('float16', 'LayerNorm', True)
        """
        return dataclasses.asdict(self)

    @property
    def num_experts(self) -> int:
        """Experts in all, on all ranks, `E`."""
        return self.global_experts

    @property
    def head_dim(self) -> int:
        """Width of a head, `H`."""
        return self.hidden_size // self.heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, `K`: `num_kv`, or as many as query heads."""
        return self.num_kv if self.num_kv > 0 else self.heads

    @property
    def activation(self) -> str:
        """The experts' activation, by its name in `pallas_kernels.Activation`."""
        form = self.gelu or ("erf" if self.mlp_act_func_type == "GATED_GELU" else "tanh")
        return _ACTIVATIONS[self.mlp_act_func_type, form]

    @property
    def working_dtype(self) -> str:
        """The dtype of computation, by name: float32 unless `fp16`, `bf16` or `dtype` say otherwise.

        >>> config = MoEInferenceConfig(hidden_size=32, heads=4, dtype="int8")
        >>> config.working_dtype, config.q_int8
        ('float16', True)
        """
        return next(iter(checks.stated_dtypes(self).values()), "float32")
