"""Text in, text out: tokenizers wrapped around the engine, stop strings, log-probabilities."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .generation import stream
from .model import Model
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]


class StopFilter:
    """Passes text on until a stop string appears; holds back what may become the beginning of one.

    >>> out = StopFilter(["END"])
    >>> out.push("one E"), out.push("N"), out.push("d END two"), out.stopped
    ('one ', '', 'ENd ', True)
    """

    def __init__(self, stop: str | Sequence[str]):
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if any(not s for s in stop):
            raise ValueError("stop: an empty stop string would end every text at once")
        self.stop, self.held, self.stopped = stop, "", False

    def push(self, text: str) -> str:
        """The text that may be shown after `text` has come in."""
        if self.stopped:
            return ""
        self.held += text
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, shown, self.held = True, self.held[: min(found)], ""
            return shown
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        shown, self.held = self.held, ""
        return shown


def encode(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (text or ids) as ids and mask `[B, T]`, padded on the left; `ValueError` for an empty one."""
    rows = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    if not rows or not all(rows):
        raise ValueError("prompts: empty" if not rows else f"prompts: number {rows.index([])} has no token")
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for row, (i, m) in zip(rows, zip(ids, mask, strict=True), strict=True):
        i[width - len(row) :], m[width - len(row) :] = row, 1
    return ids, mask


def stream_text(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, stop: str | Sequence[str] = (), **options: Any
) -> Iterator[list[str]]:
    """Continue prompts and yield, step by step, each row's new piece of text ("" where there is none yet).

    `stop`: strings that end a row; neither they nor what follows is yielded. `options` as in `moe_jax.generate`.
    Pieces hold whole characters. Raises `ValueError` as `generate` does.
    """
    ids, mask = encode(tokenizer, prompts)
    if options.get("eos_token_id") is None:
        own = model.generation.get("eos_token_id")
        known = {*model.config.token_ids("eos"), *tokenizer.eos_token_ids}
        options["eos_token_id"] = tuple(sorted(known)) if own is None else own
    ends = options["eos_token_id"]
    ends = {ends} if isinstance(ends, int) else set(ends)
    streams = [tokenizer.decode_stream() for _ in ids]
    filters = [StopFilter(stop) for _ in ids]
    ended = [False] * len(ids)
    for tokens in stream(model, ids, mask, **options):
        pieces = []
        for row, token in enumerate(tokens.tolist()):
            text = "" if ended[row] else filters[row].push("" if token in ends else streams[row].push(token))
            if not ended[row] and (token in ends or filters[row].stopped):
                ended[row] = True
                text += "" if filters[row].stopped else filters[row].push(streams[row].flush()) + filters[row].flush()
            pieces.append(text)
        yield pieces
        if all(ended):
            return
    rest = ["" if e else f.push(s.flush()) + f.flush() for e, f, s in zip(ended, filters, streams, strict=True)]
    if any(rest):
        yield rest


def generate_text(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, stop: str | Sequence[str] = (), **options: Any
) -> list[str]:
    """The whole continuations of several prompts of any lengths; see `stream_text`."""
    texts = [""] * len(prompts)
    for pieces in stream_text(model, tokenizer, prompts, stop=stop, **options):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of a text's tokens given those before: natural logarithms, the first token has none."""

    log_probabilities: np.ndarray

    @property
    def perplexity(self) -> float:
        """`exp(-mean)` of the log-probabilities."""
        return float(np.exp(-self.log_probabilities.mean()))


def score(model: Model, ids: Sequence[int], window: int = 512) -> Score:
    """Log-probability of each token after the first, `[len(ids) - 1]` in float32.

    Texts longer than `window` tokens are read in windows that overlap by half, so that each token has at least half
    a window before it. Raises `ValueError` for fewer than two tokens.

    >>> from moe_jax.model import Model, tiny_config
    >>> score(Model.initialize(tiny_config()), [1, 2, 3, 4]).log_probabilities.shape
    (3,)
    """
    if len(ids) < 2:
        raise ValueError(f"ids: {len(ids)} tokens; a score needs at least two")
    window = min(window, model.architecture.context)
    if window < 2:
        raise ValueError(f"window: {window} tokens; a score needs at least two")
    found = np.zeros(len(ids) - 1, np.float32)
    begin = scored = 0
    while scored < len(found):
        part = np.asarray(ids[begin : begin + window], np.int32)
        width = min(window, 1 << (len(part) - 1).bit_length())  # few shapes, so that few programs are compiled
        row, mask = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
        row[0, : len(part)], mask[0, : len(part)] = part, 1
        chances = np.asarray(_chosen(model(row, mask), jnp.asarray(row)))[: len(part) - 1]
        found[scored : begin + len(part) - 1] = chances[scored - begin :]
        scored = begin + len(part) - 1
        begin += max(1, window // 2)
    return Score(found)


@jax.jit
def _chosen(logits, row):
    chances = jax.nn.log_softmax(logits[0, :-1], axis=-1)
    return jnp.take_along_axis(chances, row[0, 1:, None], axis=-1)[:, 0]
