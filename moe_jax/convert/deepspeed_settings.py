"""What DeepSpeed's files do not say of a model, from whatever the user has: a config, a dictionary, a JSON file."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..deepspeed.config import MoEInferenceConfig
from ..deepspeed.values import ActivationFuncType
from .deepspeed_files import DeepSpeedFiles

_log = logging.getLogger(__name__)

#: Other spellings (Megatron's arguments, short names) of our keys.
_SPELLINGS = {
    "hidden_size": ("hidden",),
    "intermediate_size": ("intermediate", "ffn_hidden_size"),
    "heads": ("num_attention_heads",),
    "num_hidden_layers": ("layers", "num_layers"),
    "vocab_size": ("vocab", "padded_vocab_size"),
    "max_positions": ("max_position_embeddings",),
    "num_experts": ("experts", "moe_experts", "global_experts"),
    "k": ("topk", "top_k"),
    "eval_capacity_factor": ("moe_eval_capacity_factor",),
    "capacity_factor": ("moe_train_capacity_factor",),
    "min_capacity": ("moe_min_capacity",),
    "layer_norm_eps": ("layernorm_eps", "layernorm_epsilon", "layer_norm_epsilon", "epsilon", "eps"),
    "drop_tokens": ("moe_token_dropping",),
    "gelu": ("activation",),
}
_OURS = {theirs: ours for ours, spellings in _SPELLINGS.items() for theirs in spellings}
_GATE = (
    "k capacity_factor eval_capacity_factor min_capacity noisy_gate_policy drop_tokens use_rts "
    "top2_2nd_expert_sampling drop_policy"
).split()
_SIZES = "hidden_size intermediate_size num_experts use_residual".split()
_CHECKPOINT = (
    "heads num_hidden_layers vocab_size max_positions expert_interval layer_norm_eps checkpoint_version qkv_rows "
    "tie_word_embeddings position_embedding_type rotary_dim rotate_half rope_theta"
).split()
#: Remarks in the description of a stored case: how it came about, and what was measured.
_REMARKS = set(
    "name tag seed output gating training used_token tokens_kept tokens_wanted max_abs_diff_float32_vs_float64".split()
)
_ROWS = {
    "[(q, k, v), head, head_dim]": 0.0,
    "[head, head_dim, (q, k, v)]": 1.0,
    "[head, (q, k, v), head_dim]": 2.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """`gate`: arguments of `TopKGate`; `sizes`: what the config states and the weights must confirm; `rest`."""

    gate: dict[str, Any]
    sizes: dict[str, Any]
    activation: str
    rest: dict[str, Any]


def read_settings(config: MoEInferenceConfig | Mapping[str, Any] | str | os.PathLike) -> Settings:
    """Settings under our names. Raises `ValueError` for keys that nobody knows or that contradict each other.

    A dictionary speaks DeepSpeed's language: its policy "probs", the default, is our `probs_upstream`.
    """
    if isinstance(config, MoEInferenceConfig):
        return _of_layer_config(config)
    values = config if isinstance(config, Mapping) else _read(Path(config))
    found: dict[str, Any] = {}
    known = {*_GATE, *_SIZES, *_CHECKPOINT, "gelu", "mlp_type"}
    for key, value in values.items():
        name = _OURS.get(key, key)
        if name in _REMARKS or value is None:
            continue
        if name not in known:
            raise ValueError(f"config: key {key!r} is not known; known are {', '.join(sorted(known | set(_OURS)))}")
        if found.setdefault(name, value) != value:
            raise ValueError(f"config: {name} is {found[name]!r} and, as {key!r}, {value!r}")
    residual = found.pop("mlp_type", None)
    if residual is not None and found.setdefault("use_residual", residual == "residual") != (residual == "residual"):
        raise ValueError(f"config: mlp_type {residual!r} contradicts use_residual {found['use_residual']!r}")
    gelu = found.pop("gelu", "tanh")
    if gelu not in _GELU:
        raise ValueError(f"config: gelu {gelu!r} is not one of {', '.join(_GELU)}")
    if found.setdefault("drop_policy", "probs") == "probs":
        found["drop_policy"] = "probs_upstream"
    take = lambda names: {name: found[name] for name in names if name in found}
    return Settings(take(_GATE), take(_SIZES), _GELU[gelu], take(_CHECKPOINT))


_GELU = {"tanh": "gelu_tanh", "erf": "gelu", "relu": "relu"}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(values, Mapping):
        raise OSError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _of_layer_config(config: MoEInferenceConfig) -> Settings:
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    if config.num_experts > 1:
        sizes["num_experts"] = config.num_experts
    sizes["use_residual"] = config.mlp_type == "residual"
    gated = config.mlp_act_func_type in (ActivationFuncType.GATED_GELU, ActivationFuncType.GATED_SILU)
    if gated or not config.pre_layer_norm:
        raise ValueError("config: DeepSpeed's MoE layers and Megatron's models have plain MLPs and norms in front")
    rest: dict[str, Any] = {"heads": config.heads, "layer_norm_eps": config.layer_norm_eps}
    if config.num_hidden_layers > 0:
        rest["num_hidden_layers"] = config.num_hidden_layers
    if config.rotary_dim > 0:
        rest |= {"position_embedding_type": "rope", "rotary_dim": config.rotary_dim}
        rest |= {"rotate_half": config.rotate_half, "rope_theta": config.rope_theta}
    gate = {name: getattr(config, name) for name in _GATE if hasattr(config, name)}
    return Settings(gate, sizes, config.activation, rest)


def checkpoint_version(settings: Settings) -> float | None:
    """Which order the rows of query_key_value have, if the settings say."""
    version, rows = settings.rest.get("checkpoint_version"), settings.rest.get("qkv_rows")
    if rows is None:
        return version
    if rows not in _ROWS or version not in (None, _ROWS[rows]):
        raise ValueError(f"qkv_rows: {rows!r} with checkpoint_version {version}; known are {_ROWS}")
    return _ROWS[rows]


def hub_config(settings: Settings, files: DeepSpeedFiles) -> dict[str, Any]:
    """The hub dictionary of the family `deepspeed_moe`. Raises `ValueError` where settings and files disagree."""
    counts = [files.num_experts.get(i, 0) for i in range(files.num_layers)]
    rest, given = settings.rest, settings.sizes
    learned = "position_embeddings.weight" in files.tensors
    kind = rest.get("position_embedding_type", "learned" if learned else None)
    if kind is None or (kind == "learned") != learned:
        there = "there are" if learned else "there are no"
        raise ValueError(f"position_embedding_type: {kind!r}, but {there} learned positions in {files.folder}")
    tied = "lm_head.weight" not in files.tensors
    facts = {
        "tie_word_embeddings": (tied, rest),
        "hidden_size": (files.hidden_size, given),
        "intermediate_size": (files.intermediate_size, given),
        "use_residual": (files.residual, given),
        "num_hidden_layers": (files.num_layers, rest),
        "vocab_size": (files.vocab_size, rest),
    }
    if learned:
        facts["max_positions"] = (files.max_positions, rest)
    for name, (value, stated) in facts.items():
        if stated.get(name, value) != value:
            raise ValueError(f"{name}: {stated[name]} in the config, {value} in {files.folder}")
    _check_experts(given.get("num_experts"), rest.get("expert_interval"), counts)
    gate = {"k": "num_experts_per_tok"} | {n: n for n in _GATE[2:] if n in _EVALUATED}
    hub = {
        "model_type": "deepspeed_moe",
        "hidden_size": files.hidden_size,
        "intermediate_size": files.intermediate_size,
        "num_attention_heads": files.num_heads,
        "num_hidden_layers": files.num_layers,
        "vocab_size": files.vocab_size,
        "max_position_embeddings": files.max_positions or rest.get("max_positions"),
        "hidden_act": {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}[settings.activation],
        "layer_norm_epsilon": rest.get("layer_norm_eps", 1e-5),
        "num_experts": counts,
        "mlp_type": "residual" if files.residual else "standard",
        "position_embedding_type": kind,
        "tie_word_embeddings": tied,
    }
    hub |= {theirs: settings.gate[ours] for ours, theirs in gate.items() if ours in settings.gate}
    return hub | {n: rest[n] for n in ("rotary_dim", "rotate_half", "rope_theta") if n in rest}


_EVALUATED = ("eval_capacity_factor", "min_capacity", "drop_tokens", "drop_policy")


def _check_experts(stated: Any, interval: int | None, counts: list[int]) -> None:
    found = [count for count in counts if count]
    if stated is not None:
        stated = list(stated) if isinstance(stated, (list, tuple)) else [stated]
        if stated != found and (len(stated) != 1 or stated * len(found) != found):
            raise ValueError(f"num_experts: {stated} in the config, {found} in the files")
    if interval is not None and any((count > 0) != ((i + 1) % interval == 0) for i, count in enumerate(counts)):
        raise ValueError(f"expert_interval: {interval} in the config, experts per layer {counts} in the files")
