"""`moe-jax score`: log-probabilities and perplexity of a text."""

import argparse
import json

from ..text import score
from .common import add_model, load, read_text

EXAMPLE = 'moe-jax score "The capital of France is Paris."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("text", nargs="?", help="the text")
    parser.add_argument("--file", help="a file to read the text from; - is standard input")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once; windows overlap by half")
    parser.add_argument("--tokens", action="store_true", help="print every token with its log-probability")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    """Tokenize, score, print."""
    text = read_text(options.text, options.file)
    model, tokenizer = load(options)
    ids = tokenizer.encode(text)
    found = score(model, ids, options.window)
    chances = found.log_probabilities
    if options.json:
        values: dict[str, object] = {
            "tokens": len(ids),
            "log_probability": float(chances.sum()),
            "perplexity": found.perplexity,
        }
        values |= {"ids": ids, "log_probabilities": [float(c) for c in chances]} if options.tokens else {}
        print(json.dumps(values))
        return 0
    if options.tokens:
        for token, chance in zip(ids[1:], chances, strict=True):
            print(f"{chance:9.4f}  {tokenizer.decode([token], skip_special_tokens=False)!r}")
    print(f"{len(ids)} tokens, log-probability {chances.sum():.3f}, perplexity {found.perplexity:.4f}")
    return 0
