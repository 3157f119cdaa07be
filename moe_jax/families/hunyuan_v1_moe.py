"""Hunyuan-A13B: query and key norms after the rotation, a shared MLP, NTK-alpha rotary base."""

from typing import Any

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, mlp, norms, trunk


def _uniform(hub: Hub, key: str, default: Any) -> Any:
    """A value that the config may repeat for every layer; all of them must agree."""
    value = hub.get(key, default)
    if not isinstance(value, list):
        return value
    if not value or any(v != value[0] for v in value):
        raise ValueError(f"hunyuan_v1_moe: {key} differs between layers ({value}), which is not supported")
    return value[0]


#: Training switches, settings of the variants refused below, and of the vision and pooling parts of other releases.
_UNUSED = """
    add_classification_head anyres_pooling_size anyres_vit_max_image_size anyres_vit_two_views class_num
    cla_share_factor dense_list eod_token_id im_end_id im_newline_id im_start_id image_token_id kv_lora_rank
    mask_init_id moe_drop_tokens moe_random_routing_dropped_token n_group norm_type num_media_embeds org_vocab_size
    pad_id pool_type q_lora_rank qk_nope_head_dim qk_rope_head_dim skip_cls_token text_end_id text_start_id
    topk_group v_head_dim video_end_id video_start_id vit_add_patchemb_bias vit_input_resolution vit_mapping_type
    vit_norm_type vit_patch vit_path vit_remove_prenorm vit_token vit_type vit_used_rms_norm xdrope_section
""".split()


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", False)
    activation = hub.activation()
    hidden = hub.integer("intermediate_size")
    hub.require("use_qk_norm", True)
    hub.require("norm_topk_prob", True)
    hub.require("routed_scaling_factor", 1.0)
    hub.require("group_limited_greedy", False)
    hub.require("use_mla", False)
    hub.require("mlp_bias", False)
    hub.require("position_embedding_xdrope", False)
    hub.require("use_rotary_pos_emb", True)
    hub.require("use_cla", False)
    hub.require("use_mixed_mlp_moe", True)
    hub.require("moe_layer_num_skipped", 0)
    for key, expected in (("moe_intermediate_size", hidden), ("num_shared_expert", 1)):
        if _uniform(hub, key, expected) != expected:
            raise ValueError(f"hunyuan_v1_moe: {key} {hub.get(key)} is not supported, expected {expected}")
    hub.require("attention_head_dim", hub.head_dim())
    hub.ignore(*_UNUSED)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-5),
        attention=grouped_attention(hub, qkv_bias=bias, out_bias=bias, qk_norm="head", norm_after_rope=True),
        router=RouterConfig(
            num_experts=hub.first("num_experts", "num_local_experts"),
            top_k=_uniform(hub, "moe_topk", None) or hub.integer("num_experts_per_tok", 1),
        ),
        experts=MLPConfig(hidden=hidden, activation=activation),
        shared=MLPConfig(hidden=hidden, activation=activation),
    )
    return decoder(hub, block, [LayerConfig(moe=True)] * hub.integer("num_hidden_layers"))


FAMILY = Family(
    model_types=("hunyuan_v1_moe",),
    architecture=architecture,
    tensors=trunk()
    | attention("self_attn.", "query_layernorm", "key_layernorm")
    | norms()
    | {"moe.router": Tensor(LAYER + "mlp.gate.wg.weight")}
    | mlp("moe", "mlp.experts.{expert}.")
    | mlp("shared", "mlp.shared_mlp."),
)
