"""Granite 3 MoE: multipliers on embedding, attention, residuals and logits; fused gate and up on disk."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    scale = hub.number("attention_multiplier", 1.0)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, qkv_bias=bias, out_bias=bias, scale=scale),
        router=RouterConfig(
            num_experts=hub.integer("num_local_experts", 8), top_k=hub.integer("num_experts_per_tok", 2)
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
        residual_scale=hub.number("residual_multiplier", 1.0),
    )
    return decoder(
        hub,
        block,
        [LayerConfig(moe=True)] * hub.integer("num_hidden_layers"),
        embedding_scale=hub.number("embedding_multiplier", 1.0),
        logit_divisor=hub.number("logits_scaling", 1.0),
    )


_MOE = LAYER + "block_sparse_moe."
FAMILY = Family(
    model_types=("granitemoe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {
        "moe.router": Tensor(_MOE + "router.layer.weight"),
        "moe.gate": Tensor(_MOE + "input_linear.weight", part=(0, 2)),
        "moe.up": Tensor(_MOE + "input_linear.weight", part=(1, 2)),
        "moe.down": Tensor(_MOE + "output_linear.weight"),
    },
)
