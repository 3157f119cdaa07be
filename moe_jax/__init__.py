"""Mixture-of-experts transformers in JAX."""

from ._version import __version__
from .config import ModelConfig
from .model import Model, Record
from .pretrained import load_pretrained, save_pretrained



__all__ = ["Model", "ModelConfig", "Record", "__version__", "load_pretrained", "save_pretrained"]
