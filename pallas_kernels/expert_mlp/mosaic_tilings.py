"""Which tiling each call gets: a small table, measured on one H100 (docs/benchmarks.md)."""

import dataclasses
import math

from .mosaic_kernel import Tiling


@dataclasses.dataclass(frozen=True)
class Tilings:
    """Of the two products, over the same tiles."""

    up: Tiling
    down: Tiling


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
