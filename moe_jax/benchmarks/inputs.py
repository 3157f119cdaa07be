"""Inputs of the accelerator benchmarks, drawn on the host: the same for every implementation and framework."""

import dataclasses
import functools
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from .shapes import MoEShape

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
#: Standard deviation of all weights; inputs have 1.
SCALE = 0.02
#: Most tokens whose outputs are checked.
PICKS = 8


def count(tokens: int) -> int:
    """How many inputs take turns, so that one routing's weights do not stay in the L2 cache.

    >>> [count(tokens) for tokens in (1, 32, 1024, 4096)]
    [16, 16, 8, 2]
    """
    return 16 if tokens <= 32 else 8 if tokens <= 1024 else 2


@dataclasses.dataclass(frozen=True)
class Inputs:
    """`rows [P, D]`, of which a benchmark of `G` tokens takes the first `count(G) * G`, and `router [D, E]`."""

    shape: MoEShape
    rows: np.ndarray
    router: np.ndarray

    @classmethod
    def draw(cls, shape: MoEShape, tokens: Sequence[int], dtype: str, seed: int = 0) -> "Inputs":
        """Rows enough for each of `tokens`, and a router."""
        rng = np.random.default_rng(seed)
        router = SCALE * rng.standard_normal((shape.width, shape.experts), np.float32)
        rows = rng.standard_normal((max(count(g) * g for g in tokens), shape.width), np.float32)
        return cls(shape, rows.astype(DTYPES[dtype]), router.astype(DTYPES[dtype]))

    def stacked(self, tokens: int) -> np.ndarray:
        """Inputs `[n, G, D]`."""
        return self.rows[: count(tokens) * tokens].reshape(count(tokens), tokens, -1)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """Router logits of all rows, float32 `[P, E]`."""
        router = self.router.astype(np.float32)
        blocks = range(0, len(self.rows), 4096)
        return np.concatenate([self.rows[i : i + 4096].astype(np.float32) @ router for i in blocks])

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Chosen experts of all rows, `[P, k]`, in no order: every score grows with its logit."""
        k = self.shape.top_k
        return np.argpartition(-self.logits, k - 1, 1)[:, :k]

    def active(self, tokens: int) -> float:
        """Experts that are chosen at all, averaged over the inputs."""
        ids = self.ids[: count(tokens) * tokens].reshape(count(tokens), -1)
        return float(np.mean([np.unique(one).size for one in ids]))

    def picks(self, tokens: int) -> list[tuple[int, int]]:
        """`PICKS` or fewer `(input, row)` of tokens to check, spread over inputs and rows, without close choices.

        A close choice may fall differently in another order of addition, which would be no error.
        """
        total, k = count(tokens) * tokens, self.shape.top_k
        candidates = np.unique(np.linspace(0, total - 1, 8 * PICKS).astype(int))
        ordered = -np.sort(-self.logits[candidates], 1)
        gap = ordered[:, k - 1] - ordered[:, k] if k < ordered.shape[1] else np.ones(len(ordered))
        parts = np.array_split(np.arange(len(candidates)), min(PICKS, len(candidates)))
        chosen = [candidates[part[np.argmax(gap[part])]] for part in parts]
        return [divmod(int(row), tokens) for row in chosen]
