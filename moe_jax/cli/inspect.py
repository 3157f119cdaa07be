"""`moe-jax inspect`: which experts serve which tokens of a text; a table, heat maps and a page to look around in."""

import argparse
import json
from pathlib import Path

import numpy as np

from ..inspect import Usage, drift, usage
from ..inspect.page import page, table
from .common import DEMO, add_model, load, load_as_asked, note, read_text

EXAMPLE = "moe-jax inspect mixtral-8x7b --text book.txt --out report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model(parser, positional=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text; - is standard input")
    parser.add_argument("--out", required=True, metavar="DIR", help="where index.html and the heat maps are written")
    parser.add_argument("--compare", metavar="MODEL", help="another model with the same tokenizer: how far it drifted")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens read at once, without overlap")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read only the first N tokens of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")


def run(options: argparse.Namespace) -> int:
    """Count, write the page and the heat maps, print the table."""
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {options.max_tokens}")
    text = read_text(None, options.text)
    model, tokenizer = load(options)
    ids = tokenizer.encode(text)[: options.max_tokens]
    if not ids:
        raise ValueError(f"text: {options.text} holds no token")
    found, other = usage(model, ids, options.window), None
    if options.compare is not None:
        del model  # two need not fit
        asked = argparse.Namespace(**vars(options) | {"model": options.compare})
        other = Path(options.compare).name, usage(load_as_asked(asked), ids, options.window)
    name = DEMO if options.model is None else Path(options.model).name
    html = page(found, tokenizer, name, other)
    from ..inspect.plots import plot_co_activation, plot_usage  # here: matplotlib takes a second to load

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(html, encoding="utf-8")
    plot_usage(found, folder / "usage.png")
    plot_co_activation(found, folder / "co_activation.png")
    if options.json:
        print(json.dumps(_values(found, None if other is None else other[1])))
    else:
        _print(*table(found, None if other is None else other[1]))
    note(f"wrote index.html, usage.png and co_activation.png to {options.out}")
    return 0


def _values(found: Usage, other: Usage | None) -> dict[str, object]:
    """The statistics as plain JSON values."""
    values: dict[str, object] = {"tokens": found.tokens, "layers": found.layers}
    values |= {name: [part.tolist() for part in getattr(found, name)] for name in ("counts", "weights", "probability")}
    names = "entropy", "router_entropy", "imbalance", "least_share"
    values |= {name: getattr(found, name).tolist() for name in names}
    values["least_used"] = [int(np.argmin(count)) for count in found.counts]
    if other is not None:
        values["drift"] = {name: value.tolist() for name, value in vars(drift(found, other)).items()}
    return values


def _print(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True)))
