"""`moe-jax convert`: a model or DeepSpeed's checkpoint into a Hugging Face folder; upcycled, pruned, int8, widened."""

import argparse
import functools

from ..convert.deepspeed import load_checkpoint
from ..demo import fetch_demo
from ..inspect import usage
from ..model import Model
from ..pretrained import save_pretrained
from ..quantize import dequantize
from ..surgery import Keep, merge, prune
from .common import add_model, load_as_asked, load_tokenizer_of, note, read_text

EXAMPLE = "moe-jax convert --model model.gguf --upcycle 4 --top-k 2 --output smollm2-moe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--deepspeed", metavar="CONFIG", help="--model is a DeepSpeed checkpoint; JSON of the rest")
    parser.add_argument("--upcycle", type=int, metavar="E", help="make E experts out of each dense MLP of a Llama")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token of the upcycled model; 2 if unset")
    noise = "of the upcycled experts, in standard deviations of the kernel, 0.1 say; none if unset"
    parser.add_argument("--noise", type=float, metavar="S", help=noise)
    beside = "keep the dense MLP beside the upcycled experts, for every token"
    parser.add_argument("--shared-expert", action="store_true", default=None, help=beside)
    fewer = parser.add_mutually_exclusive_group()
    keep = "KEEP experts in each layer: 4, or 0.5 of them, or 4,3,4 layer by layer; needs --text"
    fewer.add_argument("--prune", type=_keep, metavar="KEEP", help=f"leave out all but {keep}")
    fewer.add_argument("--merge", type=_keep, metavar="KEEP", help=f"merge similar experts into {keep}")
    parser.add_argument("--text", metavar="FILE", help="shows which experts are used; its loss before and after")
    parser.add_argument("--dequantize", action="store_true", help="write int8 and MXFP4 kernels as floats")
    parser.add_argument("--seed", type=int, help="of the upcycled routers and the noise; 0 if unset")


def run(options: argparse.Namespace) -> int:
    """Load, convert, write."""
    given = {name: getattr(options, name) for name in ("top_k", "seed", "noise", "shared_expert")}
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and options.upcycle is None:
        raise ValueError(f"{', '.join(chosen)}: only with --upcycle")
    smaller = options.prune is not None or options.merge is not None
    if smaller != (options.text is not None):
        raise ValueError("text: needed by --prune and --merge, and used by nothing else")
    if smaller and options.quantize:
        raise ValueError("quantize: not with --prune and --merge; convert their output")
    text = read_text(None, options.text) if smaller else ""
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
    if smaller:
        model = _with_fewer(model, text, options)
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


def _with_fewer(model: Model, text: str, options: argparse.Namespace) -> Model:
    """The model with fewer experts; prints the text's loss before and after."""
    ids = load_tokenizer_of(options.model or str(fetch_demo())).encode(text)
    given = model, usage(model, ids)
    done = merge(*given, options.merge, ids=ids) if options.prune is None else prune(*given, options.prune, ids=ids)
    print(f"loss {done.before:.4f} before, {done.after:.4f} after, nats per token of {len(ids)}")
    return done.model


def _keep(text: str) -> Keep:
    if "," in text:
        return [int(part) for part in text.split(",")]
    return float(text) if "." in text else int(text)
