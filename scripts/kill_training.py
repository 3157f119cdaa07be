"""Kill a training run with SIGKILL at random moments, again and again.

Its last checkpoint must always be readable, never older than the one before, and bit by bit the state of a run that was
not disturbed.

example: python scripts/kill_training.py --kills 200
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from moe_jax.config import ModelConfig  # noqa: E402
from moe_jax.model import Model  # noqa: E402
from moe_jax.train import Settings, Training, train  # noqa: E402
from moe_jax.train.checkpoints import Checkpoints  # noqa: E402
from moe_jax.train.run import tiny_byte_model  # noqa: E402
from moe_jax.train.text import load_text  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[-1])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000, help="of a run, which begins anew when it is through")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds of life after the first new checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = settings_of(options)
    if options.run:
        train(settings, options.run)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        faults = campaign(options, settings, Path(folder))
    print(f"{options.kills} kills, {len(faults)} faults")
    return int(bool(faults))


def settings_of(options: argparse.Namespace) -> Settings:
    data = {"corpus": "pydoc_topics", "length": 16, "batch_size": 8}
    values = {"model": tiny_byte_model(), "data": data, "steps": options.steps, "checkpoint_every": options.every}
    return Settings.from_dict(values | {"optimizer": {"warmup": 5, "learning_rate": 1e-2}})


class Undisturbed:
    """The states of a run that nobody kills, by step."""

    def __init__(self, settings: Settings):
        config = ModelConfig.from_dict(settings.model)
        self.training = Training(config.architecture, settings)
        self._text = load_text(settings.data, settings.seed)
        self._state = self.training.start(Model.initialize(config, settings.seed).arrays())
        self._digests = [digest(self._state)]

    def digest(self, step: int) -> str:
        while len(self._digests) <= step:
            windows = self._text.windows.batch(len(self._digests) - 1)
            self._state, _ = self.training.step(self._state, self.training.put(windows))
            self._digests.append(digest(self._state))
        return self._digests[step]


def digest(state) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def campaign(options: argparse.Namespace, settings: Settings, folder: Path) -> list[str]:
    rng, plain = random.Random(options.seed), Undisturbed(settings)
    faults, last, number = [], 0, 0
    warnings.simplefilter("error", UserWarning)  # a checkpoint that is passed over is one that was lost
    for kill in range(options.kills):
        run = folder / str(number)
        survived = live(options, run, rng.uniform(0, options.longest), last)
        try:
            with Checkpoints(run / "checkpoints", settings.keep) as checkpoints:
                state, step = checkpoints.restore(plain.training.abstract()) or (None, 0)
            fault = None
            if step < last:
                fault = f"step {step} after {last}"
            elif state is not None and digest(state) != plain.digest(step):
                fault = f"the state of step {step} is another one"
        except Exception as error:
            step, fault = last, f"{type(error).__name__}: {error}"
        print(f"kill {kill + 1}: run {number}, step {step}, {fault or 'right'}", flush=True)
        faults += [fault] if fault else []
        last = step
        if survived or fault:
            number, last = number + 1, 0
    return faults


def steps_in(run: Path) -> list[int]:
    """Of the checkpoints that stand under their own names."""
    names = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    return [int(name) for name in names if name.isdecimal()]


def live(options: argparse.Namespace, run: Path, seconds: float, last: int) -> bool:
    """Run until `seconds` after a checkpoint newer than `last` stands, then kill; whether it came to its end before."""
    given = [sys.executable, __file__, "--run", str(run), "--steps", str(options.steps), "--every", str(options.every)]
    # compiled once: most of a life is else spent with it
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{run.parent}/compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(given, env=os.environ | cache, **output) as child:
        while child.poll() is None and max(steps_in(run), default=0) <= last:
            time.sleep(0.01)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        _, words = child.communicate()
        if child.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(words.decode()[-2000:])
        return child.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
