"""Generation: a jitted prefill and a jitted decode loop over a preallocated, donated cache. Sees token ids only."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.dims import Array as AnyArray

from . import decoder
from .block import RoutingRequest
from .cache import KVCache, admit, make_cache
from .model import Model, ascending, check_inputs, forced_ids, id_dtype
from .sampling import Sampler, make_sampler, sample


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate(..., return_record=True)` returns.

    `ids` int32 `[B, T + new]`; `expert_ids`: per MoE layer `[B, T + new, A]` in the smallest signed integer type,
    ascending, -1 where no token ran (padding, the last token, whatever follows a row's end).
    """

    ids: Int[AnyArray, "B total"]
    expert_ids: tuple[Int[AnyArray, "B total A"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What one decode step hands to the next. `step`: new tokens so far, the same for all rows."""

    cache: KVCache
    tokens: Int[Array, "B new"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    experts: Int[Array, "Lm B new A"] | None
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """What stays the same over all steps. `total`: tokens that the longest row may reach (LongRoPE's switch)."""

    sampler: Sampler
    key: Array | None
    eos: Int[AnyArray, " n"]
    pad: Int[AnyArray, ""] | int
    total: Int[AnyArray, ""] | int
    forced: Int[AnyArray, "Lm B new A"] | None
    implementation: str | None = dataclasses.field(metadata={"static": True})


def generate(
    model: Model,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int | np.integer = 24,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    key: Array | int | np.integer | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    return_record: bool = False,
    routing: Any = None,
) -> np.ndarray | Generated:
    """Continue each row of `input_ids` by up to `max_new_tokens` tokens.

    Args: `input_ids` int `[B, T]`; `attention_mask` `[B, T]`, 1 for real tokens, padding on either side;
    `temperature` 0 is greedy, above it needs `key` (a JAX key or an integer seed); `top_k`, `top_p`, `min_p`,
    `repetition_penalty`: see `moe_jax.sampling.Sampler`; `eos_token_id`: one or several ids that end a row, None for
    the model's own, `()` for none; `return_record`: return a `Generated` with the chosen experts; `routing`: such a
    record (or arrays per MoE layer `[B, T + max_new_tokens, A]`, -1 where the router decides) to be followed.
    Returns int32 `[B, T + max_new_tokens]`: new tokens start at column T whatever the padding; rows that end early
    are filled with the pad token, else the end token. It stops as soon as all rows have ended. With LongRoPE
    (Phi-3.5-MoE) all rows rotate by the long factors if the longest could pass the original length.
    Raises `ValueError` for arguments out of range, ids outside the vocabulary, or more tokens than the context.

    >>> from moe_jax.model import tiny_config
    >>> generate(Model.initialize(tiny_config()), [[1, 2, 3]], max_new_tokens=4).shape
    (1, 7)
    """
    options = {"min_p": min_p, "repetition_penalty": repetition_penalty, "routing": routing, "record": return_record}
    sampler_options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    run = _Run(model, input_ids, attention_mask, max_new_tokens, eos_token_id, key, **sampler_options, **options)
    if run.new:
        run.start()
        run.advance(run.new)
    return run.result()


def stream(model: Model, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[np.ndarray]:
    """`generate` as an iterator: yields the new tokens int32 `[B]` one step at a time.

    Arguments as in `generate`, without `return_record`. Rows that have ended yield the pad token; the iterator ends
    when all have.

    >>> from moe_jax.model import tiny_config
    >>> len(list(stream(Model.initialize(tiny_config()), [[1, 2, 3]], max_new_tokens=4)))
    4
    """
    given = {"max_new_tokens": 24, "eos_token_id": None, "key": None} | options
    run = _Run(model, input_ids, attention_mask, given.pop("max_new_tokens"), given.pop("eos_token_id"), **given)
    return run.steps()


def bucket(length: int) -> int:
    """The next of few lengths: multiples of 16, and above 64 of a quarter of the power of two below.

    >>> [bucket(n) for n in (1, 17, 100, 513)]
    [16, 32, 112, 640]
    """
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class _Run:
    """One call of `generate` or `stream`: checked inputs, compiled functions' state."""

    def __init__(self, model, input_ids, attention_mask, new, eos, key=None, *, routing=None, record=False, **sampling):
        if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 0:
            raise ValueError(f"max_new_tokens: {new!r} is not a non-negative integer")
        new = int(new)
        self.sampler = make_sampler(**sampling)
        if self.sampler.temperature is not None and key is None:
            raise ValueError(f"key: temperature {self.sampler.temperature} needs a JAX key or an integer seed")
        self.ids, self.mask = check_inputs(model.config, input_ids, attention_mask, new)
        self.model, self.new, self.record = model, new, record
        self.given = np.asarray(input_ids, np.int32)
        self.eos = _stop_ids(model, eos)
        self.pad = _pad_id(model, self.eos)
        self.key = jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key
        rows, prompt = self.ids.shape
        self.prompt, self.width, self.room = prompt, bucket(prompt), bucket(max(new, 1))
        forced = forced_ids(model.architecture, routing, (rows, prompt + new))
        extend = lambda a, size: np.pad(a, ((0, 0), (0, 0), (0, size - a.shape[2]), (0, 0)), constant_values=-1)
        self.forced = None if forced is None else extend(forced[:, :, :prompt], self.width)
        self.request = _Request(
            sampler=self.sampler,
            key=self.key,
            eos=np.asarray(self.eos, np.int32),
            pad=self.pad,
            total=int(self.mask.sum(1).max()) + new,
            forced=None if forced is None else extend(forced[:, :, prompt:], self.room),
            implementation=model.implementation,
        )
        self.weights = model.arrays()
        self.state = self.prompt_experts = None

    def start(self) -> None:
        """Prefill the cache and draw the first new token."""
        wide = lambda a: np.pad(a, ((0, 0), (0, self.width - self.prompt)))
        ids, mask = wide(self.ids), wide(self.mask)
        static = (self.model.architecture, self.room, self.record)
        self.state, self.prompt_experts = _prefill(*static, self.weights, ids, mask, self.forced, self.request)

    def advance(self, limit: int) -> None:
        """Decode until `limit` new tokens stand, or all rows have ended."""
        self.state = _decode(self.model.architecture, self.weights, self.state, self.request, limit)

    def steps(self) -> Iterator[np.ndarray]:
        """New tokens step by step."""
        if not self.new:
            return
        self.start()
        for step in range(self.new):
            self.advance(step + 1)
            if int(self.state.step) <= step:
                return
            yield np.asarray(self.state.tokens[:, step])

    def result(self) -> np.ndarray | Generated:
        """Prompt and new tokens; what follows a row's end is padding."""
        new = np.zeros((self.given.shape[0], 0), np.int32)
        if self.new:
            new = np.asarray(self.state.tokens)[:, : self.new]
        ids = np.concatenate([self.given, new], 1)
        if not self.record:
            return ids
        if not self.new:
            raise ValueError("return_record: nothing is run with max_new_tokens=0; call the model instead")
        if self.prompt_experts is None:
            return Generated(ids, ())
        parts = self.prompt_experts[:, :, : self.prompt], self.state.experts[:, :, : self.new]
        return Generated(ids, tuple(np.concatenate([np.asarray(p) for p in parts], 2)))


def _stop_ids(model: Model, eos: Any) -> tuple[int, ...]:
    if eos is None:
        eos = model.generation.get("eos_token_id")
        eos = model.config.token_ids("eos") if eos is None else eos
    return (int(eos),) if isinstance(eos, (int, np.integer)) else tuple(int(i) for i in eos)


def _pad_id(model: Model, eos: tuple[int, ...]) -> int:
    pad = model.generation.get("pad_token_id")
    found = (*((pad,) if pad is not None else ()), *model.config.token_ids("pad"), *eos, 0)
    return next(int(i) for i in found if 0 <= i < model.architecture.vocab_size)  # old Llama configs say -1


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(architecture, room, record, weights, ids, mask, forced, request):
    rows, width = ids.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    cache = make_cache(architecture, rows, width + room, weights["embedding"].dtype)
    cache = admit(cache, jnp.asarray(mask), positions)
    span = decoder.make_span(architecture, positions, positions, jnp.asarray(mask), request.total)
    routing = RoutingRequest(jnp.asarray(mask), forced, request.implementation)
    record = record and bool(architecture.moe_layers)
    x, cache, trace = decoder.decode(architecture, weights, ids, span, cache, routing, record)
    last = (width - 1 - jnp.argmax(jnp.flip(mask, 1), axis=1)).astype(jnp.int32)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    seen = None
    if request.sampler.repetition_penalty is not None:
        seen = jnp.zeros((rows, architecture.vocab_size), bool).at[jnp.arange(rows)[:, None], ids].max(mask)
    state = _State(
        cache=cache,
        tokens=jnp.full((rows, room), request.pad, jnp.int32),
        lengths=jnp.asarray(mask).sum(1).astype(jnp.int32),
        done=jnp.zeros(rows, bool),
        seen=seen,
        experts=_no_experts(architecture, rows, room) if record else None,
        step=jnp.zeros((), jnp.int32),
    )
    experts = _experts_of(architecture, trace, ids.shape) if record else None
    return _draw(architecture, weights, state, request, x), experts


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(architecture, weights, state, request, limit):
    def unfinished(state):
        return (state.step < limit) & ~state.done.all()

    return jax.lax.while_loop(unfinished, lambda state: _step(architecture, weights, state, request), state)


def _step(architecture, weights, state, request):
    """Run the newest token of each row and draw the next one. Rows that have ended take no expert's time."""
    at = state.step - 1
    token = jax.lax.dynamic_slice_in_dim(state.tokens, at, 1, axis=1)
    positions = (state.lengths + at)[:, None]
    real = ~state.done[:, None]
    cache = admit(state.cache, real, positions)
    span = decoder.make_span(architecture, positions, cache.positions, cache.valid, request.total)
    forced = None
    if request.forced is not None:
        forced = jax.lax.dynamic_slice_in_dim(request.forced, at, 1, axis=2)
    routing = RoutingRequest(real, forced, request.implementation)
    record = state.experts is not None
    x, cache, trace = decoder.decode(architecture, weights, token, span, cache, routing, record)
    state = dataclasses.replace(state, cache=cache)
    if record:
        chosen = _experts_of(architecture, trace, token.shape)
        experts = jax.lax.dynamic_update_slice_in_dim(state.experts, chosen, at, axis=2)
        state = dataclasses.replace(state, experts=experts)
    return _draw(architecture, weights, state, request, x[:, 0])


def _draw(architecture, weights, state, request, x):
    """From the last hidden state of each row to its next token."""
    with jax.named_scope("logits"):
        logits = decoder.logits(architecture, weights, decoder.final(architecture, weights, x))
    with jax.named_scope("sample"):
        key = None if request.key is None else jax.random.fold_in(request.key, state.step)
        token = sample(request.sampler, logits, key, state.seen)
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
