"""`moe-jax bench`: speed on this machine, against transformers where it is installed."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import jax

from ..axes import NAMED
from ..benchmarks import accelerator, block, decode, device_model, load, model_run
from ..benchmarks.inputs import DTYPES
from ..benchmarks.models import QUANTIZE
from ..benchmarks.table import Report, Row, machine, markdown, summary, write_json
from ..benchmarks.timing import Setting, measure_ceilings
from ..sharding.mesh import make_mesh, mesh_sizes

#: What there is to measure on a CPU, in the order of the table; and for models' shapes, on any device.
WHAT = ("block", "scaling", "decode", "load")
_SIZES = ("layers", "width", "hidden", "experts", "top_k", "vocab")

#: Whole models that are measured by default.
_MODELS = ("olmoe",)
_TOKENS = (1, 32, 512)
_REPEATS = 7

EXAMPLE = "moe-jax bench --device cpu --what block --tokens 1,32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `moe-jax bench`.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["--tokens", "1,8"]).tokens
    (1, 8)
    """
    parser.description = "Measure speed on this machine and print a table; results are checked before they are timed."
    parser.epilog = "example: moe-jax bench --device gpu --what block --model qwen3 --tokens 1,8,32 --json bench.json"
    what = [*WHAT, "prefill", "routing", "all"]
    parser.add_argument("--device", choices=["cpu", "gpu"], help="where to run (default: JAX's default backend)")
    parser.add_argument("--what", choices=what, default="all", help="what to measure; all on a GPU: block and routing")
    parser.add_argument("--tokens", type=_numbers, help="tokens of block, scaling and routing: 1,32,512; more on a GPU")
    _add_accelerator_arguments(parser)
    parser.add_argument("--batch", type=_numbers, help="batch sizes of decode: 1,8; with --model 1,32, of prefill 8")
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_number, help="instead of the benchmark's own size")
    prompt = "prompt of decode (32; with --model 128) and prefill (2048)"
    parser.add_argument("--prompt", type=_number, metavar="TOKENS", help=prompt)
    parser.add_argument(
        "--new", type=_number, metavar="TOKENS", default=128, help="new tokens of decode (default: 128)"
    )
    parser.add_argument("--load-gb", type=float, default=2.0, help="checkpoint of load in GB; 2 x for peak memory")
    parser.add_argument("--repeats", type=_number, help="timed rounds (7) or bursts (20, GPU); medians are shown")
    parser.add_argument("--no-torch", action="store_true", help="leave torch and transformers out")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")


def _add_accelerator_arguments(parser: argparse.ArgumentParser) -> None:
    models = f"{','.join(accelerator.MODELS)}, configs/NAME.json by name, or a path"
    parser.add_argument("--model", type=_names, metavar="NAME,...", help=f"whose shapes: {models}")
    stored = "weights of decode and prefill with --model (default: as released; none: as --dtype)"
    parser.add_argument("--quantize", choices=QUANTIZE, help=stored)
    mesh = "devices to spread decode's and prefill's models over, such as expert=2 (data, expert, model)"
    parser.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...", help=mesh)
    rules = "tokens spread over the ranks that hold experts, or together on all of them (few rows)"
    parser.add_argument("--rules", choices=list(NAMED), default="spread", help=rules)
    routing = "uniform: decode and prefill with --model take given experts, all as likely (default: the routers' own)"
    parser.add_argument("--routing", choices=["uniform"], help=routing)
    names = "of the experts, by name (with --model; default: what JAX programs take)"
    parser.add_argument("--implementation", type=_names, metavar="NAME,...", help=names)
    dtypes = "with --model or on a GPU (default: bfloat16; float32 on a CPU)"
    parser.add_argument("--dtype", choices=list(DTYPES), help=dtypes)
    others = "whom block compares with on a GPU (default: all)"
    parser.add_argument("--baselines", choices=["none", "jax", "torch", "all"], default="all", help=others)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for, print tables and write the JSON file.

    Returns 0; 1 for sizes that do not work, and where a result of ours on an accelerator was wrong or missing.
    """
    try:
        whole = args.what in model_run.WHAT
        if whole:  # as much as there is: the largest models need it, and whole
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        elif args.device != "cpu" and "torch" in _baselines(args):  # else JAX takes the memory that torch will want
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        device = _device(args.device)
        with jax.default_device(device):
            if whole and (device.platform != "cpu" or args.model or args.what == "prefill"):
                return model_run.run(_options(args, device), args.model or _MODELS, args.json, args.quantize)
            if device.platform != "cpu" or args.model or args.what == "routing":
                return accelerator.run(_request(args, device), args.json)
            report = _measure(args)
    except (ValueError, OSError) as error:
        print(f"moe-jax bench: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    if line := summary(report.rows):
        print(f"\n{line}")
    if args.json:
        write_json(report, args.json)
    return 0


def _device(name: str | None) -> jax.Device:
    try:
        device = jax.devices(name)[0]
    except RuntimeError as error:
        raise ValueError(f"device: JAX finds no {name} ({error})") from error
    if device.platform not in ("cpu", "gpu"):
        raise ValueError(f"device: there are no benchmarks for {device.platform} yet; --device cpu runs")
    return device


def _request(args: argparse.Namespace, device: jax.Device) -> accelerator.Request:
    """What the flags ask of an accelerator; refuses those that only the CPU's benchmarks read."""
    if args.mesh:
        raise ValueError(f"mesh: {args.what} runs on one device; decode and prefill take it")
    if args.routing:
        raise ValueError(f"routing: {args.what} draws its own choices; decode and prefill take it")
    if args.quantize:
        raise ValueError(f"quantize: {args.what} runs wide weights; decode and prefill take it")
    if args.what not in ("block", "routing", "all"):
        raise ValueError(f"what: {args.what} is measured on a CPU, with --device cpu and without --model")
    if unread := [name for name in _SIZES if getattr(args, name) is not None]:
        raise ValueError(f"{unread[0]}: sizes come from --model here, a name or the path of a config.json")
    own = {
        "what": accelerator.WHAT if args.what == "all" else (args.what,),
        "device": device,
        "baselines": _baselines(args),
        "dtype": args.dtype or ("float32" if device.platform == "cpu" else "bfloat16"),
        "models": args.model,
        "tokens": args.tokens or (_TOKENS if device.platform == "cpu" else None),
        "implementations": args.implementation,
        "samples": args.repeats or (_REPEATS if device.platform == "cpu" else None),
    }
    return accelerator.Request(**{name: value for name, value in own.items() if value is not None})


def _options(args: argparse.Namespace, device: jax.Device) -> device_model.Options:
    """What the flags ask of whole models."""
    if unread := [name for name in _SIZES if name != "layers" and getattr(args, name) is not None]:
        raise ValueError(f"{unread[0]}: sizes come from --model here, a name or the path of a config.json")
    if len(args.implementation or ()) > 1:
        raise ValueError(f"implementation: {args.what} takes one, not {', '.join(args.implementation)}")
    decoding = args.what == "decode"
    return device_model.Options(
        device=device,
        case=args.what,
        batches=args.batch or ((1, 32) if decoding else (8,)),
        prompt=args.prompt or (128 if decoding else 2048),
        new=args.new,
        dtype=args.dtype or ("float32" if device.platform == "cpu" else "bfloat16"),
        implementation=args.implementation[0] if args.implementation else None,
        layers=args.layers,
        repeats=args.repeats or 5,
        mesh=make_mesh(**args.mesh) if args.mesh else None,
        rules=args.rules,
        routing=args.routing,
    )


def _baselines(args: argparse.Namespace) -> tuple[str, ...]:
    wanted = ("jax", "torch") if args.baselines == "all" else (args.baselines,)
    return tuple(name for name in wanted if name != "none" and not (name == "torch" and args.no_torch))


def _measure(args: argparse.Namespace) -> Report:
    about = machine("cpu")
    setting = Setting("cpu", measure_ceilings(), args.repeats or _REPEATS, not args.no_torch)
    rows: list[Row] = []
    for what in WHAT if args.what == "all" else (args.what,):
        print(f"measuring {what} ...", file=sys.stderr, flush=True)
        rows += _SECTIONS[what](args, setting)
    return Report(about, setting.ceilings, tuple(rows))


def _sized(shape: Any, args: argparse.Namespace) -> Any:
    """A shape with the sizes that were given in place of its own."""
    own = {field.name for field in dataclasses.fields(shape)}
    given = {name: getattr(args, name) for name in _SIZES if name in own and getattr(args, name) is not None}
    return dataclasses.replace(shape, **given)


def _block(args: argparse.Namespace, setting: Setting) -> list[Row]:
    return block.run(_sized(block.BlockShape(), args), args.tokens or _TOKENS, setting)


def _scaling(args: argparse.Namespace, setting: Setting) -> list[Row]:
    return block.scaling(_sized(block.SCALING, args), args.tokens or _TOKENS, setting)


def _decode(args: argparse.Namespace, setting: Setting) -> list[Row]:
    much = decode.Run(prompt=args.prompt or 32, new=args.new)
    return decode.run(_sized(decode.ModelShape(), args), args.batch or (1, 8), much, setting)


def _load(args: argparse.Namespace, setting: Setting) -> list[Row]:
    nbytes, shape = int(args.load_gb * 1e9), _sized(load.SHAPE, args)
    rows = [row for dtype in ("float32", "bfloat16") for row in load.run(nbytes, setting, shape, dtype)]
    return rows + load.peak(2 * nbytes, setting, shape)


_SECTIONS: dict[str, Callable[[argparse.Namespace, Setting], list[Row]]] = {
    "block": _block,
    "scaling": _scaling,
    "decode": _decode,
    "load": _load,
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))
