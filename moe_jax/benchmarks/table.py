"""Results as rows, as a Markdown table and as JSON."""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .timing import Ceilings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. Times are medians in milliseconds; None: does not apply, or was not measured.

    `case`: what is timed, `implementation`: whose; `roofline`: share of the floor from this run's ceilings;
    `baseline`: which row `speedup` (baseline's time over this one's, paired) compares with; `bar`: the speedup asked
    for; `values`: further figures by name with unit, such as `tokens/s`; `note`: what a reader must know; `model` and
    `tokens`: the place in a grid of models and numbers of tokens, where there is one.
    """

    case: str
    implementation: str
    device: str
    dtype: str
    shape: str
    steady_ms: float | None = None
    compile_ms: float | None = None
    roofline: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    bar: float | None = None
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    model: str = ""
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows of a run, with the machine and the ceilings that were measured in it."""

    machine: dict[str, Any]
    ceilings: Ceilings
    rows: tuple[Row, ...]


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: device, cores, versions. `load` is the load average when the run began."""
    from .timing import load_average
    from .torch_baseline import versions

    return {
        "device": device,
        "kind": jax.devices(device)[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(load_average(), 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **versions(),
    }


_COLUMNS = {
    "case": "case",
    "implementation": "implementation",
    "device": "device",
    "dtype": "dtype",
    "shape": "shape",
    "compile_ms": "compile, ms",
    "steady_ms": "steady, ms",
    "roofline": "of roofline",
    "baseline": "baseline",
    "speedup": "times as fast",
    "bar": "asked for",
    "values": "more",
    "note": "note",
}


def markdown(report: Report) -> str:
    """The report as a Markdown table under a line on the machine and one on its ceilings.

    >>> row = Row(case="block", implementation="ours", device="cpu", dtype="float32", shape="G=1", steady_ms=12.34)
    >>> report = Report({"cores": 2}, Ceilings(10.0, 20.0, 100.0), (row,))
    >>> print(markdown(report).splitlines()[-1])
    | block | ours | cpu | float32 | G=1 | - | 12.3 | - | - | - | - | - | - |
    """
    lines = [
        heading(report),
        "",
        "| " + " | ".join(_COLUMNS.values()) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    lines += ["| " + " | ".join(_cell(name, getattr(row, name)) for name in _COLUMNS) + " |" for row in report.rows]
    return "\n".join(lines)


def heading(report: Report) -> str:
    """A line on the machine and one on its ceilings."""
    ceilings = report.ceilings
    return (
        "Machine: " + ", ".join(f"{name} {value}" for name, value in report.machine.items()) + ".\n"
        f"Ceilings in this run: copy {ceilings.copy:.1f} GB/s, read {ceilings.read:.1f} GB/s, "
        f"{ceilings.dtype} product {ceilings.matmul:.0f} GFLOP/s. Times are medians."
    )


def _cell(name: str, value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "-"
    if name == "values":
        return ", ".join(f"{key}: {_number(number)}" for key, number in value.items())
    if name == "roofline":
        return f"{100 * value:.0f} %"
    if name in ("speedup", "bar"):
        return f"{value:.2f}"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(report: Report, path: str | os.PathLike) -> None:
    """The report as JSON: `machine`, `ceilings` (GB/s, GFLOP/s) and `rows` with the fields of `Row`."""
    Path(path).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")


def summary(rows: Sequence[Row]) -> str:
    """How many of the asked-for speedups were reached, in one line; "" if none was asked for.

    >>> summary([Row(case="a", implementation="b", device="cpu", dtype="f", shape="s", speedup=1.5, bar=1.0)])
    'Reached 1 of 1 asked for.'
    """
    asked = [row for row in rows if row.bar is not None and row.speedup is not None]
    short = [f"{row.case} ({row.shape}): {row.speedup:.2f} of {row.bar:.2f}" for row in asked if row.speedup < row.bar]
    if not asked:
        return ""
    text = f"Reached {len(asked) - len(short)} of {len(asked)} asked for."
    return text + (" Short: " + "; ".join(short) + "." if short else "")
