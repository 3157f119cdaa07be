"""Activations of an expert: what happens between the first and the second product."""

import dataclasses

import jax
import jax.numpy as jnp

_POINTWISE = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_CLAMPED = "swiglu_clamped"


@dataclasses.dataclass(frozen=True)
class Activation:
    """An expert's activation, by name.

    Without a gate (one up projection): `silu`, `gelu` (exact), `gelu_tanh`, `relu`. With a gate, `f(gate) * up`:
    `swiglu`, `geglu`, `geglu_tanh`, `reglu` (Shazeer 2020, arXiv:2002.05202). `swiglu_clamped` is gpt-oss's
    `g * sigmoid(alpha * g) * (u + 1)` with `g = min(gate, limit)` and `u = clip(up, -limit, limit)`; only it reads
    `alpha` and `limit`.

    >>> Activation("swiglu").gated, Activation("relu").gated
    (True, False)
    """

    name: str
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self):
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation: {self.name!r} is not one of {', '.join(ACTIVATIONS)}")

    @property
    def gated(self) -> bool:
        """Whether the expert has a gate projection beside the up projection."""
        return self.name in _GATED or self.name == _CLAMPED

    def __call__(self, gate: jax.Array | None, up: jax.Array) -> jax.Array:
        """The hidden activation from `gate` (None where `gated` is false) and `up`, in their dtype."""
        if self.name == _CLAMPED:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
            return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
        if self.gated:
            return _POINTWISE[_GATED[self.name]](gate) * up
        return _POINTWISE[self.name](up)


ACTIVATIONS = (*_POINTWISE, *_GATED, _CLAMPED)
