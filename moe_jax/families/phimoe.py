"""Phi-3.5-MoE (arXiv:2404.14219): sparsemixer routing, LayerNorm, LongRoPE."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, NormConfig, RouterConfig
from .common import decoder, grouped_attention
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    hub.ignore("input_jitter_noise")  # training only
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=NormConfig(kind="layer", epsilon=hub.number("rms_norm_eps", 1e-5)),
        attention=grouped_attention(hub, theta=1e6, qkv_bias=bias, out_bias=bias),
        router=RouterConfig(
            num_experts=hub.integer("num_local_experts", 16),
            top_k=hub.integer("num_experts_per_tok", 2),
            score="sparsemixer",
            jitter=hub.number("router_jitter_noise", 0.01),
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )
    layer = LayerConfig(moe=True, window=hub.window())
    head_bias = hub.flag("lm_head_bias", False)
    return decoder(hub, block, [layer] * hub.integer("num_hidden_layers"), head_bias=head_bias)


FAMILY = Family(
    model_types=("phimoe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {"moe.router": Tensor(LAYER + "block_sparse_moe.gate.weight")}
    | mlp("moe", "block_sparse_moe.experts.{expert}.", "w1", "w3", "w2"),
)
