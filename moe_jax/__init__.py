"""Mixture-of-experts transformers in JAX."""

from ._version import __version__
from .config import ModelConfig
from .generation import Generated, generate, stream
from .model import Model, Record
from .moe import MoE
from .pretrained import load_pretrained, save_pretrained
from .router import Routing
from .text import generate_text, score, stream_text
from .tokenizer import load_tokenizer
from .upcycle import upcycle

__all__ = [
    "Generated",
    "MoE",
    "Model",
    "ModelConfig",
    "Record",
    "Routing",
    "__version__",
    "generate",
    "generate_text",
    "load_pretrained",
    "load_tokenizer",
    "save_pretrained",
    "score",
    "stream",
    "stream_text",
    "upcycle",
]
