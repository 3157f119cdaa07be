"""The two engines behind a `Tokenizer` (Hugging Face `tokenizers` and SentencePiece) and the chat templates.

`tokenizers`, `sentencepiece` and `jinja2` are needed only by those who use text; they are imported on use.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def need(name: str) -> Any:
    """Imports an optional package, or says how to get it in an `OSError`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OSError(f"{name} is needed for this tokenizer: pip install {name}") from error


def read_text(path: Path) -> str:
    """Reads a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file is an empty one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise OSError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise OSError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def token_text(value: Any) -> str | None:
    """Gives the text of a token that config files write either bare or as {"content": ...}."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


@runtime_checkable
class Backend(Protocol):
    size: int
    special: frozenset[int]

    def token_id(self, text: str) -> int | None: ...
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def save(self, folder: Path) -> None: ...


class Fast:
    """A `tokenizers.Tokenizer`; `config` adds the tokens that only tokenizer_config.json names."""

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        # Files may carry the cut and the padding of a training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = need("tokenizers").AddedToken
        for number, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            if (text := token_text(entry)) and tokenizer.token_to_id(text) is None:
                flags = {key: entry[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in entry}
                tokenizer.add_tokens([added(text, special=entry.get("special", False), **flags)])
                if tokenizer.token_to_id(text) != int(number):
                    raise OSError(f"tokenizer_config.json: added token {text!r} cannot have id {number}")
        marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        # bos, eos and the like are special even where tokenizer.json forgets to say so.
        for text in {token_text(config.get(name)) for name in SPECIAL} - marked - {None}:
            if tokenizer.token_to_id(text) is not None:
                tokenizer.add_special_tokens([added(text, special=True, normalized=False)])
        self.special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, text: str) -> int | None:
        return self.tokenizer.token_to_id(text)  # type: ignore[no-any-return]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))


class Pieces:
    """A SentencePiece model with the control tokens cut out of the text first, as Hugging Face's classes do."""

    def __init__(self, proto: bytes, config: Mapping[str, Any]) -> None:
        load = need("sentencepiece").SentencePieceProcessor
        self.proto = proto
        try:
            self.model = load(model_proto=proto)
            # Protobuf merges a repeated field: this appends normalizer_spec { add_dummy_prefix: false }.
            self.inner = load(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise OSError(f"tokenizer.model: not a SentencePiece model: {error}") from error
        pieces = self.pieces = self.model.get_piece_size()
        # The model knows its own special tokens; the config has the last word.
        own = {f"{name}_token": getattr(self.model, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
        self.config = {name: self.model.id_to_piece(i) for name, i in own.items() if i >= 0} | dict(config)
        self.texts = {i: self.model.id_to_piece(i) for i in range(pieces) if self._outside_text(i)}
        special, strips = set(self.texts), {}
        for number, entry in config.get("added_tokens_decoder", {}).items():
            if int(number) >= pieces or int(number) in self.texts or entry.get("special"):
                self.texts[int(number)] = entry["content"]
                strips[entry["content"]] = [r"\s*" * bool(entry.get(side)) for side in ("lstrip", "rstrip")]
                special |= {int(number)} if entry.get("special") else set()
        self.special, self.size = frozenset(special), max([pieces - 1, *self.texts]) + 1
        self.ids = {text: i for i, text in self.texts.items()}
        # The longest first, so that no token hides another one that it begins.
        texts = sorted(self.ids, key=len, reverse=True)
        patterns = [re.escape(text).join(strips.get(text, ["", ""])) for text in texts]
        self.pattern = re.compile("(" + "|".join(patterns) + ")")
        # Decoding drops the space that encoding put first: none, one, or (models that squeeze spaces) every one.
        self.dropped = 3 - len(self.model.decode(["\u2581", "\u2581", "a"]))
        self.later = self.model if config.get("legacy", True) else self.inner
        bos, eos = (self.token_id(token_text(self.config.get(name)) or "") for name in ("bos_token", "eos_token"))
        self.before = [bos] if config.get("add_bos_token", True) and bos is not None else []
        self.after = [eos] if config.get("add_eos_token", False) and eos is not None else []

    def _outside_text(self, i: int) -> bool:
        return bool(self.model.is_control(i) or self.model.is_unknown(i))

    def token_id(self, text: str) -> int | None:
        if text in self.ids:
            return self.ids[text]
        found = self.model.piece_to_id(text)
        return None if self.model.is_unknown(found) else int(found)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self.before) if add_special_tokens else []
        for place, part in enumerate(self.pattern.split(text)):
            if place % 2:
                ids.append(self.ids[part if part in self.ids else part.strip()])
            else:
                ids.extend((self.later if place else self.model).encode(part))
        return ids + (self.after if add_special_tokens else [])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        raw = bytearray()
        for i in ids:
            if i in self.texts:
                raw += b"" if skip_special_tokens and i in self.special else self.texts[i].encode()
            elif i < self.pieces:
                piece = self.model.id_to_piece(i)
                raw += bytes([int(piece[1:-1], 16)]) if self.model.is_byte(i) else piece.replace("\u2581", " ").encode()
        text = raw.decode("utf-8", "replace")
        return text.lstrip(" ") if self.dropped > 1 else text[self.dropped and text.startswith(" ") :]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.proto)


def compile_template(source: str) -> Any:
    """Compiles a chat template in the sandbox and with the helpers that transformers gives it."""
    jinja2, nodes, sandbox = need("jinja2"), need("jinja2.nodes"), need("jinja2.sandbox")
    ext: Any = need("jinja2.ext")
    extension: Any = ext.Extension

    class Generation(extension):  # type: ignore[misc]
        # {% generation %} marks the assistant's tokens for training masks; for rendering it is only its body.
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template, line {getattr(error, 'lineno', '?')}: {error}") from error
