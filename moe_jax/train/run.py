"""A training run from `Settings` to a model on disk; stopped anywhere, it goes on where it was."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

from ..model import Model
from ..pretrained import save_pretrained
from ..sharding import make_mesh, sharding_of
from .checkpoints import Checkpoints
from .log import Log, plot
from .settings import Settings
from .start import initial_model
from .text import Text, load_text
from .update import Report, State, Training, schedule


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """On the held-out text: `loss` in nats per token, `bits_per_byte`, and by MoE layer each expert's part of its
    choices, `shares [E]`."""

    loss: float
    bits_per_byte: float
    shares: tuple[np.ndarray, ...]

    @property
    def min_expert_share(self) -> float:
        """The least used expert's part, in fair ones (`1/E`); 1 without MoE layers."""
        return min((float(layer.min() * len(layer)) for layer in self.shares), default=1.0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: `evaluation` of the last weights, a byte `trigram`'s bits per byte on the same text,
    `seconds` of all parts of the run, and whether it is `finished`, or was stopped by SIGTERM after `step` steps."""

    step: int
    finished: bool
    seconds: float
    evaluation: Evaluation | None = None
    trigram: float | None = None

    def summary(self) -> dict[str, float | None]:
        """The numbers that a finished run is judged by; `ValueError` for another one."""
        if self.evaluation is None:
            raise ValueError(f"summary: the run was stopped after step {self.step}")
        return {
            "bits_per_byte": round(self.evaluation.bits_per_byte, 4),
            "trigram": None if self.trigram is None else round(self.trigram, 4),
            "min_expert_share": round(self.evaluation.min_expert_share, 4),
            "seconds": round(self.seconds, 1),
        }


def train(
    settings: Settings,
    folder: str | os.PathLike,
    implementation: Any = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Train a model and leave it in `folder`, with its checkpoints, a line for every step and a plot.

    A run that was stopped, however, is gone on with from its last checkpoint: on a CPU every weight is then what it
    would have been, bit by bit. SIGTERM, or Ctrl-C once, makes it write one and return. `folder` holds
    `settings.json`, `metrics.jsonl`, `metrics.png`, `checkpoints/` and, at the end, `model/` for `load_pretrained`.
    `implementation`: as in `load_pretrained`. `watch` is called with every line.

    Raises `ValueError` for settings that do not fit the model or those that the folder's run began with, `OSError` for
    files, and `FloatingPointError` naming the step if a loss or a gradient is not finite; the checkpoints are those of
    steps before it.

    >>> import tempfile
    >>> values = {"model": tiny_byte_model(), "steps": 2, "data": {"corpus": "pydoc_topics", "length": 16}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = train(Settings.from_dict(values), folder)
    >>> outcome.step, outcome.finished
    (2, True)
    """
    with _claimed(Path(folder), settings):
        return _Run(settings, Path(folder), implementation, watch).go()


def tiny_byte_model() -> dict[str, Any]:
    """The config of a one-layer model of bytes, for examples and tests."""
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | sizes | heads


class _Run:
    def __init__(self, settings, folder, implementation, watch):
        self.settings, self.folder, self.watch = settings, folder, watch or (lambda line: None)
        if jax.process_count() > 1:
            raise ValueError(f"processes: {jax.process_count()}; training runs in one")
        self.begin, self.before, self.last = time.perf_counter(), 0.0, 0.0
        self.text: Text = load_text(settings.data, settings.seed)
        sizes = dataclasses.asdict(settings.mesh)
        mesh = make_mesh(**sizes) if math.prod(sizes.values()) > 1 else None
        self.model = initial_model(settings, self.text.tokenizer.vocab_size, mesh, implementation)
        sharding = sharding_of(mesh, exchange=self.model.exchange)
        self.training = Training(self.model.architecture, settings, sharding, self.model.implementation)
        self.rate = jax.jit(schedule(settings.optimizer, settings.steps))
        self._check(self.text.held_out)
        _write(folder / "settings.json", settings.to_dict())  # all is there to begin with

    def _check(self, tokens: np.ndarray) -> np.ndarray:
        """`ValueError` for ids that the model does not have, as files of ids can hold."""
        vocab = self.model.architecture.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            names = ", ".join(self.settings.data.corpora)
            raise ValueError(f"{names}: ids from {tokens.min()} to {tokens.max()}, the model has {vocab}")
        return tokens

    def go(self) -> Outcome:
        with Checkpoints(self.folder / "checkpoints", self.settings.keep) as checkpoints, _told() as stopped:
            first = None if checkpoints.steps() else self.training.start(self.model.arrays())
            self.model = Model(self.model.config, {}, self.model.generation, self.model.named)  # without its weights
            state, step = (first, 0) if first is not None else checkpoints.restore(self.training.abstract())
            with Log(self.folder / "metrics.jsonl", step) as log:
                self.before = self.last = log.lines[-1]["seconds"] if log.lines else 0.0
                state, step = self._steps(state, step, checkpoints, log, stopped)
                if step < self.settings.steps:
                    return Outcome(step, False, self._seconds())
                return self._finish(state, log)

    def _steps(self, state: State, step: int, checkpoints: Checkpoints, log: Log, stopped: threading.Event):
        """Run until the last step or SIGTERM, and write a checkpoint. A step is looked at while the next one runs."""
        settings, training, waiting = self.settings, self.training, None
        while step < settings.steps and not stopped.is_set():
            state, report = training.step(state, training.put(self._check(self.text.windows.batch(step))))
            step += 1
            line = None if waiting is None else self._line(*waiting)
            waiting, extra = (step, report), {}
            due = lambda every: every is not None and step % every == 0  # noqa: B023
            if line:
                self._note(log, line)
            evaluates = due(settings.evaluate_every) and step < settings.steps
            if due(settings.checkpoint_every) or evaluates:
                line, waiting = self._line(*waiting), None
                if due(settings.checkpoint_every):
                    checkpoints.save(state, step)
                if evaluates:
                    found = evaluate(self.training, state, self.text)
                    extra = {"held_out_loss": found.loss, "held_out_bits_per_byte": found.bits_per_byte}
                self._note(log, line | extra)
                self.last = self._seconds()
        if waiting is not None:
            self._note(log, self._line(*waiting))
        if step:
            checkpoints.save(state, step)
        return state, step

    def _line(self, step: int, report: Report) -> dict[str, Any]:
        """A step's report as numbers, once they are there."""
        report = jax.device_get(report)
        losses, now = report.losses, self._seconds()
        if not report.finite:
            values = f"loss {losses.cross_entropy}, gradient norm {report.gradient_norm}"
            raise FloatingPointError(f"step {step}: {values}; the weights are those before it, and are not saved")
        tokens = self.settings.data.batch_size * self.settings.data.length
        since, self.last = now - self.last, now
        return {
            "step": step,
            "loss": float(losses.cross_entropy),
            "balance": float(losses.balance),
            "z": float(losses.z),
            "dropped": float(losses.dropped),
            "max_load": _max_load(np.asarray(losses.counts), self.training.architecture.expert_counts),
            "gradient_norm": float(report.gradient_norm),
            "learning_rate": float(self.rate(step - 1)),
            "tokens_per_second": round(tokens / max(since, 1e-9), 1),
            "seconds": round(now, 3),
        }

    def _note(self, log: Log, line: dict[str, Any]) -> None:
        log.write(line)
        self.watch(line)

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.begin

    def _finish(self, state: State, log: Log) -> Outcome:
        ends = {"eos_token_id": list(self.text.tokenizer.eos_token_ids)} if self.text.tokenizer.eos_token_ids else {}
        generation = ends | self.model.generation
        model = Model(self.model.config, state.weights, generation, sharding=self.training.sharding)
        save_pretrained(model, self.folder / "model")
        self.text.tokenizer.save(self.folder / "model")
        found = evaluate(self.training, state, self.text)
        if log.lines:
            last = {"held_out_loss": found.loss, "held_out_bits_per_byte": found.bits_per_byte}
            plot([*log.lines[:-1], log.lines[-1] | last], found.shares, self.folder / "metrics.png")
        outcome = Outcome(self.settings.steps, True, self._seconds(), found, self.text.trigram())
        _write(self.folder / "outcome.json", outcome.summary())
        return outcome


def _max_load(counts: np.ndarray, experts: tuple[int, ...]) -> float:
    """The most that an expert had to do, in its layer's mean; `counts [Lm, E]`, of which each layer has `experts`."""
    return float((counts.max(1) * np.asarray(experts) / counts.sum(1)).max()) if counts.size else 1.0


def evaluate(training: Training, state: State, text: Text) -> Evaluation:
    """Loss and use of experts on all of the held-out text, each token predicted once."""
    nats, predictions = 0.0, 0.0
    counts: Any = 0
    for windows, counted in text.held_out_batches():
        _, losses = training.evaluate(state.weights, training.put(windows), training.put(counted))
        real = float(counted.sum())
        nats, predictions = nats + float(losses.cross_entropy) * real, predictions + real
        counts = counts + np.asarray(losses.counts, np.int64)
    layers = zip(counts, training.architecture.expert_counts, strict=True) if np.size(counts) else ()
    shares = tuple(layer[:experts] / layer.sum() for layer, experts in layers)
    return Evaluation(nats / predictions, nats / math.log(2) / text.held_out_size, shares)


@contextlib.contextmanager
def _told() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, where this is the main thread, which alone may ask for signals. A second
    SIGINT interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def told(number, frame):
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _claimed(folder: Path, settings: Settings) -> Iterator[None]:
    """With the folder for this run alone, unless it began with other settings or another process is at work on it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(f"{folder}: another process is at work on this run") from error
        path, own = folder / "settings.json", settings.to_dict()
        if path.exists():
            before = Settings.from_json_file(path).to_dict()
            alike = set(own) - {"mesh", "unroll", "remat"}  # a run may go on over other devices
            if other := sorted(name for name in alike if before[name] != own[name]):
                raise ValueError(f"{', '.join(other)}: not those that the run in {folder} began with")
        yield


def _write(path: Path, values: Any) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    new.replace(path)
