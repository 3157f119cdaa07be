"""`Experts`: the weights of a layer's experts, or of all layers' experts, as one pytree."""

import dataclasses
from typing import Any

import jax

from .activations import Activation
from .quantized import is_quantized


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Expert weights: `y = act(x @ gate + gate_bias, x @ up + up_bias) @ down + down_bias`, one set per expert.

    Shapes: `gate` and `up` `[E, D, F]`, `down` `[E, F, D]`, biases `[E, F]` and `[E, D]`, or all of them with a
    leading `[L]` for a stack of layers (then `routed_mlp` takes `layer=`). `gate` is None where the activation has
    no gate. `layout="out_in"`: kernels have their last two axes swapped, the contraction last (what `prepare` makes
    and what checkpoints hold). Kernels may be `Quantized` (int8, MXFP4), whose layout is "out_in". Building one
    validates the shapes; it neither copies nor fuses, so it can be built from tracers.

    Raises `ValueError` naming the field and both shapes.

    >>> import jax.numpy as jnp
    >>> w = jnp.zeros((4, 8, 16)), jnp.zeros((4, 16, 8))
    >>> Experts(gate=w[0], up=w[0], down=w[1], activation="swiglu").num_experts
    4
    """

    up: Any
    down: Any
    gate: Any = None
    gate_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None
    activation: Any = "swiglu"  # an Activation once built
    layout: str = "in_out"

    def __post_init__(self):
        if isinstance(self.activation, str):
            object.__setattr__(self, "activation", Activation(self.activation))
        if self.activation.gated != (self.gate is not None):
            need = "needs" if self.activation.gated else "takes no"
            raise ValueError(f"gate: activation {self.activation.name!r} {need} gate weights")
        if self.layout not in ("in_out", "out_in"):
            raise ValueError(f"layout: {self.layout!r} is neither in_out nor out_in")
        if self.layout == "in_out" and self.quantized:
            raise ValueError("layout: quantised kernels have the contraction last, layout='out_in'")
        self._check_shapes()

    def _check_shapes(self):
        if self.up.ndim not in (3, 4):
            raise ValueError(f"up: shape {self.up.shape} is neither [E, D, F] nor [L, E, D, F]")
        *lead, d, f = self.up.shape
        if self.layout == "out_in":
            d, f = f, d
        if lead[-1] < 1:
            raise ValueError(f"up: shape {self.up.shape} holds no expert")
        want = {
            "gate": tuple(self.up.shape),
            "down": (*lead, *reversed(self.up.shape[-2:])),
            "gate_bias": (*lead, f),
            "up_bias": (*lead, f),
            "down_bias": (*lead, d),
        }
        for name, shape in want.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {shape} beside up {self.up.shape}")
        if self.gate_bias is not None and self.gate is None:
            raise ValueError("gate_bias: given without gate")

    @property
    def num_experts(self) -> int:
        """Experts per layer, `E`."""
        return self.up.shape[-3]

    @property
    def width(self) -> int:
        """Model width, `D`."""
        return self.up.shape[-2 if self.layout == "in_out" else -1]

    @property
    def hidden(self) -> int:
        """Hidden width, `F`."""
        return self.up.shape[-1 if self.layout == "in_out" else -2]

    @property
    def stacked(self) -> bool:
        """Whether the weights carry a leading layer axis."""
        return self.up.ndim == 4

    @property
    def quantized(self) -> bool:
        """Whether any kernel is `Quantized`."""
        return any(is_quantized(w) for w in (self.gate, self.up, self.down))

    def flat(self) -> "Experts":
        """The same weights with the layer axis folded into the expert axis, `[L*E, ...]`: a free reshape."""
        if not self.stacked:
            return self
        return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), self)

    def tree_flatten(self):
        return tuple(getattr(self, name) for name in _ARRAYS), (self.activation, self.layout)

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)  # no validation: transformations put placeholders in the leaves
        for name, value in zip(_ARRAYS, children, strict=True):
            object.__setattr__(self, name, value)
        for name, value in zip(_STATIC, static, strict=True):
            object.__setattr__(self, name, value)
        return self


_STATIC = ("activation", "layout")
_ARRAYS = tuple(f.name for f in dataclasses.fields(Experts) if f.name not in _STATIC)
