"""ERNIE 4.5 MoE: softmax scores with a bias that steers the choice, interleaved rotary pairs."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def architecture(hub: Hub) -> Architecture:
    activation, bias = hub.activation(), hub.flag("use_bias", False)
    hidden, shared = hub.integer("moe_intermediate_size"), hub.integer("moe_num_shared_experts", 2)
    if hub.number("moe_norm_min", 1e-12) > 1e-9:
        raise ValueError(f"ernie4_5_moe: moe_norm_min {hub.get('moe_norm_min')} would change weights; at most 1e-9")
    hub.ignore("num_nextn_predict_layers")
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-5),
        attention=grouped_attention(hub, theta=5e5, interleaved=True, qkv_bias=bias, out_bias=bias),
        router=RouterConfig(
            num_experts=hub.first("moe_num_experts", "num_experts", default=64),
            top_k=hub.first("moe_k", "num_experts_per_tok", default=6),
            selection_bias=True,
        ),
        experts=MLPConfig(hidden=hidden, activation=activation),
        shared=MLPConfig(hidden=hidden * shared, activation=activation, bias=bias) if shared else None,
        dense=MLPConfig(hidden=hub.integer("intermediate_size"), activation=activation, bias=bias),
    )
    count = hub.integer("num_hidden_layers")
    first, last = hub.integer("moe_layer_start_index", 1), hub.integer("moe_layer_end_index", -1)
    last, step = (count - 1 if last == -1 else last), hub.positive("moe_layer_interval", 1)
    layers = [LayerConfig(moe=first <= i <= last and (i + 1) % step == 0) for i in range(count)]
    return decoder(hub, block, layers, tied=hub.flag("tie_word_embeddings", True), head_bias=bias)


FAMILY = Family(
    model_types=("ernie4_5_moe",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | mlp("dense", "mlp.")
    | {
        "moe.router": Tensor(LAYER + "mlp.gate.weight"),
        "moe.selection_bias": Tensor(LAYER + "mlp.moe_statics.e_score_correction_bias", leading_one=True),
    }
    | mlp("moe", "mlp.experts.{expert}.")
    | mlp("shared", "mlp.shared_experts."),
    ignored=(r".*\.rotary_emb\.inv_freq", r"model\.mtp_.*"),
    next_token_layers=True,
)
