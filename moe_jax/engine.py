"""The compiled steps of generation: prefill and the decode loop, over a cache that is handed on and donated."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from pallas_kernels.dims import Array as AnyArray

from . import decoder
from .attention import Span
from .axes import add_up
from .block import RoutingRequest
from .block_config import Architecture
from .cache import Corner, KVCache, entry_shapes, make_cache
from .model import ascending, id_dtype
from .sampling import Sampler, sample
from .sharding import Sharding, leaf_specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one decode step hands to the next. `step`: new tokens so far, the same for all rows."""

    cache: KVCache
    tokens: Int[Array, "B new"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    experts: Int[Array, "Lm B new A"] | None
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What stays the same over all steps. `total`: tokens that the longest row may reach (LongRoPE's switch)."""

    sampler: Sampler
    key: Array | None
    eos: Int[AnyArray, " n"]
    pad: Int[AnyArray, ""] | int
    total: Int[AnyArray, ""] | int
    forced: Int[AnyArray, "Lm B new A"] | None
    implementation: str | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs of a run are compiled for.

    `capacity`: columns of the cache; `room` for new tokens; `rows` and `columns` of a prompt that run at once;
    `cache`: what the cache is stored as, see `make_cache`.
    """

    capacity: int
    room: int
    rows: int
    columns: int
    cache: Literal["int8"] | None = None


#: About so many bytes of what layers make of a prompt's tokens are held at once.
_BYTES = 1 << 30


def tokens_at_once(architecture: Architecture, itemsize: int) -> int:
    """How many tokens of prompts run at once, a power of two: as many as fit, of 2048 to 16384.

    Counted are the widest arrays of each part of a layer: the stream and its norm in float32, queries, keys, values
    and attention's output, and for each chosen expert its hidden vectors and its output.
    """
    block, attention = architecture.block, architecture.block.attention
    widths = 6 * block.width + 2 * attention.num_heads * attention.head_dim
    widths += attention.num_kv_heads * (attention.head_dim + attention.value_dim)
    hidden = [3 * mlp.hidden for mlp in (block.dense, block.shared) if mlp is not None]
    if block.experts is not None:
        hidden.append(block.router.top_k * (2 * block.experts.hidden + block.width))
    fit = _BYTES // (itemsize * (widths + max(hidden)))
    return max(2048, min(16384, 1 << max(0, fit.bit_length() - 1)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="sharding")
def prefill(architecture, sizes, record, weights, ids, lengths, forced, request, *, sharding=None):
    """Fill a new cache with `ids [B, T]`, of which the first `lengths [B]` are real, and draw the first new token.

    A row of length 0 is none, and done from the beginning. Pieces of `sizes.rows` rows and `sizes.columns` columns run
    one after the other, in a loop, if that is not all; with a `sharding`, on every device.
    Returns the state and, if they are to be recorded, the experts of the prompt `[Lm, B, T, A]`.
    """
    if sharding is None:
        return _prefill(architecture, sizes, record, weights, ids, lengths, forced, request)
    rows, layered = sharding.batch, PartitionSpec(None, *sharding.batch)
    local = sharding.local(architecture)

    def run(weights, ids, lengths, forced, chosen):
        own = dataclasses.replace(request, forced=chosen)
        state, experts = _prefill(local, sizes, record, weights, ids, lengths, forced, own)
        return _parts(state), experts

    given = leaf_specs(weights, sharding.specs(architecture)), rows, rows, layered, layered
    run = sharding.map(run, given, (_specs(architecture, sharding), layered))
    parts, experts = run(weights, ids, lengths, forced, request.forced)
    return _joined(parts), experts


def _parts(state: State) -> dict[str, Any]:
    """What a state consists of, as a dictionary, which may hold partition specs as well."""
    parts = {name: getattr(state, name) for name in ("tokens", "done", "seen", "experts", "step")}
    return parts | {"entries": state.cache.entries, "lengths": state.cache.lengths}


def _joined(parts: dict[str, Any]) -> State:
    """The inverse of `_parts`."""
    return State(cache=KVCache(parts.pop("entries"), parts.pop("lengths")), **parts)


def _specs(architecture: Architecture, sharding: Sharding) -> dict[str, Any]:
    """How the parts of a state lie on a mesh."""
    rows, layered = sharding.batch, PartitionSpec(None, *sharding.batch)
    latent = architecture.block.attention.latent is not None
    entry = layered if latent else PartitionSpec(*layered, sharding.axes.heads or None)
    entries = dict.fromkeys(entry_shapes(architecture.block.attention), entry)
    by_row = dict.fromkeys(("lengths", "tokens", "done", "seen"), rows)
    return by_row | {"entries": entries, "experts": layered, "step": PartitionSpec()}


def _prefill(architecture, sizes, record, weights, ids, lengths, forced, request):
    """`prefill` on a device."""
    (rows, width), lengths = ids.shape, jnp.asarray(lengths)
    record = record and bool(architecture.moe_layers)
    dtype = weights["embedding"].dtype
    carry = (
        make_cache(architecture, rows, sizes.capacity, dtype, sizes.cache).entries,
        jnp.zeros((rows, architecture.block.width), dtype),
        _no_experts(architecture, rows, width) if record else None,
    )
    prompt = jnp.asarray(ids), lengths, forced
    run = functools.partial(_piece, architecture, sizes, weights, prompt, request)
    down, across = -(-rows // sizes.rows), width // sizes.columns
    if down * across == 1:
        carry = run(carry, 0, 0)
    else:  # the last rows may run twice, to the same end: with gates that drop, all is one piece
        first = lambda i: jnp.minimum(i // across * sizes.rows, rows - sizes.rows)
        column = lambda i: i % across * sizes.columns if across > 1 else 0
        carry = jax.lax.fori_loop(0, down * across, lambda i, carry: run(carry, first(i), column(i)), carry)
    entries, x, experts = carry
    seen = None
    if request.sampler.repetition_penalty is not None:
        real = jnp.arange(width) < lengths[:, None]
        seen = jnp.zeros((rows, architecture.vocab_size), bool).at[jnp.arange(rows)[:, None], ids].max(real)
    state = State(
        cache=KVCache(entries, lengths),
        tokens=jnp.full((rows, sizes.room), request.pad, jnp.int32),
        done=lengths == 0,
        seen=seen,
        experts=_no_experts(architecture, rows, sizes.room) if record else None,
        step=jnp.zeros((), jnp.int32),
    )
    return _draw(architecture, weights, state, request, x), experts


def _piece(architecture, sizes, weights, prompt, request, carry, row, start):
    """Run the rows from `row` and columns from `start` on; keep what rows end with and, if recorded, the experts."""
    (ids, lengths, forced), (entries, last, experts) = prompt, carry
    rows, size = sizes.rows, (sizes.rows, sizes.columns)
    own = jax.lax.dynamic_slice_in_dim(lengths, row, rows)
    columns = start + jnp.arange(sizes.columns, dtype=jnp.int32)
    # Padding stands where the row's last token does: no table of positions ends before it.
    positions = jnp.clip(columns, 0, jnp.maximum(own[:, None] - 1, 0))
    turn = decoder.make_turn(architecture.block.attention, positions, request.total)
    span = Span(positions, turn=turn, start=start, lengths=own)
    if forced is not None:
        layers, _, _, choices = forced.shape
        forced = jax.lax.dynamic_slice(forced, (0, row, start, 0), (layers, *size, choices))
    routing = RoutingRequest(columns < own[:, None], forced, request.implementation)
    ids = jax.lax.dynamic_slice(ids, (row, start), size)
    cache, at = KVCache(entries, lengths), Corner(row, start)
    x, cache, trace = decoder.decode(architecture, weights, ids, span, cache, routing, experts is not None, at)
    end = own - 1 - start
    found = jnp.take_along_axis(x, jnp.clip(end, 0, sizes.columns - 1)[:, None, None], axis=1)[:, 0]
    here = ((end >= 0) & (end < sizes.columns))[:, None]
    found = jnp.where(here, found, jax.lax.dynamic_slice_in_dim(last, row, rows))
    last = jax.lax.dynamic_update_slice_in_dim(last, found, row, axis=0)
    if experts is not None:
        experts = jax.lax.dynamic_update_slice(experts, _experts_of(architecture, trace, size), (0, row, start, 0))
    return cache.entries, last, experts


@functools.partial(jax.jit, static_argnums=0, static_argnames="sharding", donate_argnums=2)
def decode(architecture, weights, state, request, limit, *, sharding=None):
    """Step until `limit` new tokens stand, or all rows have ended."""
    return _on_devices(_decode, architecture, sharding, weights, state, request, limit)


def _decode(architecture, weights, state, request, limit):
    axes = architecture.block.axes.batch
    unfinished = lambda state: add_up((~state.done).sum(), axes) > 0

    def run(carry):
        state = _step(architecture, weights, carry[0], request)
        return state, unfinished(state)

    going = lambda carry: (carry[0].step < limit) & carry[1]
    return jax.lax.while_loop(going, run, (state, unfinished(state)))[0]


def _on_devices(run, architecture, sharding, weights, state, request, *rest):
    """`run` on whole arrays, or on every device's share of them."""
    if sharding is None:
        return run(architecture, weights, state, request, *rest)
    lies, local = _specs(architecture, sharding), sharding.local(architecture)

    def on_one(weights, parts, forced):
        own = dataclasses.replace(request, forced=forced)
        return _parts(run(local, weights, _joined(parts), own, *rest))

    given = leaf_specs(weights, sharding.specs(architecture)), lies, PartitionSpec(None, *sharding.batch)
    return _joined(sharding.map(on_one, given, lies)(weights, _parts(state), request.forced))


def _step(architecture, weights, state, request):
    """Run the newest token of each row and draw the next one.

    Rows that have ended take no expert's time and stay as long as they are: what they write is never read.
    """
    at, lengths = state.step - 1, state.cache.lengths
    token = jax.lax.dynamic_slice_in_dim(state.tokens, at, 1, axis=1)
    positions, real = lengths[:, None], ~state.done[:, None]
    span = Span(positions, turn=decoder.make_turn(architecture.block.attention, positions, request.total))
    forced = None
    if request.forced is not None:
        forced = jax.lax.dynamic_slice_in_dim(request.forced, at, 1, axis=2)
    # A row by itself that has ended does not run on, or not for long; beside others', it may never have been one.
    alone = len(real) == 1 and not architecture.block.axes.batch
    routing = RoutingRequest(None if alone else real, forced, request.implementation)
    record = state.experts is not None
    x, cache, trace = decoder.decode(architecture, weights, token, span, state.cache, routing, record, lengths)
    state = dataclasses.replace(state, cache=dataclasses.replace(cache, lengths=lengths + real[:, 0]))
    if record:
        chosen = jnp.where(real[None, :, :, None], _experts_of(architecture, trace, token.shape), -1)
        experts = jax.lax.dynamic_update_slice_in_dim(state.experts, chosen, at, axis=2)
        state = dataclasses.replace(state, experts=experts)
    return _draw(architecture, weights, state, request, x[:, 0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="sharding", donate_argnums=2)
def step(architecture, weights, state, request, *, sharding=None):
    """One step by itself."""
    return _on_devices(_step, architecture, sharding, weights, state, request)


def _draw(architecture, weights, state, request, x):
    """From the last hidden state of each row to its next token."""
    with jax.named_scope("logits"):
        logits = decoder.logits(architecture, weights, decoder.final(architecture, weights, x))
    with jax.named_scope("sample"):
        key = None if request.key is None else jax.random.fold_in(request.key, state.step)
        axes = architecture.block.axes.batch
        first = jax.lax.axis_index(axes) * len(logits) if axes else 0
        token = sample(request.sampler, logits, key, state.seen, first)
        token = jnp.where(state.done, request.pad, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        done=state.done | (token[:, None] == request.eos).any(-1),
        seen=seen,
        step=state.step + 1,
    )


def _no_experts(architecture, rows, room):
    router, layers = architecture.block.router, len(architecture.moe_layers)
    return jnp.full((layers, rows, room, router.top_k), -1, id_dtype(router.num_experts))


def _experts_of(architecture, trace, shape):
    choices, router = trace.choices, architecture.block.router
    ids, _ = ascending(choices.ids, choices.weights, router.num_experts)
    return ids.reshape(ids.shape[0], *shape, router.top_k)
