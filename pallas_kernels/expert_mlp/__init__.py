"""The expert MLP: gather, expert products, weighted combine, over a block-aligned plan."""

from .api import capacity_mlp, moe_block, prepare, routed_mlp

__all__ = ["capacity_mlp", "moe_block", "prepare", "routed_mlp"]
