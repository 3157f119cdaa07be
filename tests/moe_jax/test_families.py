"""The families: every key of a config is honoured, refused, or known not to matter; their tensors cover the weights."""

import collections
import math
from pathlib import Path

import pytest
from test_config_values import CONFIGS, TINY, build, tiny

from moe_jax import ModelConfig
from moe_jax.checkpoint.layout import pieces
from moe_jax.families import FAMILIES, family_of
from moe_jax.families.hub import IRRELEVANT, Hub
from moe_jax.weights import flattened, nested, parameters

#: Keys of the tiny configs that change nothing there: training, other heads and modalities, features that are off.
NO_EFFECT = {
    # greedy choice has no groups; yarn's ramp lies inside one of four frequencies
    "deepseek_v2": "n_group topk_group rope_scaling.beta_fast rope_scaling.beta_slow",
    "deepseek_v3": "ep_size num_nextn_predict_layers rope_scaling.beta_fast rope_scaling.beta_slow",
    "kimi_k2": "num_nextn_predict_layers",
    # the file has layer_types, which say it
    "dots1": "use_sliding_window",
    "ernie4_5_moe": "num_nextn_predict_layers",
    "glm4_moe": "num_nextn_predict_layers",
    "gpt_oss": "initial_context_length",
    "hunyuan_v1_moe": """
        add_classification_head anyres_pooling_size anyres_vit_two_views cla_share_factor class_num eod_token_id
        im_end_id im_newline_id im_start_id image_token_id mask_init_id moe_drop_tokens
        moe_random_routing_dropped_token num_media_embeds org_vocab_size pad_id skip_cls_token text_end_id
        text_start_id video_end_id video_start_id vit_add_patchemb_bias vit_input_resolution vit_patch
        vit_remove_prenorm vit_token vit_used_rms_norm rope_scaling.beta_fast rope_scaling.beta_slow
        rope_scaling.factor rope_scaling.mscale rope_scaling.mscale_all_dim""",
    "llama4": "for_llm_compressor router_jitter_noise",
    "minimax_m2": "mlp_intermediate_size mtp_transformer_layers num_mtp_modules router_jitter_noise use_mtp",
    # the key of the same name beside rope_scaling wins
    "phimoe": "input_jitter_noise rope_scaling.original_max_position_embeddings",
    # use_sliding_window is false
    "qwen2_moe": "max_window_layers sliding_window",
    # sliding_window is null
    "qwen3_moe": "max_window_layers use_sliding_window",
}


def _others(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, value // 2, value * 10, max(0, value - 1)]
    return [value * 1.5, value + 0.25, value * 30, value / 30] if isinstance(value, float) else []


def _outcomes(name, place, base):
    """What other numbers at `place` do: change the architecture, nothing, or raise."""
    found = set()
    value = tiny(name)[1]
    for key in place:
        value = value[key]
    for other in _others(value):
        values, text = tiny(name)
        (text if len(place) == 1 else text[place[0]])[place[-1]] = other
        try:
            if other != value:
                found.add("changed" if ModelConfig.from_dict(values).architecture != base else "same")
        except ValueError:
            found.add("refused")
    return found


@pytest.mark.parametrize("name", TINY)
def test_every_number_is_honoured_or_refused_or_listed(name):
    base, without_effect, tried = build(name).architecture, set(), 0
    for key, value in tiny(name)[1].items():
        places = [(key,)] + ([(key, inner) for inner in value] if isinstance(value, dict) else [])
        for place in places:
            found = _outcomes(name, place, base)
            tried += bool(found)
            if key in IRRELEVANT:
                assert found <= {"same"}, f"{key} is listed as irrelevant, but gives {found}"
            elif found and not found & {"changed", "refused"}:
                without_effect.add(".".join(place))
    assert without_effect == set(NO_EFFECT.get(name, "").split())
    assert tried >= 12


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "moe_layer_freq", 2),
        ("deepseek_v2", "num_key_value_heads", 2),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "num_key_value_heads", 1),
        ("glm4_moe", "scoring_func", "softmax"),
        ("glm4_moe", "topk_method", "greedy"),
        ("dots1", "scoring_func", "softmax"),
        ("gpt_oss", "hidden_act", "gelu"),
        ("gpt_oss", "swiglu_limit", -7.0),
        ("ernie4_5_moe", "moe_norm_min", 0.1),
        ("hunyuan_v1_moe", "use_qk_norm", False),
        ("hunyuan_v1_moe", "norm_topk_prob", False),
        ("hunyuan_v1_moe", "routed_scaling_factor", 2.0),
        ("hunyuan_v1_moe", "group_limited_greedy", True),
        ("hunyuan_v1_moe", "use_mla", True),
        ("hunyuan_v1_moe", "mlp_bias", True),
        ("hunyuan_v1_moe", "position_embedding_xdrope", True),
        ("hunyuan_v1_moe", "use_rotary_pos_emb", False),
        ("hunyuan_v1_moe", "use_cla", True),
        ("hunyuan_v1_moe", "use_mixed_mlp_moe", False),
        ("hunyuan_v1_moe", "moe_layer_num_skipped", 1),
        ("hunyuan_v1_moe", "attention_head_dim", 8),
        ("hunyuan_v1_moe", "moe_topk", [2, 1]),
        ("hunyuan_v1_moe", "moe_intermediate_size", [32, 32]),
        ("hunyuan_v1_moe", "num_shared_expert", [2, 2]),
        ("minimax_m2", "scoring_func", "softmax"),
        ("minimax_m2", "use_qk_norm", False),
        ("minimax_m2", "qk_norm_type", "per_head"),
        ("minimax_m2", "use_routing_bias", False),
        ("minimax_m2", "shared_intermediate_size", 8),
        ("minimax_m2", "layernorm_full_attention_beta", 2.0),
        ("minimax_m2", "layernorm_linear_attention_beta", 2.0),
        ("minimax_m2", "layernorm_mlp_beta", 2.0),
        ("minimax_m2", "attn_type_list", [1, 0]),
        ("minimax_m2", "sliding_window", 16),
        ("llama4", "layer_types", ["full_attention"]),
        ("llama4", "layer_types", ["sliding_attention"] * 4),
        ("llama4", "no_rope_layers", [1]),
        ("llama4", "floor_scale", 0),
        ("dots1", "layer_types", ["full_attention"]),
        ("gpt_oss", "layer_types", ["full_attention", "chunked_attention"]),
        ("phimoe", "num_experts_per_tok", 5),
        ("qwen3_moe", "rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ],
)
def test_what_a_family_does_not_support_is_refused_by_name(name, key, value):
    with pytest.raises(ValueError) as error:
        build(name, **{key: value})
    words = {"moe_topk": "2, 1", "num_experts_per_tok": "top_k: 5", "rope_scaling": "short_factor"}
    assert words.get(key, key) in str(error.value)


def test_sliding_layers_need_a_window():
    with pytest.raises(ValueError, match="sliding_attention but sliding_window is not set"):
        build("dots1", layer_types=["sliding_attention"] * tiny("dots1")[1]["num_hidden_layers"], sliding_window=None)


def test_which_layers_are_moe():
    moe = lambda name, **changes: build(name, **changes).architecture.moe_layers
    assert moe("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=3) == (3, 4)
    assert moe("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    assert moe("ernie4_5_moe", num_hidden_layers=6, moe_layer_start_index=1, moe_layer_end_index=4) == (1, 2, 3, 4)
    assert moe("ernie4_5_moe", num_hidden_layers=6, moe_layer_end_index=-1, moe_layer_interval=2) == (1, 3, 5)
    assert moe("llama4") == (1, 3) and moe("llama4", moe_layers=[2]) == (2,) and moe("llama") == ()


def test_windows_of_each_rule():
    window = lambda name, **changes: [layer.window for layer in build(name, **changes).architecture.layers]
    assert window("mixtral", sliding_window=7) == [7, 7]
    assert window("gpt_oss", num_hidden_layers=3, layer_types=None, sliding_window=9) == [9, None, 9]
    slides = {"num_hidden_layers": 4, "sliding_window": 5, "use_sliding_window": True}
    assert window("qwen2_moe", **slides, max_window_layers=3) == [5, None, 5, None]
    assert window("qwen3_moe", **slides, max_window_layers=3) == [5] * 4
    assert window("dots1", **slides, max_window_layers=3, layer_types=None) == [None, None, None, 5]


def test_llama4_layers():
    layers = build("llama4", num_hidden_layers=8, floor_scale=4, attn_scale=0.5).architecture.layers
    assert [layer.rotary for layer in layers] == [True, True, True, False] * 2
    assert [layer.chunk for layer in layers] == [8, 8, 8, None] * 2
    assert [layer.temperature for layer in layers] == [None, None, None, (0.5, 4)] * 2
    assert build("llama4", attn_temperature_tuning=False).architecture.layers[3].temperature is None


def test_defaults_of_deepseek_v3s_groups():
    """Left out, they are 8 and 4, whichever of the two is given."""
    values, _ = tiny("deepseek_v3")
    values |= {"n_routed_experts": 16, "num_experts_per_tok": 2}
    for given, expected in (({}, (8, 4)), ({"topk_group": 2}, (8, 2)), ({"n_group": 4}, (4, 4))):
        rest = {k: v for k, v in values.items() if k not in ("n_group", "topk_group")}
        router = ModelConfig.from_dict(rest | given).architecture.block.router
        assert (router.groups, router.top_groups) == expected


@pytest.mark.parametrize("name", [*TINY, "../deepseek-v3", "../gpt-oss-20b", "../llama-4-scout-17b-16e"])
def test_tensors_cover_every_parameter_once(name):
    config = ModelConfig.from_json_file(CONFIGS / "tiny" / f"{name}.json")
    table = parameters(config.architecture)
    size, taken = collections.Counter(), collections.Counter()
    for piece in pieces(config):
        size[piece.parameter] += math.prod(piece.shape)
        taken[piece.name] += math.prod(piece.shape) / math.prod(piece.disk_shape)
        assert piece.name.startswith(config.family.prefix) and "{" not in piece.name
    assert size == {parameter: math.prod(p.shape) for parameter, p in table.items()}
    assert all(share == 1 for share in taken.values())
    assert flattened(nested(dict.fromkeys(table, 1))) == dict.fromkeys(table, 1)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("smollm2-135m-instruct", 134_515_008),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("olmoe-1b-7b-0924", 6_919_161_856),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v2-lite", 15_706_484_224),
        ("phi-3.5-moe-instruct", 41_873_153_344),
    ],
)
def test_released_models_have_as_many_parameters_as_their_pages_say(name, total):
    table = parameters(ModelConfig.from_json_file(CONFIGS / f"{name}.json").architecture)
    assert sum(math.prod(p.shape) for p in table.values()) == total


def test_list_of_families():
    assert all(name in family.model_types for name, family in FAMILIES.items())
    assert family_of("kimi_k2") is family_of("deepseek_v3") is not family_of("deepseek_v2")
    folder = Path(__file__).parents[2] / "moe_jax" / "families"
    beside = {"__init__", "common", "family", "hub", "tensors"}
    assert len({p.stem for p in folder.glob("*.py")} - beside) == 15


def test_reader_of_hub_keys():
    hub = Hub({"a": 1, "b": 2.5, "c": True, "d": None, "e": [1], "f": {}}, "x")
    assert (hub.integer("a"), hub.number("b"), hub.flag("c"), hub.integer("d", 7)) == (1, 2.5, True, 7)
    assert hub.items("e") == [1] and hub.mapping("f") == {} and hub.first("d", "a") == 1 and hub.positive("a") == 1
    for read, key in ((hub.integer, "b"), (hub.number, "c"), (hub.flag, "a"), (hub.items, "f"), (hub.mapping, "e")):
        with pytest.raises(ValueError, match=rf"x: config key '{key}' is .*, expected"):
            read(key)
    with pytest.raises(ValueError, match="'d' is missing"):
        hub.first("d", "g")
    with pytest.raises(ValueError, match="'a' is 1; supported: "):
        hub.require("a", 2, 3)
    hub.finish()


def test_an_absent_window_is_the_familys_and_a_null_one_is_none():
    def seen(name, drop=(), **changes):
        values = {key: value for key, value in tiny(name)[0].items() if key not in drop} | changes
        return [layer.window for layer in ModelConfig.from_dict(values).architecture.layers]

    slides = {"use_sliding_window": True}
    assert set(seen("qwen3_moe", drop=["sliding_window"], **slides)) == {4096}
    assert set(seen("qwen3_moe", sliding_window=None, **slides)) == {None}
    assert seen("dots1", drop=["sliding_window", "layer_types"], max_window_layers=1)[:2] == [None, 4096]
    assert set(seen("dots1", drop=["layer_types"], sliding_window=None, max_window_layers=0)) == {None}
