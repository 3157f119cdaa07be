"""The plan: which rows go where."""

from .api import make_plan
from .value import Plan, tile_bound

__all__ = ["Plan", "make_plan", "tile_bound"]
