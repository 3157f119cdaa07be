"""`MoEInference`: DeepSpeed's fused MoE transformer layer, through the block that every model here runs."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.expert_mlp.api import OPERATION

from ..block import RoutingRequest, block, sublayer_input
from ..random_weights import draw
from ..weights import nested
from .attention import (
    Past,
    attention_probabilities,
    check_past,
    empty_past,
    mask_bias,
    place_of,
    present,
    room,
    span_of,
)
from .config import MoEInferenceConfig
from .int8 import quantize_layer
from .translate import DataFlow, block_config, layer_config, layer_parameters, layer_weights


class MoEInference(nnx.Module):
    """One layer: norm, attention, norm, gate, experts (and, with `mlp_type` "residual", an MLP beside them).

    Args:
      config: sizes and options; `eval_capacity_factor` and `drop_tokens` decide which tokens an expert drops; with
        `q_int8` kernels are kept as int8, see `quantize_layer`.
      weights: upstream's state dict, kernels `[in, out]` (see `layer_from_state_dict`); None: random ones.
      data_flow: `standard`: the layer's input is added to attention's output; `literal`: it is not, which is what
        upstream's code says.
      layer_index: the layer's place in its model, for `scale_attn_by_inverse_layer_idx`.
      implementation: the experts' implementation by name, see `pallas_kernels.routed_mlp`.
      rngs: where random weights come from.

    Raises `ValueError` for weights that do not fit the config.

    >>> from moe_jax import MoEInferenceConfig
    >>> config = MoEInferenceConfig(hidden_size=8, heads=2, moe_experts=4, k=2, return_tuple=False)
    >>> layer = MoEInference(config, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(
        self,
        config: MoEInferenceConfig,
        weights: Mapping[str, Any] | None = None,
        *,
        data_flow: DataFlow = "standard",
        layer_index: int = 0,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        OPERATION.check(implementation)  # refuses an unknown name
        self.config, self.implementation = config, implementation
        self.block, self.layer = block_config(config, data_flow), layer_config(config, layer_index)
        dtype = jnp.dtype(config.working_dtype)
        if (weights is None) == (rngs is None):
            raise ValueError("weights, rngs: give one of the two")
        if weights is None:
            table = layer_parameters(self.block, self.layer)
            given = {name: draw(rngs.params(), name, p, dtype) for name, p in table.items()}
        else:
            given = {n: jnp.asarray(w, dtype) for n, w in layer_weights(config, self.block, weights).items()}
        if config.q_int8:
            given = quantize_layer(config, given)
        self.weights = nnx.data(jax.tree.map(nnx.Param, nested(given)))

    def __call__(
        self,
        input: Float[AnyArray, "B T D"],
        input_mask: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        layer_past: Past | None = None,
        get_key_value: bool = False,
        get_present: bool = False,
        encoder_output: Any = None,
        enc_dec_attn_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> Any:
        """Run the layer on `input [B, T, D]`; upstream's arguments by name.

        `input_mask` (or `attention_mask`, which wins): bool or integer, 1 for real tokens, or float, added to the
        scores; it acts on attention only: masked tokens take experts, as upstream. `layer_past`: earlier keys and
        values `[B, K, P, H]`; `get_present`, `get_key_value` or `use_cache`: return those of all tokens.
        Returns the output in the input's dtype; behind it, as a tuple, what was asked for: `(keys, values)`,
        attention probabilities `[B, N, T, S]`. With the config's `return_tuple` always a tuple.
        Raises `ValueError` for shapes that do not fit, and for a `head_mask` or anything of an encoder.
        """
        self._refuse(
            head_mask=head_mask,
            encoder_output=encoder_output,
            enc_dec_attn_mask=enc_dec_attn_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        x = jnp.asarray(input)
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input: {x.dtype} {x.shape}, expected floats [B, T, {self.config.hidden_size}]")
        batch, new, _ = x.shape
        keep = get_present or get_key_value or use_cache
        length = check_past(self.config, batch, layer_past, new)
        mask = input_mask if attention_mask is None else attention_mask
        bias = mask_bias(mask, (batch, self.config.heads, new, length + new), self.config.invert_mask)
        h, entries = x.astype(jnp.dtype(self.config.working_dtype)), None
        if layer_past is not None or keep:
            entries = room(layer_past or empty_past(self.config, batch), length, new, h.dtype)
        static = self.block, self.layer, self.implementation, output_attentions
        y, entries, chances = _run(*static, self._arrays(), h, entries, jnp.int32(length), bias)
        out: tuple[Any, ...] = (y.astype(x.dtype),)
        if keep:
            out += (present(entries, length + new),)
        if output_attentions:
            out += (chances[..., : length + new],)
        return out if len(out) > 1 or self.config.return_tuple else out[0]

    def _arrays(self):
        return jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda p: isinstance(p, nnx.Variable))

    @staticmethod
    def _refuse(**given: Any) -> None:
        used = [name for name, value in given.items() if value is not None]
        if used:
            raise ValueError(f"{', '.join(used)}: not supported; the layer has self attention only, without head masks")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(config, layer, implementation, with_probabilities, weights, x, entries, length, bias):
    keys = x.shape[1] if entries is None else entries["k"].shape[3]
    span, place = span_of(config, x.shape[:2], keys, length, bias), place_of(layer)
    request = RoutingRequest(jnp.ones(x.shape[:2], bool), None, implementation)
    y, entries, _ = block(config, weights, x, place, span, entries, length, request)
    chances = None
    if with_probabilities:
        h = sublayer_input(config, weights, x, place, "attention")
        chances = attention_probabilities(config, weights, h, place, span, entries)
    return y, entries, chances
