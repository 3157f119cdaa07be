"""A run of whole models on an accelerator: model by model, then ceilings, then tables."""

import dataclasses
import sys
import time
from collections.abc import Sequence

from . import device_model
from .accelerator import ceilings_of, pace_of
from .models import find_config, stored_as
from .table import Report, Row, heading, machine, write_json

#: What there is to measure.
WHAT = ("decode", "prefill")


def run(
    options: device_model.Options, models: Sequence[str], json: str | None = None, quantize: str | None = None
) -> int:
    """Measure, print a table, and write the JSON file after each model. Returns 1 if anything failed, else 0.

    `quantize`: see `models.stored_as`. Ceilings are measured after the first model, whose memory they would spoil.
    `ValueError` for models that there are not.
    """
    stored = [stored_as(find_config(name, options.layers), quantize) for name in models]
    begin, device = time.perf_counter(), options.device
    about, rows, ceilings = machine(device.platform), [], None
    for name, form in zip(models, stored, strict=True):
        options = dataclasses.replace(options, quantized=form)
        found = device_model.run(name, options)
        ceilings = ceilings or ceilings_of(device, options.dtype, pace_of(device))
        rows += device_model.rows(name, options, found, ceilings)
        report = Report(about, ceilings, tuple(rows))
        print(f"{time.perf_counter() - begin:4.0f} s  {name} measured", file=sys.stderr, flush=True)
        if json:
            write_json(report, json)
    print(heading(report), "", table(rows), sep="\n")
    for row in (bad := [row for row in rows if row.steady_ms is None]):
        print(f"{row.case} {row.model} {row.shape}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


def table(rows: Sequence[Row]) -> str:
    """Rows of one case as a Markdown table.

    >>> about = dict(case="decode", implementation="moe_jax", device="gpu", dtype="bfloat16", model="m")
    >>> row = Row(shape="B=1", steady_ms=2.0, roofline=0.5, values={"tokens/s": 500.0, "peak over": 0.9}, **about)
    >>> print(table([row, Row(shape="B=9", note="failed: no memory", **about)]))
    | model | dtype | run | tokens/s | ms a step | of the memory's rate | peak over weights + cache + 1 GB |
    |---|---|---|---|---|---|---|
    | m | bfloat16 | B=1 | 500 | 2.000 | 50.0% | 0.9 |
    | m | bfloat16 | B=9 | failed: no memory |
    """
    decode = rows[0].case == "decode"
    names = {
        "tokens/s": "tokens/s",
        "by steps": "by steps",
        "steady": "ms a step" if decode else "ms",
        "roofline": "of the memory's rate" if decode else "of the products' rate",
        "first token, ms": "first token, ms",
        "compile": "compile, s",
        "compile from cache, s": "from cache, s",
        "GB a step": "GB a step",
        "TFLOP": "TFLOP",
        "active experts": "active experts",
        "weights, GB": "weights, GB",
        "cache, GB": "cache, GB",
        "peak, GB": "peak, GB",
        "peak over": "peak over weights + cache + 1 GB",
    }
    cells = [_cells(row) for row in rows]
    used = [name for name in names if any(name in texts for texts in cells)]
    lines = [["model", "dtype", "run", *(names[name] for name in used)]]
    for row, texts in zip(rows, cells, strict=True):
        figures = [texts.get(name, "-") for name in used] if texts else [row.note]
        lines.append([row.model, row.dtype, row.shape, *figures])
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


def _cells(row: Row) -> dict[str, str]:
    if row.steady_ms is None:
        return {}
    texts = {"steady": f"{row.steady_ms:.3f}", "roofline": f"{100 * row.roofline:.1f}%"}
    if row.compile_ms is not None:
        texts["compile"] = f"{row.compile_ms / 1e3:.1f}"
    return texts | {name: f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for name, value in row.values.items()}
