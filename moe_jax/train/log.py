"""What a run writes down: a JSON line for every step, and a plot of them."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np


class Log:
    """JSON lines in a file, one for each step; reopened after `step` steps, it drops what was written behind them."""

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        self.lines = [line for line in read(self.path) if line["step"] <= step]
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        new.replace(self.path)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self.lines.append(dict(line))
        print(json.dumps(line), file=self._file, flush=True)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; without the last one if it was not written to its end.

    >>> read("no_such_file.jsonl")
    []
    """
    if not Path(path).exists():
        return []
    text, found = Path(path).read_text(encoding="utf-8"), []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            warnings.warn(f"{path}: line {number} is damaged, and left out with those behind it", stacklevel=2)
            break
    return found


def plot(lines: list[dict[str, Any]], shares: Sequence[np.ndarray], path: str | Path) -> None:
    """A PNG of losses and balance by step, and by MoE layer of each expert's share `[E]` of the held-out choices."""
    from matplotlib.figure import Figure  # half a second to import

    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [line["loss"] for line in lines], linewidth=0.6, label="training")
    held = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if held:
        left.plot(*zip(*held, strict=True), "o-", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="nats per token", title="loss")
    left.legend()
    middle.plot(steps, [line["balance"] for line in lines], linewidth=0.6, label="balance loss (even: 1)")
    middle.plot(steps, [line["dropped"] for line in lines], linewidth=0.6, label="share of choices dropped")
    middle.set(xlabel="step", title="balance")
    middle.legend()
    if shares:
        most = max(map(len, shares))
        use = [np.pad(layer * len(layer), (0, most - len(layer)), constant_values=np.nan) for layer in shares]
        image = right.imshow(use, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r")
        figure.colorbar(image, ax=right, label="times the fair share")
    right.set(xlabel="expert", ylabel="MoE layer", title="use of experts, held out")
    right.locator_params(integer=True)
    figure.savefig(path, dpi=110)
