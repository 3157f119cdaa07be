"""What goes into a gate and what comes out, as data: `GateRule` and `Routing`; the sort and the losses they share."""

import dataclasses
import math
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dims import Array as AnyArray

from .axes import add_up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router decided for `G` tokens.

    `ids`, `weights [G, A]`: chosen experts (-1: a padded token, which takes none) and their weights. `keep [G, A]`:
    false for choices dropped by capacity (and for padded tokens); a weight of 0 does not mean dropped. `position
    [G, A]`: the choice's slot in its expert, in the gate's own order; a dropped choice's is `capacity` or more.
    `counts [E]`: choices per expert before dropping. `aux_loss`: load balancing, 1 when balanced (Switch,
    arXiv:2101.03961, eq. 4; DeepSpeed's top-2 gate over first choices, else over all choices). `z_loss`: mean squared
    log-partition of the logits (ST-MoE, arXiv:2202.08906, eq. 5). `capacity`: slots per expert, None without dropping.
    """

    ids: Int[Array, "G A"]
    weights: Float[Array, "G A"]
    keep: Bool[Array, "G A"]
    position: Int[Array, "G A"]
    counts: Int[Array, " E"]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})

    def _slots(self) -> tuple[Array, int]:
        capacity = int(self.counts.max()) if self.capacity is None else self.capacity
        slots = self.counts.shape[0] * capacity
        return jnp.where(self.keep, self.ids * capacity + self.position, slots), capacity

    def dense_combine_weights(self) -> Float[Array, "G E C"]:
        """The kept weights as GShard's dense tensor; without capacity `C = max(counts)`, outside `jit` only."""
        slot, capacity = self._slots()
        dense = jnp.zeros((self.ids.shape[0], self.counts.shape[0] * capacity), self.weights.dtype)
        rows = jnp.arange(self.ids.shape[0])[:, None]
        dense = dense.at[rows, slot].set(self.weights, mode="drop")
        return dense.reshape(self.ids.shape[0], self.counts.shape[0], capacity)

    def dense_dispatch_mask(self) -> Bool[Array, "G E C"]:
        """Which token sits in which slot; as `dense_combine_weights`."""
        slot, capacity = self._slots()
        dense = jnp.zeros((self.ids.shape[0], self.counts.shape[0] * capacity), bool)
        dense = dense.at[jnp.arange(self.ids.shape[0])[:, None], slot].set(True, mode="drop")
        return dense.reshape(self.ids.shape[0], self.counts.shape[0], capacity)


#: `position`: earlier tokens; `choice`: first choices, then earlier tokens; `probs`: higher logits; `probs_upstream`:
#: higher logits, where tokens that chose another expert compete with a 0; `gate`: higher probabilities; `random`.
DropPolicy = Literal["position", "choice", "probs", "probs_upstream", "gate", "random"]
Noise = Literal["all", "second"] | None
TOPK_POLICIES = ("position", "probs", "probs_upstream", "gate")
NOISE_POLICIES = (None, "None", "Jitter", "RSample")


@dataclasses.dataclass(frozen=True)
class GateRule:
    """How a gate chooses, keeps and weighs: hashable, so that it may be a static argument.

    `k`, `capacity_factor`, `min_capacity`: see `gate_capacity`. `policy`: which choices an expert keeps when it has
    more than its capacity. `noise`: Gumbel noise on the logits when choosing `all` experts or the `second`.
    `renormalize`: divide the kept weights by their sum. `first_balance`: the auxiliary loss counts first choices only.
    Raises `ValueError` for values out of range.
    """

    k: int
    capacity_factor: float
    min_capacity: int
    drop_tokens: bool = True
    policy: DropPolicy = "position"
    noise: Noise = None
    renormalize: bool = True
    first_balance: bool = False

    def __post_init__(self):
        for name, least in (("k", 1), ("min_capacity", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: {self.capacity_factor} is not positive and finite")
        if self.policy not in get_args(DropPolicy):
            raise ValueError(f"drop_policy: {self.policy!r} is not one of {', '.join(get_args(DropPolicy))}")
        if self.noise not in (None, "all", "second") or (self.noise == "second" and self.k != 2):
            raise ValueError(f"noise: {self.noise!r} with k={self.k}")

    @classmethod
    def top1(
        cls,
        capacity_factor: float,
        min_capacity: int,
        drop_tokens: bool = True,
        use_rts: bool = False,
        noisy_gate_policy: str | None = None,
    ) -> "GateRule":
        """The rule of `top1_gating`."""
        if noisy_gate_policy not in NOISE_POLICIES:
            raise ValueError(f"noisy_gate_policy: {noisy_gate_policy!r} is not one of {NOISE_POLICIES}")
        policy: DropPolicy = "random" if use_rts else "position"
        noise: Noise = "all" if noisy_gate_policy == "RSample" else None
        return cls(1, capacity_factor, min_capacity, drop_tokens, policy, noise, renormalize=False)

    @classmethod
    def top2(
        cls, capacity_factor: float, min_capacity: int, drop_tokens: bool = True, second_expert_sampling: bool = False
    ) -> "GateRule":
        """The rule of `top2_gating`."""
        noise: Noise = "second" if second_expert_sampling else None
        return cls(2, capacity_factor, min_capacity, drop_tokens, "choice", noise, first_balance=True)

    @classmethod
    def topk(
        cls, k: int, capacity_factor: float, min_capacity: int, drop_tokens: bool = True, drop_policy: str = "probs"
    ) -> "GateRule":
        """The rule of `topk_gating`."""
        if drop_policy not in TOPK_POLICIES:
            raise ValueError(f"drop_policy: {drop_policy!r} is not one of {TOPK_POLICIES}")
        return cls(k, capacity_factor, min_capacity, drop_tokens, cast(DropPolicy, drop_policy))

    @classmethod
    def of(
        cls, k: int, capacity_factor: float, min_capacity: int, drop_tokens: bool = True, drop_policy: str = "probs"
    ) -> "GateRule":
        """DeepSpeed's rule for `k` experts per token, with nothing sampled: top-1, top-2 or top-k."""
        if k == 1:
            return cls.top1(capacity_factor, min_capacity, drop_tokens)
        if k == 2:
            return cls.top2(capacity_factor, min_capacity, drop_tokens)
        return cls.topk(k, capacity_factor, min_capacity, drop_tokens, drop_policy)


def gate_capacity(rule: GateRule, tokens: Any, num_experts: int) -> Any:
    """Slots per expert: `ceil(tokens / experts * (k * capacity_factor))` in float32, at least `min_capacity` and one.

    `tokens`: an integer or a NumPy array of integers; the result is of the same kind. It may exceed `tokens`. Float32
    because DeepSpeed computes it so: in float64 some products land on the other side of an integer. Raises
    `ValueError` for more slots than 32 bits can count.

    >>> gate_capacity(GateRule.top1(1.2, 4), 45, 2), gate_capacity(GateRule.top2(1.25, 4), 64, 8)
    (28, 20)
    """
    factor = rule.capacity_factor * rule.k
    most = max(np.max(tokens, initial=0) / num_experts * factor, rule.min_capacity)
    if most > 2**30:
        raise ValueError(
            f"capacity_factor, min_capacity: {rule.capacity_factor}, {rule.min_capacity} make {most:.3g} slots per "
            f"expert; drop_tokens=False keeps all choices"
        )
    wanted = np.ceil((np.asarray(tokens) / num_experts).astype(np.float32) * np.float32(factor)).astype(np.int32)
    slots = np.maximum(wanted, max(rule.min_capacity, 1))
    return slots if np.ndim(tokens) else int(slots)


def rank_within(
    bucket: Int[AnyArray, " R"], buckets: int, key: AnyArray | None = None
) -> tuple[Int[Array, " R"], Int[Array, " buckets"]]:
    """Each row's rank among the rows of its bucket, and the buckets' sizes.

    `bucket`: `buckets` itself stands for none and is ranked too, but not counted. `key [R]`: lower ranks first, NaN
    last, equal ones by row; None ranks by row.

    >>> rank, counts = rank_within(jnp.array([1, 0, 1, 1]), 2, key=jnp.array([3.0, 0.0, 1.0, 2.0]))
    >>> rank.tolist(), counts.tolist()
    ([2, 0, 0, 1], [1, 3])
    """
    keys = (jnp.asarray(bucket),) if key is None else (jnp.asarray(bucket), jnp.asarray(key))
    if keys[0].size <= _PAIRS:
        return _compared(*keys, buckets=buckets)
    rows = jnp.arange(keys[0].size, dtype=jnp.int32)
    ordered, *_, order = jax.lax.sort((*keys, rows), num_keys=len(keys), is_stable=True)
    edges = jnp.searchsorted(ordered, jnp.arange(buckets + 1)).astype(jnp.int32)
    rank = jnp.zeros_like(rows).at[order].set(rows - edges[ordered], unique_indices=True)
    return rank, edges[1:] - edges[:-1]


#: Rows of which all pairs are compared: a GPU does it in two kernels where a sort and its scatters take a dozen.
_PAIRS = 1024


def _compared(bucket, key=None, *, buckets):
    """`rank_within` by comparing all pairs of rows."""
    rows = jnp.arange(bucket.size)
    ahead = rows[None, :] < rows[:, None]
    if key is not None:
        other, own = key[None, :], key[:, None]
        worst = jnp.isnan(own) if jnp.issubdtype(key.dtype, jnp.floating) else False
        lower = (other < own) | (worst & (other == other))
        ahead = lower | (ahead & ((other == own) | (worst & (other != other))))
    rank = ((bucket[:, None] == bucket[None, :]) & ahead).sum(1, dtype=jnp.int32)
    return rank, (bucket[None, :] == jnp.arange(buckets)[:, None]).sum(1, dtype=jnp.int32)


def losses(
    scores: Float[AnyArray, "G E"],
    logits: Float[AnyArray, "G E"],
    share: Float[Array, " E"],
    counted: Any,
    axes: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Load balancing and z loss over the tokens where `counted [G]` is true; 0 where there are none.

    The first is `E * sum_e share_e * mean(scores_e)`, `share` being the experts' parts of the choices. `axes`: mesh
    axes along which tokens are spread; both are then means over all devices' tokens, as `share` has to be.
    """
    tokens = jnp.maximum(add_up(counted.sum(), axes), 1)
    mean = add_up(jnp.where(counted[:, None], scores, 0).sum(0), axes) / tokens
    partition = jax.nn.logsumexp(logits, axis=-1)
    z_loss = add_up(jnp.where(counted, partition**2, 0).sum(), axes) / tokens
    return scores.shape[1] * (share * mean).sum(), z_loss
