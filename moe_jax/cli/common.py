"""What several commands share: options, loading a model with its tokenizer."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..checkpoint.gguf import GGUFFile
from ..checkpoint.hub import resolve
from ..demo import fetch_demo
from ..model import Model
from ..pretrained import load_pretrained
from ..tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ..upcycle import upcycle

DEMO = "SmolLM2-135M-Instruct, upcycled to 4 experts"
_DEMO_PENALTY = 1.1


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--dtype`, `--implementation`."""
    parser.add_argument("--model", metavar="PATH", help=f"folder, hub id or Llama .gguf file (without: {DEMO})")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--implementation", help="the expert MLP's implementation by name")


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The options of `moe_jax.generate`."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that reach probability P")
    parser.add_argument("--min-p", type=float, metavar="P", help="only those P times as likely as the likeliest")
    penalty = f"1 is none; unset: {_DEMO_PENALTY} for the demo model, which loops without, 1 for others"
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help=penalty)
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `stream_text` from parsed options."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    given = {name: getattr(options, name) for name in names}
    if given["repetition_penalty"] is None:
        given["repetition_penalty"] = _DEMO_PENALTY if options.model is None else 1.0
    return given | {"key": options.seed if options.temperature else None}


def load(options: argparse.Namespace, tokenizer: bool = True, upcycled: bool = True) -> tuple[Model, Tokenizer | None]:
    """The model that the options name and its tokenizer; without a name the demo model, `upcycled` or as it is."""
    begin = time.perf_counter()
    path = options.model
    if path is None:
        path = str(fetch_demo())
    reader = load_tokenizer_of(path) if tokenizer else None
    model = load_pretrained(path, dtype=options.dtype, implementation=options.implementation)
    if options.model is None and upcycled:
        model = upcycle(model, num_experts=4, top_k=2)
    note(f"loaded {options.model or DEMO} in {time.perf_counter() - begin:.1f} s")
    return model, reader


def load_tokenizer_of(path: str) -> Tokenizer:
    """The tokenizer that lies with a model."""
    if path.endswith(".gguf"):
        return tokenizer_from_gguf(GGUFFile(path))
    return load_tokenizer(resolve(path))


def note(text: str) -> None:
    """A line for the person at the terminal, beside the output."""
    print(text, file=sys.stderr, flush=True)


def read_text(argument: str | None, file: str | None) -> str:
    """A text given as argument, as a file, or on standard input (`-`)."""
    if (argument is None) == (file is None):
        raise ValueError("give a text or --file, not both" if argument else "give a text or --file")
    if argument is not None:
        return argument
    return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")


class Speedometer:
    """Counts steps from the first token on, which waits for compilation."""

    def __init__(self):
        self.begin, self.first, self.tokens = time.perf_counter(), None, 0

    def step(self) -> None:
        """One more token per row."""
        self.tokens += 1
        if self.first is None:
            self.first = time.perf_counter()

    def report(self, rows: int = 1) -> str:
        """First token after how long, then tokens per second."""
        if self.first is None:
            return "no token"
        text = f"{self.tokens * rows} tokens, first after {self.first - self.begin:.1f} s"
        rest = time.perf_counter() - self.first
        return text + (f", then {(self.tokens - 1) * rows / rest:.1f} tokens/s" if self.tokens > 1 else "")
