"""The command line, `moe-jax`: one file per command."""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from .. import __version__
from ..demo import cache_folder
from . import bench, chat, convert, generate, info, inspect, plan, score, train

_COMMANDS = {
    "generate": (generate, "continue a prompt"),
    "chat": (chat, "talk with a model"),
    "score": (score, "log-probabilities and perplexity of a text"),
    "info": (info, "what a checkpoint or config holds"),
    "convert": (convert, "write a model as a Hugging Face folder; upcycled, pruned or merged on request"),
    "train": (train, "train a model, or go on with one"),
    "bench": (bench, "measure speed"),
    "inspect": (inspect, "which experts serve which tokens of a text"),
    "plan": (plan, "what a model needs on many devices, which need not be there"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of use and of files are one line on stderr, status 2."""
    parser = argparse.ArgumentParser(prog="moe-jax", description="Mixture-of-experts transformers in JAX.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        return _COMMANDS[options.command][0].run(options)
    except (ValueError, OSError) as error:
        print(f"moe-jax {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
