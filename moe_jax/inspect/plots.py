"""Heat maps of a `Usage` as PNG files, by matplotlib."""

import math
import os

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .usage import Usage

#: Shares are shown from a quarter of a fair one to four times it, in steps that people with any colour vision tell.
_SPAN, _COLOURS = 2, "PuOr_r"
#: Panels of co-activation in a row.
_COLUMNS = 4


def plot_usage(usage: Usage, path: str | os.PathLike) -> None:
    """Draw layers x experts: each expert's choices over a fair share; green: none. `OSError` if it cannot be written.

    >>> import tempfile
    >>> from moe_jax.inspect.usage import example
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_usage(example(counts=[[3, 1, 0, 4], [2, 2, 2, 2]]), f"{folder}/usage.png")
    ...     os.listdir(folder)
    ['usage.png']
    """
    most = max(map(len, usage.counts))
    ratio = np.full((len(usage.counts), most), np.nan)
    for row, share in zip(ratio, usage.share, strict=True):
        row[: len(share)] = share * len(share)
    width, height = min(max(5.0, 2 + 0.25 * most), 18), min(max(2.5, 1.5 + 0.25 * len(ratio)), 14)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    colours = axes.imshow(_log(ratio), aspect="auto", cmap=_colours(), vmin=-_SPAN, vmax=_SPAN, interpolation="nearest")
    rows = range(0, len(usage.layers), max(1, len(usage.layers) // 16))
    axes.set_yticks(rows, [str(usage.layers[row]) for row in rows])
    axes.set(title=f"Use of experts over {usage.tokens} tokens", xlabel="expert", ylabel="layer")
    bar = figure.colorbar(colours, ticks=range(-_SPAN, _SPAN + 1), label="choices / fair share")
    bar.set_ticklabels(["1/4", "1/2", "1", "2", "4"])
    _save(figure, path)


def plot_co_activation(usage: Usage, path: str | os.PathLike) -> None:
    """Draw one panel per layer: of the tokens that the row's expert served, the part that the column's served too."""
    count = len(usage.pairs)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.6 * columns + 1, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.axis("off")
    parts = [together(pairs) for pairs in usage.pairs]
    most = max([np.nanmax(part) for part in parts if part.size > 1], default=0) or 1
    for panel, layer, part in zip(panels, usage.layers, parts, strict=False):
        colours = panel.imshow(part, cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.tick_params(labelsize=7)
    figure.colorbar(colours, ax=panels.tolist(), label="part of the row's tokens", shrink=min(1.0, 2 / rows))
    _save(figure, path)


def together(pairs: np.ndarray) -> np.ndarray:
    """Co-activation `[E, E]` as parts of each row's tokens, 0 to 1; the diagonal, which says nothing, is NaN.

    >>> together(np.array([[4, 1], [1, 2]])).tolist()
    [[nan, 0.25], [0.5, nan]]
    """
    part = pairs / np.maximum(pairs.diagonal(), 1)[:, None]
    np.fill_diagonal(part, np.nan)
    return part


def _colours():
    return colormaps[_COLOURS].with_extremes(under="#009e73", bad="none")


def _log(ratio: np.ndarray) -> np.ndarray:
    """Base-2 logarithms within the span; an expert without choices lies below it."""
    shown = np.clip(np.log2(ratio, out=np.full(ratio.shape, -np.inf), where=ratio != 0), -_SPAN, _SPAN)
    return np.where(ratio == 0, -_SPAN - 1, shown)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    FigureCanvasAgg(figure).print_png(path)
