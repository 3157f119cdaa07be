"""Upcycling: a dense model's MLPs copied into experts (arXiv:2212.05055)."""

import jax
import jax.numpy as jnp

from .config import ModelConfig
from .model import Model

_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
    "original_max_position_embeddings partial_rotary_factor tie_word_embeddings eos_token_id pad_token_id "
    "initializer_range attention_dropout use_cache torch_dtype dtype"
).split()


def upcycle(model: Model, num_experts: int = 4, top_k: int = 2, seed: int = 0) -> Model:
    """A Mixtral-style model out of a dense Llama: every expert is a copy of the layer's MLP, routers are random.

    Since the weights of the chosen experts sum to one, the new model computes what the dense one does, until
    training tells its experts apart. Raises `ValueError` for a model that is not a dense Llama without biases, or
    `top_k` outside `[1, num_experts]`.

    >>> dense = Model.initialize(tiny_llama())
    >>> moe = upcycle(dense, num_experts=4, top_k=2)
    >>> bool(jnp.abs(moe([[1, 2, 3]]) - dense([[1, 2, 3]])).max() < 1e-4)
    True
    """
    config = model.config
    block = config.architecture.block
    if config.model_type != "llama":
        raise ValueError(f"upcycle: takes a dense llama model, got {config.model_type}")
    if block.attention.qkv_bias or block.dense.bias or block.attention.rope.interleaved:
        raise ValueError("upcycle: Mixtral has no biases and rotates halves; this Llama differs")
    hub = {key: config.hub[key] for key in _COPIED if key in config.hub}
    hub |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}
    hub |= {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    hub.setdefault("rope_theta", 10000.0)  # the families' defaults differ
    hub.setdefault("rms_norm_eps", 1e-6)
    new = ModelConfig.from_dict(hub)
    if new.architecture.block.attention != block.attention:
        raise ValueError("upcycle: Mixtral's config cannot say how this Llama attends")
    weights = model.arrays()
    dense = weights.pop("dense")
    layers, width = config.num_layers, block.width
    moe = {name: jnp.repeat(kernel[:, None], num_experts, axis=1) for name, kernel in dense.items()}
    router = jax.random.normal(jax.random.key(seed), (layers, num_experts, width)) * width**-0.5
    weights["moe"] = moe | {"router": router.astype(model.dtype)}
    return Model(new, weights, model.generation, model.named)


def tiny_llama() -> ModelConfig:
    """A two-layer Llama of a few thousand parameters, for examples and tests."""
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return ModelConfig.from_dict({"model_type": "llama"} | values)
