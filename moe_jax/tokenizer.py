"""Text to token ids and back: loading tokenizers, chat templates, streaming."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_jax.tokenizer_backends import (
    SPECIAL,
    Backend,
    Fast,
    Pieces,
    compile_template,
    need,
    read_json,
    read_text,
    token_text,
)

# GGUF pre-tokenizers whose split is known here. Both then split as GPT-2 does.
_DIGITS_APART = {"gpt-2": False, "smollm": True}
_REPLACED = "\ufffd"


class DecodeStream:
    """Turns token ids into text as they come; the pieces joined are `Tokenizer.decode` of all of the ids.

    Tokens may end within a character and may need their neighbour to know their space, so that text is held back
    until it can no longer change. Malformed bytes become U+FFFD. Made by `Tokenizer.decode_stream`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._start()

    def _start(self, context: list[int] | None = None) -> None:
        """Keeps only the ids whose text is out but which the next token needs to know its space."""
        self._context: list[int] = context or []
        self._pending: list[int] = []
        self._before = self._tokenizer.decode(self._context, self._skip)
        self._given = self._before

    def _now(self) -> str:
        text = self._tokenizer.decode(self._context + self._pending, self._skip)
        # Byte tokens decode in runs, so an unfinished character spoils a finished one before it: then, as a byte has
        # no space to learn, the new ids can stand alone.
        if text.startswith(self._given):
            return text
        return self._before + self._tokenizer.decode(self._pending, self._skip)

    def push(self, token: int) -> str:
        """Takes the next id and gives the text, often empty, that is now certain; ValueError for a negative id."""
        token = operator.index(token)
        if token in self._tokenizer.special_ids and self._skip:
            return ""
        self._pending.append(token)
        text = self._now()
        # A character has at most 4 bytes, so at most 3 marks at the end can still turn into one.
        held = next((n for n in range(3) if not text[: len(text) - n].endswith(_REPLACED)), 3)
        new = text[len(self._given) : len(text) - held]
        self._given += new
        # Spaces alone are no context: the decoder would take them for the leading ones that it drops.
        if new.strip(" ") and not held:
            self._start(self._pending)
        return new

    def flush(self) -> str:
        """Gives what was held back, with U+FFFD for an unfinished character, and starts a new text."""
        text = self._now()[len(self._given) :]
        self._start()
        return text


class Tokenizer:
    """A tokenizer with its chat template and special ids; made by `load_tokenizer` or `tokenizer_from_gguf`.

    `eos_token_ids` holds every id that ends a text (the tokenizer's own first, then those of generation_config.json),
    `bos_token_id` and `pad_token_id` may be None, `vocab_size` is the highest id plus one, `special_ids` are those
    that `decode` skips. `chat_template` is the template's source or None.
    """

    def __init__(self, backend: Backend, config: dict[str, Any], generation: Mapping[str, Any]) -> None:
        self._backend, self._config = backend, config
        self._compiled: Any = None
        self.special_ids, self.vocab_size = backend.special, backend.size
        ids: dict[str, int | None] = {}
        for name in SPECIAL:
            text = token_text(config.get(name))
            ids[name] = None if text is None else backend.token_id(text)
            # Without these two a text would not start or end as in training; the others are only conveniences.
            if text is not None and ids[name] is None and name in ("bos_token", "eos_token"):
                raise OSError(f"tokenizer_config.json: {name} {text!r} is not in the vocabulary")
            # A config that says null means it: only its silence is filled.
            if name not in config and isinstance(generation.get(f"{name}_id"), int):
                ids[name] = generation[f"{name}_id"]
        self.bos_token_id, self.pad_token_id = ids["bos_token"], ids["pad_token"]
        ends = generation.get("eos_token_id")
        ends = [ids["eos_token"], *(ends if isinstance(ends, list) else [ends])]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        self.chat_template: str | None = source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Gives the ids of a text, with the model's bos (and eos) where it uses them, unless told not to.

        Special tokens written in the text, such as "</s>", become those tokens, as in transformers: a stranger's
        text can end a turn or open another one. Raises ValueError for what is not text or holds lone surrogates.

        >>> example_tokenizer().encode("abba")
        [2, 1, 0]
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be str, is {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Gives the text of token ids (Python, NumPy or JAX integers), without special tokens unless told otherwise.

        Ids past the vocabulary (rows that pad an embedding) have no text; negative ones raise ValueError.

        >>> example_tokenizer().decode([2, 1, 0])
        'abba'
        """
        numbers = [operator.index(i) for i in ids]
        if numbers and min(numbers) < 0:
            raise ValueError(f"token ids must not be negative, got {min(numbers)}")
        return self._backend.decode([i for i in numbers if i < self.vocab_size], skip_special_tokens)

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Starts a decoder that takes one id at a time and gives text as soon as it is certain.

        >>> stream = example_tokenizer().decode_stream()
        >>> stream.push(2) + stream.push(1) + stream.flush()
        'abb'
        """
        return DecodeStream(self, skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Gives the text that the chat template makes of messages, each with a "role" and usually a "content".

        `variables` (such as `tools`) go to the template. Raises ValueError without a template, for messages that
        are not such mappings, and for whatever the template refuses. Source: transformers' apply_chat_template.

        >>> example_tokenizer().render_chat([{"role": "user", "content": "ab"}])
        'aba'
        """
        if not self.chat_template:
            raise ValueError("this tokenizer has no chat template: write the prompt yourself and use encode")
        if isinstance(messages, (str, Mapping)) or any(
            not isinstance(message, Mapping) or not isinstance(message.get("role"), str) for message in messages
        ):
            raise ValueError(f"messages must be a list of mappings with a 'role' of type str, got {messages!r}")
        self._compiled = self._compiled or compile_template(self.chat_template)
        special = {name: text for name in SPECIAL if (text := token_text(self._config.get(name)))}
        # Many templates print "None" for a field that is None, and rightly leave out an absent one.
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"tools": None, "documents": None, **special, **variables}
        try:
            return str(self._compiled.render(messages=turns, add_generation_prompt=add_generation_prompt, **values))
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Gives the ids of a conversation, ending (unless told otherwise) where the assistant is to speak.

        As in `encode`, special tokens written in a message become those tokens. Raises as `render_chat`.

        >>> example_tokenizer().chat([{"role": "user", "content": "ab"}])
        [2, 0]
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json (or tokenizer.model) and tokenizer_config.json, which transformers reads, too.

        The chat template goes into tokenizer_config.json. Stop ids beyond the tokenizer's own eos belong to
        generation_config.json, which is not written here. Raises OSError where the folder cannot be written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     example_tokenizer().save(folder)
        ...     load_tokenizer(folder).encode("ab")
        [2]
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        self._backend.save(folder)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a model folder: tokenizer.json, or else SentencePiece's tokenizer.model.

    Reads tokenizer_config.json, special_tokens_map.json, chat_template.jinja and generation_config.json where
    present. Raises OSError where the folder has no tokenizer, a file is broken or a package is missing.
    A tokenizer.model puts its leading space before the text after each special token ("legacy" behaviour, what
    Llama and Mixtral were trained with) unless tokenizer_config.json has "legacy": false.

    >>> load_tokenizer("/nowhere")
    Traceback (most recent call last):
    OSError: /nowhere: no tokenizer.json and no tokenizer.model
    """
    folder = Path(path)
    config = read_json(folder / "tokenizer_config.json")
    # The older file fills what the newer one leaves out.
    config = {**{k: v for k, v in read_json(folder / "special_tokens_map.json").items() if k in SPECIAL}, **config}
    if (template := folder / "chat_template.jinja").exists():
        config["chat_template"] = read_text(template)
    backend: Backend
    if (file := folder / "tokenizer.json").exists():
        try:
            tokenizer = need("tokenizers").Tokenizer.from_file(str(file))
        except ImportError:
            raise
        except Exception as error:  # the package raises nothing narrower
            raise OSError(f"{file}: not a tokenizer: {error}") from error
        backend = Fast(tokenizer, config)
    elif (file := folder / "tokenizer.model").exists():
        backend = pieces = Pieces(file.read_bytes(), config)
        config = pieces.config
    else:
        raise OSError(f"{folder}: no tokenizer.json and no tokenizer.model")
    return Tokenizer(backend, config, read_json(folder / "generation_config.json"))


def example_tokenizer() -> Tokenizer:
    """Three tokens ("a", "b", "ab") and a chat template that ends with an "a": what the examples above use."""
    meta = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    values = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    values["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}a"
    return tokenizer_from_gguf(SimpleNamespace(metadata=values))


def tokenizer_from_gguf(gguf: Any) -> Tokenizer:
    """Builds the byte-level BPE tokenizer that the metadata of a GGUF file (`GGUFFile`) describes.

    Raises ValueError for other kinds and for pre-tokenizers other than gpt-2 and smollm (naming them), and where the
    metadata is incomplete. Bytes that the vocabulary lacks (SmolLM2: some control characters) are dropped, as in
    transformers. Source: llama.cpp's llama-vocab.cpp; smollm splits off each digit, then as GPT-2 does.

    >>> meta = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    >>> gguf = SimpleNamespace(metadata={f"tokenizer.ggml.{key}": value for key, value in meta.items()})
    >>> tokenizer_from_gguf(gguf).encode("abba")
    [2, 1, 0]
    """
    meta, key = gguf.metadata, "tokenizer.ggml."
    for name, names in (("model", ("gpt2",)), ("pre", tuple(_DIGITS_APART))):
        if meta.get(key + name) not in names:
            raise ValueError(f"GGUF metadata {key + name!r} is {meta.get(key + name)!r}; known are {', '.join(names)}")
    tokens, merges, kinds = (meta.get(key + name) for name in ("tokens", "merges", "token_type"))
    if not tokens or merges is None or len(set(tokens)) != len(tokens) or len(kinds or tokens) != len(tokens):
        raise ValueError(f"GGUF metadata {key}tokens, merges and token_type are missing, doubled or of unequal length")
    tokenizers = need("tokenizers")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = tokenizers.models.BPE({text: i for i, text in enumerate(tokens)}, pairs)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"GGUF metadata {key}merges do not fit the tokens: {error}") from error
    built, pre = tokenizers.Tokenizer(model), tokenizers.pre_tokenizers
    split = pre.ByteLevel(add_prefix_space=bool(meta.get(key + "add_space_prefix")))
    apart = _DIGITS_APART[meta[key + "pre"]]
    built.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), split]) if apart else split
    built.decoder = tokenizers.decoders.ByteLevel()
    # Kinds: 3 is a control token, 4 one that its users defined: both are cut out of the text before it is split.
    marked = [(text, kind == 3) for text, kind in zip(tokens, kinds or [], strict=False) if kind in (3, 4)]
    built.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text, special in marked])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, theirs in zip(SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True):
        if (i := meta.get(f"{key}{theirs}_token_id")) is not None and 0 <= i < len(tokens):
            config[name] = tokens[i]
    around = [config.get(f"{end}_token") if meta.get(f"{key}add_{end}_token") else None for end in ("bos", "eos")]
    if any(around):
        single = [f"{around[0]}"] * bool(around[0]) + ["$A"] + [f"{around[1]}"] * bool(around[1])
        known = [(text, tokens.index(text)) for text in around if text]
        built.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=known)
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    ends = [meta.get(f"{key}{name}_token_id") for name in ("eot", "eom")]
    return Tokenizer(Fast(built, config), config, {"eos_token_id": [i for i in ends if i is not None]})
