"""Routing: router logits to chosen experts and their weights."""

from .api import SCORES, route

__all__ = ["SCORES", "route"]
