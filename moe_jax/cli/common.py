"""What several commands share: options, loading a model with its tokenizer."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.gguf import GGUFFile
from ..checkpoint.hub import resolve
from ..demo import fetch_demo
from ..model import Model
from ..pretrained import load_pretrained
from ..quantize import quantize
from ..tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ..upcycle import upcycle

DEMO = "SmolLM2-135M-Instruct, upcycled to 4 experts"
_DEMO_EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2}
_DEMO_PENALTY = 1.1


def add_model(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """`--model` (or MODEL, if `positional`), `--dtype`, `--implementation`, `--quantize`, `--group-size`."""
    model = f"folder, hub id, Llama .gguf file or novels, which is here (without: {DEMO})"
    if positional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    else:
        parser.add_argument("--model", metavar="PATH", help=model)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--implementation", help="the expert MLP's implementation by name")
    parser.add_argument("--quantize", choices=["int8"], help="kernels in int8, made so while they are loaded")
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs per int8 scale, 128 say; a row if unset")


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The options of `moe_jax.generate`."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that reach probability P")
    parser.add_argument("--min-p", type=float, metavar="P", help="only those P times as likely as the likeliest")
    penalty = f"1 is none; unset: {_DEMO_PENALTY} for the demo model, which loops without, 1 for others"
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help=penalty)
    parser.add_argument(
        "--kv-cache-dtype", choices=["int8"], help="keys and values in int8: half the memory, a little accuracy"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `stream_text` from parsed options."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "kv_cache_dtype")
    given = {name: getattr(options, name) for name in names}
    if given["repetition_penalty"] is None:
        given["repetition_penalty"] = _DEMO_PENALTY if options.model is None else 1.0
    return given | {"key": options.seed if options.temperature else None}


def load(options: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The model that the options name, see `load_as_asked`, and its tokenizer."""
    reader = load_tokenizer_of(options.model or str(fetch_demo()))
    return load_as_asked(options), reader


def load_as_asked(
    options: argparse.Namespace, experts: dict[str, Any] | None = None, read: Callable[..., Model] | None = None
) -> Model:
    """The model that the options name, upcycled to `experts`, else the demo model with its own; in int8 if so asked.

    `read`: in place of `load_pretrained`.
    """
    begin = time.perf_counter()
    if options.group_size is not None and options.quantize is None:
        raise ValueError("group_size: only with --quantize")
    path, given = options.model or str(fetch_demo()), {"dtype": options.dtype, "implementation": options.implementation}
    experts = experts or (_DEMO_EXPERTS if options.model is None else None)
    if experts is None and read is None:
        model = load_pretrained(path, quantize=options.quantize, group_size=options.group_size, **given)
    else:
        model = (read or load_pretrained)(path, **given)
        model = model if experts is None else upcycle(model, **experts)
        model = quantize(model, group_size=options.group_size) if options.quantize else model
    note(f"loaded {options.model or DEMO} in {time.perf_counter() - begin:.1f} s")
    return model


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
