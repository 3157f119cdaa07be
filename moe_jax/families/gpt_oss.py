"""gpt-oss (arXiv:2508.10925): biases everywhere, clamped SwiGLU, attention sinks, alternating windows."""

from pallas_kernels import Activation

from ..block_config import Architecture, BlockConfig, LayerConfig, MLPConfig, RouterConfig
from .common import decoder, grouped_attention, rms_norm, windows
from .family import Family
from .hub import Hub
from .tensors import LAYER, Tensor, attention, norms, trunk


def architecture(hub: Hub) -> Architecture:
    bias = hub.flag("attention_bias", True)
    if hub.first("rope_parameters", "rope_scaling", default=None) is None:
        hub.values["rope_scaling"] = _YARN  # the released models' setting is the family's default
    hub.require("hidden_act", "silu")
    hub.ignore("initial_context_length")  # the same as rope's original_max_position_embeddings
    alpha, limit = float(hub.number("swiglu_alpha", 1.702)), float(hub.number("swiglu_limit", 7.0))
    if limit <= 0:
        raise ValueError(f"gpt_oss: swiglu_limit {limit} is not positive")
    activation = Activation("swiglu_clamped", alpha=alpha, limit=limit)
    block = BlockConfig(
        width=hub.integer("hidden_size"),
        norm=rms_norm(hub, 1e-5),
        attention=grouped_attention(hub, theta=150000.0, qkv_bias=bias, out_bias=bias, sinks=True),
        router=RouterConfig(
            num_experts=hub.first("num_local_experts", "num_experts"),
            top_k=hub.first("num_experts_per_tok", "experts_per_token", default=4),
            logit_bias=True,
        ),
        experts=MLPConfig(hidden=hub.integer("intermediate_size"), activation=activation, bias=True),
    )
    count = hub.integer("num_hidden_layers")
    per_layer = windows(hub, hub.window(128), [i % 2 == 0 for i in range(count)])
    return decoder(hub, block, [LayerConfig(moe=True, window=window) for window in per_layer])


_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_YARN |= {"original_max_position_embeddings": 4096}
_EXPERTS = LAYER + "mlp.experts."
FAMILY = Family(
    model_types=("gpt_oss",),
    architecture=architecture,
    tensors=trunk()
    | attention()
    | norms()
    | {
        "moe.router": Tensor(LAYER + "mlp.router.weight"),
        "moe.router_bias": Tensor(LAYER + "mlp.router.bias"),
        "moe.gate": Tensor(_EXPERTS + "gate_up_proj", transposed=True, part=(0, 2), interleaved=True),
        "moe.up": Tensor(_EXPERTS + "gate_up_proj", transposed=True, part=(1, 2), interleaved=True),
        "moe.gate_bias": Tensor(_EXPERTS + "gate_up_proj_bias", part=(0, 2), interleaved=True),
        "moe.up_bias": Tensor(_EXPERTS + "gate_up_proj_bias", part=(1, 2), interleaved=True),
        "moe.down": Tensor(_EXPERTS + "down_proj", transposed=True),
        "moe.down_bias": Tensor(_EXPERTS + "down_proj_bias"),
    },
)
