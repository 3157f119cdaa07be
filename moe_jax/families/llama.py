"""Llama, dense: what the demo model is made from."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    hub.ignore("is_llama_config")
    dense = MLPConfig(
        hidden=hub.integer("intermediate_size"), activation=hub.activation(), bias=hub.flag("mlp_bias", False)
    )
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-6),
        attention=grouped_attention(hub, interleaved=hub.flag("rope_interleaved", False), qkv_bias=bias, out_bias=bias),
        dense=dense,
    )
    return decoder(hub, block, [LayerConfig(moe=False)] * hub.integer("num_hidden_layers"))


FAMILY = Family(
    model_types=("llama",),
    architecture=architecture,
    tensors=trunk() | attention() | norms() | mlp("dense", "mlp."),
)
