"""A model's loss on a batch of token windows, differentiable: layers in a scan over their own weights.

`decoder.decode` addresses the stacks of all layers from inside of its loop, which copies no expert but would give each
layer a cotangent of a whole stack. Here the loop hands each layer its slice, cast to the dtype of computation on the
way in, and its cotangent is that slice's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import decoder
from ..axes import add_up
from ..block import Place, RoutingRequest, block
from ..block_config import Architecture
from ..decoder import Segment, segments, varying
from ..router import balance_of
from ..weights import Weights, flattened, nested, parameters

#: Weights that stay in float32: routing is sensitive to rounding (ST-MoE, arXiv:2202.08906, section 3.3).
_ROUTERS = ("moe.router", "moe.router_bias", "moe.selection_bias")
#: Logits held at once, in each direction: 4 GB. Those of more rows are computed again in the backward pass.
_LOGITS = 1 << 30


@dataclasses.dataclass(frozen=True)
class Computation:
    """How a loss is computed: what is static of a training step.

    `dtype`: of activations and of the weights that they meet; `balance`, `z`: weights of the two auxiliary losses;
    `capacity_factor`: see `RoutingRequest`; `remat`: layers' activations are computed again in the backward pass;
    `unroll`: turns of the loop over layers that are written out as one.
    """

    dtype: Any = jnp.float32
    balance: float = 0.0
    z: float = 0.0
    capacity_factor: float | None = None
    remat: bool = False
    unroll: int = 1
    implementation: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Of a batch: `cross_entropy` in nats a token; the auxiliary losses' means over MoE layers, `balance` (1: even, see
    `Routing.aux_loss`) and `z`; choices by layer and expert before dropping, `counts [Lm, E]`, and the share `dropped`
    of all."""

    cross_entropy: Float[Array, ""]
    balance: Float[Array, ""]
    z: Float[Array, ""]
    counts: Int[Array, "Lm E"]
    dropped: Float[Array, ""]


def loss(
    architecture: Architecture,
    computation: Computation,
    weights: Weights,
    windows: Int[Array, "B T1"],
    counted: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """What training minimises on windows of T + 1 tokens, each but the first to be predicted, and its parts.

    `weights` in float32. `counted`: 1 for predictions that count, 0 for those of padding; None: all do. On a mesh,
    inside `shard_map`: a device's windows, and the loss of all devices'.
    """
    ids, targets = windows[:, :-1], windows[:, 1:]
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    span = decoder.make_span(architecture, positions, None, None, jnp.int32(length))
    span = dataclasses.replace(span, start=0, lengths=jnp.full(batch, length, jnp.int32))
    x = decoder.embedded(architecture, weights, ids, positions).astype(computation.dtype)
    real = None if counted is None else counted > 0
    x, balances, kept = run_layers(architecture, computation, weights, x, span, real)
    x = decoder.final(architecture, weights, x)
    axes = architecture.block.axes.batch
    counted = jnp.ones(ids.shape, jnp.float32) if counted is None else counted
    entropy = cross_entropy(architecture, _narrow(weights, computation.dtype, "head", "embedding"), x, targets, counted)
    entropy = add_up(entropy, axes) / add_up(counted.sum(), axes)
    if not balances:
        none = jnp.zeros((), jnp.float32)
        return entropy, Losses(entropy, none, none, jnp.zeros((0, 0), jnp.int32), none)
    balances = jax.tree.map(lambda *layers: jnp.concatenate(layers), *balances)
    aux, z = balances.aux_loss.mean(), balances.z_loss.mean()
    kept = jnp.concatenate(kept).sum()
    dropped = 1 - add_up(kept, axes) / balances.counts.sum()
    total = entropy + computation.balance * aux + computation.z * z
    return total, Losses(entropy, aux, z, balances.counts, dropped)


def run_layers(architecture: Architecture, computation: Computation, weights: Weights, x: Array, span, real=None):
    """The stream behind all layers, and by segment the balance of its MoE layers and how many choices ran."""
    request = RoutingRequest(real, None, computation.implementation, computation.capacity_factor)
    balances, kept = [], []
    counts = iter(architecture.expert_counts)
    kinds = tuple(next(counts) if layer.moe else 0 for layer in architecture.layers)
    for segment in segments(kinds):
        period = functools.partial(_period, architecture, computation, segment, span, request)
        run = jax.checkpoint(period) if computation.remat else period
        own = _cut(architecture, weights, kinds, segment)
        turns = jnp.arange(segment.repeats), own
        x, (found, ran) = jax.lax.scan(run, x, turns, unroll=min(computation.unroll, segment.repeats))
        if found is not None:
            balances.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found))
            kept.append(ran.reshape(-1))
    return x, balances, kept


def _period(architecture, computation, segment, span, request, x, given):
    """One period of a segment; `given`: which, and its layers' weights `[layers of a kind, ...]`."""
    turn, weights = given
    weights = _narrow(weights, computation.dtype)
    config, balances, kept = architecture.block, [], []
    for offset, experts in enumerate(segment.experts):
        layer = segment.start + turn * len(segment.experts) + offset
        before = segment.experts[:offset]
        of_kind = sum((k > 0) == (experts > 0) for k in before)
        first = sum(before) if architecture.pyramid and experts else None
        place = Place(offset, of_kind, experts > 0, varying(architecture.layers, layer), first, experts)
        x, _, choice = block(config, weights, x, place, span, None, 0, request)
        if choice is not None:
            bias = weights["moe"].get("selection_bias")
            bias = None if bias is None else bias[of_kind]
            found = balance_of(config.router, choice.logits, config.axes.batch, bias, request.real)
            missing = config.router.num_experts - experts
            balances.append(dataclasses.replace(found, counts=jnp.pad(found.counts, (0, missing))))
            kept.append((choice.ids >= 0).sum())
    if not balances:
        return x, (None, None)
    return x, (jax.tree.map(lambda *layers: jnp.stack(layers), *balances), jnp.stack(kept))


def _cut(architecture: Architecture, weights: Weights, kinds: tuple[int, ...], segment: Segment) -> Weights:
    """A segment's part of the stacks, a period at a time: `[repeats, layers of a kind, ...]`."""
    length = segment.repeats * len(segment.experts)
    before, inside = kinds[: segment.start], kinds[segment.start : segment.start + length]
    found = {}
    for name, parameter in parameters(architecture).items():
        if parameter.layers is None:
            continue
        group = name.partition(".")[0]
        if parameter.counts is not None:
            first, size = sum(before), sum(inside)
        else:
            of_group = {"dense": lambda k: k == 0, "moe": bool, "shared": bool}.get(group, lambda k: True)
            first, size = (sum(map(of_group, some)) for some in (before, inside))
        if size:
            stack = _get(weights, name)
            part = stack if size == len(stack) else stack[first : first + size]
            found[name] = part.reshape(segment.repeats, size // segment.repeats, *part.shape[1:])
    return nested(found)


def _get(weights, name):
    for part in name.split("."):
        weights = weights[part]
    return weights


def _narrow(weights: Weights, dtype: Any, *groups: str) -> Weights:
    """Weights (those of `groups`, or all) in the dtype of computation; norms keep theirs, which compute in float32."""
    flat = flattened({name: weights[name] for name in groups if name in weights} if groups else weights)
    keep = lambda name: name in _ROUTERS or "norm" in name
    return nested({name: w if keep(name) else w.astype(dtype) for name, w in flat.items()})


def cross_entropy(
    architecture: Architecture,
    weights: Weights,
    normed: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counted: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum of `counted * -log p(target)` in nats; logits exist for a part of the rows at a time."""
    rows = normed.reshape(-1, normed.shape[-1])
    parts = -(-len(rows) * architecture.vocab_size // _LOGITS)
    missing = -len(rows) % parts
    cut = lambda a: jnp.pad(a, ((0, missing), *[(0, 0)] * (a.ndim - 1))).reshape(parts, -1, *a.shape[1:])
    given = cut(rows), cut(targets.reshape(-1)), cut(counted.reshape(-1))

    def part(total, given):
        rows, targets, counted = given
        logits = _logits(architecture, weights, rows)
        # a gather's derivative is a scatter into zeros of the logits' size
        own = jnp.where(jnp.arange(logits.shape[1]) == targets[:, None], logits, 0).sum(-1)
        return total + ((jax.nn.logsumexp(logits, -1) - own) * counted).sum(), None

    part = part if parts == 1 else jax.checkpoint(part)
    return jax.lax.scan(part, jnp.zeros((), jnp.float32), given)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(architecture, weights, rows):
    """Float32 logits, whose cotangent is rounded to the dtype of `rows` before it is multiplied: two products in
    float32 took a GPU twice as long."""
    return decoder.logits(architecture, weights, rows)


def _logits_forward(architecture, weights, rows):
    return decoder.logits(architecture, weights, rows), (weights, rows)


def _logits_backward(architecture, given, cotangent):
    narrow = given[1].dtype
    pull = jax.vjp(lambda weights, rows: decoder.logits(architecture, weights, rows, narrow), *given)[1]
    return pull(cotangent.astype(narrow))


_logits.defvjp(_logits_forward, _logits_backward)
