"""Qwen2-MoE: a gated shared expert beside the routed ones, biases on query, key and value."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, every_nth, grouped_attention, rms_norm, windows
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    activation = hub.activation()
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, qkv_bias=hub.flag("qkv_bias", True)),
        router=RouterConfig(
            num_experts=hub.first("num_experts", "num_local_experts"),
            top_k=hub.integer("num_experts_per_tok", 4),
            renormalize=hub.flag("norm_topk_prob", False),
        ),
        experts=MLPConfig(hidden=hub.integer("moe_intermediate_size"), activation=activation),
        shared=MLPConfig(hidden=hub.integer("shared_expert_intermediate_size"), activation=activation),
        shared_gate=True,
        dense=MLPConfig(hidden=hub.integer("intermediate_size"), activation=activation),
    )
    moe = every_nth(hub)
    window = hub.window(4096)
    slides = hub.flag("use_sliding_window", False)
    limit = hub.integer("max_window_layers", 28)
    per_layer = windows(hub, window if slides else None, [slides and i % 2 == 0 and i < limit for i in range(len(moe))])
    return decoder(hub, block, [LayerConfig(moe=m, window=w) for m, w in zip(moe, per_layer, strict=True)])


FAMILY = Family(
    model_types=("qwen2_moe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | mlp("dense", "mlp.")
    | {"moe.router": Tensor(LAYER + "mlp.gate.weight")}
    | mlp("moe", "mlp.experts.{expert}.")
    | mlp("shared", "mlp.shared_expert.")
    | {"shared.scale": Tensor(LAYER + "mlp.shared_expert_gate.weight", leading_one=True)},
)
