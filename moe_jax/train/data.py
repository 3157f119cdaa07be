"""Token ids to train on: corpora as documents, documents as ids, ids as batches of windows."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..tokenizer import Tokenizer
from .corpora import Corpus, load_corpus

__all__ = ["Corpus", "Windows", "held_out_batches", "load_corpus", "load_tokens", "tokenize"]


def tokenize(documents: Sequence[str], tokenizer: Tokenizer | str) -> np.ndarray:
    """The ids of documents, one after the other, int32 `[N]`.

    `"bytes"`: the bytes of UTF-8, documents joined by a line end. A `Tokenizer`: each document's ids and then its first
    eos, which separates them; without an eos, documents are joined by a line end too. Raises `ValueError` for another
    string.

    >>> tokenize(["ab", "é"], "bytes").tolist()
    [97, 98, 10, 195, 169]
    """
    if isinstance(tokenizer, str):
        if tokenizer != "bytes":
            raise ValueError(f"tokenizer: {tokenizer!r} is neither 'bytes' nor a Tokenizer")
        return np.frombuffer("\n".join(documents).encode(), np.uint8).astype(np.int32)
    if not (ends := tokenizer.eos_token_ids):
        return np.array(tokenizer.encode("\n".join(documents), add_special_tokens=False), np.int32)
    rows = [[*tokenizer.encode(text, add_special_tokens=False), ends[0]] for text in documents]
    return np.concatenate([np.array(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32)


def load_tokens(path: str | Path, held_out: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a file, to train on and (the last `held_out` of them) to test on; mapped, not read, into memory.

    `.npy`: integers `[N]`; `.bin`: little-endian uint16 without a header, as nanoGPT writes them. Raises `OSError` for
    files that are neither and `ValueError` for a share outside `[0, 1)`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/ids.npy", np.arange(10, dtype=np.uint16))
    ...     train, held_out = load_tokens(f"{folder}/ids.npy", 0.2)
    >>> len(train), held_out.tolist()
    (8, [8, 9])
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: {held_out!r}, expected a share in [0, 1)")
    path = Path(path)
    try:
        if path.suffix == ".bin":
            tokens = np.memmap(path, "<u2", "r")
        else:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # an empty file, half of a number, or not NumPy's
        raise OSError(f"{path}: holds no token ids: {error}") from error
    if getattr(tokens, "ndim", 0) != 1 or tokens.dtype.kind not in "iu":
        raise OSError(f"{path}: expected integers in one dimension, found {tokens!r:.60}")
    cut = len(tokens) - int(held_out * len(tokens))
    return tokens[:cut], tokens[cut:]


class Windows:
    """Batches of windows of `length + 1` tokens, `length` inputs and as many targets, out of `tokens [N]`.

    An epoch cuts the text, closed to a ring, at a random place into `N // length` windows and shuffles them. Everything
    follows from `seed` and the epoch's number by way of Philox's raw output (which NumPy's NEP 19 keeps stable) and a
    stable sort: batches are the same on all platforms, and a resumed run needs the step alone. `tokens` may be a memory
    map. Raises `ValueError` for a text shorter than one window, and for sizes or seeds out of range.

    >>> windows = Windows(np.arange(100), batch_size=2, length=8, seed=0)
    >>> batch = windows.batch(step=3)
    >>> batch.shape, bool((np.diff(batch) % 100 == 1).all()), windows.per_epoch
    ((2, 9), True, 12)
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int, seed: int):
        if batch_size < 1 or length < 1 or seed < 0:
            raise ValueError(f"batch_size {batch_size}, length {length}: at least 1; seed {seed}: at least 0")
        if len(tokens) < length + 1:
            raise ValueError(f"tokens: {len(tokens)}, fewer than one window of {length} + 1")
        self.tokens, self.batch_size, self.length, self.seed = tokens, batch_size, length, seed
        self.per_epoch = len(tokens) // length

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The batch of a step, counted from 0: int32 `[B, length + 1]`, or those `rows` of it that a process needs.

        Batches run on from one epoch into the next. Raises `ValueError` for a negative step.
        """
        if step < 0:
            raise ValueError(f"step: {step} is negative")
        first = step * self.batch_size
        wanted = range(first, first + self.batch_size)[rows]
        starts = np.array([self._start(*divmod(number, self.per_epoch)) for number in wanted], np.int64)
        places = (starts[:, None] + np.arange(self.length + 1)) % len(self.tokens)
        return self.tokens[places].astype(np.int32)

    def _start(self, epoch: int, place: int) -> int:
        cut, order = _epoch(self.seed, epoch, self.per_epoch)
        return cut % len(self.tokens) + int(order[place]) * self.length


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    """Where an epoch cuts (any natural number) and in which order its windows come."""
    raw = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count + 1)
    return int(raw[0]), np.argsort(raw[1:], kind="stable")


def held_out_batches(tokens: np.ndarray, batch_size: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches that predict each of `tokens [N]` but the first once: ids int32 `[B, length + 1]`, mask `[B, length]`.

    The float32 mask is 1 where a prediction counts and 0 behind the text's end, where the ids are 0. A window's first
    prediction sees one token, its last one `length`. Raises `ValueError` for fewer than two tokens.

    >>> [(ids.tolist(), mask.tolist()) for ids, mask in held_out_batches(np.array([5, 6, 7, 8]), 2, 2)]
    [([[5, 6, 7], [7, 8, 0]], [[1.0, 1.0], [1.0, 0.0]])]
    """
    if batch_size < 1 or length < 1 or len(tokens) < 2:
        raise ValueError(f"batch_size {batch_size}, length {length}: at least 1; {len(tokens)} tokens: at least 2")
    return _held_out(tokens, batch_size, length)


def _held_out(tokens: np.ndarray, batch_size: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(tokens) - 1, batch_size * length):
        places = first + np.arange(batch_size)[:, None] * length + np.arange(length + 1)
        real = places < len(tokens)
        ids = np.where(real, tokens[np.minimum(places, len(tokens) - 1)], 0)
        yield ids.astype(np.int32), real[:, 1:].astype(np.float32)
