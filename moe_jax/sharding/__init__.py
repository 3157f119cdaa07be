"""Models over a mesh of devices: which axes are cut along which, and every device's share."""

from ..axes import RULES, Axes
from .mesh import make_mesh
from .sharding import Sharding, fetched, leaf_specs, sharding_of

__all__ = ["RULES", "Axes", "Sharding", "fetched", "leaf_specs", "make_mesh", "sharding_of"]
