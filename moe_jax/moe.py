"""`MoE`: the mixture-of-experts layer by itself, to put into one's own Flax model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels import Activation, Experts, capacity_mlp
from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.expert_mlp.api import OPERATION

from .block import mlp, run_experts
from .block_config import RouterConfig
from .router import Routing, capacity_of, choose, describe


class MoE(nnx.Module):
    """A layer of `num_experts` MLPs of which every token takes `top_k`.

    Args:
      width, hidden: model width D and the experts' hidden width F.
      num_experts, top_k: E and A.
      activation: of the experts, see `pallas_kernels.Activation` (`swiglu`, `gelu`, ...).
      bias: whether the experts' products have biases.
      shared_hidden: hidden width of an MLP beside the experts that every token takes, 0 for none.
      capacity_factor: None for dropless routing; else each expert takes at most
        `ceil(G * A / E * capacity_factor)` choices of a call and the rest are dropped.
      implementation: the experts' implementation by name, see `pallas_kernels.routed_mlp`.
      dtype: of the parameters; the output has the tokens' dtype promoted with it.
      rngs: where initial weights come from: normal with standard deviation `1/sqrt(fan-in)`.
      gate: further fields of `moe_jax.block_config.RouterConfig` (`score`, `renormalize`, `groups`, `scale`, ...).

    Kernels are `[E, out, in]`. Raises `ValueError` for values that do not fit each other. Differentiable.

    >>> layer = MoE(16, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0))
    >>> y, routing = layer(jnp.ones((2, 3, 16)))
    >>> y.shape, routing.ids.shape, int(routing.counts.sum())
    ((2, 3, 16), (6, 2), 12)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        num_experts: int,
        top_k: int,
        rngs: nnx.Rngs,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        shared_hidden: int = 0,
        capacity_factor: float | None = None,
        implementation: str | None = None,
        dtype: Any = jnp.float32,
        **gate: Any,
    ):
        self.config = RouterConfig(num_experts=num_experts, top_k=top_k, **gate)
        self.activation = Activation(activation) if isinstance(activation, str) else activation
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor: {capacity_factor} is not positive")
        if width < 1 or hidden < 1 or shared_hidden < 0:
            raise ValueError(f"width, hidden, shared_hidden: {width}, {hidden}, {shared_hidden}")
        if self.config.rule is not None:
            raise ValueError("rule: DeepSpeed's gates run in moe_jax.deepspeed.MoE")
        if capacity_factor is not None and self.config.scale_input:
            raise ValueError("capacity_factor: not supported with scale_input")
        OPERATION.check(implementation)  # refuses an unknown name
        self.capacity_factor, self.implementation = capacity_factor, implementation

        def normal(*shape):
            return nnx.Param((jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5).astype(dtype))

        def zeros(*shape):
            return nnx.Param(jnp.zeros(shape, dtype))

        def kernels(size, *lead):
            made = {"up": normal(*lead, size, width), "down": normal(*lead, width, size)}
            if self.activation.gated:
                made["gate"] = normal(*lead, size, width)
            if bias:
                made |= {f"{name}_bias": zeros(*kernel.shape[:-1]) for name, kernel in made.items()}
            return nnx.data(made)

        self.router = nnx.data({"router": normal(num_experts, width)})
        if self.config.logit_bias:
            self.router["router_bias"] = zeros(num_experts)
        if self.config.selection_bias:
            self.router["selection_bias"] = nnx.Param(jnp.zeros(num_experts, jnp.float32))
        self.experts = kernels(hidden, num_experts)
        self.shared = kernels(shared_hidden) if shared_hidden else None

    def __call__(
        self, x: Float[AnyArray, "*batch D"], mask: Bool[AnyArray, "..."] | None = None
    ) -> tuple[Float[Array, "*batch D"], Routing]:
        """The layer's output, in the shape of `x`, and what the router decided for the `G` flattened tokens.

        `mask`: false for padded tokens, which take no expert, give 0 and have no part in counts and losses.
        """
        width = self.router["router"].shape[-1]
        if x.shape[-1] != width:
            raise ValueError(f"x: shape {x.shape}, expected [..., {width}]")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask: shape {mask.shape}, expected {x.shape[:-1]}")
        rows = jnp.asarray(x).reshape(-1, width)
        rows = rows.astype(jnp.promote_types(rows.dtype, self.experts["up"].dtype))
        real = None if mask is None else jnp.asarray(mask).reshape(-1)
        logits, chosen = choose(self.config, _arrays(self.router), rows, real=real)
        capacity = None
        if self.capacity_factor is not None:
            capacity = capacity_of(rows.shape[0], self.config.top_k, self.config.num_experts, self.capacity_factor)
        routing = describe(self.config, logits, chosen.ids, chosen.weights, capacity)
        experts = Experts(**_arrays(self.experts), activation=self.activation, layout="out_in")
        y = self._run(rows, routing, experts)
        if self.shared is not None:
            beside = mlp(self.activation, _arrays(self.shared), rows)
            y = y + (beside if mask is None else jnp.where(jnp.asarray(mask).reshape(-1, 1), beside, 0))
        return y.reshape(x.shape), routing

    def _run(self, rows, routing, experts):
        if routing.capacity is None:
            given = self.config.scale_input, rows, routing.ids, routing.weights, experts
            return run_experts(*given, implementation=self.implementation)
        given = rows, routing.ids, routing.weights, routing.position
        return capacity_mlp(*given, experts, capacity=routing.capacity)


def _arrays(params: Any) -> dict[str, Array]:
    return {name: param[...] for name, param in params.items()}
