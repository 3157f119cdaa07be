"""Granite 3 MoE: multipliers on embedding, attention, residuals and logits; fused gate and up on disk."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, linear, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.bool("attention_bias", False)
    scale = hub.float("attention_multiplier", 1.0)
    block = BlockConfig(
        width=hub.int("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, qkv_bias=bias, out_bias=bias, scale=scale),
        router=RouterConfig(num_experts=hub.int("num_local_experts", 8), top_k=hub.int("num_experts_per_tok", 2)),
        experts=MLPConfig(hidden=hub.int("intermediate_size"), activation=hub.activation()),
        residual_scale=hub.float("residual_multiplier", 1.0),
    )
    return decoder(
        hub,
        block,
        [LayerConfig(moe=True)] * hub.int("num_hidden_layers"),
        embedding_scale=hub.float("embedding_multiplier", 1.0),
        logit_divisor=hub.float("logits_scaling", 1.0),
    )


_MOE = LAYER + "block_sparse_moe."
FAMILY = Family(
    model_types=("granitemoe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {
        "moe.router": linear(_MOE + "router.layer.weight"),
        "moe.gate": Tensor(_MOE + "input_linear.weight", linear=True, part=(0, 2)),
        "moe.up": Tensor(_MOE + "input_linear.weight", linear=True, part=(1, 2)),
        "moe.down": linear(_MOE + "output_linear.weight"),
    },
)
