"""Activations of an expert: what happens between the first and the second product."""

import dataclasses

import jax
import jax.numpy as jnp

_POINTWISE = {
    "silu": lambda x, erf: jax.nn.silu(x),
    "gelu": lambda x, erf: 0.5 * x * (1 + erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x, erf: jax.nn.gelu(x, approximate=True),
    "relu": lambda x, erf: jnp.where(x <= 0, 0, x),  # keeps NaN; jax.nn's is a custom_jvp, which kernels cannot hold
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

    def __call__(self, gate: jax.Array | None, up: jax.Array, erf=jax.lax.erf) -> jax.Array:
        """The hidden activation from `gate` (None where `gated` is false) and `up`, in their dtype.

        `erf`: the error function of `gelu` and `geglu`, for kernels that have to bring their own.
        """
        if self.name == _CLAMPED:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
            return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
        if self.gated:
            return _POINTWISE[_GATED[self.name]](gate, erf) * up
        return _POINTWISE[self.name](up, erf)


ACTIVATIONS = (*_POINTWISE, *_GATED, _CLAMPED)


def simple_erf(x: jax.Array) -> jax.Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26): neither GPU backend of Pallas has one."""
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    y = 1 - series * jnp.exp(-x * x)
    return jnp.where(x < 0, -y, y)
