#!/usr/bin/env python3
"""Make tiny random-weight Hugging Face checkpoints together with the arrays transformers computes from them.

    python scripts/make_golden.py --out tests/golden/hf                   # every case
    python scripts/make_golden.py --out tests/golden/hf --case jetmoe     # some of them

Needs torch and transformers 5; the tests themselves only read what this script wrote. A case is a folder with
`config.json`, `model.safetensors` (names of released checkpoints), `generation_config.json`, `expected.npz` and
`meta.json`; tests/golden/README.md says what the arrays are. Everything runs in float32 on the CPU with eager attention
and eager experts. Weights whose routing or greedy choices come near a tie are thrown away and the next seed is tried.
"""

import argparse
import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TOKENS, SHORT, PROMPT, NEW = 17, 11, 8, 24  # sequence length, length of the padded row, prompt, generated tokens
MIN_ROUTER_GAP, MIN_GREEDY_GAP, NUDGE = 1e-3, 5e-3, 3e-5

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
    tie_word_embeddings=False,
)
SPLIT = "mlp.experts.0.gate_proj.weight"  # a name that the written file must hold, to notice other layouts
MIXTRAL = "block_sparse_moe.experts.0.w1.weight"


@dataclass
class Case:
    model_type: str
    options: dict  # config keys as hub files spell them; None in COMMON's place removes a key
    expert_name: str | None
    style: str = "hub"  # spelling of config.json: "hub" (rope_theta, rope_scaling, torch_dtype) or "v5" (as saved)
    left: bool = True  # whether to store the left-padded run
    written_type: str | None = None  # model_type in config.json where it differs


def mla(**options):
    return (
        dict(
            num_hidden_layers=3,
            num_key_value_heads=4,
            intermediate_size=32,
            moe_intermediate_size=8,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
            ep_size=1,
            attention_bias=False,
        )
        | options
    )


def yarn(**options):
    return dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1) | options


def sigmoid_moe(**options):  # glm4_moe and dots1
    return (
        dict(
            num_hidden_layers=3,
            intermediate_size=40,
            moe_intermediate_size=12,
            n_routed_experts=6,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
        )
        | options
    )


def ernie(**options):
    return (
        dict(
            num_hidden_layers=3,
            intermediate_size=40,
            moe_intermediate_size=12,
            moe_num_experts=6,
            moe_k=2,
            moe_layer_start_index=1,
            moe_layer_interval=1,
            rope_theta=500000.0,
        )
        | options
    )


def llama4(**options):
    return (
        dict(
            head_dim=8,
            intermediate_size=16,
            intermediate_size_mlp=40,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=6,
            attn_temperature_tuning=True,
            attn_scale=0.1,
            use_qk_norm=True,
            rms_norm_eps=1e-3,
            rope_theta=500000.0,
            router_jitter_noise=0.0,
        )
        | options
    )


LLAMA4_TOP1 = llama4(num_hidden_layers=4, interleave_moe_layer_step=2, no_rope_layers=[1, 1, 1, 0], floor_scale=8192)
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)

CASES = {
    "deepseek_v2": Case(
        "deepseek_v2",
        mla(
            n_shared_experts=2,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            rms_norm_eps=1e-2,
            rope_scaling=yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        SPLIT,
    ),
    "deepseek_v2_grouped": Case(
        "deepseek_v2",
        mla(
            q_lora_rank=20,
            n_shared_experts=1,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=2.5,
        ),
        SPLIT,
        "v5",
    ),
    "deepseek_v3_yarn": Case(
        "deepseek_v3",
        mla(
            q_lora_rank=20,
            n_shared_experts=2,
            topk_method="noaux_tc",
            n_group=4,
            topk_group=2,
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            max_position_embeddings=256,
            rms_norm_eps=1e-2,
            rope_scaling=yarn(mscale=1.0, mscale_all_dim=0.5),
        ),
        SPLIT,
    ),
    "kimi_k2": Case(
        "deepseek_v3",
        mla(
            q_lora_rank=20,
            n_shared_experts=1,
            topk_method="noaux_tc",
            n_group=1,
            topk_group=1,
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.827,
            num_nextn_predict_layers=0,
            rope_theta=50000.0,
            max_position_embeddings=16384,
            rope_scaling=yarn(
                factor=32.0,
                original_max_position_embeddings=512,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        SPLIT,
        written_type="kimi_k2",
    ),
    "glm4_moe": Case(
        "glm4_moe",
        sigmoid_moe(
            head_dim=16,
            partial_rotary_factor=0.5,
            use_qk_norm=True,
            attention_bias=True,
            n_shared_experts=1,
            routed_scaling_factor=1.5,
            num_nextn_predict_layers=0,
        ),
        SPLIT,
    ),
    "dots1": Case(
        "dots1",
        sigmoid_moe(
            head_dim=12,
            attention_bias=False,
            n_shared_experts=2,
            routed_scaling_factor=2.5,
            sliding_window=5,
            max_window_layers=2,
            scoring_func="noaux_tc",
        ),
        SPLIT,
        "v5",
    ),
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        ernie(moe_num_shared_experts=2, moe_layer_end_index=-1, use_bias=False, tie_word_embeddings=True),
        SPLIT,
    ),
    "ernie4_5_moe_bias": Case(
        "ernie4_5_moe",
        ernie(moe_num_shared_experts=1, moe_layer_end_index=1, use_bias=True, tie_word_embeddings=False),
        SPLIT,
        "v5",
    ),
    "hunyuan_v1_moe": Case(
        "hunyuan_v1_moe",
        dict(
            head_dim=16,
            attention_head_dim=16,
            intermediate_size=16,
            moe_intermediate_size=[16, 16],
            num_experts=6,
            moe_topk=[2, 2],
            num_shared_expert=[1, 1],
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            attention_bias=False,
            use_cla=False,
            rope_scaling=dict(
                type="dynamic", alpha=20.0, factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
            ),
        ),
        SPLIT,
    ),
    "minimax_m2": Case(
        "minimax_m2",
        dict(
            head_dim=16,
            rotary_dim=8,
            intermediate_size=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            rope_theta=5000000.0,
            scoring_func="sigmoid",
            use_routing_bias=True,
            use_qk_norm=True,
            qk_norm_type="per_layer",
            shared_intermediate_size=0,
            attn_type_list=[1, 1],
        ),
        MIXTRAL,
    ),
    "flex_olmo": Case(
        "flex_olmo",
        dict(
            intermediate_size=16,
            num_experts=5,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            attention_bias=False,
            rope_theta=500000.0,
        ),
        SPLIT,
        "v5",
    ),
    "llama4_text": Case("llama4_text", LLAMA4_TOP1, "feed_forward.experts.gate_up_proj", "v5"),
    "llama4_text_k2": Case(
        "llama4_text",
        llama4(
            num_hidden_layers=3,
            interleave_moe_layer_step=1,
            no_rope_layers=[1, 0, 1],
            num_experts_per_tok=2,
            floor_scale=4,
            attn_scale=0.3,
            rope_scaling=LLAMA3_ROPE,
        ),
        "feed_forward.experts.gate_up_proj",
        "v5",
        left=False,
    ),
    "llama4": Case("llama4_text", LLAMA4_TOP1, "feed_forward.experts.gate_up_proj", written_type="llama4"),
    "jetmoe": Case(
        "jetmoe",
        dict(
            num_attention_heads=None,
            hidden_act=None,
            activation_function="silu",
            kv_channels=8,
            intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=1e-2,
            tie_word_embeddings=True,
        ),
        "mlp.input_linear.weight",
    ),
    "llama_llama3_tied": Case(
        "llama",
        dict(
            intermediate_size=48,
            head_dim=16,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        None,
        "v5",
    ),
    "llama_linear": Case(
        "llama",
        dict(intermediate_size=48, rope_scaling=dict(type="linear", factor=2.5), attention_bias=False, mlp_bias=False),
        None,
    ),
    "mixtral_window": Case(
        "mixtral",
        dict(head_dim=12, intermediate_size=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=5),
        MIXTRAL,
        "v5",
    ),
    "qwen2_moe_sparse": Case(
        "qwen2_moe",
        dict(
            num_hidden_layers=4,
            intermediate_size=40,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=2,
        ),
        SPLIT,
    ),
    "qwen3_moe_options": Case(
        "qwen3_moe",
        dict(
            head_dim=12,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            attention_bias=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            use_sliding_window=False,
        ),
        SPLIT,
        "v5",
    ),
    "olmoe_clip": Case(
        "olmoe",
        dict(
            intermediate_size=16,
            num_experts=6,
            num_experts_per_tok=2,
            clip_qkv=0.8,
            norm_topk_prob=True,
            attention_bias=False,
        ),
        SPLIT,
        "v5",
    ),
    "granitemoe_untied": Case(
        "granitemoe",
        dict(
            intermediate_size=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            attention_bias=True,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.4,
            logits_scaling=2.0,
        ),
        "block_sparse_moe.input_linear.weight",
        "v5",
    ),
    "phimoe_longrope": Case(
        "phimoe",
        dict(
            intermediate_size=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            attention_bias=True,
            lm_head_bias=True,
            max_position_embeddings=256,
            router_jitter_noise=0.01,
            input_jitter_noise=0.0,
            sliding_window=None,
            original_max_position_embeddings=64,
            rope_scaling=dict(
                type="longrope",
                short_factor=[1.0, 1.25, 1.5, 2.0],
                long_factor=[1.0, 2.5, 4.0, 8.0],
                short_mscale=1.125,
                long_mscale=1.25,
                original_max_position_embeddings=64,
            ),
        ),
        MIXTRAL,
    ),
    "gpt_oss_full": Case(
        "gpt_oss",
        dict(
            head_dim=16,
            intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            attention_bias=True,
            layer_types=["full_attention", "full_attention"],
            sliding_window=6,
            swiglu_limit=7.0,
            rope_theta=150000.0,
            rope_parameters=dict(rope_type="default", rope_theta=150000.0),
        ),
        "mlp.experts.gate_up_proj",
        "v5",
    ),
}


# ---------------------------------------------------------------- weights


def fill(model, seed):
    """Overwrites every weight and persistent buffer in a way that makes each of them matter."""
    g = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict(keep_vars=True).items():
        noise = torch.randn(x.shape, generator=g)
        if "e_score_correction_bias" in name:
            value = 0.15 * noise
        elif name.endswith("sinks"):
            value = 0.7 * noise
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.15 * noise
        elif name.endswith("bias"):
            value = 0.15 * noise
        elif "embed_tokens" in name:
            value = 0.5 * noise
        elif re.search(r"(router|gate|wg|layer)\.weight$", name):
            value = 0.3 * noise
        else:
            value = 0.2 * noise
        x.data.copy_(value)


# ---------------------------------------------------------------- running


def routers(model):
    """(layer, module) of every feed-forward router; JetMoE's attention routers are left out."""
    for name, module in model.named_modules():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(?:mlp|feed_forward|block_sparse_moe)\.(?:gate|router)", name)
        if match:
            yield int(match[1]), module


def read_router(module, inputs, output, k):
    """Logits, chosen experts, their weights and the smallest distance to another choice, per token."""
    kind = type(module).__name__
    if kind.startswith("Llama4"):
        scores, logits = output
        weights, chosen = scores.topk(k, dim=-1)
    elif kind.startswith("JetMoe"):
        logits = output[-1]
        top, chosen = logits.topk(k, dim=-1)
        weights = top.softmax(-1)
    else:
        logits, weights, chosen = output
    bias = getattr(module, "e_score_correction_bias", inputs[1] if len(inputs) > 1 else None)
    groups = getattr(module, "num_group", None) or 1
    if hasattr(module, "moe_statics"):
        scores = logits.softmax(-1) + module.moe_statics.e_score_correction_bias
    elif bias is not None:
        scores = logits.sigmoid() + bias
    else:
        scores = logits if groups == 1 else logits.softmax(-1)
    gap = torch.full(scores.shape[:1], float("inf"), dtype=scores.dtype)
    if groups > 1:
        grouped = scores.unflatten(-1, (groups, -1))
        value = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        best = value.topk(module.topk_group + 1, dim=-1)
        gap = best.values[:, -2] - best.values[:, -1]
        allowed = torch.zeros_like(value).scatter(1, best.indices[:, :-1], 1).bool()
        scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    best = scores.topk(k + 1, dim=-1).values
    order = chosen.argsort(-1)
    gap = torch.minimum(gap, best[:, -2] - best[:, -1])
    return logits, chosen.gather(-1, order), weights.gather(-1, order), gap


@torch.no_grad()
def run(model, k, ids, mask=None, positions=None):
    """One forward pass: arrays named as in expected.npz, and the router gap of every token."""
    seen, hooks = {}, []
    for layer, module in routers(model):

        def hook(m, inputs, output, layer=layer):
            seen[layer] = read_router(m, inputs, output, k)

        hooks.append(module.register_forward_hook(hook))
    final = []
    hooks.append(model.model.norm.register_forward_hook(lambda m, i, o: final.append(o)))
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(out.hidden_states[-1], final[0]), "the last hidden state is not the normed one"
    arrays = {"logits": out.logits, "hidden_states": torch.stack(out.hidden_states)}
    gap = torch.full(ids.shape, float("inf"), dtype=out.logits.dtype)
    for layer, (logits, chosen, weights, gaps) in sorted(seen.items()):
        for name, x in (("router_logits", logits), ("expert_indices", chosen), ("expert_weights", weights)):
            arrays[f"{name}.layer{layer}"] = x.reshape(*ids.shape, -1)
        gap = torch.minimum(gap, gaps.reshape(ids.shape))
    return arrays, gap


@torch.no_grad()
def greedy(model, prompt):
    """NEW greedy tokens, each from a full pass without a cache, and the smallest lead of a chosen token."""
    ids, lead = prompt, float("inf")
    for _ in range(NEW):
        top = model(input_ids=ids, use_cache=False).logits[:, -1].topk(2, dim=-1)
        lead = min(lead, (top.values[:, 0] - top.values[:, 1]).item())
        ids = torch.cat([ids, top.indices[:, :1]], dim=1)
    return ids, lead


def inputs(vocab):
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(2, vocab, (2, TOKENS), generator=g)
    right, pad = torch.ones_like(ids), TOKENS - SHORT
    right[1, SHORT:] = 0
    left = right.flip(1)
    shifted = ids.clone()
    shifted[1, pad:], shifted[1, :pad] = ids[1, :SHORT], 0
    positions = (left.cumsum(1) - 1).clamp(min=0)
    return {
        "full": (ids, None, None),
        "right": (ids * right, right, None),
        "left": (shifted, left, positions),
    }, torch.randint(2, vocab, (1, PROMPT), generator=g)


def attempt(model, k, seed):
    """Arrays and figures for one seed, or None and the reason when a choice is too close to call."""
    fill(model, seed)
    runs, prompt = inputs(model.config.vocab_size)
    arrays, kept = {}, {}
    for way, (ids, mask, positions) in runs.items():
        kept[way], gap = run(model, k, ids, mask, positions)
        gap = gap.min() if mask is None else gap[mask.bool()].min()
        if gap < MIN_ROUTER_GAP:
            return None, f"router gap {gap:.1e}"
        arrays[f"{way}.input_ids" if way != "full" else "input_ids"] = ids
        arrays |= {f"{way}.attention_mask": mask} if mask is not None else {}
        arrays |= {f"{way}.position_ids": positions} if positions is not None else {}
        arrays |= {f"{way}.{name}": x for name, x in kept[way].items() if way != "left" or "hidden" not in name}
    sequence, lead = greedy(model, prompt)
    if lead < MIN_GREEDY_GAP:
        return None, f"greedy gap {lead:.1e}"
    arrays |= {"prompt_ids": prompt, "generated_ids": sequence[:, PROMPT:]}
    _, gap_generated = run(model, k, sequence)
    if gap_generated.min() < MIN_ROUTER_GAP:
        return None, f"router gap {gap_generated.min():.1e} while generating"

    double = copy.deepcopy(model).double()
    exact, gap = run(double, k, runs["full"][0])
    differences = {}
    for name, x in kept["full"].items():
        kind = name.split(".")[0]
        differences[kind] = max(differences.get(kind, 0.0), (x.double() - exact[name]).abs().max().item())
    g = torch.Generator().manual_seed(seed)
    for p in double.parameters():
        p.data.mul_(1 + NUDGE * torch.randn(p.shape, generator=g, dtype=p.dtype))
    nudged, _ = run(double, k, runs["full"][0])
    moved = any((nudged[n] != x).any() for n, x in kept["full"].items() if "indices" in n)
    again = double(input_ids=sequence[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].argmax(-1)
    jump = (nudged["logits"] - exact["logits"]).abs().max().item()
    if moved or not torch.equal(again, sequence[:, PROMPT:]) or jump > 0.05:
        return None, "a small nudge of the weights changes a choice"
    agree = (kept["left"]["logits"][1, -SHORT:] - kept["right"]["logits"][1, :SHORT]).abs().max().item()
    cached = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
    )
    closest = min(gap.min().item(), gap_generated.min().item())
    meta = {
        "seed": seed,
        "min_router_gap": round(closest, 6) if closest < float("inf") else None,
        "min_greedy_gap": round(lead, 6),
        "generate_with_cache_gives_same_ids": bool(torch.equal(cached, sequence)),
        "left_differs_from_right_by": float(f"{agree:.2e}"),
        "max_abs_diff_float32_vs_float64": {
            n: float(f"{d:.2e}") for n, d in sorted(differences.items()) if n != "expert_indices"
        },
        "logits_std": round(kept["full"]["logits"].std().item(), 3),
        "logits_abs_max": round(kept["full"]["logits"].abs().max().item(), 3),
    }
    return arrays, meta


# ---------------------------------------------------------------- writing


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1 if path.name == "meta.json" else 2, sort_keys=True) + "\n")


def nest_llama4(folder, config):
    """Turns a text checkpoint into one laid out as the multimodal releases, with a stub of the other towers."""
    tensors = {f"language_model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    tensors["multi_modal_projector.linear_1.weight"] = torch.full((4, 4), 0.5)
    tensors["vision_model.class_embedding"] = torch.full((4,), 0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shared = {k: config.pop(k) for k in ("architectures", "transformers_version")}
    return {
        "model_type": "llama4",
        "text_config": config | {"model_type": "llama4_text"},
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 4, "num_hidden_layers": 1},
        "boi_token_index": 93,
        "eoi_token_index": 94,
        "image_token_index": 95,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **shared,
        "architectures": ["Llama4ForConditionalGeneration"],
    }


def make(name, out, first_seed=0, tries=300):
    case, folder = CASES[name], out / name
    hub = {k: v for k, v in (COMMON | case.options).items() if not (v is None and k in COMMON and k != "eos_token_id")}
    config = CONFIG_MAPPING[case.model_type].from_dict(copy.deepcopy(hub) | {"dtype": "float32"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    k = getattr(config, "num_experts_per_tok", None)
    k = k[0] if isinstance(k, list) else k
    for seed in range(first_seed, first_seed + tries):
        arrays, meta = attempt(model, k, seed)
        if arrays is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed is good, last: {meta}")
    if not case.left:
        arrays = {n: x for n, x in arrays.items() if not n.startswith("left.")}
    elif meta["left_differs_from_right_by"] > 1e-4:
        raise SystemExit(f"{name}: padding on the left changes the result by {meta['left_differs_from_right_by']}")

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    names = list(load_file(folder / "model.safetensors"))
    assert case.expert_name is None or any(n.endswith(case.expert_name) for n in names), names
    assert ("lm_head.weight" in names) != config.tie_word_embeddings
    if case.style == "hub":
        written = hub | {
            "architectures": [type(model).__name__],
            "model_type": case.written_type or case.model_type,
            "torch_dtype": "float32",
            "transformers_version": transformers.__version__,
        }
        write_json(folder / "config.json", written)
    # What was written must load again, without a missing or unexpected tensor, and give the same logits.
    reread = json.loads((folder / "config.json").read_text()) | {"model_type": case.model_type}
    again, info = type(model).from_pretrained(
        folder,
        config=type(config).from_dict(reread),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert torch.equal(again(input_ids=arrays["input_ids"]).logits, arrays["full.logits"]), "reloads differently"
    if case.written_type == "llama4":
        write_json(folder / "config.json", nest_llama4(folder, written))

    np.savez_compressed(
        folder / "expected.npz",
        **{n: x.detach().numpy().astype(np.float32 if x.is_floating_point() else np.int32) for n, x in arrays.items()},
    )
    write_json(
        folder / "meta.json",
        {
            "model_type": case.model_type,
            "weights_dtype": "float32",
            "compute_dtype": "float32",
            "config_style": case.style,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            **meta,
        },
    )
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"{name}: seed {meta['seed']}, {size / 1024:.0f} KiB, gaps {meta['min_router_gap']} {meta['min_greedy_gap']}, "
        f"cache {meta['generate_with_cache_gives_same_ids']}, left {meta['left_differs_from_right_by']}, "
        f"f64 {meta['max_abs_diff_float32_vs_float64']['logits']}, std {meta['logits_std']}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder the cases are written to")
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), metavar="NAME", help="only these cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in args.case or CASES:
        make(name, args.out)


if __name__ == "__main__":
    main()
