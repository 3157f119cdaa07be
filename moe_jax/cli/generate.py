"""`moe-jax generate`: continue a prompt, streaming."""

import argparse

import numpy as np

from ..generation import generate
from ..text import stream_text
from .common import Speedometer, add_model, add_sampling, load, load_as_asked, note, sampling

EXAMPLE = 'moe-jax generate "The capital of France is" --max-new-tokens 32'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("prompt", nargs="+", help="one or several prompts, run as one batch")
    add_model(parser)
    add_sampling(parser, max_new_tokens=48, temperature=0.0)
    parser.add_argument("--ids", action="store_true", help="prompts are token ids, as in 1,2,3; print ids")


def run(options: argparse.Namespace) -> int:
    """Load, stream, report speed."""
    if options.ids:
        return _run_ids(options)
    model, tokenizer = load(options)
    prompts, speed = options.prompt, Speedometer()
    texts = [""] * len(prompts)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for pieces in stream_text(model, tokenizer, prompts, **sampling(options)):
        speed.step()
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if len(prompts) == 1:
            print(pieces[0], end="", flush=True)
    print() if len(prompts) == 1 else print("\n\n".join(p + t for p, t in zip(prompts, texts, strict=True)))
    note(speed.report(len(prompts)))
    return 0


def _run_ids(options: argparse.Namespace) -> int:
    try:
        rows = [[int(i) for i in prompt.split(",")] for prompt in options.prompt]
    except ValueError:
        raise ValueError(f"prompt: {options.prompt} are not token ids separated by commas") from None
    if options.stop:
        raise ValueError("--stop: stop strings need text, not --ids")
    model = load_as_asked(options)
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    given = {name: value for name, value in sampling(options).items() if name != "stop"}
    found = generate(model, ids, mask, **given)
    assert isinstance(found, np.ndarray)  # not a record
    for row in found[:, width:].tolist():
        print(",".join(map(str, row)))
    return 0
