"""`MoE`: DeepSpeed's layer for training (`deepspeed.moe.layer.MoE`), with a residual MLP if asked for."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import Activation, Experts
from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.expert_mlp.api import OPERATION

from ..block import mix, mlp, run_experts
from .gate import TopKGate


class MoE(nnx.Module):
    """A gate with capacity and experts with biases; upstream's arguments by name.

    Args:
      hidden_size, intermediate_size: model width D and the experts' hidden width F.
      num_experts, k, capacity_factor, eval_capacity_factor, min_capacity, noisy_gate_policy, drop_tokens, use_rts,
        top2_2nd_expert_sampling, drop_policy: see `TopKGate`.
      use_residual: an MLP like an expert that every token takes, mixed in by a softmax over two learned coefficients
        (PR-MoE, arXiv:2201.05596), the experts' coefficient first.
      activation: of the experts, see `pallas_kernels.Activation`.
      implementation: the experts' implementation by name, see `pallas_kernels.routed_mlp`.
      weights: `gate [E, D]` and, under `experts` and `residual`, dictionaries of kernels `[E, out, in]` and biases;
        None: random ones.
      rngs: where random weights come from: normal with standard deviation `1/sqrt(fan-in)`, biases 0.

    Differentiable. Raises `ValueError` for values that do not fit each other, and for weights that do not fit them.

    >>> layer = MoE(8, 16, num_experts=4, k=2, use_residual=True, rngs=nnx.Rngs(0))
    >>> y, l_aux, exp_counts = layer(jnp.ones((2, 3, 8)))
    >>> y.shape, l_aux.shape, int(exp_counts.sum())
    ((2, 3, 8), (), 12)
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int = 1,
        k: int = 1,
        use_residual: bool = False,
        activation: str | Activation = "gelu_tanh",
        implementation: str | None = None,
        dtype: Any = jnp.float32,
        weights: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
        **gate: Any,
    ):
        if (weights is None) == (rngs is None):
            raise ValueError("weights, rngs: give one of the two")
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size: {intermediate_size} is not positive")
        OPERATION.check(implementation)  # refuses an unknown name
        gate = {"min_capacity": 4} | gate
        self.gate = TopKGate(hidden_size, num_experts, k, **gate, rngs=rngs or nnx.Rngs(0))
        self.activation = Activation(activation) if isinstance(activation, str) else activation
        self.implementation = implementation

        shapes = _shapes(hidden_size, intermediate_size, num_experts, self.activation.gated, use_residual)
        if weights is None:
            weights = {group: _draw(rngs, table) for group, table in shapes.items()}
        else:
            _check(weights, {"gate": (num_experts, hidden_size)} | shapes)
            self.gate.wg[...] = jnp.asarray(weights["gate"], self.gate.wg[...].dtype)
        params = lambda group: nnx.data({name: nnx.Param(jnp.asarray(w, dtype)) for name, w in group.items()})
        self.experts = params(weights["experts"])
        self.residual = params(weights["residual"]) if use_residual else None

    def __call__(
        self,
        x: Float[AnyArray, "*batch D"],
        used_token: AnyArray | None = None,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[Float[Array, "*batch D"], Float[Array, ""], Int[Array, " E"]]:
        """Output in the shape of `x`, auxiliary loss, and choices per expert before dropping.

        `used_token`, with the shape of `x` without D or flattened: 0 for tokens that take no expert. `train`:
        training's capacity and noise; then `key` is needed where the gate samples. Raises `ValueError` for shapes that
        do not fit.
        """
        experts, x = {name: w[...] for name, w in self.experts.items()}, jnp.asarray(x)
        routing = self.gate(x, used_token, train=train, key=key)
        rows = x.reshape(-1, x.shape[-1])
        stack = Experts(**experts, activation=self.activation, layout="out_in")
        ids = jnp.where(routing.keep, routing.ids, -1)
        y = run_experts(False, rows, ids, routing.weights, stack, implementation=self.implementation)
        if self.residual is not None:
            own = {name: w[...] for name, w in self.residual.items()}
            y = mix(own, rows, y, mlp(self.activation, own, rows))
        return y.reshape(x.shape), routing.aux_loss, routing.counts


Shapes = dict[str, tuple[int, ...]]


def _shapes(width: int, hidden: int, num_experts: int, gated: bool, use_residual: bool) -> dict[str, Shapes]:
    kernels: Shapes = {"up": (hidden, width), "down": (width, hidden)}
    if gated:
        kernels["gate"] = hidden, width
    one = kernels | {f"{name}_bias": shape[:1] for name, shape in kernels.items()}
    shapes = {"experts": {name: (num_experts, *shape) for name, shape in one.items()}}
    if use_residual:
        shapes["residual"] = one | {"mix": (2, width), "mix_bias": (2,)}
    return shapes


def _draw(rngs: nnx.Rngs, shapes: Shapes) -> dict[str, Array]:
    def draw(name, shape):
        if name.endswith("_bias"):
            return jnp.zeros(shape)
        return jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _check(weights: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    if set(weights) != set(shapes):
        raise ValueError(f"weights: {sorted(weights)}, expected {sorted(shapes)}")
    for group, wanted in shapes.items():
        given = weights[group]
        found = np.shape(given) if group == "gate" else {name: np.shape(w) for name, w in given.items()}
        if found != wanted:
            raise ValueError(f"weights: {group} of shape {found}, expected {wanted}")
