"""`MoEInferenceConfig` and upstream's weights in the terms of the one transformer block."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from pallas_kernels import Activation

from ..block_config import (
    Architecture,
    AttentionConfig,
    BlockConfig,
    LayerConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from ..routing import GateRule
from ..weights import Parameter, parameters
from .config import MoEInferenceConfig, NormType

DataFlow = Literal["standard", "literal"]


def attention_config(config: MoEInferenceConfig) -> AttentionConfig:
    """Fused QKV attention; upstream scales scores by `1/sqrt(head_dim)`, by `1/head_dim` with muP, or not at all."""
    size = config.head_dim
    if config.bigscience_bloom and config.kv_heads != config.heads:
        raise ValueError(f"num_kv: {config.kv_heads} beside heads {config.heads}; Bloom has as many")
    rope = None
    if config.rotary_dim > 0:
        turns = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
        frequencies = tuple(float(f) for f in float(config.rope_theta) ** -turns)
        rope = RopeConfig(frequencies=frequencies, interleaved=not config.rotate_half)
    scale = 1.0
    if config.scale_attention:
        scale = 1 / size if config.use_mup else size**-0.5
    return AttentionConfig(
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=size,
        value_dim=size,
        scale=scale,
        rope=rope,
        qkv_bias=True,
        out_bias=True,
        causal=config.triangular_masking,
        alibi=config.bigscience_bloom,
    )


def block_config(config: MoEInferenceConfig, data_flow: DataFlow = "standard") -> BlockConfig:
    """The block of `MoEInference`; `literal`: attention's output replaces its input, as upstream's code has it."""
    if data_flow not in ("standard", "literal"):
        raise ValueError(f"data_flow: {data_flow!r} is neither standard nor literal")
    rms = config.norm_type == NormType.RMSNorm
    mlp = MLPConfig(hidden=config.intermediate_size, activation=Activation(config.activation), bias=True)
    residual = config.mlp_type == "residual"
    return BlockConfig(
        width=config.hidden_size,
        norm=NormConfig(
            kind="rms" if rms else "layer",
            epsilon=config.layer_norm_eps,
            place="pre" if config.pre_layer_norm else "last",
        ),
        attention=attention_config(config),
        router=router_config(config),
        experts=mlp,
        shared=mlp if residual else None,
        mix="shared_first" if residual else None,
        skip_attention=data_flow == "standard",
    )


def router_config(config: MoEInferenceConfig) -> RouterConfig:
    """The gate in inference: evaluation's capacity, no noise."""
    return RouterConfig(
        num_experts=config.num_experts,
        top_k=config.k,
        rule=GateRule.of(
            config.k, config.eval_capacity_factor, config.min_capacity, config.drop_tokens, config.drop_policy
        ),
    )


def layer_config(config: MoEInferenceConfig, layer_index: int) -> LayerConfig:
    """What depends on the layer: the window, and scores divided by `layer_index + 1` where the config says so."""
    if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 0:
        raise ValueError(f"layer_index: expected a whole number of at least 0, got {layer_index!r}")
    inverse = config.scale_attn_by_inverse_layer_idx and config.scale_attention
    return LayerConfig(
        moe=True,
        window=config.window_size if config.local_attention else None,
        score_divisor=float(layer_index + 1) if inverse else 1.0,
    )


def layer_parameters(block: BlockConfig, layer: LayerConfig) -> dict[str, Parameter]:
    """The parameters of one layer, each with a leading axis of length one."""
    table = parameters(Architecture(block=block, layers=(layer,), vocab_size=1, context=1, tied=True))
    return {name: p for name, p in table.items() if p.layers is not None}


def layer_weights(config: MoEInferenceConfig, block: BlockConfig, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Upstream's `state_dict` of a layer as our parameters `{dotted name: [1, ...]}`.

    `given`: arrays under upstream's names, kernels `[in, out]`. Raises `ValueError` that names what is missing,
    unknown or misshapen. Norm weights that upstream's MLPs carry without using them are left out.
    """
    found = {name: np.asarray(value) for name, value in given.items()}
    whole = sorted(name for name, value in found.items() if value.dtype.kind in "biu")
    if whole:
        raise ValueError(f"weights: integers in {whole}; pass floats, and q_int8 in the config for int8 weights")
    ours = _translate(config, found)
    table = layer_parameters(block, layer_config(config, 0))
    for name, parameter in table.items():
        if ours[name].shape != parameter.shape[1:]:
            raise ValueError(f"{name}: shape {ours[name].shape}, expected {parameter.shape[1:]}")
    return {name: ours[name][None] for name in table}


_UNUSED = re.compile(r"(mlp\.\d+|res_mlp)\.attn_n[wb]")


def _translate(config, given):
    given = {name: value for name, value in given.items() if not _UNUSED.fullmatch(name)}
    wanted = _names(config)
    missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
    if missing or unknown:
        raise ValueError(f"weights: missing {missing}, unknown {unknown} for {config.num_experts} experts")
    ours = {
        "attention_norm.scale": given["norm_w"],
        "mlp_norm.scale": given["attn_nw"],
        "moe.router": given["moe_gate.wg.weight"],
    }
    if config.norm_type == NormType.LayerNorm:
        ours |= {"attention_norm.bias": given["norm_b"], "mlp_norm.bias": given["attn_nb"]}
    fused = {name: given[f"attention.{name}"] for name in ("attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob")}
    ours |= attention_weights(config, fused)
    experts = [_mlp(config, given, f"mlp.{e}.") for e in range(config.num_experts)]
    ours |= {f"moe.{name}": np.stack([expert[name] for expert in experts]) for name in experts[0]}
    if config.mlp_type == "residual":
        ours |= {f"shared.{name}": value for name, value in _mlp(config, given, "res_mlp.").items()}
        ours["shared.mix"] = given["res_coef"].T
    return ours


def _names(config) -> set[str]:
    mlp = ("inter_w", "inter_b", "output_w", "output_b")
    names = {f"attention.attn_{name}" for name in ("qkvw", "qkvb", "ow", "ob")}
    names |= {"norm_w", "attn_nw", "moe_gate.wg.weight"}
    names |= {"norm_b", "attn_nb"} if config.norm_type == NormType.LayerNorm else set()
    names |= {f"mlp.{e}.{name}" for e in range(config.num_experts) for name in mlp}
    if config.mlp_type == "residual":
        names |= {"res_coef"} | {f"res_mlp.{name}" for name in mlp}
    return names


def attention_weights(config: MoEInferenceConfig, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Upstream's fused attention weights `attn_qkvw`, `attn_qkvb`, `attn_ow`, `attn_ob` as our parameters."""
    heads, size, width = config.heads, config.head_dim, config.hidden_size
    rows = (heads + 2 * config.kv_heads) * size
    shapes = {"attn_qkvw": (width, rows), "attn_qkvb": (rows,), "attn_ow": (heads * size, width), "attn_ob": (width,)}
    found = {name: np.asarray(value) for name, value in given.items()}
    if set(found) != set(shapes):
        raise ValueError(f"weights: {sorted(found)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(f"{name}: shape {found[name].shape}, expected {shape}")
    ours = {"attention.o": found["attn_ow"].T.reshape(width, heads, size), "attention.o_bias": found["attn_ob"]}
    for fused, suffix in (("attn_qkvw", ""), ("attn_qkvb", "_bias")):
        parts = _split_qkv(config, found[fused].T)
        ours |= {f"attention.{name}{suffix}": part for name, part in zip("qkv", parts, strict=True)}
    return ours


def _split_qkv(config, fused):
    """Queries, keys, values `[heads, head_dim, ...]` out of fused rows: one after another, head by head for Bloom."""
    size, rest = config.head_dim, fused.shape[1:]
    if config.bigscience_bloom:
        by_head = fused.reshape(config.heads, 3, size, *rest)
        return [by_head[:, i] for i in range(3)]
    counts = (config.heads, config.kv_heads, config.kv_heads)
    parts = np.split(fused, np.cumsum(counts[:2]) * size)
    return [part.reshape(count, size, *rest) for part, count in zip(parts, counts, strict=True)]


def _mlp(config, given, prefix):
    """One MLP's kernels, output first. Of a gated one, upstream's fused first kernel holds `up`, then `gate`."""
    kernels = {"up": given[prefix + "inter_w"].T, "down": given[prefix + "output_w"].T}
    biases = {"up_bias": given[prefix + "inter_b"], "down_bias": given[prefix + "output_b"]}
    if not Activation(config.activation).gated:
        return kernels | biases
    hidden = config.intermediate_size
    if len(kernels["up"]) != 2 * hidden or len(biases["up_bias"]) != 2 * hidden:
        raise ValueError(f"{prefix}inter_w: {len(kernels['up'])} columns, expected 2 * {hidden} for a gated activation")
    halves = {"gate": kernels["up"][hidden:], "gate_bias": biases["up_bias"][hidden:]}
    halves |= {"up": kernels["up"][:hidden], "up_bias": biases["up_bias"][:hidden]}
    return kernels | biases | halves
