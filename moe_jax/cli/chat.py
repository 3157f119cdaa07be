"""`moe-jax chat`: a conversation in the terminal, through the model's chat template."""

import argparse
import sys

from ..text import stream_text
from .common import Speedometer, add_model, add_sampling, load, note, sampling

EXAMPLE = 'moe-jax chat "Why is the sky blue?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("message", nargs="?", help="one message, to be answered; without: a conversation, line by line")
    parser.add_argument("--system", help="what the model is told first")
    add_model(parser)
    add_sampling(parser, max_new_tokens=256, temperature=0.0)


def run(options: argparse.Namespace) -> int:
    """Answer one message, or one line after the other until the input ends."""
    model, tokenizer = load(options)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    if options.message is not None:
        _answer(model, tokenizer, messages, options.message, options)
        return 0
    note("Type a message; end with Ctrl-D.")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if line.strip():
            _answer(model, tokenizer, messages, line.strip(), options)


def _answer(model, tokenizer, messages, text, options) -> None:
    messages.append({"role": "user", "content": text})
    ids, answer, speed = tokenizer.chat(messages), "", Speedometer()
    for (piece,) in stream_text(model, tokenizer, [ids], **sampling(options)):
        speed.step()
        answer += piece
        print(piece, end="", flush=True)
    print()
    note(speed.report())
    messages.append({"role": "assistant", "content": answer})
