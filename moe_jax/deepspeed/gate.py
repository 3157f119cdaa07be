"""`TopKGate`: the gate of DeepSpeed's MoE layer, a linear map and one of its gating functions."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.dims import Array as AnyArray

from ..gating import gate
from ..routing import NOISE_POLICIES, GateRule, Routing

_JITTER = 0.01


class TopKGate(nnx.Module):
    """DeepSpeed's gate: float32 logits by `wg [E, D]`, then top-1 (`k=1`), top-2 (`k=2`) or top-k gating.

    Args:
      model_dim, num_experts, k: D, E and the experts that a token takes.
      capacity_factor, eval_capacity_factor: in training and in inference; `min_capacity` bounds the capacity from
        below, and without `drop_tokens` there is none. See `moe_jax.router.top1_gating`.
      noisy_gate_policy: in training, "Jitter" multiplies the input by a uniform number in 1 +- 0.01, "RSample" adds
        Gumbel noise to the logits for a top-1 choice.
      use_rts: in training, a full expert of a top-1 gate keeps a random selection of its tokens, else the earliest.
      top2_2nd_expert_sampling: in training, Gumbel noise on the choice of the second of two experts.
      drop_policy: what a full expert keeps where `k` is above 2, see `moe_jax.router.topk_gating`.
      rngs: where the initial weights come from, uniform in `+-1/sqrt(D)`.

    Inference (`train=False`, the default) samples nothing, where DeepSpeed goes on with random token selection and
    sampled second experts. Raises `ValueError` for values that do not fit each other.

    >>> gate = TopKGate(8, 4, k=2, min_capacity=1, rngs=nnx.Rngs(0))
    >>> routing = gate(jnp.ones((2, 3, 8)))
    >>> routing.ids.shape, routing.capacity, routing.counts.tolist().count(6)
    ((6, 2), 3, 2)
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
        drop_policy: str = "probs",
        *,
        rngs: nnx.Rngs,
    ):
        if model_dim < 1 or num_experts < 1:
            raise ValueError(f"model_dim, num_experts: {model_dim}, {num_experts}")
        if noisy_gate_policy not in NOISE_POLICIES:
            raise ValueError(f"noisy_gate_policy: {noisy_gate_policy!r} is not one of {NOISE_POLICIES}")
        GateRule.topk(k, 1.0, min_capacity, drop_tokens, drop_policy)  # refuses a policy that this k does not use
        if k > num_experts:
            raise ValueError(f"k: {k} experts per token out of num_experts {num_experts}")
        try:
            self.eval_rule = GateRule.of(k, eval_capacity_factor, min_capacity, drop_tokens, drop_policy)
        except ValueError as error:
            raise ValueError(f"eval_{error}") from None
        rule = GateRule.of(k, capacity_factor, min_capacity, drop_tokens, drop_policy)
        if k == 1:
            rule = GateRule.top1(capacity_factor, min_capacity, drop_tokens, use_rts, noisy_gate_policy)
        elif k == 2:
            rule = dataclasses.replace(rule, noise="second" if top2_2nd_expert_sampling else None)
        self.train_rule, self.jitter = rule, noisy_gate_policy == "Jitter"
        bound = model_dim**-0.5
        self.wg = nnx.Param(jax.random.uniform(rngs.params(), (num_experts, model_dim), jnp.float32, -bound, bound))

    def __call__(
        self,
        x: Float[AnyArray, "*batch D"],
        used_token: AnyArray | None = None,
        train: bool = False,
        key: Array | None = None,
    ) -> Routing:
        """What the gate decides for the `G` flattened tokens of `x`.

        `used_token`, with the shape of `x` without D or `[G]`: 0 for tokens that take no expert; they count in the
        capacity all the same (DeepSpeed ignores it for `k > 1`). `train`: the training capacity, noise and random
        selection, which need a random `key`. Raises `ValueError` for shapes and for a missing key.
        """
        x = jnp.asarray(x)
        width = self.wg.shape[-1]
        if x.ndim == 0 or x.shape[-1] != width:
            raise ValueError(f"x: shape {x.shape}, expected [..., {width}]")
        rows = x.reshape(-1, width).astype(jnp.float32)
        if used_token is not None:
            used_token = jnp.asarray(used_token)
            if used_token.shape not in (x.shape[:-1], rows.shape[:1]):
                raise ValueError(f"used_token: shape {used_token.shape}, expected {x.shape[:-1]}")
            used_token = used_token.reshape(-1)
        if train and self.jitter:
            if key is None:
                raise ValueError("key: None, but Jitter needs a random key")
            key, jitter_key = jax.random.split(key)
            rows = rows * jax.random.uniform(jitter_key, rows.shape, jnp.float32, 1 - _JITTER, 1 + _JITTER)
        logits = jnp.matmul(rows, self.wg[...].astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
        return gate(logits, self.train_rule if train else self.eval_rule, used_token, key, count_unused=True)
