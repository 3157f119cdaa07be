"""Reading a hub `config.json`: every key is used, known to be irrelevant, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels import Activation

from ..block_config import RopeConfig
from ..rope import rope_config

#: Keys that never change the result of inference, whatever the family.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map
    aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads quantization_config
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    router_z_loss_coef sep_token_id seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed use_bfloat16 use_cache
    """.split()
)

_ACTIVATIONS = {
    "silu": ("swiglu", "silu"),
    "swish": ("swiglu", "silu"),
    "gelu": ("geglu", "gelu"),
    "gelu_new": ("geglu_tanh", "gelu_tanh"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "relu": ("reglu", "relu"),
}
_REQUIRED = object()


class Hub:
    """A hub dictionary that remembers which keys were read.

    >>> hub = Hub({"hidden_size": 64, "mystery": 1}, "mixtral")
    >>> hub.integer("hidden_size")
    64
    >>> hub.finish()
    Traceback (most recent call last):
    ValueError: mixtral: config key 'mystery' is not known (value 1): it may change the result
    """

    def __init__(self, values: Mapping[str, Any], family: str):
        self.values, self.family = dict(values), family
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key` as it stands; null counts as unset. Without default the key is required."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.family}: config key {key!r} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number."""
        return self._typed(key, default, (int,), "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number."""
        return self._typed(key, default, (int, float), "a number")

    def window(self, default: int | None = None) -> int | None:
        """`sliding_window`: null is none, an absent key the family's default."""
        return self.integer("sliding_window", None if "sliding_window" in self.values else default)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._typed(key, default, (bool,), "true or false")

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number above zero."""
        value = self.integer(key, default)
        if value is not default and value < 1:
            raise ValueError(f"{self.family}: config key {key!r} is {value!r}, expected a positive integer")
        return value

    def items(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list."""
        return self._typed(key, default, (list, tuple), "a list")

    def mapping(self, key: str, default: Any = _REQUIRED) -> Any:
        """A dictionary."""
        return self._typed(key, default, (Mapping,), "a dictionary")

    def _typed(self, key, default, types, wanted):
        value = self.get(key, default)
        if value is default:
            return value
        wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{self.family}: config key {key!r} is {value!r}, expected {wanted}")
        return value

    def first(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of several spellings of one key; two that differ are an error."""
        found = {key: self.get(key, None) for key in keys}
        found = {key: value for key, value in found.items() if value is not None}
        if len({repr(value) for value in found.values()}) > 1:
            raise ValueError(f"{self.family}: config keys contradict each other: {found}")
        if found:
            return next(iter(found.values()))
        return self.get(keys[0], default)

    def ignore(self, *keys: str) -> None:
        """Keys that this family is known to carry without effect on the result."""
        self._read.update(keys)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse a value of `key` that is not the default `allowed[0]` nor another of `allowed`."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{self.family}: config key {key!r} is {value!r}; supported: {allowed}")

    def finish(self) -> None:
        """Raise for keys that nobody read."""
        for key in self.values:
            if key not in self._read and key not in IRRELEVANT and self.values[key] is not None:
                value = f"(value {self.values[key]!r})"
                raise ValueError(f"{self.family}: config key {key!r} is not known {value}: it may change the result")

    # What nearly every family has

    def activation(self, key: str = "hidden_act", gated: bool = True) -> Activation:
        """The activation of the (gated) MLPs."""
        name = self.get(key, "silu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise ValueError(f"{self.family}: {key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return Activation(_ACTIVATIONS[name][0 if gated else 1])

    def rope_settings(self, theta: float = 10000.0) -> dict[str, Any]:
        """`rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`, as one dictionary."""
        for key in ("rope_parameters", "rope_scaling"):
            self.mapping(key, None)
        scaling = self.first("rope_parameters", "rope_scaling", default={})
        settings = {key: value for key, value in scaling.items() if value is not None}
        kind = settings.pop("type", None)
        settings.setdefault("rope_type", kind or "default")
        settings.setdefault("rope_theta", self.number("rope_theta", theta))
        factor = self.number("partial_rotary_factor", None)
        if factor is not None:
            settings.setdefault("partial_rotary_factor", factor)
        original = self.integer("original_max_position_embeddings", None)
        if original is not None and settings["rope_type"] in ("longrope", "yarn", "llama3"):
            settings["original_max_position_embeddings"] = original
        return settings

    def rope(self, head_dim: int, theta: float, partial: float = 1.0, interleaved: bool = False) -> RopeConfig:
        """Rotary positions of heads of `head_dim`, `partial` of which is rotated unless the config says otherwise."""
        settings = self.rope_settings(theta)
        share = settings.get("partial_rotary_factor", partial)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"{self.family}: partial_rotary_factor {share!r} is not in (0, 1]")
        context = self.positive("max_position_embeddings")
        return rope_config(settings, int(head_dim * share), context, interleaved)

    def head_dim(self) -> int:
        """`head_dim`, or the width divided by the number of heads."""
        width, heads = self.positive("hidden_size"), self.positive("num_attention_heads")
        size = self.positive("head_dim", None) or width // heads
        if size < 1:
            raise ValueError(f"{self.family}: hidden_size {width} does not reach for num_attention_heads {heads}")
        return size
