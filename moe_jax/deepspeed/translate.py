"""`MoEInferenceConfig` and upstream's weights in the terms of the one transformer block."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
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
    unknown, misshapen or not of floats. Norm weights that upstream's MLPs carry without using them are left out.
    """
    given = {name: w for name, w in given.items() if not _UNUSED.fullmatch(name)}
    if config.norm_type == NormType.RMSNorm:  # which has no biases, though upstream's layer holds some
        given = {n: w for n, w in given.items() if n not in ("norm_b", "attn_nb") or np.asarray(w).any()}
    given = _checked(_shapes(config), given)
    ours = {
        "attention_norm.scale": given["norm_w"],
        "mlp_norm.scale": given["attn_nw"],
        "moe.router": given["moe_gate.wg.weight"],
    }
    if config.norm_type == NormType.LayerNorm:
        ours |= {"attention_norm.bias": given["norm_b"], "mlp_norm.bias": given["attn_nb"]}
    ours |= attention_weights(config, {name: given[f"attention.{name}"] for name in _attention_shapes(config)})
    experts = [_mlp(config, given, f"mlp.{e}.") for e in range(config.num_experts)]
    ours |= {f"moe.{name}": np.stack([expert[name] for expert in experts]) for name in experts[0]}
    if config.mlp_type == "residual":
        ours |= {f"shared.{name}": value for name, value in _mlp(config, given, "res_mlp.").items()}
        ours["shared.mix"] = given["res_coef"].T
    return {name: ours[name][None] for name in layer_parameters(block, layer_config(config, 0))}


_UNUSED = re.compile(r"(mlp\.\d+|res_mlp)\.attn_n[wb]")


def _checked(shapes, given) -> dict[str, np.ndarray]:
    """`given` as arrays, if it has exactly the names and `shapes` wanted, all of floats."""
    found = {name: np.asarray(value) for name, value in given.items()}
    missing, unknown = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or unknown:
        raise ValueError(f"weights: missing {missing}, unknown {unknown}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(f"{name}: shape {found[name].shape}, expected {shape}")
    others = sorted(name for name, value in found.items() if not jnp.issubdtype(value.dtype, jnp.floating))
    if others:
        raise ValueError(f"weights: no floats in {others}; pass floats, and q_int8 in the config for int8 weights")
    return found


def _shapes(config) -> dict[str, tuple[int, ...]]:
    width, hidden, experts = config.hidden_size, config.intermediate_size, config.num_experts
    columns = 2 * hidden if Activation(config.activation).gated else hidden
    mlp = {"inter_w": (width, columns), "inter_b": (columns,), "output_w": (hidden, width), "output_b": (width,)}
    shapes = {f"attention.{name}": shape for name, shape in _attention_shapes(config).items()}
    shapes |= {"norm_w": (width,), "attn_nw": (width,), "moe_gate.wg.weight": (experts, width)}
    if config.norm_type == NormType.LayerNorm:
        shapes |= {"norm_b": (width,), "attn_nb": (width,)}
    prefixes = [f"mlp.{e}." for e in range(experts)]
    if config.mlp_type == "residual":
        prefixes.append("res_mlp.")
        shapes["res_coef"] = (width, 2)
    return shapes | {prefix + name: shape for prefix in prefixes for name, shape in mlp.items()}


def _attention_shapes(config) -> dict[str, tuple[int, ...]]:
    width, rows = config.hidden_size, (config.heads + 2 * config.kv_heads) * config.head_dim
    inner = config.heads * config.head_dim
    return {"attn_qkvw": (width, rows), "attn_qkvb": (rows,), "attn_ow": (inner, width), "attn_ob": (width,)}


def attention_weights(config: MoEInferenceConfig, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Upstream's fused attention weights `attn_qkvw`, `attn_qkvb`, `attn_ow`, `attn_ob` as our parameters.

    Raises `ValueError` as `layer_weights`.
    """
    found = _checked(_attention_shapes(config), given)
    ours = {"attention.o": found["attn_ow"].T, "attention.o_bias": found["attn_ob"]}
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
    halves = {"gate": kernels["up"][hidden:], "gate_bias": biases["up_bias"][hidden:]}
    halves |= {"up": kernels["up"][:hidden], "up_bias": biases["up_bias"][:hidden]}
    return kernels | biases | halves
