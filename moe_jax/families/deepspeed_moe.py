"""Megatron-DeepSpeed's MoE GPT (arXiv:2201.05596): LayerNorm, learned positions, DeepSpeed's gates, PR-MoE.

There is no such family on the hub. `moe_jax.convert.deepspeed.load_checkpoint` writes the config out of the engine's
files; names of tensors are Megatron's, with queries, keys and values apart.
"""

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
from ..routing import TOPK_POLICIES, GateRule
from .common import decoder
from .family import Family
from .hub import Hub
from .tensors import Tensor


def architecture(hub: Hub) -> Architecture:
    counts = _expert_counts(hub)
    mlp = MLPConfig(hidden=hub.positive("intermediate_size"), activation=hub.activation(gated=False), bias=True)
    hub.require("mlp_type", "standard", "residual")
    residual = hub.get("mlp_type", "standard") == "residual"
    kind = hub.get("position_embedding_type", "learned")
    hub.require("position_embedding_type", "learned", "rope", "alibi")
    block = BlockConfig(
        width=hub.positive("hidden_size"),
        norm=NormConfig(kind="layer", epsilon=hub.number("layer_norm_epsilon", 1e-5)),
        attention=_attention(hub, kind),
        router=_router(hub, max(counts)) if any(counts) else None,
        experts=mlp if any(counts) else None,
        shared=mlp if residual else None,
        mix="experts_first" if residual else None,
        mix_bias=residual,
        dense=mlp,
    )
    uniform = len({count for count in counts if count}) == 1
    layers = [LayerConfig(moe=c > 0, num_experts=None if uniform or not c else c) for c in counts]
    tied = hub.flag("tie_word_embeddings", True)
    return decoder(hub, block, layers, tied=tied, learned_positions=kind == "learned")


def _expert_counts(hub: Hub) -> list[int]:
    """Experts of each layer, 0 for a dense one: a list as long as the model, or one number for all layers."""
    layers = hub.positive("num_hidden_layers")
    counts = hub.get("num_experts")
    counts = [counts] * layers if isinstance(counts, int) else counts
    whole = isinstance(counts, (list, tuple)) and all(type(c) is int and c >= 0 for c in counts)
    if not whole or len(counts) != layers:
        raise ValueError(f"{hub.family}: num_experts {counts!r} does not give each of {layers} layers a whole number")
    return list(counts)


def _attention(hub: Hub, kind: str) -> AttentionConfig:
    heads, size, rope = hub.positive("num_attention_heads"), hub.head_dim(), None
    if kind == "rope":
        dim = hub.positive("rotary_dim", size)
        theta = hub.number("rope_theta", 10000.0)
        if dim % 2 or dim > size:
            raise ValueError(f"{hub.family}: rotary_dim {dim} of head_dim {size}; it must be even and fit")
        frequencies = tuple(float(theta ** (-i / dim)) for i in range(0, dim, 2))
        rope = RopeConfig(frequencies=frequencies, interleaved=not hub.flag("rotate_half", True))
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=hub.positive("num_key_value_heads", heads),
        head_dim=size,
        value_dim=size,
        scale=size**-0.5,
        rope=rope,
        qkv_bias=True,
        out_bias=True,
        alibi=kind == "alibi",
    )


def _router(hub: Hub, most: int) -> RouterConfig:
    top_k = hub.positive("num_experts_per_tok", 1)
    hub.require("drop_policy", *TOPK_POLICIES)
    rule = GateRule.of(
        top_k,
        hub.number("eval_capacity_factor", 1.0),
        hub.integer("min_capacity", 4),
        hub.flag("drop_tokens", True),
        hub.get("drop_policy", "probs"),
    )
    return RouterConfig(num_experts=most, top_k=top_k, rule=rule)


_AT = "layers.{layer}."


def _mlp(group: str, prefix: str) -> dict[str, Tensor]:
    names = {"up": "dense_h_to_4h.weight", "down": "dense_4h_to_h.weight"}
    names |= {"up_bias": "dense_h_to_4h.bias", "down_bias": "dense_4h_to_h.bias"}
    return {f"{group}.{ours}": Tensor(f"{_AT}{prefix}{theirs}") for ours, theirs in names.items()}


def _pairs(names: dict[str, str], parts: dict[str, str]) -> dict[str, Tensor]:
    return {ours + a: Tensor(theirs + b) for ours, theirs in names.items() for a, b in parts.items()}


FAMILY = Family(
    model_types=("deepspeed_moe",),
    architecture=architecture,
    tensors={
        "embedding": Tensor("word_embeddings.weight"),
        "positions": Tensor("position_embeddings.weight"),
        "head.kernel": Tensor("lm_head.weight"),
        "moe.router": Tensor(_AT + "mlp.gate.weight"),
        "shared.mix": Tensor(_AT + "mlp.coefficient.weight"),
        "shared.mix_bias": Tensor(_AT + "mlp.coefficient.bias"),
    }
    | _pairs(
        {
            "attention_norm": _AT + "input_layernorm",
            "mlp_norm": _AT + "post_attention_layernorm",
            "final_norm": "final_layernorm",
        },
        {".scale": ".weight", ".bias": ".bias"},
    )
    | _pairs({f"attention.{n}": f"{_AT}self_attention.{n}" for n in "qkv"}, {"": ".weight", "_bias": ".bias"})
    | _pairs({"attention.o": _AT + "self_attention.dense"}, {"": ".weight", "_bias": ".bias"})
    | _mlp("dense", "mlp.")
    | _mlp("moe", "mlp.experts.{expert}.")
    | _mlp("shared", "mlp.residual."),
)
