"""How far a block's output may be from the right one, and how far it is."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

from .shapes import MoEShape

#: The standard of our implementations: at most this many times the error of rounding.
_OURS = 1.2
#: What passes for others, which round in more places (float32 on a GPU: tf32 products).
_OTHERS = 0.02


def expected(shape: MoEShape) -> Callable:
    """A program `run(x [n, D], router, experts)` of the block's output for a few rows, twice, float32 `[n, D]`.

    First with float32 products of the highest precision throughout; then with the hidden activation, each expert's
    output and the sum rounded to x's dtype, between float32 products: what is unavoidable in that dtype.
    """

    def product(a, b):
        return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def run(x, router, experts):
        narrow = jnp.finfo(x.dtype)
        # not by conversions, of which XLA leaves out those that cancel
        rounded = lambda y: jax.lax.reduce_precision(y, narrow.nexp, narrow.nmant)
        logits = product(x, router)
        ids, weights, _ = pallas_kernels.route(
            logits, shape.top_k, shape.score, shape.renormalize, implementation="xla"
        )

        def choice(_, at):
            row, expert = x[at[0]], jax.tree.map(lambda w: w[at[1]], experts)
            bias = lambda b: 0.0 if b is None else b.astype(jnp.float32)
            up = product(row, expert.up) + bias(expert.up_bias)
            gate = None if expert.gate is None else product(row, expert.gate) + bias(expert.gate_bias)
            hidden = experts.activation(gate, up)
            down = lambda h: product(h, expert.down) + bias(expert.down_bias)
            return None, (down(hidden), rounded(down(rounded(hidden))))

        rows = jnp.repeat(jnp.arange(x.shape[0]), shape.top_k)
        _, outputs = jax.lax.scan(choice, None, (rows, ids.reshape(-1)))
        total = lambda y: (y.reshape(*ids.shape, -1) * weights[..., None]).sum(1)
        return total(outputs[0]), rounded(total(outputs[1]))

    return run


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference over the norm of `want`.

    >>> relative(np.array([3.0, 4.0]), np.array([3.0, 5.0])) < 0.2
    True
    """
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@dataclasses.dataclass(frozen=True)
class Standard:
    """The right output of some rows, and the error that rounding alone makes in it."""

    exact: np.ndarray
    rounding: float

    def check(self, got: np.ndarray, ours: bool) -> float:
        """The relative error of the same rows; `ValueError` if it is more than rounding explains.

        >>> Standard(np.ones(2), 1e-3).check(np.ones(2), ours=True)
        0.0
        >>> Standard(np.ones(2), 1e-3).check(np.ones(2) + 0.01, ours=True)
        Traceback (most recent call last):
        ValueError: wrong result: relative error 0.01, at most 0.0012 is rounding
        """
        error = relative(got, self.exact)
        limit = max(_OURS * self.rounding, 1e-6) if ours else _OTHERS
        if not error <= limit:
            raise ValueError(f"wrong result: relative error {error:.3g}, at most {limit:.3g} is rounding")
        return error
