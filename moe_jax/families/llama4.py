"""Llama 4's text model: the router's weight scales the expert's input, chunked and position-free layers."""

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk

_TYPES = ("chunked_attention", "full_attention")


def _layers(hub: Hub) -> list[LayerConfig]:
    count, step = hub.integer("num_hidden_layers"), hub.positive("interleave_moe_layer_step", 1)
    moe = hub.items("moe_layers", None)
    moe = range(step - 1, count, step) if moe is None else moe
    for key in ("no_rope_layer_interval", "nope_layer_interval"):
        hub.positive(key, None)
    interval = hub.first("no_rope_layer_interval", "nope_layer_interval", default=4)
    # Despite the name, a 1 marks a layer with rotary positions.
    rotary = hub.items("no_rope_layers", None) or [int((i + 1) % interval != 0) for i in range(count)]
    types = hub.items("layer_types", None) or ["chunked_attention" if r else "full_attention" for r in rotary]
    if len(rotary) < count or len(types) != count or any(t not in _TYPES for t in types):
        raise ValueError(f"llama4: no_rope_layers {rotary} and layer_types {types} do not fit {count} layers")
    chunk = hub.integer("attention_chunk_size", 8192)
    floor, scale = hub.number("floor_scale", 8192), hub.number("attn_scale", 0.1)
    if floor <= 0:
        raise ValueError(f"llama4: floor_scale {floor} is not positive")
    tuned = (scale, floor) if hub.get("attn_temperature_tuning", True) else None
    return [
        LayerConfig(
            moe=i in moe,
            chunk=chunk if types[i] == "chunked_attention" else None,
            rotary=bool(rotary[i]),
            temperature=None if rotary[i] else tuned,
        )
        for i in range(count)
    ]


def architecture(hub: Hub) -> Architecture:
    bias, activation = hub.flag("attention_bias", False), hub.activation()
    hidden = hub.integer("intermediate_size")
    hub.ignore("router_jitter_noise", "for_llm_compressor")
    norm = "l2" if hub.flag("use_qk_norm", True) else None
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-5),
        attention=grouped_attention(
            hub, theta=5e5, interleaved=True, qkv_bias=bias, out_bias=bias, qk_norm=norm, norm_after_rope=True
        ),
        router=RouterConfig(
            num_experts=hub.first("num_local_experts", "num_experts", default=16),
            top_k=hub.integer("num_experts_per_tok", 1),
            score="sigmoid",
            renormalize=False,
            scale_input=True,
        ),
        experts=MLPConfig(hidden=hidden, activation=activation),
        shared=MLPConfig(hidden=hidden, activation=activation),
        dense=MLPConfig(hidden=hub.integer("intermediate_size_mlp"), activation=activation),
    )
    return decoder(hub, block, _layers(hub))


_FORWARD = LAYER + "feed_forward."
_TENSORS = (
    trunk()
    | attention()
    | norms()
    | mlp("dense", "feed_forward.")
    | mlp("shared", "feed_forward.shared_expert.")
    | {
        "moe.router": Tensor(_FORWARD + "router.weight"),
        "moe.gate": Tensor(_FORWARD + "experts.gate_up_proj", transposed=True, part=(0, 2)),
        "moe.up": Tensor(_FORWARD + "experts.gate_up_proj", transposed=True, part=(1, 2)),
        "moe.down": Tensor(_FORWARD + "experts.down_proj", transposed=True),
    }
)
LLAMA4_TEXT = Family(model_types=("llama4_text",), architecture=architecture, tensors=_TENSORS)
LLAMA4 = Family(
    model_types=("llama4",),
    architecture=architecture,
    tensors=_TENSORS,
    ignored=(r".*\.rotary_emb\.inv_freq", r"vision_model\..*", r"multi_modal_projector\..*"),
    nested_config="text_config",
    beside_nested=("vision_config", "boi_token_index", "eoi_token_index", "image_token_index"),
    prefix="language_model.",
)
