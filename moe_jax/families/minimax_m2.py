"""MiniMax-M2: sigmoid scores with a correction bias, norms over all heads, half of each head rotated."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    hub.require("scoring_func", "sigmoid")
    hub.require("use_qk_norm", True)
    hub.require("qk_norm_type", "per_layer")
    hub.require("use_routing_bias", True)
    hub.require("shared_intermediate_size", 0)
    for part in ("full_attention", "linear_attention", "mlp"):
        hub.require(f"layernorm_{part}_beta", 1.0)
    kinds = hub.items("attn_type_list", [])
    if any(kind != 1 for kind in kinds):
        raise ValueError(f"minimax_m2: attn_type_list {kinds} holds linear attention, which is not supported")
    # Training, next-token prediction, and settings of features that are off.
    hub.ignore("router_jitter_noise", "use_mtp", "num_mtp_modules", "mtp_transformer_layers")
    hub.ignore("shared_moe_mode", "mlp_intermediate_size")
    rotary = hub.integer("rotary_dim", None)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, theta=5e6, partial=rotary / hub.head_dim() if rotary else 1.0, qk_norm="full"),
        router=RouterConfig(
            num_experts=hub.first("num_local_experts", "num_experts"),
            top_k=hub.integer("num_experts_per_tok", 8),
            score="sigmoid",
            selection_bias=True,
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )
    return decoder(hub, block, [LayerConfig(moe=True)] * hub.integer("num_hidden_layers"))


FAMILY = Family(
    model_types=("minimax_m2",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {
        "moe.router": Tensor(LAYER + "block_sparse_moe.gate.weight"),
        "moe.selection_bias": Tensor(LAYER + "block_sparse_moe.e_score_correction_bias"),
    }
    | mlp("moe", "block_sparse_moe.experts.{expert}.", "w1", "w3", "w2"),
    next_token_layers=True,
)
