"""Pieces of architecture that many families share."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from ..block_config import (
    Architecture,
    AttentionConfig,
    BlockConfig,
    LatentConfig,
    LayerConfig,
    MLPConfig,
    NormConfig,
    RouterConfig,
)
from ..rope import mla_score_factor, rope_config
from .hub import Hub


def decoder(hub: Hub, block: BlockConfig, layers: Sequence[LayerConfig], **options: Any) -> Architecture:
    """The parts around the blocks, under the keys that every family uses."""
    options.setdefault("tied", hub.flag("tie_word_embeddings", False))
    return Architecture(
        block=block,
        layers=_with_own_counts(hub, layers),
        vocab_size=hub.integer("vocab_size"),
        context=hub.integer("max_position_embeddings"),
        **options,
    )


def _with_own_counts(hub: Hub, layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """Layers with the experts of `num_experts_per_layer` (0: dense), our own key for what `moe_jax.prune` makes."""
    counts = hub.items("num_experts_per_layer", None)
    if counts is None:
        return tuple(layers)
    known = [type(count) is int and count >= 0 for count in counts]
    if not all(known) or [count > 0 for count in counts] != [layer.moe for layer in layers]:
        dense = [i for i, layer in enumerate(layers) if not layer.moe]
        raise ValueError(
            f"{hub.family}: num_experts_per_layer {counts} does not fit {len(layers)} layers, dense ones {dense}"
        )
    return tuple(
        dataclasses.replace(layer, num_experts=count or None) for layer, count in zip(layers, counts, strict=True)
    )


def rms_norm(hub: Hub, default: float, place: Literal["pre", "post"] = "pre") -> NormConfig:
    """RMSNorm with the config's epsilon."""
    return NormConfig(kind="rms", epsilon=hub.number("rms_norm_eps", default), place=place)


def grouped_attention(
    hub: Hub, *, theta: float = 10000.0, partial: float = 1.0, interleaved: bool = False, **options: Any
) -> AttentionConfig:
    """Attention with query, key, value and output projections; `options` override what the keys give."""
    heads, head_dim = hub.integer("num_attention_heads"), hub.head_dim()
    fields = {
        "num_heads": heads,
        "num_kv_heads": hub.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "value_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": hub.rope(head_dim, theta, partial, interleaved),
        "norm_epsilon": hub.number("rms_norm_eps", 1e-6),
    }
    return AttentionConfig(**fields | options)


def latent_attention(hub: Hub, interleaved: bool) -> AttentionConfig:
    """DeepSeek's multi-head latent attention."""
    heads, bias = hub.integer("num_attention_heads"), hub.flag("attention_bias", False)
    plain, rotary = hub.positive("qk_nope_head_dim", 128), hub.positive("qk_rope_head_dim", 64)
    hub.require("num_key_value_heads", heads)
    hub.ignore("head_dim", "qk_head_dim")  # written by transformers, derived from the two above
    settings = hub.rope_settings()
    rope = rope_config(settings, rotary, hub.positive("max_position_embeddings"), interleaved)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=plain + rotary,
        value_dim=hub.integer("v_head_dim", 128),
        scale=(plain + rotary) ** -0.5 * mla_score_factor(settings),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        latent=LatentConfig(
            query_rank=hub.integer("q_lora_rank", None),
            rank=hub.integer("kv_lora_rank"),
            plain_dim=plain,
            rotary_dim=rotary,
        ),
    )


def bias_steered_router(hub: Hub, renormalize: bool, groups: int = 1, top_groups: int = 1) -> RouterConfig:
    """DeepSeek-V3's gate (arXiv:2412.19437): sigmoid scores, a correction bias that steers the choice, groups."""
    hub.require("scoring_func", "sigmoid", "noaux_tc")
    hub.require("topk_method", "noaux_tc")
    return RouterConfig(
        num_experts=hub.first("n_routed_experts", "num_local_experts", "num_experts"),
        top_k=hub.integer("num_experts_per_tok"),
        score="sigmoid",
        renormalize=hub.flag("norm_topk_prob", renormalize),
        groups=hub.integer("n_group", groups),
        top_groups=hub.integer("topk_group", top_groups),
        scale=hub.number("routed_scaling_factor", 1.0),
        selection_bias=True,
    )


def shared_experts(hub: Hub, hidden: int, default: int | None, **options: Any) -> MLPConfig | None:
    """`n_shared_experts` experts that every token takes, as one wide MLP."""
    count = hub.integer("n_shared_experts", default) or 0
    return MLPConfig(hidden=hidden * count, activation=hub.activation(), **options) if count else None


def first_dense(hub: Hub, default: int) -> list[bool]:
    """Which layers are MoE layers where the first `first_k_dense_replace` are dense."""
    hub.require("moe_layer_freq", 1)
    count = hub.integer("first_k_dense_replace", default)
    return [i >= count for i in range(hub.integer("num_hidden_layers"))]


def every_nth(hub: Hub) -> list[bool]:
    """Which layers are MoE layers under Qwen's `decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = hub.positive("decoder_sparse_step", 1), hub.items("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(hub.integer("num_hidden_layers"))]


def windows(hub: Hub, window: int | None, sliding: Sequence[bool]) -> list[int | None]:
    """Each layer's window: from `layer_types` where given, else the layers marked in `sliding`."""
    types = hub.items("layer_types", None)
    if types is None:
        return [window if slides else None for slides in sliding]
    known = {"full_attention": False, "sliding_attention": True}
    if len(types) != len(sliding) or not all(kind in known for kind in map(str, types)):
        raise ValueError(f"{hub.family}: layer_types {types} do not fit {len(sliding)} layers of {sorted(known)}")
    if window is None and any(known[t] for t in types):
        raise ValueError(f"{hub.family}: layer_types has sliding_attention but sliding_window is not set")
    return [window if known[t] else None for t in types]
