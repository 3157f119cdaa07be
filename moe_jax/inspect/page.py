"""A `Usage` as one HTML page that needs nothing else: no server, script, style or font from elsewhere."""

import base64
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..tokenizer import Tokenizer
from .compare import drift
from .usage import Usage

#: Tokens of a list and contexts of a cell; neighbours of a context's token.
_TOKENS, _CONTEXTS, _REACH = 10, 4, 10
#: Ratios of shares are shown between its inverse and this.
_MOST = 64.0


def page(usage: Usage, tokenizer: Tokenizer, title: str, other: tuple[str, Usage] | None = None, shown: int = 5000):
    """The page as text: heat map, examples of each expert, the text coloured by expert, co-activation, drift.

    `title`: the model's name. `other`: another model's name and usage of the same text, to compare with. `shown`:
    tokens of the text view. Texts stand as JSON in which "<" is escaped, and become text nodes only: a token can be no
    markup. Raises `ValueError` as `drift` does.
    """
    folder = importlib.resources.files(__package__)
    html, css, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    values = json.dumps(_values(usage, tokenizer, title, other, shown), allow_nan=False, separators=(",", ":"))
    data = values.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return html.replace("/*style*/", css).replace("/*script*/", script).replace("/*data*/", data)


def _values(usage: Usage, tokenizer: Tokenizer, title: str, other: tuple[str, Usage] | None, shown: int) -> Any:
    """What `page.js` reads."""
    names = {int(token): tokenizer.decode([token], skip_special_tokens=False) for token in np.unique(usage.ids)}
    weights = usage.expert_weights[:, :shown]
    unit = float(weights.max(initial=0)) / 255 or 1.0
    return {
        "title": title,
        "other": other and other[0],
        "layers": usage.layers,
        "experts": [len(count) for count in usage.counts],
        "chosen": usage.expert_ids.shape[2],
        "tokens": usage.tokens,
        "kept": len(usage.ids),
        "shown": weights.shape[1],
        "counts": [count.tolist() for count in usage.counts],
        "meanWeights": [_rounded(w / np.maximum(c, 1)) for w, c in zip(usage.weights, usage.counts, strict=True)],
        "metrics": _metrics(usage, other),
        "table": dict(zip(("head", "rows"), table(usage, other and other[1]), strict=True)),
        "pieces": _pieces(usage, tokenizer),
        "choices": _packed(usage.expert_ids[:, :shown], "<i2"),
        "weights": _packed(np.rint(weights / unit), "u1"),
        "unit": unit,
        "cells": [[_cell(usage, layer, e, names) for e in range(len(c))] for layer, c in enumerate(usage.counts)],
        "pairs": [[row[: i + 1].tolist() for i, row in enumerate(pairs)] for pairs in usage.pairs],
        "reach": _REACH,
    }


def _metrics(usage: Usage, other: tuple[str, Usage] | None) -> list[dict[str, Any]]:
    """What the heat map's colours may show, each as ratios `[Lm][E]`; 1 is even."""
    weights = [weight / max(weight.sum(), np.finfo(np.float64).tiny) for weight in usage.weights]
    found = [("use", "choices", usage.share), ("weight", "sum of router weights", weights)]
    found += [("router probability", "mean router probability", usage.probability)]
    found += [] if other is None else [(f"use by {other[0]}", "its choices", other[1].share)]
    metrics = [
        (name, f"{text} over a fair share", "× fair", [part * len(part) for part in layers])
        for name, text, layers in found
    ]
    if other is not None:
        ratios = [_ratio(new, old) for old, new in zip(usage.share, other[1].share, strict=True)]
        metrics += [(f"change to {other[0]}", "its choices over this model's", "×", ratios)]
    return [dict(name=n, help=h, unit=unit, values=[_rounded(v) for v in values]) for n, h, unit, values in metrics]


def table(usage: Usage, other: Usage | None = None) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the statistics of each layer, as texts; with `other`, its drift from `usage`.

    >>> from moe_jax.inspect.usage import example
    >>> table(example(counts=[[3, 1, 1, 3]]))[1]
    [['0', '4', '0.906', '0.000', '1.50', '1', '0.50']]
    """
    head = ["layer", "experts", "entropy", "router entropy", "imbalance", "least used", "of a fair share"]
    least = [int(count.argmin()) for count in usage.counts]
    columns: list[Sequence[str]] = [
        [str(layer) for layer in usage.layers],
        [str(len(count)) for count in usage.counts],
        [f"{value:.3f}" for value in usage.entropy],
        [f"{value:.3f}" for value in usage.router_entropy],
        [f"{value:.2f}" for value in usage.imbalance],
        [str(expert) for expert in least],
        [f"{value:.2f}" for value in usage.least_share],
    ]
    if other is not None:
        apart = drift(usage, other)
        head += ["total variation", "Jensen-Shannon", "agreement"]
        columns += [[f"{v:.3f}" for v in c] for c in (apart.total_variation, apart.jensen_shannon, apart.agreement)]
    return head, [list(row) for row in zip(*columns, strict=True)]


def _cell(usage: Usage, layer: int, expert: int, names: dict[int, str]) -> list[Any]:
    """An expert's frequent and typical tokens as `[text, count, lift]`, its contexts as `[position, weight]`."""
    found = usage.examples(layer, expert, _TOKENS, 0)
    lists = ([[names[t.token], t.count, round(t.lift, 2)] for t in some] for some in (found.frequent, found.typical))
    return [*lists, [[c.position, round(c.weight, 3)] for c in found.contexts[:_CONTEXTS]]]


def _pieces(usage: Usage, tokenizer: Tokenizer) -> dict[str, Any]:
    """The text of the kept tokens: different pieces, and which of them stands where; joined they are the text."""
    stream = tokenizer.decode_stream(skip_special_tokens=False)
    texts = [stream.push(token) for token in usage.ids.tolist()]
    texts[-1] += stream.flush()
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return {"texts": list(index), "at": [index[text] for text in texts]}


def _ratio(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Shares over shares; where both are 0, 1."""
    ratio = np.divide(new, old, out=np.where(new > 0, np.inf, 1.0), where=old > 0)
    return np.minimum(ratio, _MOST)


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(dtype)).tobytes()).decode("ascii")


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 6).tolist()
