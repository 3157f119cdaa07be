"""Mixtral (arXiv:2401.04088): softmax over all experts, renormalised over the best k."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    hub.ignore("router_jitter_noise")  # training only
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-5),
        attention=grouped_attention(hub, theta=1e6),
        router=RouterConfig(
            num_experts=hub.first("num_local_experts", "num_experts"), top_k=hub.integer("num_experts_per_tok", 2)
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=hub.activation()),
    )
    layer = LayerConfig(moe=True, window=hub.window())
    return decoder(hub, block, [layer] * hub.integer("num_hidden_layers"))


FAMILY = Family(
    model_types=("mixtral",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {"moe.router": Tensor(LAYER + "block_sparse_moe.gate.weight")}
    | mlp("moe", "block_sparse_moe.experts.{expert}.", "w1", "w3", "w2"),
)
