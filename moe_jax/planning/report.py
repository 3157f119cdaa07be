"""Plans as tables and as JSON."""

import dataclasses
from collections import defaultdict
from typing import Any

from .collectives import Collective
from .devices import Device
from .kernels import Kernel
from .plan import Plan, StagePlan
from .search import Estimate


def as_text(plan: Plan) -> str:
    """Memory, collectives and rooflines of each device as tables, and what is to be known of them."""
    job, topology = plan.job, plan.topology
    mesh = ", ".join(f"{name} {size}" for name, size in plan.sizes.items())
    mesh += "" if job.rules == "spread" else f", tokens {job.rules}"
    stored = job.dtype + (f" with {job.quantize} weights" if job.quantize else "")
    stored += f" and {job.cache} cache" if job.cache else ""
    lines = [
        f"{job.name} on {topology.text}: {len(topology.devices)} x {topology.device.name}, mesh {mesh}",
        f"batch {job.batch}, context {job.context} of which {job.new} new, {stored}; compiled by {topology.compiler}",
        *([f"NOTE: {topology.note}"] if topology.note else []),
        "",
        *_table(["per device", *(one.stage for one in plan.stages)], _memory_rows(plan)),
        *(f"{one.stage}: {one.refusal}" for one in plan.stages if one.refusal),
    ]
    for one in plan.stages:
        if one.sent:
            header = [f"{one.stage}: sent by a device", "times", "over", "each", "in all"]
            lines += ["", *_table(header, _sent_rows(one.sent))]
    for one in plan.stages:
        if one.kernels:
            header = [f"{one.stage}: kernels", "times", "VMEM", "bytes", "GFLOP", "at best, ms", "limit"]
            lines += ["", *_table(header, [_kernel_row(kernel, topology.device) for kernel in one.kernels])]
    header = ["at best, ms", "memory", "compute", "wire", "limit", "compiled in"]
    lines += ["", *_table(header, [_roofline_row(one) for one in plan.stages])]
    step = plan.stages[-1].roofline.seconds
    lines.append(f"at most {job.batch / step:,.0f} tokens/s by decode steps; planned in {plan.seconds:.0f} s")
    return "\n".join(lines)


def _memory_rows(plan: Plan) -> list[list[str]]:
    rows: list[list[str]] = [
        ["weights"],
        ["KV cache"],
        ["temporaries"],
        ["the rest"],
        ["in all"],
        ["there is"],
        ["fits"],
    ]
    for one in plan.stages:
        known = [plan.weights, plan.cache]
        if one.memory is None:
            cells = [*map(_bytes, known), "?", "?", "?"]
        else:
            rest = one.memory.total - sum(known) - one.memory.temporaries
            cells = [*map(_bytes, (*known, one.memory.temporaries, rest, one.memory.total))]
        cells += [_bytes(plan.topology.device.memory), "yes" if plan.fits_in(one) else "NO"]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    return rows


def _sent_rows(sent: list[Collective]) -> list[list[str]]:
    """Collectives of equal kind, size and group in one row, the most bytes first."""
    merged: dict[tuple, list[Collective]] = defaultdict(list)
    for one in sent:
        merged[one.kind, one.branch, len(one.devices), one.sent / one.times, one.counted].append(one)
    rows = []
    for (kind, branch, size, each, counted), alike in merged.items():
        times, total = sum(one.times for one in alike), sum(one.sent for one in alike)
        name = kind + (", if an exchange overflows" if branch else "") + ("" if counted else ", each turn of a loop")
        rows.append((branch, -total, [name, f"{times}", f"{size}", _bytes(each), _bytes(total)]))
    return [row for *_, row in sorted(rows)]


def _kernel_row(one: Kernel, device: Device) -> list[str]:
    """Bytes, operations and time of all calls together."""
    name = one.name + (", if an exchange overflows" if one.branch else "") + ("" if one.counted else ", each turn")
    moved, flops, best = (one.times * x for x in (one.nbytes, one.flops, 1e3 * one.seconds(device)))
    return [
        name,
        f"{one.times}",
        _bytes(one.vmem),
        _bytes(moved),
        f"{flops / 1e9:.3g}",
        f"{best:.3g}",
        one.limit(device),
    ]


def _roofline_row(one: StagePlan) -> list[str]:
    limits = one.roofline
    wire = f"{1e3 * limits.wire:.3g}" if one.memory else "?"
    cells = [f"{1e3 * limits.memory:.3g}", f"{1e3 * limits.compute:.3g}", wire, limits.limit]
    return [one.stage, *cells, f"{one.seconds:.1f} s"]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as they need to be, the first one to the left."""
    every = [header, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
    return [line(row).rstrip() for row in every]


def estimates_as_text(found: list[Estimate], memory: float, most: int = 8) -> str:
    """The first `most` meshes of a search as a table."""
    header = ["mesh (data x expert x model), estimated", "tokens", "memory", "fits", "prefill, ms", "step, ms"]
    rows = [
        [
            " x ".join(str(size) for size in one.sizes.values()),
            one.rules,
            _bytes(one.nbytes),
            "yes" if one.nbytes <= memory else "no",
            f"{1e3 * one.prefill:.0f}",
            f"{1e3 * one.step:.2f}",
        ]
        for one in found[:most]
    ]
    return "\n".join(_table(header, rows))


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan in plain values: bytes, seconds, and names."""
    stages = {}
    for one in plan.stages:
        memory = one.memory and dataclasses.asdict(one.memory) | {"total": one.memory.total}
        sent = [dataclasses.asdict(c) | {"devices": len(c.devices), "sent": c.sent} for c in one.sent]
        limits = dataclasses.asdict(one.roofline) | {"limit": one.roofline.limit}
        stages[one.stage] = {
            "memory": memory,
            "fits": plan.fits_in(one),
            "refusal": one.refusal,
            "collectives": sent,
            "kernels": [dataclasses.asdict(k) | {"seconds": k.seconds(plan.topology.device)} for k in one.kernels],
            "roofline": limits,
            "compile_seconds": one.seconds,
        }
    job = {f.name: getattr(plan.job, f.name) for f in dataclasses.fields(plan.job) if f.name != "config"}
    return {
        "job": job,
        "topology": plan.topology.text,
        "devices": len(plan.topology.devices),
        "compiler": plan.topology.compiler,
        "note": plan.topology.note,
        "mesh": plan.sizes,
        "weights": plan.weights,
        "cache": plan.cache,
        "device_memory": plan.topology.device.memory,
        "fits": plan.fits,
        "stages": stages,
        "seconds": plan.seconds,
    }


def _bytes(nbytes: float) -> str:
    """In the largest unit of which there is one.

    >>> _bytes(12_880_000_000), _bytes(-999.6), _bytes(40)
    ('12.88 GB', '-1.00 kB', '40 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= 0.999 * size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:.0f} B"
