"""Mixture-of-experts transformers in JAX."""

from . import convert, inspect, router, train
from ._version import __version__
from .axes import Axes
from .config import ModelConfig
from .deepspeed import MoEInference, MoEInferenceConfig, MoEMLP, SelfAttention, TopKGate
from .generation import Generated, generate, stream
from .model import Model, Record
from .moe import MoE
from .placement import Placement, balance
from .pretrained import load_pretrained, save_pretrained
from .quantize import dequantize, quantize
from .router import Routing
from .shard import gather, shard
from .sharding import make_mesh
from .surgery import Surgery, merge, prune
from .text import generate_text, score, stream_text
from .tokenizer import load_tokenizer
from .upcycle import upcycle

__all__ = [
    "Axes",
    "Generated",
    "MoE",
    "MoEInference",
    "MoEInferenceConfig",
    "MoEMLP",
    "Model",
    "ModelConfig",
    "Placement",
    "Record",
    "Routing",
    "SelfAttention",
    "Surgery",
    "TopKGate",
    "__version__",
    "balance",
    "convert",
    "dequantize",
    "gather",
    "generate",
    "generate_text",
    "inspect",
    "load_pretrained",
    "load_tokenizer",
    "make_mesh",
    "merge",
    "prune",
    "quantize",
    "router",
    "save_pretrained",
    "score",
    "shard",
    "stream",
    "stream_text",
    "train",
    "upcycle",
]
