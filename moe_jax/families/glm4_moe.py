"""GLM-4.5 (arXiv:2508.06471) and dots.llm1 (arXiv:2506.05767): DeepSeek-V3's gate over grouped attention."""

from ..block_config import Architecture, AttentionConfig, BlockConfig, LayerConfig, MLPConfig
from .common import (
    bias_steered_router,
    decoder,
    first_dense,
    grouped_attention,
    rms_norm,
    shared_experts,
    windows,
)
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def _block(hub: Hub, attention: AttentionConfig, *, epsilon: float, renormalize: bool, shared: int) -> BlockConfig:
    hidden = hub.integer("moe_intermediate_size")
    return BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, epsilon),
        attention=attention,
        router=bias_steered_router(hub, renormalize),
        experts=MLPConfig(hidden=hidden, activation=hub.activation()),
        shared=shared_experts(hub, hidden, shared),
        dense=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )


def glm4_moe(hub: Hub) -> Architecture:
    norm = "head" if hub.flag("use_qk_norm", False) else None
    attention = grouped_attention(hub, partial=0.5, qkv_bias=hub.flag("attention_bias", False), qk_norm=norm)
    hub.ignore("num_nextn_predict_layers", "num_mtp_layers")
    block = _block(hub, attention, epsilon=1e-5, renormalize=True, shared=1)
    return decoder(hub, block, [LayerConfig(moe=moe) for moe in first_dense(hub, 1)])


def dots1(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    attention = grouped_attention(hub, qkv_bias=bias, out_bias=bias, qk_norm="head")
    block = _block(hub, attention, epsilon=1e-6, renormalize=False, shared=0)
    moe = first_dense(hub, 0)
    window, start = hub.window(4096), hub.integer("max_window_layers", 62)
    hub.ignore("use_sliding_window")  # transformers goes by the window alone
    per_layer = windows(hub, window, [window is not None and i >= start for i in range(len(moe))])
    return decoder(hub, block, [LayerConfig(moe=m, window=w) for m, w in zip(moe, per_layer, strict=True)])


_TENSORS = (
    trunk()
    | attention()
    | norms()
    | mlp("dense", "mlp.")
    | {
        "moe.router": Tensor(LAYER + "mlp.gate.weight"),
        "moe.selection_bias": Tensor(LAYER + "mlp.gate.e_score_correction_bias"),
    }
    | mlp("moe", "mlp.experts.{expert}.")
    | mlp("shared", "mlp.shared_experts.")
)
GLM4_MOE = Family(model_types=("glm4_moe",), architecture=glm4_moe, tensors=_TENSORS, next_token_layers=True)
DOTS1 = Family(model_types=("dots1",), architecture=dots1, tensors=_TENSORS)
