"""Which tiling each call gets: a small table, measured on one H100 (docs/benchmarks.md)."""

import dataclasses
import math

from .mosaic_kernel import Tiling
from .mosaic_weight_gradient import STEP, GradientTiling


@dataclasses.dataclass(frozen=True)
class Tilings:
    """Of the two products, over the same tiles."""

    up: Tiling
    down: Tiling


@dataclasses.dataclass(frozen=True)
class BackwardTilings:
    """Of the products that give gradients of the hidden rows, of x, and of kernels stored as `[F, D]` and `[D, F]`.

    `gathers`: the kernels gather rows of x and of its gradient, instead of reading such as were gathered before.
    """

    hidden: Tiling
    x: Tiling
    fd: GradientTiling
    df: GradientTiling
    gathers: bool = True


#: Tokens up to which every active expert takes all of them, in place: reading weights is all the time there is.
IN_PLACE = 8
#: Rows that tiles can have; the most that two accumulators of 64 columns leave registers for.
TILE_ROWS = tuple(range(8, 161, 8))


def choose(tokens, choices, experts, rows=None) -> Tilings:
    """For `tokens` with `choices` each; `rows`: of the tiles, where the plan is made already."""
    mean = tokens * choices / experts.num_experts
    rows = tile_rows(tokens, mean) if rows is None else rows
    columns = 128 if experts.gate is not None else 256
    if rows <= 64:  # reading the weights is all the time there is: strips that go around evenly, deep rings
        large, one = experts.hidden >= 2048, tokens == 1  # of one token, wide strips would not go around
        up = Tiling(rows, columns // 2, 128, 5 if large else 3, 1, 1)
        down = Tiling(rows, 64, 128, 6, 1, 1)
        if large and not one:
            up = Tiling(rows, columns, 64, 5, 2, 1)
        if (large or rows > 8) and not one:
            down = Tiling(rows, 128, 64, 4, 2, 1, blocks=2)
    elif mean <= 200:
        up, down = Tiling(rows, columns, stages=3), Tiling(rows, 256, stages=3)
    else:
        long = mean > 600
        up = Tiling(rows, columns, group=16 if long else 8)
        down = Tiling(rows, 256, group=16 if long and experts.hidden > 4096 else 8)
    return Tilings(_fit(up, experts.hidden), _fit(down, experts.width))


def choose_backward(tokens, choices, experts, rows) -> BackwardTilings:
    """For the gradients of `tokens` with `choices` each, over tiles of `rows`."""
    mean = tokens * choices / experts.num_experts
    tiling = Tiling(rows, 256, group=16 if mean > 600 else 8)
    fd = gradient_tiling(experts.hidden, experts.width, gathered=1)
    df = gradient_tiling(experts.width, experts.hidden, gathered=0)
    return BackwardTilings(_fit(tiling, experts.hidden), _fit(tiling, experts.width), fd, df)


def gradient_tiling(rows: int, columns: int, gathered: int) -> GradientTiling:
    """For the gradient of kernels `[rows, columns]`; the side whose rows are gathered is the narrower one.

    >>> tiling = gradient_tiling(768, 192, gathered=1)
    >>> tiling.rows, tiling.columns, tiling.consumers
    (256, 128, 2)
    """
    rows = next(size for size in ((256, 128, 64) if gathered else (128, 64)) if size <= rows)
    columns = min(columns, 128 if gathered and rows > 128 else 256)
    return GradientTiling(rows, columns, consumers=1 if rows < 128 else 2, group=2 if gathered else 16)


def trained_rows(tokens: int, mean: float) -> int | None:
    """Rows of a tile where gradients are wanted, None for so few tokens that the tile would be in place.

    wgmma takes 64 rows in a row of swizzled tiles, and a gradient's steps must end where an expert's tiles do.

    >>> [trained_rows(tokens, mean) for tokens, mean in ((16384, 2048.0), (16384, 64.0), (100, 96.0), (64, 64.0))]
    [128, 64, 64, None]
    """
    if tokens <= STEP:
        return None
    return 2 * STEP if mean > 96 and tokens > 2 * STEP else STEP


def tile_rows(tokens: int, mean: float) -> int:
    """Rows of a tile for `tokens` with `mean` rows per expert.

    Tiles hold an expert's rows with room for more than the mean (of a random choice), in as many equal tiles as that
    takes: three standard deviations where a second tile would read the weights again for little, two where reading
    weights is most of the time, fewer where products are. Where experts have many rows, the size that multiplies
    fastest.

    >>> [tile_rows(16384, mean) for mean in (2.0, 16.0, 64.0, 256.0, 512.0, 1024.0)]
    [8, 32, 80, 144, 136, 128]
    """
    if tokens <= IN_PLACE:
        return 8
    if mean > 600:
        return 128
    room = mean + (3 if mean <= 32 else 2 if mean <= 200 else 1.4) * math.sqrt(mean)
    rows = room / math.ceil(room / TILE_ROWS[-1])
    return next(size for size in TILE_ROWS if size >= rows)


def _fit(tiling: Tiling, columns: int) -> Tiling:
    """With strips that are no wider than the columns there are."""
    while tiling.columns > columns:
        half = tiling.columns // 2
        tiling = dataclasses.replace(tiling, columns=half, consumers=min(tiling.consumers, half // 64))
    return tiling
