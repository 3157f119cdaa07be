"""OLMoE (arXiv:2409.02060) and FlexOlmo (arXiv:2507.07024): norms over all query and all key heads together."""

from typing import Literal

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def _architecture(
    hub: Hub, *, epsilon: float, place: Literal["pre", "post"], theta: float, top_k: int, **attention
) -> Architecture:
    bias = hub.flag("attention_bias", False)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, epsilon, place),
        attention=grouped_attention(hub, theta=theta, qkv_bias=bias, out_bias=bias, qk_norm="full", **attention),
        router=RouterConfig(
            num_experts=hub.first("num_experts", "num_local_experts"),
            top_k=hub.integer("num_experts_per_tok", top_k),
            renormalize=hub.flag("norm_topk_prob", False),
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )
    return decoder(hub, block, [LayerConfig(moe=True)] * hub.integer("num_hidden_layers"))


def olmoe(hub: Hub) -> Architecture:
    return _architecture(hub, epsilon=1e-5, place="pre", theta=1e4, top_k=8, clip=hub.number("clip_qkv", None))


def flex_olmo(hub: Hub) -> Architecture:
    return _architecture(hub, epsilon=1e-6, place="post", theta=5e5, top_k=5)


_TENSORS = (
    trunk() | attention() | {"moe.router": Tensor(LAYER + "mlp.gate.weight")} | mlp("moe", "mlp.experts.{expert}.")
)
OLMOE = Family(model_types=("olmoe",), architecture=olmoe, tensors=_TENSORS | norms())
FLEX_OLMO = Family(
    model_types=("flex_olmo",),
    architecture=flex_olmo,
    tensors=_TENSORS | norms("post_attention_layernorm", "post_feedforward_layernorm"),
)
