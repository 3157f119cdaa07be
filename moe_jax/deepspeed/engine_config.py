"""`EngineConfig`: the JSON of DeepSpeed's inference engine, translated into a mesh and a layer's configuration."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import values
from .config import MoEInferenceConfig
from .keys import ENGINE_ALIASES, ENGINE_DEPRECATED, ENGINE_KEYS, ENGINE_WITHOUT_EFFECT, engine_top_level, unknown_key

__all__ = ["ENGINE_WITHOUT_EFFECT", "EngineConfig", "MoEConfig", "QuantConfig", "TensorParallelConfig"]

_log = logging.getLogger(__name__)

# Defaults of keys without effect that are not false, none or empty: a file that spells them out is not worth a line.
_DEFAULTS = {"replace_method": "auto", "training_mp_size": 1, "tensor_parallel.tp_grain_size": 64}
_DEFAULTS |= {"quant.qkv.enabled": True, "quant.activation.q_groups": 1}


def _take(owner: Any, prefix: str) -> None:
    """Make the fields of a frozen section plain numbers and flags, or raise."""
    for field in dataclasses.fields(owner):
        value = values.typed(prefix + field.name, getattr(owner, field.name), field.type)
        object.__setattr__(owner, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorParallelConfig:
    """Section `tensor_parallel`: `tp_size` devices share each weight, unless `enabled` is false."""

    enabled: bool = True
    tp_size: int = 1

    def __post_init__(self):
        _take(self, "tensor_parallel.")
        values.at_least(1, self, "tp_size", prefix="tensor_parallel.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Section `moe`: `ep_size` devices share the experts; `moe_experts`: experts per MoE layer, or one for all."""

    enabled: bool = True
    ep_size: int = 1
    moe_experts: tuple[int, ...] = (1,)
    type: str = "standard"

    def __post_init__(self):
        _take(self, "moe.")
        values.at_least(1, self, "ep_size", prefix="moe.")
        values.one_of("moe.type", self.type, ("standard", "residual"))
        given = self.moe_experts
        if not isinstance(given, (list, tuple)):
            given = (given,)
        experts = tuple(values.typed("moe.moe_experts", count, int) for count in given)
        if not experts:
            raise ValueError("moe.moe_experts: the list is empty")
        for count in experts:
            if count < 1:
                raise ValueError(f"moe.moe_experts: expected positive integers, got {list(experts)}")
            if self.enabled and experts != (1,) and count % self.ep_size:  # (1,) is the default: not stated
                raise ValueError(f"moe.ep_size: {self.ep_size} does not divide moe_experts {list(experts)}")
        object.__setattr__(self, "moe_experts", experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Section `quant.weight`, for `dtype` int8: symmetric, 8 bits, `q_groups` groups per weight."""

    enabled: bool = True
    num_bits: int = 8
    q_type: str = "symmetric"
    q_groups: int = 1
    section: dataclasses.InitVar[str] = "quant.weight"  # for messages

    def __post_init__(self, section: str):
        _take(self, f"{section}.")
        values.at_least(1, self, "q_groups", prefix=f"{section}.")
        values.one_of(f"{section}.q_type", self.q_type, ("symmetric", "asymmetric"))
        if self.enabled and self.num_bits != 8:
            raise ValueError(f"{section}.num_bits: {self.num_bits} bits are not supported, only 8")
        if self.enabled and self.q_type != "symmetric":
            raise ValueError(
                f"{section}.q_type: {self.q_type} with {self.num_bits} bits is not supported, only symmetric"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The configuration of DeepSpeed's inference engine (`init_inference`), with its defaults; frozen.

    Build it with `from_dict` or `from_json_file`: a section may be spelled `tp` or `tensor_parallel`, `moe` may be a
    bool, old keys such as `mp_size` go to their sections, and "auto" means the default, all as in DeepSpeed. Keys in
    `ENGINE_WITHOUT_EFFECT` are logged with the reason and not kept. `dtype` is a name, float16 by default.

    >>> entries = {"dtype": "bf16", "tp": {"tp_size": 2}, "moe": {"ep_size": 4, "num_experts": [8]}}
    >>> engine = EngineConfig.from_dict(entries)
    >>> engine.mesh_sizes()
    {'data': 1, 'expert': 4, 'model': 2}
    >>> layer = engine.layer_config(hidden_size=32, heads=4, k=2)
    >>> layer.num_experts, layer.working_dtype
    (8, 'bfloat16')
    """

    dtype: Any = "float16"
    tensor_parallel: TensorParallelConfig = TensorParallelConfig()
    moe: MoEConfig = MoEConfig()
    quant: QuantConfig = QuantConfig()
    triangular_masking: bool = True
    return_tuple: bool = True
    max_out_tokens: int = 1024
    min_out_tokens: int = 1
    checkpoint: str | None = None
    base_dir: str = ""

    def __post_init__(self):
        _take(self, "")
        object.__setattr__(self, "dtype", values.dtype_name(self.dtype))
        values.at_least(1, self, "max_out_tokens", "min_out_tokens")
        if self.min_out_tokens > self.max_out_tokens:
            raise ValueError(f"min_out_tokens: {self.min_out_tokens} exceeds max_out_tokens {self.max_out_tokens}")
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, Path)):
            raise ValueError(
                f"checkpoint: expected a path, got {type(self.checkpoint).__name__}; give load_checkpoint the folder"
            )
        if not isinstance(self.base_dir, (str, Path)):
            raise ValueError(f"base_dir: expected a path, got {self.base_dir!r}")
        object.__setattr__(self, "checkpoint", self.checkpoint and str(self.checkpoint))
        object.__setattr__(self, "base_dir", str(self.base_dir) if self.base_dir else "")
        for name, kind in (("tensor_parallel", TensorParallelConfig), ("moe", MoEConfig), ("quant", QuantConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected a {kind.__name__}; from_dict takes dictionaries")
        if self.dtype == "int8" and not self.quant.enabled:
            raise ValueError("quant.enabled: False contradicts dtype int8")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "EngineConfig":
        """From the engine's dictionary. An unknown key is a `ValueError` that names it and the nearest known one."""
        top = _read("", entries, {*ENGINE_KEYS, *ENGINE_DEPRECATED})
        sections = {name: top.pop(name, {}) for name in ("tensor_parallel", "moe", "quant")}
        if isinstance(sections["moe"], bool):
            sections["moe"] = {"enabled": sections["moe"]}
        tensor_parallel = _read("tensor_parallel", sections["tensor_parallel"], {"enabled", "tp_size"})
        moe = _read("moe", sections["moe"], {"enabled", "ep_size", "moe_experts", "type"})
        for old, (section, key) in ENGINE_DEPRECATED.items():
            if old in top:
                target = moe if section == "moe" else tensor_parallel
                value = top.pop(old)
                if target.setdefault(key, value) != value:
                    raise ValueError(f"{old}: {value!r} contradicts {section}.{key} {target[key]!r}")
        return cls(
            **top,
            tensor_parallel=TensorParallelConfig(**tensor_parallel),
            moe=MoEConfig(**moe),
            quant=_read_quant(sections["quant"]),
        )

    @classmethod
    def from_json_file(cls, path: str | Path) -> "EngineConfig":
        """From a JSON file. `OSError` if it cannot be read or is not JSON."""
        return cls.from_dict(values.read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """What has an effect, as plain JSON values; `from_dict` gives an equal configuration."""
        entries = dataclasses.asdict(self)
        entries["moe"]["moe_experts"] = self.moe_experts
        entries["quant"] = {"weight": entries["quant"]}
        return entries

    @property
    def moe_experts(self) -> list[int]:
        """Experts of each MoE layer, in order; one entry holds for all layers."""
        return list(self.moe.moe_experts)

    def mesh_sizes(self) -> dict[str, int]:
        """Sizes of the mesh's axes, as `moe_jax.make_mesh` takes them. A section that is not enabled has size 1.

        >>> EngineConfig.from_dict({"mp_size": 2, "moe": False}).mesh_sizes()
        {'data': 1, 'expert': 1, 'model': 2}
        """
        expert = self.moe.ep_size if self.moe.enabled else 1
        model = self.tensor_parallel.tp_size if self.tensor_parallel.enabled else 1
        return {"data": 1, "expert": expert, "model": model}

    def layer_config(self, *, moe_layer: int | None = None, **sizes: Any) -> MoEInferenceConfig:
        """The configuration of one layer: `sizes` (any key of it, at least `hidden_size` and `heads`) and the engine's.

        A key that both know is taken from `sizes`, except the number of experts, where a contradiction is an error.
        `moe_layer`: which entry of `moe_experts`, needed if they differ.

        >>> engine = EngineConfig.from_dict({"dtype": "int8", "moe": {"moe_experts": [4, 8], "type": "residual"}})
        >>> layer = engine.layer_config(moe_layer=1, hidden_size=32, heads=4)
        >>> layer.num_experts, layer.mlp_type, layer.q_int8, layer.working_dtype
        (8, 'residual', True, 'float16')
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in ("triangular_masking", "return_tuple")}
        given |= {"max_out_tokens": self.max_out_tokens, "min_out_tokens": self.min_out_tokens}
        given |= {"mp_size": self.mesh_sizes()["model"], "q_int8": self.dtype == "int8"}
        if self.quant.enabled:
            given["quantize_groups"] = self.quant.q_groups
        if not any(sizes.get(name) for name in ("dtype", "fp16", "bf16")):
            sizes.pop("dtype", None)
            given["dtype"] = self.dtype
        if self.moe.enabled:
            given["mlp_type"] = self.moe.type
            if experts := self._experts(moe_layer, sizes):
                sizes = {**sizes, "global_experts": experts}
        return MoEInferenceConfig.from_dict(given | sizes)

    def _experts(self, moe_layer: int | None, sizes: Mapping[str, Any]) -> int | None:
        """The number of experts that the engine states for a layer; None if it states none or the caller chose."""
        stated = self.moe.moe_experts
        if stated == (1,):
            return None
        if moe_layer is not None and len(stated) > 1:
            if not 0 <= values.typed("moe_layer", moe_layer, int) < len(stated):
                raise ValueError(f"moe_layer: {moe_layer} of {len(stated)} layers in moe_experts {list(stated)}")
            stated = (stated[moe_layer],)
        asked = sizes.get("global_experts", 1)
        if asked != 1:
            if asked not in stated:
                raise ValueError(f"global_experts: {asked!r} contradicts the engine's moe_experts {list(stated)}")
            return None
        if len(set(stated)) > 1:
            raise ValueError(f"moe_layer: needed, because the layers differ in moe_experts {list(stated)}")
        return stated[0]


def _read(section: str, entries: Any, known: set[str]) -> dict[str, Any]:
    """One dictionary with second names resolved and keys without effect logged; unknown keys raise."""
    prefix = f"{section}." if section else ""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{section or 'config'}: expected a dictionary, got {entries!r}")
    aliases = ENGINE_ALIASES.get(section, {})
    found: dict[str, Any] = {}
    for key, value in entries.items():
        name = aliases.get(key, key)
        if f"{prefix}{name}" in ENGINE_WITHOUT_EFFECT:
            if value and value != "auto" and value != _DEFAULTS.get(f"{prefix}{name}"):
                _log.info("%s%s=%r has no effect: %s", prefix, key, value, ENGINE_WITHOUT_EFFECT[f"{prefix}{name}"])
            continue
        if name not in known:
            raise _unknown(section, key, known)
        if isinstance(value, str) and value == "auto":
            continue
        if name in found and found[name] != value:
            raise ValueError(f"{prefix}{name}: {found[name]!r} and {value!r} are given, the key has two names")
        found[name] = value
    return found


def _unknown(section: str, key: Any, known: set[str]) -> ValueError:
    if not section and key in {field.name for field in dataclasses.fields(MoEInferenceConfig)}:
        return ValueError(f"{key}: belongs to a layer's configuration; give it to layer_config or MoEInferenceConfig")
    if not section:
        return unknown_key(key, engine_top_level(), "EngineConfig")
    ignored = {name.removeprefix(f"{section}.") for name in ENGINE_WITHOUT_EFFECT if name.startswith(f"{section}.")}
    return unknown_key(key, known | ENGINE_ALIASES.get(section, {}).keys() | ignored, f"EngineConfig, {section}")


def _read_quant(entries: Any) -> QuantConfig:
    quant = _read("quant", entries, {"enabled", "weight", "activation", "qkv"})
    names = {"enabled", "num_bits", "q_type", "q_groups"}
    enabled = values.typed("quant.enabled", quant.get("enabled", True), bool)
    _read("quant.qkv", quant.get("qkv", {}), set())
    activation = _read("quant.activation", quant.get("activation", {}), names - {"q_groups"})
    weight = _read("quant.weight", quant.get("weight", {}), names)
    if not enabled:
        activation["enabled"] = weight["enabled"] = False
    QuantConfig(**activation, section="quant.activation")  # checked; activations are not quantised here
    return QuantConfig(**weight)
