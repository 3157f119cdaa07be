"""Generation: prefill, then decoding over a preallocated, donated cache. Sees token ids only."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from pallas_kernels.dims import Array as AnyArray

from .cache import grow
from .engine import Request, Sizes, decode, prefill, step, tokens_at_once
from .model import Model, check_inputs, forced_ids, is_integer, with_more_rows
from .sampling import make_sampler
from .sharding import Sharding, fetched


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate(..., return_record=True)` returns.

    `ids` int32 `[B, T + new]`; `expert_ids`: per MoE layer `[B, T + new, A]` in the smallest signed integer type,
    ascending, -1 where no token ran (padding, the last token, whatever follows a row's end).
    """

    ids: Int[AnyArray, "B total"]
    expert_ids: tuple[Int[AnyArray, "B total A"], ...]

    def expert_counts(self, num_experts: int) -> np.ndarray:
        """Tokens of each MoE layer's experts, int64 `[Lm, num_experts]`: what `moe_jax.balance` takes.

        >>> Generated(np.zeros((1, 3), int), (np.array([[[0, 1], [1, 2], [-1, -1]]]),)).expert_counts(4).tolist()
        [[1, 2, 1, 0]]
        """
        chosen = (np.asarray(layer).ravel() for layer in self.expert_ids)
        return np.stack([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in chosen])


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
    kv_cache_dtype: str | None = None,
) -> np.ndarray | Generated:
    """Continue each row of `input_ids` by up to `max_new_tokens` tokens.

    Args: `input_ids` int `[B, T]`; `attention_mask` `[B, T]`, 1 for real tokens, padding on either side;
    `temperature` 0 is greedy, above it needs `key` (a JAX key or an integer seed); `top_k`, `top_p`, `min_p`,
    `repetition_penalty`: see `moe_jax.sampling.Sampler`; `eos_token_id`: one or several ids that end a row, None for
    the model's own, `()` for none; `return_record`: return a `Generated` with the chosen experts; `routing`: such a
    record (or arrays per MoE layer `[B, T + max_new_tokens, A]`, -1 where the router decides) to be followed;
    `kv_cache_dtype` "int8" keeps keys and values in about half the memory of bfloat16, with a scale for each token's
    head; logits move by about 1.5 % of their spread (docs/decisions.md); None keeps them in the model's dtype.
    Returns int32 `[B, T + max_new_tokens]`: new tokens start at column T whatever the padding; rows that end early
    are filled with the pad token, else the end token. It stops when all rows have ended (a GPU up to 16 steps later).
    The cache begins with 512 columns, or twice the prompt's if that is more (fewer, if fewer can be needed), and
    doubles when it is full.
    Long prompts run in pieces, so that what layers need beside the cache stays at about a gigabyte; all at once where
    gates drop by a capacity, which is that of all tokens. With LongRoPE (Phi-3.5-MoE) all rows rotate by the long
    factors if the longest could pass the original length.
    Raises `ValueError` for arguments out of range, ids outside the vocabulary, or more tokens than the context.

    >>> from moe_jax.model import tiny_config
    >>> generate(Model.initialize(tiny_config()), [[1, 2, 3]], max_new_tokens=4).shape
    (1, 7)
    """
    options = {"min_p": min_p, "repetition_penalty": repetition_penalty, "routing": routing, "record": return_record}
    options |= {"kv_cache_dtype": kv_cache_dtype}
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


#: A cache of up to so many columns is made at once.
_COLUMNS = 512
#: Steps on a GPU between two questions whether all rows have ended.
_STEPS = 8
#: Tokens of prompts that run at once, where tests say so.
_TOKENS: int | None = None


def bucket(length: int) -> int:
    """The next of few lengths: multiples of 16, and above 64 of a quarter of the power of two below.

    >>> [bucket(n) for n in (1, 17, 100, 513)]
    [16, 32, 112, 640]
    """
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class _Run:
    """One call of `generate` or `stream`: checked inputs, compiled functions' state.

    Rows run without their padding: real tokens first, so that a token's column in the cache is its position.
    """

    def __init__(
        self, model, input_ids, attention_mask, new, eos, key=None, *,
        routing=None, record=False, kv_cache_dtype=None, **sampling,
    ):  # fmt: skip
        if kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype: {kv_cache_dtype!r} is neither None nor 'int8'")
        if not is_integer(new) or new < 0:
            raise ValueError(f"max_new_tokens: {new!r} is not a non-negative integer")
        new = int(new)
        self.sampler = make_sampler(**sampling)
        if self.sampler.temperature is not None and key is None:
            raise ValueError(f"key: temperature {self.sampler.temperature} needs a JAX key or an integer seed")
        ids, self.mask = check_inputs(model.config, input_ids, attention_mask, new)
        self.model, self.new, self.record = model, new, record
        self.given = np.asarray(input_ids, np.int32)
        self.eos = _stop_ids(model, eos)
        forced = forced_ids(model.architecture, routing, (len(ids), ids.shape[1] + new))
        self.sharding = model.sharding
        parts = 1 if self.sharding is None else self.sharding.rows
        ids, self.mask, forced = with_more_rows(parts, ids, self.mask, forced)
        rows, prompt = ids.shape
        self.lengths = self.mask.sum(1, dtype=np.int32)
        self.longest, room = int(self.lengths.max()), bucket(max(new, 1))
        width, self.sizes, self.full = _sizes(model, rows // parts, self.longest, room)
        self.sizes = dataclasses.replace(self.sizes, cache=kv_cache_dtype)
        self.capacity = self.sizes.capacity
        self.ids = _resized(compact(ids, self.mask, 1), width, 1, 0)
        if forced is not None:
            self.forced = _resized(compact(forced[:, :, :prompt], self.mask[None, :, :, None], 2), width, 2, -1)
            forced = _resized(forced[:, :, prompt:], room, 2, -1)
        else:
            self.forced = None
        request = Request(
            sampler=self.sampler,
            key=jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key,
            eos=np.asarray(self.eos or (-1,), np.int32),  # XLA's partitioner (jax 0.11.2) dies of an empty one
            pad=_pad_id(model, self.eos),
            total=self.longest + new,
            forced=forced,
            implementation=model.implementation,
        )
        # on the devices once, and not with every step
        if self.sharding is None:
            self.request, self.weights = jax.device_put((request, model.arrays()))
        else:
            self.request, self.weights = _put(self.sharding, request), model.arrays()
        self.state, self.prompt_experts, self.count = None, None, 0

    def start(self) -> None:
        """Prefill the cache and draw the first new token."""
        static, prompt = (self.model.architecture, self.sizes, self.record), (self.ids, self.lengths, self.forced)
        self.state, self.prompt_experts = prefill(*static, self.weights, *prompt, self.request, sharding=self.sharding)
        self.count = 1

    def advance(self, limit: int) -> None:
        """Decode until `limit` new tokens stand, or all rows have ended; the cache grows where it has to."""
        while True:
            # The newest token is not in the cache, so one more stands than there are columns.
            reach = min(limit, self.capacity - self.longest + 1)
            self._decode(reach)
            if reach == limit or bool(fetched(self.state.done.all())):
                return
            self.capacity = min(2 * self.capacity, self.full)
            self.state = dataclasses.replace(self.state, cache=grow(self.state.cache, self.capacity))

    def _decode(self, limit: int) -> None:
        """Decode within the cache that there is."""
        given, sharding = (self.model.architecture, self.weights), self.sharding
        if not _on_gpu(self.weights):
            self.state = decode(*given, self.state, self.request, limit, sharding=sharding)
            return
        # A loop on a GPU that asks if rows have ended waits for the host each time: steps are sent ahead instead.
        ended = jnp.zeros((), bool)
        while self.count < limit:
            self.state = step(*given, self.state, self.request, sharding=sharding)
            self.count += 1
            if self.count % _STEPS == 0:
                if fetched(ended):  # waits for the answer to the question before, while the steps since then run
                    return
                ended = self.state.done.all()

    def steps(self) -> Iterator[np.ndarray]:
        """New tokens step by step."""
        if not self.new:
            return
        self.start()
        for index in range(self.new):
            if index and bool(fetched(self.state.done.all())):
                return
            self.advance(index + 1)
            yield fetched(self.state.tokens[: len(self.given), index])

    def result(self) -> np.ndarray | Generated:
        """Prompt and new tokens; what follows a row's end is padding."""
        new = np.zeros((self.given.shape[0], 0), np.int32)
        if self.new:
            new = fetched(self.state.tokens)[: len(self.given), : self.new]
        ids = np.concatenate([self.given, new], 1)
        if not self.record:
            return ids
        if not self.new:
            raise ValueError("return_record: nothing is run with max_new_tokens=0; call the model instead")
        if self.prompt_experts is None:
            return Generated(ids, ())
        parts = spread(fetched(self.prompt_experts), self.mask), fetched(self.state.experts)[:, :, : self.new]
        return Generated(ids, tuple(np.concatenate(parts, 2)[:, : len(ids)]))


def _put(sharding: Sharding, request: Request) -> Request:
    """The request with its numbers on all devices, forced choices where their rows are."""
    eos, pad, total = (sharding.put(np.asarray(x, np.int32)) for x in (request.eos, request.pad, request.total))
    forced = request.forced
    if forced is not None:
        forced = sharding.put(np.asarray(forced), PartitionSpec(None, *sharding.batch))
    key = request.key
    if key is not None:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        bits = sharding.put(fetched(jax.random.key_data(key) if typed else key))
        key = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(key)) if typed else bits
    return dataclasses.replace(request, eos=eos, pad=pad, total=total, forced=forced, key=key)


def _on_gpu(weights: Any) -> bool:
    return next(iter(jax.tree.leaves(weights)[0].devices())).platform == "gpu"


def _sizes(model: Model, rows: int, longest: int, room: int) -> tuple[int, Sizes, int]:
    """Columns of the prompt, sizes to compile for, and columns that the cache may come to have.

    The cache begins with all columns that can be needed if they are few or at most twice the prompt's, and doubles
    when it is full. A prompt with more tokens than run at once is cut into equal pieces: into rows, and into columns
    where a single row is too long. But not for gates that drop by a capacity, which is that of all tokens together.
    """
    width, limit = bucket(longest), _TOKENS or tokens_at_once(model.architecture, model.dtype.itemsize)
    router = model.architecture.block.router
    if router is not None and router.drops:
        limit = rows * width
    across = -(-width // limit)
    columns = -(-width // (16 * across)) * 16
    width = across * columns
    down = -(-rows // max(1, limit // columns))
    full = width + room
    capacity = min(full, max(_COLUMNS, 2 * width))
    return width, Sizes(capacity, room, -(-rows // down), columns), full


def compact(values: np.ndarray, mask: np.ndarray, axis: int) -> np.ndarray:
    """`values` with what `mask` marks along `axis` moved to the front, in order; `mask` has as many dimensions.

    >>> compact(np.array([[0, 5, 0, 6]]), np.array([[False, True, False, True]]), 1).tolist()
    [[5, 6, 0, 0]]
    """
    return np.take_along_axis(values, np.argsort(~mask, axis=axis, kind="stable"), axis)


def spread(experts: Int[AnyArray, "Lm B width A"], mask: Bool[AnyArray, "B T"]) -> Int[AnyArray, "Lm B T A"]:
    """The reverse of `compact` for experts: each row's first ones go where `mask` is true, -1 stands elsewhere."""
    place = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    found = np.take_along_axis(experts, place[None, :, :, None], axis=2)
    return np.where(mask[None, :, :, None], found, experts.dtype.type(-1))


def _resized(values, size, axis, filler):
    """`values` cut or filled to `size` along `axis`."""
    values = np.moveaxis(values, axis, 0)[:size]
    values = np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), constant_values=filler)
    return np.moveaxis(values, 0, axis)


def _stop_ids(model: Model, eos: Any) -> tuple[int, ...]:
    if eos is None:
        eos = model.generation.get("eos_token_id")
        eos = model.config.token_ids("eos") if eos is None else eos
    return (int(eos),) if isinstance(eos, (int, np.integer)) else tuple(int(i) for i in eos)


def _pad_id(model: Model, eos: tuple[int, ...]) -> int:
    pad = model.generation.get("pad_token_id")
    found = (*((pad,) if pad is not None else ()), *model.config.token_ids("pad"), *eos, 0)
    return next(int(i) for i in found if 0 <= i < model.architecture.vocab_size)  # old Llama configs say -1
