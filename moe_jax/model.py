"""`Model`: a decoder with its weights; what `load_pretrained` returns and `generate` takes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.expert_mlp.api import OPERATION
from pallas_kernels.mxfp4 import GROUP

from . import decoder, exchange
from .axes import RULES, Axes, add_up
from .block import Choice, RoutingRequest
from .block_config import Architecture
from .config import ModelConfig
from .random_weights import draw, stored_forms
from .sharding import Sharding, leaf_specs, sharding_of
from .sharding.place import placed
from .weights import Weights, nested, parameters


@dataclasses.dataclass(frozen=True)
class Record:
    """What a forward pass did.

    `logits [B, T, V]` float32, `[B, kept, V]` with `logits_to_keep`; `hidden_states [L+1, B, T, D]`, the
    embedding first, each layer's output, the last one after the final norm. One entry per MoE layer, in order:
    `router_logits [B, T, E]` float32 (E may differ between layers), `expert_ids [B, T, A]` in the smallest signed
    integer type that holds them, ascending (-1: padding, no expert ran), `expert_weights [B, T, A]` float32 in the
    same order. `overflow`: per MoE layer, the tokens that took the second pass of an exchange between devices.
    """

    logits: Float[Array, "B kept V"]
    hidden_states: Float[Array, "L B T D"]
    router_logits: tuple[Float[Array, "B T _"], ...]
    expert_ids: tuple[Int[Array, "B T A"], ...]
    expert_weights: tuple[Float[Array, "B T A"], ...]
    overflow: Int[Array, " Lm"]


class Model(nnx.Module):
    """A causal language model: frozen configuration and weights.

    `weights` is a nested dictionary of `nnx.Param`s with all layers of a kind stacked along the first axis (see
    `moe_jax.weights.parameters`); with a `sharding` they lie on its mesh as `moe_jax.shard` puts them. Calling it runs
    one full forward pass:

    >>> model = Model.initialize(tiny_config(), seed=0)
    >>> model([[1, 2, 3]]).shape
    (1, 3, 96)
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        generation: Mapping[str, Any] | None = None,
        implementation: str | Mapping[str, str] | None = None,
        sharding: Sharding | None = None,
    ):
        self.config = config
        self.weights = nnx.data(jax.tree.map(nnx.Param, weights))
        self.generation = dict(generation or {})
        self.implementation, self.exchange = named_implementations(implementation)
        self.sharding = sharding

    @classmethod
    def initialize(
        cls,
        config: ModelConfig,
        seed: int = 0,
        dtype: Any = jnp.float32,
        quantize: str | None = None,
        group_size: int | None = None,
        mesh: Mesh | None = None,
        rules: Axes = RULES,
        **options: Any,
    ) -> "Model":
        """A model with random weights: normal with standard deviation `1/sqrt(fan-in)`, norms 1, biases 0.

        They are made on the default device, which never holds much more than them. `quantize`: "int8", from the
        beginning as `moe_jax.quantize` with this `group_size` would give them, or "mxfp4": experts in 4 bits, codes
        and powers of two random with the same standard deviation, all else in `dtype`. `mesh`, `rules`: each parameter
        goes where `moe_jax.shard` would put it, once it is made. `options`: those of `Model`.
        Raises `ValueError` for another `quantize`, a `group_size` that is no positive integer or not of int8, and
        MXFP4 of a model without experts, of a pyramid, or of widths that are not multiples of 32.

        >>> Model.initialize(tiny_config(), quantize="int8", group_size=16).arrays()["moe"]["up"].scales.shape
        (2, 4, 48, 2)
        """
        table, made = parameters(config.architecture), {}
        forms = stored_forms(table, quantize, group_size)
        _, exchange_name = named_implementations(options.get("implementation"))
        unit = group_size or (GROUP if quantize == "mxfp4" else 1)
        sharding = sharding_of(mesh, rules, exchange_name, unit)
        shares = {} if sharding is None else sharding.shares(config.architecture)
        for key, (name, p) in zip(jax.random.split(jax.random.key(seed), len(table)), table.items(), strict=True):
            made[name] = draw(key, name, p, dtype, forms.get(name), group_size)
            if sharding is not None:
                made[name] = jax.block_until_ready(placed(name, made[name], shares[name], p.shape, sharding))
        return cls(config, nested(made), sharding=sharding, **options)

    @property
    def architecture(self) -> Architecture:
        """What the configuration describes."""
        return self.config.architecture

    @property
    def named(self) -> dict[str, str]:
        """The implementations that the user named, by operation."""
        named = {"routed_mlp": self.implementation, "exchange": self.exchange}
        return {operation: name for operation, name in named.items() if name is not None}

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and hidden states; of quantised weights, the one that they stand for."""
        return self.weights["embedding"].dtype

    def arrays(self) -> Weights:
        """The weights as plain arrays, the form that the pure functions take."""
        return jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda p: isinstance(p, nnx.Variable))

    def __call__(
        self,
        input_ids: Int[AnyArray, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[AnyArray, "B T"] | Sequence[Sequence[int]] | None = None,
        return_record: bool = False,
        routing: "Record | Sequence[AnyArray] | None" = None,
        logits_to_keep: int | None = None,
    ) -> Float[Array, "B kept V"] | Record:
        """Logits of every position, or of the last `logits_to_keep`.

        Args: `input_ids` int `[B, T]`; `attention_mask` `[B, T]`, 1 for real tokens, padding on either side;
        `return_record`: return a `Record` of logits, hidden states and routing; `routing`: a record (or its
        `expert_ids`) whose choices are forced, weighed by this model's own scores; `logits_to_keep`: make logits of
        so many last columns only (all if None), padding among them: rows of unequal length are padded on the left for
        it. A long text with a large vocabulary has no memory for all.
        Returns float32 `[B, T, V]`, or `[B, kept, V]`; what stands at padded positions means nothing.
        Raises `ValueError` for ids outside the vocabulary, more tokens than the context, masks and routing that do
        not fit, and fewer than one column to keep.
        """
        ids, mask = check_inputs(self.config, input_ids, attention_mask)
        rows = len(ids)
        if logits_to_keep is not None and (not is_integer(logits_to_keep) or logits_to_keep < 1):
            raise ValueError(f"logits_to_keep: {logits_to_keep!r}, expected an integer of at least 1, or None for all")
        forced = forced_ids(self.architecture, routing, ids.shape)
        keep = None if logits_to_keep is None else int(logits_to_keep)
        if self.sharding is not None:
            ids, mask, forced = with_more_rows(self.sharding.rows, ids, mask, forced)
        static = self.architecture, self.implementation, return_record, keep
        out = _forward(*static, self.arrays(), ids, mask, forced, sharding=self.sharding)
        return _as_record(self.architecture, rows, *out) if return_record else out[0][:rows]


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def tiny_config() -> ModelConfig:
    """A two-layer Mixtral of a few thousand parameters, for examples and tests."""
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return ModelConfig.from_dict({"model_type": "mixtral", "max_position_embeddings": 128} | values)


def named_implementations(given: str | Mapping[str, str] | None) -> tuple[str | None, str | None]:
    """The expert MLP's and the exchange's names out of what the user gave; `ValueError` for one that there is not."""
    exchange_name = None
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {"routed_mlp", "exchange"})
        if unknown:
            raise ValueError(
                f"implementation: unknown operations {', '.join(unknown)}; there are: routed_mlp, exchange"
            )
        exchange_name, given = given.get("exchange"), given.get("routed_mlp")
    OPERATION.check(given)  # refuses an unknown name
    exchange.check(exchange_name)
    return given, exchange_name


def check_inputs(config: ModelConfig, input_ids: Any, attention_mask: Any, new_tokens: int = 0):
    """Ids and mask as checked NumPy arrays `[B, T]`, before anything is computed (JAX would clamp ids silently)."""
    architecture = config.architecture
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise ValueError("input_ids: rows differ in length; pad them and pass attention_mask") from None
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"input_ids: expected a non-empty [B, T] array, got shape {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids: expected integers, got {ids.dtype}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: shape {mask.shape}, expected that of input_ids, {ids.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask: values other than 0 and 1")
    mask = mask.astype(bool)
    if not mask.any(1).all():
        raise ValueError(f"attention_mask: row {int(np.argmin(mask.any(1)))} has no token")
    real = ids[mask]
    if real.min() < 0 or real.max() >= architecture.vocab_size:
        bad = real[(real < 0) | (real >= architecture.vocab_size)][0]
        raise ValueError(f"input_ids: {bad} is outside the vocabulary of {architecture.vocab_size}")
    longest = int(mask.sum(1).max())
    if longest + new_tokens > architecture.context:
        beside = f" and {new_tokens} new ones" if new_tokens else ""
        raise ValueError(f"input_ids: {longest} tokens{beside} exceed the model's context of {architecture.context}")
    return np.where(mask, ids, 0).astype(np.int32), mask


def forced_ids(architecture: Architecture, routing: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Forced choices as int32 `[Lm, B, T, A]`, or None."""
    if routing is None:
        return None
    routing = getattr(routing, "expert_ids", routing)
    router, count = architecture.block.router, len(architecture.moe_layers)
    if not count and not len(routing):
        return None  # the record of a dense model
    want = (*shape, router.top_k) if router else None
    if len(routing) != count or any(np.shape(layer) != want for layer in routing):
        got = [np.shape(layer) for layer in routing]
        raise ValueError(f"routing: expected {count} arrays (one per MoE layer) of shape {want}, got {got}")
    forced = np.stack([np.asarray(layer) for layer in routing])
    if not np.issubdtype(forced.dtype, np.integer):
        raise ValueError(f"routing: expected integers, got {forced.dtype}")
    for layer, experts in zip(forced, architecture.expert_counts, strict=True):
        if layer.max(initial=-1) >= experts:
            raise ValueError(f"routing: expert {layer.max()} of {experts}")
    return forced.astype(np.int32)


def with_more_rows(parts: int, ids: np.ndarray, mask: np.ndarray, forced: np.ndarray | None) -> tuple[Any, Any, Any]:
    """Ids and mask `[B, T]` and forced choices `[Lm, B, T, A]` with empty rows, so that B divides into `parts`."""
    more = [(0, -len(ids) % parts), (0, 0)]
    ids, mask = np.pad(ids, more), np.pad(mask, more)
    return ids, mask, None if forced is None else np.pad(forced, [(0, 0), *more, (0, 0)], constant_values=-1)


def id_dtype(num_experts: int) -> Any:
    """The smallest signed integer type for expert ids and -1."""
    return jnp.int8 if num_experts <= 128 else jnp.int16


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="sharding")
def _forward(architecture, implementation, trace, keep, weights, ids, mask, forced, *, sharding=None):
    if sharding is None:
        return _run(architecture, implementation, trace, keep, weights, ids, mask, forced)
    rows, layered = sharding.batch, PartitionSpec(None, *sharding.batch)
    local = sharding.local(architecture)

    def run(weights, ids, mask, forced):
        logits, normed, notes = _run(local, implementation, trace, keep, weights, ids, mask, forced)
        choices = None if notes is None or notes.choices is None else dict(vars(notes.choices))
        if choices is not None:  # those of one group that exchanges; the batch may lie along further axes
            axes = local.block.axes
            others = tuple(name for name in axes.batch if name not in axes.experts)
            choices["overflow"] = add_up(choices["overflow"], others)
        return logits, normed, None if notes is None else notes.hidden, choices

    choices = dict.fromkeys(("logits", "ids", "weights"), layered) | {"overflow": PartitionSpec()}
    given = leaf_specs(weights, sharding.specs(architecture)), rows, rows, layered
    lies = rows, rows, layered, choices if trace and architecture.moe_layers else None
    logits, normed, hidden, choices = sharding.map(run, given, lies)(weights, ids, mask, forced)
    return logits, normed, decoder.Trace(hidden, None if choices is None else Choice(**choices)) if trace else None


def _run(architecture, implementation, trace, keep, weights, ids, mask, forced):
    axes = architecture.block.axes.batch
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    longest = positions.max() + 1
    longest = jax.lax.pmax(longest, axes) if axes else longest
    span = decoder.make_span(architecture, positions, positions, mask, longest)
    request = RoutingRequest(mask, forced, implementation)
    x, _, notes = decoder.decode(architecture, weights, ids, span, None, request, trace)
    normed = decoder.final(architecture, weights, x)
    kept = normed if keep is None else normed[:, -keep:]
    return decoder.logits(architecture, weights, kept), normed, notes


def ascending(ids: Array, weights: Array, num_experts: int) -> tuple[Array, Array]:
    """Choices in ascending order of expert id, ids in their small type: records of two runs compare as they are."""
    order = jnp.argsort(ids, axis=-1)
    ids, weights = (jnp.take_along_axis(a, order, axis=-1) for a in (ids, weights))
    return ids.astype(id_dtype(num_experts)), weights


def _as_record(architecture: Architecture, rows: int, logits, normed, trace) -> Record:
    shape = normed.shape[:2]
    hidden = jnp.concatenate([trace.hidden, normed[None]])[:, :rows]
    logits = logits[:rows]
    if trace.choices is None:
        return Record(logits, hidden, (), (), (), jnp.zeros(0, jnp.int32))
    router = architecture.block.router
    ids, weights = ascending(trace.choices.ids, trace.choices.weights, router.num_experts)

    def per_layer(stack):
        return tuple(layer.reshape(*shape, -1)[:rows] for layer in stack)

    scores = zip(per_layer(trace.choices.logits), architecture.expert_counts, strict=True)
    logits_of = tuple(s[..., :count] for s, count in scores)
    return Record(logits, hidden, logits_of, per_layer(ids), per_layer(weights), trace.choices.overflow)
