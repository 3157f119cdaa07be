"""Rows of models and numbers of tokens as grids, in the form of the recorded figures, and what they come to."""

import math
from collections.abc import Iterable, Sequence

from . import recorded
from .device_block import OURS
from .kernels import ALONE
from .table import Row


def grids(rows: Sequence[Row]) -> str:
    """A Markdown table for each case and model: implementations by numbers of tokens, microseconds and shares.

    >>> about = dict(case="block", device="gpu", dtype="bfloat16", shape="s", model="m", tokens=8)
    >>> print(grids([Row(implementation="a", steady_ms=0.0123, roofline=0.5, **about)]))
    block of m, s: us (share of the roofline)
    | implementation | T=8 |
    |---|---|
    | a | 12.3 (50%) |
    """
    tables = []
    for case, model in dict.fromkeys((row.case, row.model) for row in rows):
        tables.append("\n".join(_grid(case, model, [row for row in rows if (row.case, row.model) == (case, model)])))
    return "\n\n".join(tables)


def _grid(case: str, model: str, rows: Sequence[Row]) -> Iterable[str]:
    tokens = list(dict.fromkeys(row.tokens for row in rows))
    cells = {(row.implementation, row.tokens): row for row in rows}
    shape = rows[0].shape.removeprefix(f"{model} G={rows[0].tokens} ")
    line = lambda name, texts: f"| {name} | " + " | ".join(texts) + " |"
    yield f"{case} of {model}, {shape}: us" + (" (share of the roofline)" if case == "block" else "")
    yield line("implementation", [f"T={g}" for g in tokens])
    yield "|---" * (1 + len(tokens)) + "|"
    for name in dict.fromkeys(row.implementation for row in rows):
        yield line(name, [_cell(cells.get((name, g))) for g in tokens])
    ours = {g: next((r for r in rows if r.tokens == g and r.implementation.startswith(OURS)), None) for g in tokens}
    figures = {g: recorded.figures(model, g) if case == "block" else {} for g in tokens}
    if any(figures.values()):
        yield line(f"{recorded.VLLM} ({recorded.SOURCE})", [_us(figures[g].get(recorded.VLLM)) for g in tokens])
        yield line("best recorded", [_us(min(figures[g].values(), default=None)) for g in tokens])
    for label, pick in _EXTRA.items():
        values = [pick(ours[g]) if ours[g] else None for g in tokens]
        if any(value is not None for value in values):
            yield line(label, [f"{value:.2f}" if value is not None else "-" for value in values])
    notes: dict[str, list[str]] = {}
    for row in filter(_failed, rows):
        notes.setdefault(f"{row.implementation}: {row.note}", []).append(str(row.tokens))
    for note, where in notes.items():
        yield f"- T={', '.join(where)}: {note}"


_EXTRA = {
    "ours: times as fast as the best baseline": lambda row: row.speedup,
    "ours: times as fast as vLLM (recorded)": lambda row: row.values.get("times vLLM's speed (recorded)"),
    "ours: times as fast as the best recorded": lambda row: row.values.get("times the best's speed (recorded)"),
    "ours: share of 700 TFLOP/s and 3.097 TB/s": lambda row: row.values.get("share of fixed ceilings"),
    "ours: error / rounding's": lambda row: _ratio(row),
    f"ours: {ALONE}": lambda row: row.values.get(ALONE),
    "ours: compile one, s": lambda row: None if row.compile_ms is None else row.compile_ms / 1e3,
}


def _ratio(row: Row) -> float | None:
    rounding = row.values.get("rounding's error")
    return row.values["relative error"] / rounding if rounding else None


def _failed(row: Row) -> bool:
    return row.steady_ms is None


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(row: Row | None) -> str:
    if row is None or row.steady_ms is None:
        return "-"
    return _us(1e3 * row.steady_ms) + (f" ({100 * row.roofline:.0f}%)" if row.roofline is not None else "")


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that failed or were wrong."""
    return [row for row in rows if _failed(row) and row.implementation.startswith(OURS)]


def comparison(rows: Sequence[Row]) -> list[str]:
    """Geometric means of our speed against others', a line for each kind of comparison that there is.

    >>> about = dict(case="block", implementation="moe_jax", device="gpu", dtype="bfloat16", shape="s", steady_ms=1.0)
    >>> comparison([Row(speedup=2.0, **about), Row(speedup=8.0, **about)])
    ['block: 4.00 times as fast as the best baseline of this run (2 cells, least 2.00)']
    """
    kinds = {
        "the best baseline of this run": lambda row: row.speedup,
        f"vLLM ({recorded.SOURCE})": lambda row: row.values.get("times vLLM's speed (recorded)"),
        f"the best of all ({recorded.SOURCE})": lambda row: row.values.get("times the best's speed (recorded)"),
    }
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case and row.implementation.startswith(OURS)]
        for kind, pick in kinds.items():
            ratios = [value for value in map(pick, mine) if value]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                lines.append(
                    f"{case}: {mean:.2f} times as fast as {kind} ({len(ratios)} cells, least {min(ratios):.2f})"
                )
    return lines
