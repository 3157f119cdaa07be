"""What a `MoEInferenceConfig` resolves and checks when it is built; errors name the field and show the numbers."""

from typing import Any

from .values import ActivationFuncType, NormType, above_zero, at_least, dtype_name, member, one_of


def _put(config: Any, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the configuration is frozen, and this is still its construction


def stated_dtypes(config: Any) -> dict[str, str]:
    """What each field that is set says about the dtype of computation."""
    stated = {}
    if config.fp16:
        stated["fp16"] = "float16"
    if config.bf16:
        stated["bf16"] = "bfloat16"
    if config.dtype is not None:
        stated["dtype"] = "float16" if config.dtype == "int8" else config.dtype
    return stated


def resolve(config: Any) -> None:
    """Replace second spellings and unset values by what they stand for."""
    if config.dtype is not None:
        _put(config, "dtype", dtype_name(config.dtype))
    if config.dtype == "int8":
        _put(config, "q_int8", True)
    _put(config, "norm_type", member("norm_type", config.norm_type, NormType))
    _put(config, "mlp_act_func_type", member("mlp_act_func_type", config.mlp_act_func_type, ActivationFuncType))
    if config.noisy_gate_policy == "None":
        _put(config, "noisy_gate_policy", None)
    if config.intermediate_size <= 0:
        _put(config, "intermediate_size", 4 * config.hidden_size)
    if config.global_experts == 1 and config.moe_experts > 1:
        _put(config, "global_experts", config.moe_experts)
    if config.moe_experts == 1 and config.global_experts > 1:
        _put(config, "moe_experts", config.global_experts)


def check_sizes(config: Any) -> None:
    """Sizes, dtypes and the norm."""
    at_least(1, config, "hidden_size", "heads", "mp_size", "training_mp_size", "max_out_tokens", "min_out_tokens")
    if config.num_hidden_layers != -1:
        at_least(1, config, "num_hidden_layers")
    if config.hidden_size % config.heads:
        raise ValueError(f"heads: {config.heads} does not divide hidden_size {config.hidden_size}")
    if config.min_out_tokens > config.max_out_tokens:
        raise ValueError(f"min_out_tokens: {config.min_out_tokens} exceeds max_out_tokens {config.max_out_tokens}")
    if config.layer_norm_eps < 0:
        raise ValueError(f"layer_norm_eps: {config.layer_norm_eps} is negative")
    stated = stated_dtypes(config)
    if len(set(stated.values())) > 1:
        fields = ", ".join(f"{name}={getattr(config, name)!r}" for name in stated)
        raise ValueError(f"{' and '.join(stated)}: contradict each other ({fields})")
    if config.norm_type not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"norm_type: {config.norm_type} is not supported, only LayerNorm and RMSNorm")
    for name in ("heads", "kv_heads", "intermediate_size"):
        if getattr(config, name) % config.mp_size:
            raise ValueError(f"mp_size: {config.mp_size} does not divide {name} {getattr(config, name)}")


def check_attention(config: Any) -> None:
    """Heads, rotary positions, window."""
    if config.num_kv != -1:
        at_least(1, config, "num_kv")
        if config.heads % config.num_kv:
            raise ValueError(f"num_kv: {config.num_kv} does not divide heads {config.heads}")
    rotated, head = config.rotary_dim, config.head_dim
    if rotated != -1 and (rotated < 0 or rotated > head or rotated % 2):
        raise ValueError(f"rotary_dim: {rotated} is neither -1 nor even and at most the head's {head}")
    if rotated > 0 and not (config.rotate_half or config.rotate_every_two):
        raise ValueError(f"rotary_dim: {rotated} components, but rotate_half and rotate_every_two are both false")
    above_zero(config, "rope_theta")
    at_least(1, config, "window_size")
    if not config.mlp_after_attn:
        raise ValueError("mlp_after_attn: False (MLP beside attention, as in GPT-J) is not what a MoE layer computes")


def check_experts(config: Any) -> None:
    """Experts and gate."""
    if config.mlp_act_func_type == "UNKNOWN":
        raise ValueError("mlp_act_func_type: UNKNOWN (0) names no function")
    at_least(1, config, "moe_experts", "global_experts", "k")
    if config.global_experts % config.moe_experts:
        raise ValueError(
            f"global_experts: {config.global_experts} is not a multiple of moe_experts {config.moe_experts}"
        )
    if config.k > config.global_experts:
        raise ValueError(f"k: {config.k} experts per token out of global_experts {config.global_experts}")
    above_zero(config, "capacity_factor", "eval_capacity_factor")
    at_least(0, config, "min_capacity")
    one_of("noisy_gate_policy", config.noisy_gate_policy, (None, "Jitter", "RSample"))
    one_of("mlp_type", config.mlp_type, ("standard", "residual"))
    one_of("drop_policy", config.drop_policy, ("probs", "position", "gate", "probs_upstream"))
    one_of("gelu", config.gelu, (None, "tanh", "erf"))


def check_quantization(config: Any) -> None:
    """Groups of int8 weights."""
    at_least(1, config, "quantize_groups", "merge_count")
    if config.merge_count & (config.merge_count - 1):
        raise ValueError(f"merge_count: {config.merge_count} is not a power of two")
    if not config.q_int8:
        return
    width, mlp_groups = config.hidden_size, config.quantize_groups * (2 if config.mlp_extra_grouping else 1)
    for rows, groups in ((width, config.quantize_groups), (config.intermediate_size, mlp_groups)):
        if rows * width % groups:
            raise ValueError(f"quantize_groups: {groups} do not divide the {rows} x {width} elements of a weight")
