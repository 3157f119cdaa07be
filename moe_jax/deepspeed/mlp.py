"""The expert's MLP as a function and as a module of stacked experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import Activation, Experts
from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.expert_mlp.reference import expert

from .config import MoEInferenceConfig


def mlp_function(
    x: Float[AnyArray, "*batch D"],
    inter_w: Float[AnyArray, "D F"],
    inter_b: Float[AnyArray, " F"],
    output_w: Float[AnyArray, "F D"],
    output_b: Float[AnyArray, " D"],
    activation: str | Activation = "gelu_tanh",
    inference: bool = True,
) -> Float[Array, "*batch D"]:
    """DeepSpeed's fused MLP: `activation(x @ inter_w + inter_b) @ output_w + output_b`.

    Kernels are `[in, out]`, upstream's order; of a gated activation `inter_w [D, 2F]` holds `up`, then `gate`.
    `inference`: a gradient raises `RuntimeError`, as upstream's does; False makes it differentiable. Raises
    `ValueError` for shapes that do not fit each other.

    >>> import jax.numpy as jnp
    >>> mlp_function(jnp.ones((1, 2)), jnp.eye(2), jnp.zeros(2), 2 * jnp.eye(2), jnp.ones(2), "relu").tolist()
    [[3.0, 3.0]]
    """
    activation = Activation(activation) if isinstance(activation, str) else activation
    x, inter_w, inter_b, output_w, output_b = (jnp.asarray(a) for a in (x, inter_w, inter_b, output_w, output_b))
    shapes = [a.shape for a in (inter_w, inter_b, output_w, output_b)]
    hidden, width = output_w.shape if output_w.ndim == 2 else (-1, -1)
    columns = 2 * hidden if activation.gated else hidden
    if shapes != [(width, columns), (columns,), (hidden, width), (width,)]:
        raise ValueError(f"inter_w, inter_b, output_w, output_b: shapes {shapes} do not fit {activation.name!r}")
    if x.ndim == 0 or x.shape[-1] != width or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {x.dtype} {x.shape}, expected floats [..., {width}]")
    run = _no_backward if inference else _mlp
    return run(activation, x, inter_w, inter_b, output_w, output_b)


def _mlp(activation, x, inter_w, inter_b, output_w, output_b):
    hidden = output_w.shape[0]
    one = dict(up=inter_w[:, :hidden], up_bias=inter_b[:hidden], down=output_w, down_bias=output_b)
    if activation.gated:
        one |= dict(gate=inter_w[:, hidden:], gate_bias=inter_b[hidden:])
    stacked = Experts(**{name: w[None] for name, w in one.items()}, activation=activation)
    rows = expert(x.reshape(-1, x.shape[-1]), jax.tree.map(lambda w: w[0], stacked))
    return rows.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _no_backward(activation, x, inter_w, inter_b, output_w, output_b):
    return _mlp(activation, x, inter_w, inter_b, output_w, output_b)


def _forward(activation, *operands):
    return _mlp(activation, *operands), None


def _backward(activation, saved, gradient):
    raise RuntimeError("mlp_function runs in inference mode and has no backward pass; pass inference=False to train")


_no_backward.defvjp(_forward, _backward)


class MoEMLP(nnx.Module):
    """The experts of a layer, stacked: upstream's `DeepSpeedMoEMLP` and its list of them.

    Args: `config`: sizes, activation and dtype; `num_experts`: `config.num_experts` if None; `rngs`: where initial
    weights come from (normal with standard deviation `1/sqrt(fan-in)`, biases 0). Kernels are `[E, in, out]`. Raises
    `ValueError` for `q_int8`.

    >>> from moe_jax import MoEInferenceConfig
    >>> experts = MoEMLP(MoEInferenceConfig(hidden_size=8, heads=2, moe_experts=4), rngs=nnx.Rngs(0))
    >>> experts(jnp.ones((4, 3, 8))).shape
    (4, 3, 8)
    """

    def __init__(self, config: MoEInferenceConfig, num_experts: int | None = None, *, rngs: nnx.Rngs):
        if config.q_int8:
            raise ValueError("q_int8: MoEMLP holds floats to train; MoEInference keeps its experts in int8")
        count = config.num_experts if num_experts is None else num_experts
        width, hidden, dtype = config.hidden_size, config.intermediate_size, jnp.dtype(config.working_dtype)
        self.activation = Activation(config.activation)
        columns = 2 * hidden if self.activation.gated else hidden

        def normal(*shape: int) -> Any:
            return nnx.Param((jax.random.normal(rngs.params(), shape) * shape[-2] ** -0.5).astype(dtype))

        self.inter_w, self.inter_b = normal(count, width, columns), nnx.Param(jnp.zeros((count, columns), dtype))
        self.output_w, self.output_b = normal(count, hidden, width), nnx.Param(jnp.zeros((count, width), dtype))

    def __call__(self, x: Float[AnyArray, "E *batch D"]) -> Float[Array, "E *batch D"]:
        """Expert `e` on the rows `x[e]`. Raises `ValueError` for shapes that do not fit. Differentiable."""
        weights = tuple(w[...] for w in (self.inter_w, self.inter_b, self.output_w, self.output_b))
        count, width = weights[0].shape[:2]
        if x.ndim < 2 or (x.shape[0], x.shape[-1]) != (count, width):
            raise ValueError(f"x: shape {x.shape}, expected [{count}, ..., {width}]")
        return jax.vmap(functools.partial(_mlp, self.activation))(jnp.asarray(x, weights[0].dtype), *weights)
