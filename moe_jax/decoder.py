"""The decoder as a pure function: embedding, layers that share compiled bodies, final norm, logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear import linear
from pallas_kernels.quantized import dense

from .attention import Span, Varying
from .axes import add_up, gathered
from .block import Choice, Place, RoutingRequest, block
from .block_config import Architecture, AttentionConfig, LayerConfig
from .cache import KVCache
from .norm import norm
from .rope import rotation
from .step import plain_enough, step
from .weights import Weights


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times the same sequence of layer kinds (experts of each layer, 0: dense), starting at layer `start`."""

    start: int
    experts: tuple[int, ...]
    repeats: int


def segments(kinds: tuple[int, ...]) -> tuple[Segment, ...]:
    """Cut the layers into repeating periods, each to be compiled once: from each layer on, what repeats longest.

    >>> [(s.start, s.experts, s.repeats) for s in segments((0, 8, 8, 8))]
    [(0, (0,), 1), (1, (8,), 3)]
    >>> [(s.experts, s.repeats) for s in segments((0, 8, 0, 8, 0, 16))]
    [((0, 8), 2), ((0,), 1), ((16,), 1)]
    """
    found, start = [], 0
    while start < len(kinds):
        best = Segment(start, kinds[start : start + 1], 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            pattern = kinds[start : start + period]
            repeats = 1
            while kinds[start + repeats * period :][:period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * len(best.experts):
                best = Segment(start, pattern, repeats)
        found.append(best)
        start += best.repeats * len(best.experts)
    return tuple(found)


def varying(layers: tuple[LayerConfig, ...], index: Any) -> Varying:
    """Layer `index`'s settings: plain values where all layers agree, else looked up in a small array."""
    unlimited = 2**30  # farther than any position: the same as no window

    def pick(values):
        if len(set(values)) == 1:
            return values[0]
        if values[0] is None or (isinstance(values[0], int) and not isinstance(values[0], bool)) or None in values:
            values = [unlimited if v is None else v for v in values]
        return jnp.asarray(values)[index]

    divisors = [layer.score_divisor for layer in layers]
    heat = [layer.temperature for layer in layers]
    temperature = None
    if any(h is not None for h in heat):
        scale = jnp.asarray([0.0 if h is None else h[0] for h in heat], jnp.float32)[index]
        floor = jnp.asarray([1.0 if h is None else h[1] for h in heat], jnp.float32)[index]
        temperature = (scale, floor)
    return Varying(
        window=pick([layer.window for layer in layers]),
        chunk=pick([layer.chunk for layer in layers]),
        rotary=pick([layer.rotary for layer in layers]),
        temperature=temperature,
        score_divisor=pick(divisors),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What the layers did, stacked: residual stream before each layer `[L, B, T, D]`, router choices `[Lm, G, ...]`."""

    hidden: Float[Array, "L B T D"] | None
    choices: Choice | None


def decode(
    architecture: Architecture,
    weights: Weights,
    ids: Int[Array, "B T"],
    span: Span,
    cache: KVCache | None,
    request: RoutingRequest,
    trace: bool = False,
    column: Any = 0,
) -> tuple[Float[Array, "B T D"], KVCache | None, Trace | None]:
    """Run all layers on new tokens; returns the residual stream before the final norm.

    With a cache, entries go to `column` (see `write_entries`); its lengths are the caller's to keep. `trace` also
    returns what each layer did.
    """
    x = embedded(architecture, weights, ids, span.positions)
    entries = None if cache is None else cache.entries
    notes = _empty_trace(architecture, x) if trace else None
    counts = iter(architecture.expert_counts)
    kinds = tuple(next(counts) if layer.moe else 0 for layer in architecture.layers)

    def run(carry, turn, segment):
        x, entries, notes = carry
        for offset in range(len(segment.experts)):
            place = _place(architecture, kinds, segment, turn, offset)
            stream = x
            given = x, place, span, entries
            run_layer = step if plain_enough(architecture.block, *given) else block
            x, entries, choice = run_layer(architecture.block, weights, *given, column, request)
            if notes is not None:
                notes = _note(notes, place, stream, choice)
        return x, entries, notes

    carry = (x, entries, notes)
    for segment in segments(kinds):
        if segment.repeats == 1:
            carry = run(carry, 0, segment)
        else:
            few = cache is not None and ids.shape[1] == 1
            carry = _repeat(functools.partial(run, segment=segment), segment.repeats, carry, few)
    x, entries, notes = carry
    if cache is not None:
        cache = dataclasses.replace(cache, entries=entries)
    return x, cache, notes


def embedded(architecture: Architecture, weights: Weights, ids: Int[Array, "B T"], positions: Any) -> Array:
    """The residual stream `[B, T, D]` before the first layer, of ids at `positions [B, T]`."""
    x = _rows(architecture, weights["embedding"], ids)
    if architecture.learned_positions:
        x = x + weights["positions"][positions]
    return x if architecture.embedding_scale == 1.0 else x * architecture.embedding_scale


def _rows(architecture: Architecture, table: Any, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding, which may lie on several devices."""
    axes = architecture.block.axes.vocab
    if not axes:
        return dense(table[ids])
    ids = ids - jax.lax.axis_index(axes) * table.shape[0]
    here = (ids >= 0) & (ids < table.shape[0])
    return add_up(jnp.where(here[..., None], dense(table[jnp.where(here, ids, 0)]), 0), axes)


def _repeat(period: Callable[[Any, Any], Any], repeats: int, carry: Any, few: bool) -> Any:
    """`period` on the carry for turns 0, 1, ...: in a loop, so that time to compile does not grow with depth.

    With `few` tokens on a GPU a turn of a loop costs 5 us, a tenth of a layer: layers are written out there. They
    are traced once, and XLA compiles equal kernels once.
    """

    def looped(carry):
        return jax.lax.fori_loop(0, repeats, lambda turn, carry: period(carry, turn), carry)

    def written_out(carry):
        for turn in range(repeats):
            carry = once(carry, jnp.int32(turn))
        return carry

    if not few:
        return looped(carry)
    once = jax.jit(period)
    return jax.lax.platform_dependent(carry, cuda=written_out, default=looped)


def _place(architecture: Architecture, kinds: tuple[int, ...], segment: Segment, turn: Any, offset: int) -> Place:
    """Where the layer at `offset` of a segment's `turn`-th period stands; `turn` may be traced."""
    period, count = segment.experts, segment.experts[offset]
    earlier = kinds[: segment.start] + period[:offset]
    layer = segment.start + turn * len(period) + offset
    alike = lambda layers: sum((k > 0) == (count > 0) for k in layers)
    of_kind = alike(earlier) + turn * alike(period)
    first = sum(earlier) + turn * sum(period) if architecture.pyramid and count else None
    return Place(layer, of_kind, count > 0, varying(architecture.layers, layer), first, count)


def _empty_trace(architecture: Architecture, x: Array) -> Trace:
    router, layers = architecture.block.router, len(architecture.moe_layers)
    rows = x.shape[0] * x.shape[1]
    choices = None
    if layers:
        choices = Choice(
            logits=jnp.zeros((layers, rows, router.num_experts), jnp.float32),
            ids=jnp.zeros((layers, rows, router.top_k), jnp.int32),
            weights=jnp.zeros((layers, rows, router.top_k), jnp.float32),
            overflow=jnp.zeros(layers, jnp.int32),
        )
    return Trace(jnp.zeros((len(architecture.layers), *x.shape), x.dtype), choices)


def _note(trace: Trace, place: Place, stream: Array, choice: Choice | None) -> Trace:
    hidden = trace.hidden.at[place.layer].set(stream)
    if choice is None:
        return Trace(hidden, trace.choices)
    missing = trace.choices.logits.shape[-1] - choice.logits.shape[-1]  # a pyramid's smaller layers
    logits = jnp.pad(choice.logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    choice = dataclasses.replace(choice, logits=logits)
    return Trace(hidden, jax.tree.map(lambda all, one: all.at[place.of_kind].set(one), trace.choices, choice))


def make_span(architecture: Architecture, positions, key_positions, key_valid, length) -> Span:
    """The span of new tokens at `positions`; `length`: tokens of the longest row (LongRoPE's switch)."""
    turn = make_turn(architecture.block.attention, positions, length)
    return Span(positions, key_positions, key_valid, turn)


def make_turn(attention: AttentionConfig, positions, length):
    """Rotary cosine and sine of `positions`, None without rotary positions."""
    return None if attention.rope is None else rotation(attention.rope, positions, length)


def final(architecture: Architecture, weights: Weights, x: Float[Array, "*G D"]) -> Float[Array, "*G D"]:
    """The final norm."""
    return norm(architecture.block.norm, x, weights["final_norm"])


def logits(
    architecture: Architecture, weights: Weights, normed: Float[Array, "*G D"], dtype: Any = jnp.float32
) -> Float[Array, "*G V"]:
    """Logits of normed hidden states in `dtype`."""
    kernel = weights["embedding"] if architecture.tied else weights["head"]["kernel"]
    biases = [weights["head"]["bias"]] if architecture.head_bias else None
    (y,) = linear(normed.reshape(-1, normed.shape[-1]), [kernel], biases=biases, dtype=dtype)
    y = gathered(y, architecture.block.axes.vocab, 1)[:, : architecture.vocab_size]
    y = y.reshape(*normed.shape[:-1], -1)
    return y if architecture.logit_divisor == 1.0 else y / architecture.logit_divisor
