"""The declarative table of a family's tensors: our parameter -> the tensor(s) on disk."""

import dataclasses
from collections.abc import Mapping

LAYER = "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter lives in a checkpoint.

    `name` may hold `{layer}` and `{expert}`. Kernels are stored `[out, in]`, as torch's Linear does and as we do;
    `transposed`: this one is `[in, out]`. `part = (index, count)`: the parameter is one of `count` parts along the
    output axis, in blocks, or alternating if `interleaved` (gpt-oss's gate and up). `leading_one`: stored with an
    axis of length one in front.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    interleaved: bool = False
    leading_one: bool = False


Table = Mapping[str, Tensor]


def trunk(final_norm: str = "model.norm") -> dict[str, Tensor]:
    """Embedding, final norm and head, under the names nearly every family uses."""
    return {
        "embedding": Tensor("model.embed_tokens.weight"),
        "final_norm.scale": Tensor(final_norm + ".weight"),
        "final_norm.bias": Tensor(final_norm + ".bias"),
        "head.kernel": Tensor("lm_head.weight"),
        "head.bias": Tensor("lm_head.bias"),
    }


def attention(prefix: str = "self_attn.", query_norm: str = "q_norm", key_norm: str = "k_norm") -> dict[str, Tensor]:
    """Query, key, value and output projections with biases, query/key norms and sinks."""
    at = LAYER + prefix
    return {
        "attention.q": Tensor(at + "q_proj.weight"),
        "attention.k": Tensor(at + "k_proj.weight"),
        "attention.v": Tensor(at + "v_proj.weight"),
        "attention.o": Tensor(at + "o_proj.weight"),
        "attention.q_bias": Tensor(at + "q_proj.bias"),
        "attention.k_bias": Tensor(at + "k_proj.bias"),
        "attention.v_bias": Tensor(at + "v_proj.bias"),
        "attention.o_bias": Tensor(at + "o_proj.bias"),
        "attention.q_norm": Tensor(at + query_norm + ".weight"),
        "attention.k_norm": Tensor(at + key_norm + ".weight"),
        "attention.sinks": Tensor(at + "sinks"),
    }


def latent_attention(prefix: str = "self_attn.") -> dict[str, Tensor]:
    """Multi-head latent attention under DeepSeek's names."""
    at = LAYER + prefix
    return {
        "attention.q": Tensor(at + "q_proj.weight"),
        "attention.q_down": Tensor(at + "q_a_proj.weight"),
        "attention.q_down_bias": Tensor(at + "q_a_proj.bias"),
        "attention.q_latent_norm": Tensor(at + "q_a_layernorm.weight"),
        "attention.q_up": Tensor(at + "q_b_proj.weight"),
        "attention.kv_down": Tensor(at + "kv_a_proj_with_mqa.weight"),
        "attention.kv_down_bias": Tensor(at + "kv_a_proj_with_mqa.bias"),
        "attention.kv_latent_norm": Tensor(at + "kv_a_layernorm.weight"),
        "attention.kv_up": Tensor(at + "kv_b_proj.weight"),
        "attention.o": Tensor(at + "o_proj.weight"),
        "attention.o_bias": Tensor(at + "o_proj.bias"),
    }


def norms(attention: str = "input_layernorm", mlp: str = "post_attention_layernorm") -> dict[str, Tensor]:
    """The two norms of a block."""
    return {
        "attention_norm.scale": Tensor(LAYER + attention + ".weight"),
        "attention_norm.bias": Tensor(LAYER + attention + ".bias"),
        "mlp_norm.scale": Tensor(LAYER + mlp + ".weight"),
        "mlp_norm.bias": Tensor(LAYER + mlp + ".bias"),
    }


def mlp(group: str, prefix: str, gate="gate_proj", up="up_proj", down="down_proj") -> dict[str, Tensor]:
    """A gated MLP (or each expert, where `prefix` holds `{expert}`) as parameters `group.gate` and so on."""
    at = LAYER + prefix
    kernels = {"gate": gate, "up": up, "down": down}
    table = {f"{group}.{ours}": Tensor(f"{at}{theirs}.weight") for ours, theirs in kernels.items()}
    return table | {f"{group}.{ours}_bias": Tensor(f"{at}{theirs}.bias") for ours, theirs in kernels.items()}
