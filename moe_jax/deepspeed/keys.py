"""Names of DeepSpeed's configuration keys: which have no effect here and why, and which belong to the engine."""

import difflib
from collections.abc import Iterable

#: Keys of the layer's configuration that are accepted, checked and then change nothing, each with the reason.
WITHOUT_EFFECT: dict[str, str] = {
    "enable_qkv_quantization": "q_int8 quantises all large weights; DeepSpeed stores this flag and never reads it",
    "layer_id": "a layer's place is the argument layer_index; there is no counter shared by all layers",
    "local_rank": "JAX places arrays by device and mesh, not by a rank in the configuration",
    "min_out_tokens": "DeepSpeed compares it with free memory; here an array is allocated as asked, or fails at once",
    "mp_size": "the mesh's axis 'model' says how many devices share a layer; only divisibility is checked",
    "return_single_tuple": "the MoE layer never read it; return_tuple decides",
    "set_empty_params": "weights are read straight into place; no layer is ever built empty",
    "stochastic_mode": "inference has no stochastic kernels; DeepSpeed stores this flag and never reads it",
    "training_mp_size": "checkpoint files tell by their names into how many slices they were cut",
    "transposed_mode": "weights are given as the layer declares them, [in, out]; kernels choose their own layout",
    "triton_autotune": "kernels choose their tiles from shapes, without a search at the first call",
    "use_triton": "which kernel runs is the argument implementation, not configuration",
}

_MESH = "the mesh replaces process groups (EngineConfig.mesh_sizes, moe_jax.make_mesh)"
_INJECTION = "nothing is injected into a foreign model; load_pretrained and load_checkpoint build one"

#: The same for the engine's keys; a dot leads into a section.
ENGINE_WITHOUT_EFFECT: dict[str, str] = {
    "checkpoint_config": "DeepSpeed never reads it; the folder is an argument of load_checkpoint",
    "config": "a dictionary inside the dictionary; give its keys directly",
    "enable_cuda_graph": "compiled programs run as a whole already",
    "ep_group": _MESH,
    "ep_mp_group": _MESH,
    "injection_policy": _INJECTION,
    "injection_policy_tuple": _INJECTION,
    "keep_module_on_host": "weights are read piece by piece, straight to the device",
    "moe.ep_group": _MESH,
    "moe.ep_mp_group": _MESH,
    "mpu": _MESH,
    "quant.activation.q_groups": "activations stay in the working dtype",
    "quant.qkv.enabled": WITHOUT_EFFECT["enable_qkv_quantization"],
    "quant.weight.post_init_quant": "weights are quantised while they are loaded",
    "quant.weight.quantized_initialization": "weights are quantised while they are loaded",
    "replace_method": "DeepSpeed itself no longer reads it",
    "replace_with_kernel_inject": _INJECTION,
    "save_mp_checkpoint_path": "save_pretrained writes models; shards are cut while loading",
    "set_empty_params": WITHOUT_EFFECT["set_empty_params"],
    "tensor_parallel.mpu": _MESH,
    "tensor_parallel.tp_grain_size": "widths are cut evenly",
    "tensor_parallel.tp_group": _MESH,
    "training_mp_size": WITHOUT_EFFECT["training_mp_size"],
    "transposed_mode": WITHOUT_EFFECT["transposed_mode"],
    "triton_autotune": WITHOUT_EFFECT["triton_autotune"],
    "use_triton": WITHOUT_EFFECT["use_triton"],
    "zero": "ZeRO-Inference (weights off the device) has no counterpart; shard over a mesh",
}

#: Second names of the engine's keys, by section.
ENGINE_ALIASES: dict[str, dict[str, str]] = {
    "": {
        "args": "config",
        "ckpt_config": "checkpoint_config",
        "expert_group": "ep_group",
        "expert_mp_group": "ep_mp_group",
        "injection_dict": "injection_policy",
        "kernel_inject": "replace_with_kernel_inject",
        "max_tokens": "max_out_tokens",
        "min_tokens": "min_out_tokens",
        "tm": "triangular_masking",
        "tp": "tensor_parallel",
    },
    "moe": {"expert_group": "ep_group", "num_experts": "moe_experts"},
}

#: Old keys of the engine, and where their values belong now.
ENGINE_DEPRECATED: dict[str, tuple[str, str]] = {
    "ep_size": ("moe", "ep_size"),
    "moe_experts": ("moe", "moe_experts"),
    "moe_type": ("moe", "type"),
    "mp_size": ("tensor_parallel", "tp_size"),
}

#: Keys of the engine's top level that do something here.
ENGINE_KEYS = (
    "base_dir checkpoint dtype max_out_tokens min_out_tokens moe quant return_tuple tensor_parallel triangular_masking"
).split()


def engine_top_level() -> frozenset[str]:
    """All keys that may stand at the top of an engine's configuration, second and old names included."""
    ignored = (key for key in ENGINE_WITHOUT_EFFECT if "." not in key)
    return frozenset((*ENGINE_KEYS, *ignored, *ENGINE_ALIASES[""], *ENGINE_DEPRECATED))


def unknown_key(key: object, known: Iterable[str], owner: str) -> ValueError:
    """The error for a key that nothing knows, with the nearest one that something does.

    >>> unknown_key("hiden_size", ["heads", "hidden_size"], "MoEInferenceConfig")
    ValueError("MoEInferenceConfig: unknown key 'hiden_size'; the nearest known key is 'hidden_size'")
    """
    nearest = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)
    return ValueError(f"{owner}: unknown key {key!r}; the nearest known key is {nearest[0]!r}")
