"""Norm, products, biases and residual of few rows."""

from .api import linear
from .norms import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "linear"]
