"""`moe-jax bench`: speed on this machine, against transformers where it is installed."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from ..benchmarks import block, decode, load
from ..benchmarks.table import Report, Row, machine, markdown, summary, write_json
from ..benchmarks.timing import Setting, measure_ceilings

#: What there is to measure, in the order of the table.
WHAT = ("block", "scaling", "decode", "load")
_SIZES = ("layers", "width", "hidden", "experts", "top_k", "vocab")

EXAMPLE = "moe-jax bench --device cpu --what block --tokens 1,32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `moe-jax bench`.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["--tokens", "1,8"]).tokens
    (1, 8)
    """
    parser.description = "Measure speed on this machine and print a table; results are checked before they are timed."
    parser.epilog = "example: moe-jax bench --device cpu --what block --tokens 1,32,512 --json bench.json"
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--what", choices=[*WHAT, "all"], default="all", help="what to measure (default: all)")
    parser.add_argument("--tokens", type=_numbers, default=(1, 32, 512), help="tokens of block and scaling: 1,32,512")
    parser.add_argument("--batch", type=_numbers, default=(1, 8), help="batch sizes of decode: 1,8")
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_number, help="instead of the benchmark's own size")
    parser.add_argument("--prompt-tokens", type=_number, default=32, help="prompt of decode (default: 32)")
    parser.add_argument("--new-tokens", type=_number, default=128, help="new tokens of decode (default: 128)")
    parser.add_argument("--load-gb", type=float, default=2.0, help="checkpoint of load in GB; 2 x for peak memory")
    parser.add_argument("--repeats", type=_number, default=7, help="timed rounds; medians are shown (default: 7)")
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for, print the table and write the JSON file. Returns 0; 1 for sizes that do not work."""
    try:
        with jax.default_device(jax.devices(args.device)[0]):
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


def _measure(args: argparse.Namespace) -> Report:
    about = machine(args.device)
    setting = Setting(args.device, measure_ceilings(), args.repeats, not args.no_torch)
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
    return block.run(_sized(block.BlockShape(), args), args.tokens, setting)


def _scaling(args: argparse.Namespace, setting: Setting) -> list[Row]:
    return block.scaling(_sized(block.SCALING, args), args.tokens, setting)


def _decode(args: argparse.Namespace, setting: Setting) -> list[Row]:
    much = decode.Run(prompt=args.prompt_tokens, new=args.new_tokens)
    return decode.run(_sized(decode.ModelShape(), args), args.batch, much, setting)


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


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))
