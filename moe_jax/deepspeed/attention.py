"""Self attention with upstream's calling conventions: masks, earlier keys and values, probabilities on request."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.dims import Array as AnyArray

from ..attention import MASKED, Span, grouped_scores, probabilities, project
from ..block import Place, self_attention, take
from ..block_config import BlockConfig, LayerConfig
from ..decoder import make_turn, varying
from ..generation import bucket
from ..model import draw
from ..weights import Weights, nested
from .config import MoEInferenceConfig
from .int8 import quantize_layer
from .translate import attention_weights, block_config, layer_config, layer_parameters

#: What upstream adds to the score of a key that an integer mask excludes.
_EXCLUDED = -10000.0
Past = tuple[AnyArray, AnyArray]


def mask_bias(mask: Any, shape: tuple[int, int, int, int], invert: bool = True) -> jax.Array | None:
    """A mask as an addend to scores of `shape` `[B, N, T, S]`: `[B, 1 or N, 1 or T, S]`; None for None.

    `mask [B, S]`, `[B, 1, 1, S]` or anything that broadcasts to `[B, N, T, S]`: integers or bools are 1 for real
    tokens (0 with `invert` false, Bloom's convention), floats are added as they are, down to a bound that still lies
    above keys that are not visible at all. A mask of the new tokens only says nothing of earlier ones, which are then
    visible. Raises `ValueError` for other shapes and values.
    """
    if mask is None:
        return None
    mask, (batch, heads, queries, keys) = jnp.asarray(mask), shape
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    allowed = (1, batch), (1, heads), (1, queries), (queries, keys)
    if mask.ndim != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
        raise ValueError(
            f"input_mask: shape {mask.shape} does not fit {batch} rows, {heads} heads, {queries} queries, {keys} keys"
        )
    if jnp.issubdtype(mask.dtype, jnp.floating):
        bias = jnp.maximum(mask.astype(jnp.float32), MASKED / 10)
    else:
        if not isinstance(mask, jax.core.Tracer) and not np.isin(np.asarray(mask), (0, 1)).all():
            raise ValueError("input_mask: integers other than 0 and 1")
        bias = jnp.where((mask != 0) == invert, 0.0, _EXCLUDED)
    earlier = keys - bias.shape[3]
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (earlier, 0)))
    return jnp.broadcast_to(bias, (batch, *bias.shape[1:]))


def check_past(config: MoEInferenceConfig, batch: int, past: Past | None, new: int) -> int:
    """How many earlier tokens `layer_past` holds.

    `ValueError` unless it is two arrays `[B, K, P, H]`, and for more tokens in all than `max_out_tokens`.
    """
    length = 0 if past is None else _length(config, batch, past)
    if length + new > config.max_out_tokens:
        raise ValueError(f"input: {length} earlier and {new} new tokens exceed max_out_tokens {config.max_out_tokens}")
    return length


def _length(config, batch, past):
    shapes = [np.shape(a) for a in past]
    length = shapes[0][2] if len(shapes) == 2 and len(shapes[0]) == 4 else -1
    if shapes != [(batch, config.kv_heads, length, config.head_dim)] * 2:
        want = f"({batch}, {config.kv_heads}, P, {config.head_dim})"
        raise ValueError(f"layer_past: shapes {shapes}, expected keys and values of shape {want}")
    return length


def room(past: Past | None, length: int, new: int, dtype: Any) -> dict[str, jax.Array]:
    """Cache stacks `[1, B, K, S, H]` with the earlier entries and room for new ones, of few different lengths."""
    pad = lambda a: jnp.pad(jnp.asarray(a, dtype), ((0, 0), (0, 0), (0, bucket(length + new) - length), (0, 0)))[None]
    return {name: pad(a) for name, a in zip("kv", past, strict=True)}


def span_of(block: BlockConfig, shape: tuple[int, int], keys: int, length: Any, bias: Any) -> Span:
    """The span of `T` new tokens behind `length` earlier ones, over `keys` columns; `bias` over the valid ones."""
    batch, new = shape
    positions = jnp.broadcast_to(length + jnp.arange(new, dtype=jnp.int32), shape)
    columns = jnp.arange(keys, dtype=jnp.int32)
    valid = jnp.broadcast_to(columns < length + new, (batch, keys))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, keys - bias.shape[3])))
    turn = make_turn(block.attention, positions, length + new)
    return Span(positions, jnp.broadcast_to(columns, (batch, keys)), valid, turn, bias)


def attention_probabilities(block: BlockConfig, weights: Weights, h: Array, place: Place, span: Span, entries: Any):
    """What each query gives each key, `[B, N, T, S]` in float32; computed again, since it is rarely asked for."""
    own = take(weights["attention"], place.layer)
    q, new = project(block.attention, own, h, span, place.varying)
    k = new["k"] if entries is None else entries["k"][0]
    return probabilities(block.attention, own, grouped_scores(q, k), span, place.varying)


def place_of(layer: LayerConfig) -> Place:
    """A layer by itself: the first of its stacks."""
    return Place(0, 0, True, varying((layer,), 0))


class SelfAttention(nnx.Module):
    """Upstream's `DeepSpeedSelfAttention` (and, with `bigscience_bloom`, `BloomSelfAttention`), without the norm.

    Args: `config`; `layer_index`: for `scale_attn_by_inverse_layer_idx`; `weights`: upstream's `attn_qkvw [D, (N +
    2K) H]`, `attn_qkvb`, `attn_ow [N H, D]`, `attn_ob`, or None for random ones from `rngs`. With the config's
    `q_int8` kernels are kept as int8. Raises `ValueError` for weights that do not fit the config.

    >>> from moe_jax import MoEInferenceConfig
    >>> attention = SelfAttention(MoEInferenceConfig(hidden_size=8, heads=2), rngs=nnx.Rngs(0))
    >>> y, (keys, values) = attention(jnp.ones((1, 3, 8)), get_present=True)
    >>> y.shape, keys.shape
    ((1, 3, 8), (1, 2, 3, 4))
    """

    def __init__(
        self,
        config: MoEInferenceConfig,
        layer_index: int = 0,
        weights: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        self.config, self.block, self.layer = config, block_config(config), layer_config(config, layer_index)
        dtype = jnp.dtype(config.working_dtype)
        if (weights is None) == (rngs is None):
            raise ValueError("weights, rngs: give one of the two")
        if weights is None:
            table = layer_parameters(self.block, self.layer)
            wanted = {name: p for name, p in table.items() if name.startswith("attention.")}
            given = {name: draw(rngs.params(), name, p, dtype) for name, p in wanted.items()}
        else:
            given = {n: jnp.asarray(w[None], dtype) for n, w in attention_weights(config, weights).items()}
        if config.q_int8:
            given = quantize_layer(config, given)
        self.weights = nnx.data(jax.tree.map(nnx.Param, nested(given)))

    def __call__(
        self,
        x: Float[AnyArray, "B T D"],
        input_mask: Any = None,
        layer_past: Past | None = None,
        get_present: bool = False,
        output_attentions: bool = False,
    ) -> Any:
        """Attention of `x [B, T, D]`, output bias included.

        `input_mask`: see `mask_bias`; `layer_past`: earlier keys and values `[B, K, P, H]`. Returns the output, and
        as a tuple behind it what was asked for: `(keys, values)` of all tokens, probabilities `[B, N, T, S]`.
        Raises `ValueError` for shapes that do not fit.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x: {x.dtype} {x.shape}, expected floats [B, T, {self.config.hidden_size}]")
        batch, new, _ = x.shape
        length = check_past(self.config, batch, layer_past, new)
        bias = mask_bias(input_mask, (batch, self.config.heads, new, length + new), self.config.invert_mask)
        weights = jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda p: isinstance(p, nnx.Variable))
        h = x.astype(jnp.dtype(self.config.working_dtype))
        entries = None
        if layer_past is not None or get_present:
            past = layer_past or empty_past(self.config, batch)
            entries = room(past, length, new, h.dtype)
        static = self.block, self.layer, output_attentions
        y, entries, chances = _attend(*static, weights, h, entries, jnp.int32(length), bias)
        out: tuple[Any, ...] = (y.astype(x.dtype),)
        if get_present:
            out += (present(entries, length + new),)
        if output_attentions:
            out += (chances[..., : length + new],)
        return out if len(out) > 1 else out[0]


def empty_past(config: MoEInferenceConfig, batch: int) -> Past:
    """Keys and values of no token."""
    none = jnp.zeros((batch, config.kv_heads, 0, config.head_dim))
    return none, none


def present(entries: Mapping[str, Array], length: int) -> tuple[Array, Array]:
    """Keys and values of all tokens so far, `[B, K, length, H]`."""
    return entries["k"][0, :, :, :length], entries["v"][0, :, :, :length]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(block, layer, with_probabilities, weights, h, entries, length, bias):
    keys = h.shape[1] if entries is None else entries["k"].shape[3]
    span, place = span_of(block, h.shape[:2], keys, length, bias), place_of(layer)
    y, entries = self_attention(block, weights, h, place, span, entries, length)
    chances = None
    if with_probabilities:
        chances = attention_probabilities(block, weights, h, place, span, entries)
    return y, entries, chances
