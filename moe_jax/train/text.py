"""What a run reads: its corpus in token windows, and the held-out rest."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..checkpoint.gguf import GGUFFile
from ..demo import fetch_demo
from ..tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ..tokenizer_backends import Fast, need
from .bpe import train_tokenizer
from .data import Windows, held_out_batches, load_corpus, load_tokens, tokenize
from .ngram import trigram_bits_per_byte
from .settings import Data


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus in tokens: `windows` to train on, `held_out` tokens and how many bytes they stand for, the tokenizer;
    `bytes` of both, None for files of token ids."""

    tokenizer: Tokenizer
    windows: Windows
    held_out: np.ndarray
    held_out_size: int
    bytes: tuple[bytes, bytes] | None
    data: Data

    def held_out_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows `[B, T + 1]` over the held-out tokens, and which predictions `[B, T]` count: each token once."""
        return held_out_batches(self.held_out, self.data.batch_size, self.data.length)

    def trigram(self) -> float | None:
        """Bits per byte that a byte trigram of the training text has on the held-out text."""
        return None if self.bytes is None else trigram_bits_per_byte(*self.bytes)


def load_text(data: Data, seed: int) -> Text:
    """The corpus that `data` names, its windows in the order of `seed`. Errors as of `load_corpus`, `load_tokens`."""
    both = None
    if data.corpora[0].endswith((".npy", ".bin")):
        if len(data.corpora) > 1:
            raise ValueError(f"corpus: a file of token ids stands alone, got {', '.join(data.corpora)}")
        tokenizer = tokenizer_of(data.tokenizer)
        train, held_out = load_tokens(data.corpora[0], data.held_out)
        pieces = (held_out[i : i + _PIECE] for i in range(0, len(held_out), _PIECE))
        size = sum(len(tokenizer.decode(piece).encode()) for piece in pieces)
    else:
        corpora = [load_corpus(source, data.held_out) for source in data.corpora]
        documents = [[text for c in corpora for text in getattr(c, part)] for part in ("train", "held_out")]
        tokenizer = tokenizer_of(data.tokenizer, documents[0])
        cutter = "bytes" if data.tokenizer == "bytes" else tokenizer
        train, held_out = (tokenize(some, cutter) for some in documents)
        first, second = ("\n".join(some).encode() for some in documents)
        both, size = (first, second), len(second)
    if len(held_out) < 2 or not size:
        raise ValueError(f"held_out: {data.held_out} of this text are {len(held_out)} tokens, too few to predict any")
    return Text(tokenizer, Windows(train, data.batch_size, data.length, seed), held_out, size, both, data)


#: Tokens whose bytes are counted at once.
_PIECE = 1 << 20


def tokenizer_of(source: str, documents: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `Data.tokenizer` names; `documents` are those to learn one from.

    >>> tokenizer_of("bpe:258", ["so so so"]).vocab_size
    258
    """
    if source == "bytes":
        return byte_tokenizer()
    if source.startswith("bpe:"):
        if not source[4:].isdecimal():
            raise ValueError(f"tokenizer: {source!r}, expected a number of tokens, such as bpe:2048")
        return train_tokenizer(documents, int(source[4:]))
    path = str(fetch_demo()) if source == "demo" else source
    return tokenizer_from_gguf(GGUFFile(path)) if path.endswith(".gguf") else load_tokenizer(path)


def byte_tokenizer() -> Tokenizer:
    """Every byte of UTF-8 is a token, whose id is its value.

    >>> byte_tokenizer().encode("aé")
    [97, 195, 169]
    """
    tokenizers = need("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=ord)
    # the printable bytes stand for themselves, the others, in order, for what comes from 256 on
    plain = [ord(c) for c in alphabet if ord(c) < 256]
    others = iter(c for c in alphabet if ord(c) >= 256)
    names = [chr(byte) if byte in plain else next(others) for byte in range(256)]
    built = tokenizers.Tokenizer(tokenizers.models.BPE({name: byte for byte, name in enumerate(names)}, []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return Tokenizer(Fast(built, config), config, {})
