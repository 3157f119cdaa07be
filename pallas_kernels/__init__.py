"""Operations of a mixture-of-experts layer, each with named, interchangeable implementations.

`route` -> `make_plan` -> `routed_mlp` is the path of a token; `moe_block` is all of it in one call. This package
imports nothing from `moe_jax`.
"""

from .activations import ACTIVATIONS, Activation
from .expert_mlp import capacity_mlp, moe_block, prepare, routed_mlp
from .experts import Experts
from .mxfp4 import MXFP4Array
from .plan import Plan, make_plan
from .quantized import QuantizedArray
from .routing import route, route_tokens

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Experts",
    "MXFP4Array",
    "Plan",
    "QuantizedArray",
    "capacity_mlp",
    "make_plan",
    "moe_block",
    "prepare",
    "route",
    "route_tokens",
    "routed_mlp",
]
