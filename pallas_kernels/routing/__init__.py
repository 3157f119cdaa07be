"""Routing: router logits to chosen experts and their weights."""

from .api import SCORES, route, route_tokens

__all__ = ["SCORES", "route", "route_tokens"]
