"""Model families by `model_type`. Adding one: `docs/adding_a_family.md`."""

from . import (
    deepseek,
    deepspeed_moe,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    llama,
    llama4,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from .family import Family

_ALL = (
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    olmoe.OLMOE,
    olmoe.FLEX_OLMO,
    deepseek.DEEPSEEK_V2,
    deepseek.DEEPSEEK_V3,
    gpt_oss.FAMILY,
    granitemoe.FAMILY,
    phimoe.FAMILY,
    glm4_moe.GLM4_MOE,
    glm4_moe.DOTS1,
    ernie4_5_moe.FAMILY,
    hunyuan_v1_moe.FAMILY,
    minimax_m2.FAMILY,
    llama4.LLAMA4_TEXT,
    llama4.LLAMA4,
    llama.FAMILY,
    deepspeed_moe.FAMILY,
)

#: `model_type` -> family.
FAMILIES: dict[str, Family] = {name: family for family in _ALL for name in family.model_types}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; `ValueError` with the list of supported ones for any other.

    >>> family_of("switch_transformers")
    Traceback (most recent call last):
    ValueError: model_type 'switch_transformers' is not supported; supported are deepseek_v2, ...
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
