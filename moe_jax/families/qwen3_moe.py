"""Qwen3-MoE (arXiv:2505.09388): norms on each query and key head, no shared expert."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, every_nth, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, qkv_bias=bias, out_bias=bias, qk_norm="head"),
        router=RouterConfig(
            num_experts=hub.first("num_experts", "num_local_experts"),
            top_k=hub.integer("num_experts_per_tok", 8),
            renormalize=hub.flag("norm_topk_prob", False),
        ),
        experts=MLPConfig(hidden=hub.integer("moe_intermediate_size"), activation=hub.activation()),
        dense=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )
    window = hub.window(4096)
    hub.ignore("max_window_layers")  # where windows are on, they are on in every layer
    window = window if hub.flag("use_sliding_window", False) else None
    return decoder(hub, block, [LayerConfig(moe=moe, window=window) for moe in every_nth(hub)])


FAMILY = Family(
    model_types=("qwen3_moe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | mlp("dense", "mlp.")
    | {"moe.router": Tensor(LAYER + "mlp.gate.weight")}
    | mlp("moe", "mlp.experts.{expert}."),
)
