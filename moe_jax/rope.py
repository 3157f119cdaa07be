"""Rotary positions: frequencies from a checkpoint's settings, and their application."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .block_config import RopeConfig

#: Keys of each kind of scaling beside `rope_type`, `rope_theta` and `partial_rotary_factor`.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    # Hunyuan writes the last four beside alpha; neither its code nor transformers reads them.
    "dynamic": ("factor", "alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
    + ("attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor")
    + ("short_mscale", "long_mscale"),
}


def rope_config(settings: Mapping[str, Any], dim: int, context: int, interleaved: bool = False) -> RopeConfig:
    """Frequencies of `dim` rotated components from `rope_parameters`-style settings.

    `settings` holds `rope_theta`, `rope_type` and that type's keys; `context` is the model's longest sequence.
    Raises `ValueError` for an unknown type or key, or a missing one.

    >>> rope_config({"rope_theta": 10000.0, "rope_type": "default"}, dim=4, context=128).frequencies
    (1.0, 0.01)
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rope: {dim} rotated components; the number must be even and positive")
    kind = settings.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type: {kind!r} is not supported; supported are {', '.join(SCALINGS)}")
    known = {*SCALINGS[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(key for key, value in settings.items() if key not in known and value is not None)
    if unknown:
        raise ValueError(f"rope scaling {kind!r}: unknown keys {', '.join(unknown)}")
    settings = {key: value for key, value in settings.items() if value is not None}
    _check(kind, settings)
    theta = float(settings["rope_theta"])
    base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    try:
        return RopeConfig(interleaved=interleaved, **_KINDS[kind](base, settings, dim, theta, context))
    except KeyError as missing:
        raise ValueError(f"rope scaling {kind!r}: missing key {missing.args[0]!r}") from None


#: Settings that are divided by, or whose logarithm is.
_POSITIVE = ("factor", "alpha", "short_mscale", "long_mscale", "attention_factor")
_ABOVE_ONE = ("rope_theta", "original_max_position_embeddings")


def _check(kind: str, settings: Mapping[str, Any]) -> None:
    """Each setting's type and range; `None`s are gone by now."""

    def number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    for key, value in settings.items():
        if key in ("rope_type", "type"):
            continue
        if key == "truncate":
            good, wanted = isinstance(value, bool), "true or false"
        elif key in ("short_factor", "long_factor"):
            good = isinstance(value, (list, tuple)) and all(number(v) and v > 0 for v in value)
            wanted = "a list of positive numbers"
        elif key in _ABOVE_ONE:
            good, wanted = number(value) and value > 1, "a number above 1"
        elif key in _POSITIVE:
            good, wanted = number(value) and value > 0, "a positive number"
        else:
            good, wanted = number(value) and value >= 0, "a number that is not negative"
        if not good:
            raise ValueError(f"rope scaling {kind!r}: {key} is {value!r}, expected {wanted}")


def _floats(values) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _default(base, settings, dim, theta, context):
    return {"frequencies": _floats(base)}


def _linear(base, settings, dim, theta, context):
    return {"frequencies": _floats(base / settings["factor"])}


def _dynamic(base, settings, dim, theta, context):
    """NTK with a fixed `alpha` stretches the base. Without it, scaling begins beyond the context: nothing here."""
    if settings.get("alpha"):
        theta = theta * settings["alpha"] ** (dim / (dim - 2))
        base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    return {"frequencies": _floats(base)}


def _llama3(base, settings, dim, theta, context):
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    original = settings.get("original_max_position_embeddings", context)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = original * base / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns >= low).astype(np.float64)
    return {"frequencies": _floats(base * (keep + (1 - keep) / settings["factor"]))}


def _yarn_magnitude(factor: float | int, weight: float | int = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(base, settings, dim, theta, context):
    """YaRN (arXiv:2309.00071): interpolate below `beta_slow` turns, extrapolate above `beta_fast`, ramp between."""
    original = settings.get("original_max_position_embeddings", context)
    factor = settings.get("factor", context / original)

    def component(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(settings.get("beta_fast") or 32), component(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    magnitude = settings.get("attention_factor")
    if magnitude is None:
        mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
        magnitude = _yarn_magnitude(factor)
        if mscale and all_dim:
            magnitude = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dim)
    return {"frequencies": _floats(base * (1 - ramp) + base / factor * ramp), "factor": float(magnitude)}


def _longrope(base, settings, dim, theta, context):
    """LongRoPE (arXiv:2402.13753): one factor per frequency, another list beyond the original length."""
    original = settings.get("original_max_position_embeddings", context)
    factor = settings.get("factor", context / original)
    magnitude = settings.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    lists = {name: np.asarray(settings[name], np.float64) for name in ("short_factor", "long_factor")}
    for name, values in lists.items():
        if values.shape != base.shape:
            raise ValueError(f"{name}: {values.size} factors for {base.size} frequencies")
    return {
        "frequencies": _floats(base / lists["short_factor"]),
        "factor": float(settings.get("short_mscale", magnitude)),
        "long_frequencies": _floats(base / lists["long_factor"]),
        "long_factor": float(settings.get("long_mscale", magnitude)),
        "switch_length": int(original),
    }


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def mla_score_factor(settings: Mapping[str, Any]) -> float:
    """What DeepSeek's latent attention multiplies its score scale by under YaRN: the squared magnitude."""
    all_dim = settings.get("mscale_all_dim") if settings.get("rope_type", "default") != "default" else None
    if all_dim and "factor" not in settings:
        raise ValueError(f"rope scaling {settings['rope_type']!r}: missing key 'factor'")
    return _yarn_magnitude(settings["factor"], all_dim) ** 2 if all_dim else 1.0


def rotation(
    rope: RopeConfig, positions: Int[Array, "B T"], length: Int[Array, ""] | int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine per position and frequency, float32; `length`: tokens of the longest row, for LongRoPE."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    factor: Array | float = rope.factor
    if rope.long_frequencies is not None:
        long = length > rope.switch_length
        frequencies = jnp.where(long, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
        factor = jnp.where(long, rope.long_factor, factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """Rotate the first components of `x [B, T, heads, H]` by `turn` (cosine and sine `[B, T, half]`)."""
    cos, sin = (t[:, :, None, :] for t in turn)
    dim = 2 * cos.shape[-1]
    part = x[..., :dim].astype(jnp.float32)
    if interleaved:
        even, odd = part[..., 0::2], part[..., 1::2]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(part.shape)
    else:
        low, high = jnp.split(part, 2, axis=-1)
        turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    turned = turned.astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], -1)
