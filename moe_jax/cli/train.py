"""`moe-jax train`: train a model as a settings file says."""

import argparse
import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from ..sharding.mesh import mesh_sizes
from ..train import Settings, train
from .common import note

EXAMPLE = "moe-jax train configs/train/tiny.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("settings", help="a JSON file, see configs/train and moe_jax.train.Settings")
    folder = "where the run lies, and goes on if it was stopped (default: runs/NAME, numbered behind finished ones)"
    parser.add_argument("--output", metavar="FOLDER", help=folder)
    parser.add_argument("--steps", type=int, help="instead of the file's")
    parser.add_argument("--seed", type=int, help="instead of the file's")
    parser.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...", help="devices, such as data=2,expert=4")
    parser.add_argument("--implementation", help="the expert MLP's implementation by name")


def run(options: argparse.Namespace) -> int:
    """Train with a progress bar; the last line on stdout is the outcome as JSON."""
    settings = Settings.from_json_file(options.settings)
    given = {name: getattr(options, name) for name in ("steps", "seed") if getattr(options, name) is not None}
    if options.mesh is not None:
        given["mesh"] = dataclasses.replace(settings.mesh, **options.mesh)
    settings = dataclasses.replace(settings, **given)
    folder = Path(options.output) if options.output else _folder(Path("runs"), Path(options.settings).stem)
    note(f"run in {folder}")
    with tqdm(total=settings.steps, unit="step", mininterval=0.5) as bar:

        def watch(line):
            shown = {"loss": f"{line['loss']:.3f}", "tokens/s": f"{line['tokens_per_second']:.0f}"}
            shown |= {"balance": f"{line['balance']:.3f}", "dropped": f"{line['dropped']:.1%}"}
            if "held_out_bits_per_byte" in line:
                bar.write(f"step {line['step']}: held out {line['held_out_bits_per_byte']:.4f} bits per byte")
            bar.set_postfix(shown, refresh=False)
            bar.update(line["step"] - bar.n)

        try:
            outcome = train(settings, folder, options.implementation, watch)
        except FloatingPointError as error:
            bar.close()
            note(f"moe-jax train: {error}")
            return 1
    if not outcome.finished:
        note(f"stopped after step {outcome.step}; the same command goes on from there")
        return 0
    note(f"model, plot and metrics in {folder}")
    print(json.dumps(outcome.summary()))
    return 0


def _folder(runs: Path, name: str) -> Path:
    """The run's folder by default: the first of NAME, NAME-2, ... that holds no finished run."""
    number = 1
    while (folder := runs / (name if number == 1 else f"{name}-{number}")).joinpath("outcome.json").exists():
        number += 1
    return folder
