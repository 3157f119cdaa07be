"""What `routed_mlp` should give, in NumPy, one choice at a time; shared by the tests of the expert MLP."""

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Activation, Experts

_ERF = np.vectorize(math.erf, otypes=[np.float64])


def activate(activation, gate, up):
    """The activation in the dtype of `up`, from its formula."""

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    def gelu(v):
        return v * (1 + _ERF(v / math.sqrt(2)).astype(v.dtype)) / 2

    def gelu_tanh(v):
        return v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2

    if activation.name == "swiglu_clamped":
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
        return gate * sigmoid(activation.alpha * gate) * (up + 1)
    pointwise = {
        "silu": lambda v: v * sigmoid(v),
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "relu": lambda v: np.maximum(v, 0),
    }
    gated = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    if activation.name in gated:
        return pointwise[gated[activation.name]](gate) * up
    return pointwise[activation.name](up)


def oracle(x, ids, weights, experts, layer=None, wide=np.float64, narrow=None):
    """`sum over a of weights[g, a] * expert[ids[g, a]](x[g])` in `wide`, `[G, D]`.

    `narrow`: the working dtype that the hidden activation, the expert's output and the result are rounded to.
    """

    def array(value):
        value = np.asarray(value)
        return value.astype(wide) if layer is None else value[layer].astype(wide)

    def rounded(value):
        return value if narrow is None else value.astype(narrow).astype(wide)

    def product(row, kernel, bias, e):
        kernel = kernel[e].T if experts.layout == "out_in" else kernel[e]
        y = np.add.accumulate(row[:, None] * kernel)[-1]  # term by term: the plain order of accumulation
        return y if bias is None else y + bias[e]

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    arrays = {n: None if getattr(experts, n) is None else array(getattr(experts, n)) for n in names}
    x, ids, weights = np.asarray(x).astype(wide), np.asarray(ids), np.asarray(weights).astype(wide)
    y = np.zeros(x.shape, wide)
    for g, a in np.ndindex(ids.shape):
        e = ids[g, a]
        if 0 <= e < experts.num_experts:
            up = product(x[g], arrays["up"], arrays["up_bias"], e)
            gate = None if arrays["gate"] is None else product(x[g], arrays["gate"], arrays["gate_bias"], e)
            hidden = rounded(activate(experts.activation, gate, up))
            y[g] += weights[g, a] * rounded(product(hidden, arrays["down"], arrays["down_bias"], e))
    return rounded(y)


def error(got, want):
    """Root mean square of the difference."""
    return np.sqrt(np.mean((np.asarray(got).astype(np.float64) - want) ** 2))


def make_experts(
    num_experts, width, hidden, *, layers=(), activation="swiglu", dtype=np.float32, layout="in_out", biases=False
):
    """Seeded experts whose outputs are near 1; `layers=(L,)` for a stack."""
    rng = np.random.default_rng(17)
    activation = activation if isinstance(activation, Activation) else Activation(activation)

    def array(*shape, fan_in=1.0):
        return jnp.asarray((rng.standard_normal((*layers, num_experts, *shape)) / np.sqrt(fan_in)).astype(dtype))

    def kernel(inner, outer):
        return array(*((inner, outer) if layout == "in_out" else (outer, inner)), fan_in=inner)

    return Experts(
        gate=kernel(width, hidden) if activation.gated else None,
        up=kernel(width, hidden),
        down=kernel(hidden, width),
        gate_bias=array(hidden) if biases and activation.gated else None,
        up_bias=array(hidden) if biases else None,
        down_bias=array(width) if biases else None,
        activation=activation,
        layout=layout,
    )


def make_tokens(tokens, width, num_experts, choices, dtype=np.float32, seed=5):
    """Seeded `x [G, D]`, distinct `ids [G, A]` per token and float32 `weights [G, A]` that sum to one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)).astype(dtype)
    ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :choices].astype(np.int32)
    weights = rng.random((tokens, choices)).astype(np.float32) + np.float32(0.1)
    return jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights / weights.sum(1, keepdims=True))
