"""Mixture-of-experts transformers in JAX."""

from ._version import __version__
from .config import ModelConfig
from .generation import Generated, generate, stream
from .model import Model, Record
from .pretrained import load_pretrained, save_pretrained

__all__ = [
    "Generated",
    "Model",
    "ModelConfig",
    "Record",
    "__version__",
    "generate",
    "load_pretrained",
    "save_pretrained",
    "stream",
]
