"""DeepSpeed's MoE inference layer under its own names: configuration, gate, attention, experts, layer."""

from .attention import SelfAttention
from .config import MoEInferenceConfig
from .engine_config import EngineConfig
from .gate import TopKGate
from .layer import MoEInference
from .mlp import MoEMLP, mlp_function
from .moe import MoE

__all__ = [
    "EngineConfig",
    "MoE",
    "MoEInference",
    "MoEInferenceConfig",
    "MoEMLP",
    "SelfAttention",
    "TopKGate",
    "mlp_function",
]
