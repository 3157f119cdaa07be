"""`moe-jax convert`: a model or DeepSpeed's checkpoint into a Hugging Face folder; upcycled, int8, widened."""

import argparse
import functools

from ..convert.deepspeed import load_checkpoint
from ..demo import fetch_demo
from ..pretrained import save_pretrained
from ..quantize import dequantize
from .common import add_model, load_as_asked, load_tokenizer_of, note

EXAMPLE = "moe-jax convert --model model.gguf --upcycle 4 --top-k 2 --output smollm2-moe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--deepspeed", metavar="CONFIG", help="--model is a DeepSpeed checkpoint; JSON of the rest")
    parser.add_argument("--upcycle", type=int, metavar="E", help="make E experts out of each dense MLP of a Llama")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token of the upcycled model; 2 if unset")
    parser.add_argument("--dequantize", action="store_true", help="write int8 and MXFP4 kernels as floats")
    parser.add_argument("--seed", type=int, help="of the upcycled routers; 0 if unset")


def run(options: argparse.Namespace) -> int:
    """Load, convert, write."""
    chosen = {"top_k": options.top_k, "seed": options.seed}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen and options.upcycle is None:
        raise ValueError(f"{', '.join(chosen)}: only with --upcycle")
    if options.dequantize and options.quantize:
        raise ValueError("dequantize: not with --quantize")
    read = None
    if options.deepspeed is not None:
        if options.model is None:
            raise ValueError("deepspeed: needs --model, the checkpoint's folder")
        read = functools.partial(load_checkpoint, config=options.deepspeed)
    model = load_as_asked(options, None if options.upcycle is None else {"num_experts": options.upcycle} | chosen, read)
    if options.dequantize:
        model = dequantize(model)
    save_pretrained(model, options.output)
    if options.deepspeed is not None:
        note(f"wrote {model.config!r} to {options.output}")
        return 0
    try:
        load_tokenizer_of(options.model or str(fetch_demo())).save(options.output)
    except (OSError, ValueError) as error:
        note(f"no tokenizer written: {error}")
    note(f"wrote {model.config!r} to {options.output}")
    return 0
