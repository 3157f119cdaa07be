"""DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437) and Kimi-K2: latent attention, shared experts."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import bias_steered_router, decoder, first_dense, latent_attention, rms_norm, shared_experts
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, mlp, norms, trunk
from .tensors import latent_attention as latent_tensors


def _architecture(hub: Hub, router: RouterConfig, *, interleaved: bool, shared: int, dense: int) -> Architecture:
    activation, bias = hub.activation(), hub.flag("mlp_bias", False)
    hub.ignore("ep_size", "num_nextn_predict_layers", "num_mtp_layers")
    hidden = hub.integer("moe_intermediate_size")
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=latent_attention(hub, interleaved),
        router=router,
        experts=MLPConfig(hidden=hidden, activation=activation),
        shared=shared_experts(hub, hidden, shared, bias=bias),
        dense=MLPConfig(hidden=hub.integer("intermediate_size"), activation=activation, bias=bias),
    )
    return decoder(hub, block, [LayerConfig(moe=moe) for moe in first_dense(hub, dense)])


def deepseek_v2(hub: Hub) -> Architecture:
    hub.require("scoring_func", "softmax")
    hub.require("topk_method", "greedy", "group_limited_greedy")
    hub.require("norm_topk_prob", False)  # DeepSeek's own code and transformers disagree on what true means
    limited = hub.get("topk_method", "greedy") == "group_limited_greedy"
    groups, top_groups = hub.integer("n_group", 1), hub.integer("topk_group", 1)
    router = RouterConfig(
        num_experts=hub.first("n_routed_experts", "num_local_experts", "num_experts"),
        top_k=hub.integer("num_experts_per_tok"),
        renormalize=False,
        groups=groups if limited else 1,
        top_groups=top_groups if limited else 1,
        scale=hub.number("routed_scaling_factor", 1.0),
    )
    return _architecture(hub, router, interleaved=True, shared=2, dense=0)


def deepseek_v3(hub: Hub) -> Architecture:
    router = bias_steered_router(hub, renormalize=True, groups=8, top_groups=4)
    return _architecture(hub, router, interleaved=hub.flag("rope_interleave", True), shared=1, dense=3)


_TENSORS = (
    trunk()
    | latent_tensors()
    | norms()
    | mlp("dense", "mlp.")
    | {
        "moe.router": Tensor(LAYER + "mlp.gate.weight"),
        "moe.selection_bias": Tensor(LAYER + "mlp.gate.e_score_correction_bias"),
    }
    | mlp("moe", "mlp.experts.{expert}.")
    | mlp("shared", "mlp.shared_experts.")
)
DEEPSEEK_V2 = Family(model_types=("deepseek_v2",), architecture=deepseek_v2, tensors=_TENSORS)
DEEPSEEK_V3 = Family(
    model_types=("deepseek_v3", "kimi_k2"), architecture=deepseek_v3, tensors=_TENSORS, next_token_layers=True
)
