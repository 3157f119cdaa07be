"""What an expert gets: the tokens that it serves most, those that it serves more than others do, and where."""

import dataclasses

import numpy as np

from pallas_kernels.dims import Float, Int


@dataclasses.dataclass(frozen=True)
class TokenCount:
    """A token id, how often an expert served it, and `lift`: its share of the expert's tokens over that in the text."""

    token: int
    count: int
    lift: float


@dataclasses.dataclass(frozen=True)
class Context:
    """A place in the text: the token there, the router's weight for the expert, the ids on its left and right."""

    position: int
    weight: float
    left: tuple[int, ...]
    token: int
    right: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens that an expert gets, see `Usage.examples`; all empty where it served none."""

    frequent: tuple[TokenCount, ...]
    typical: tuple[TokenCount, ...]
    contexts: tuple[Context, ...]


def find(
    ids: Int[np.ndarray, " kept"],
    chosen: Int[np.ndarray, "kept A"],
    weights: Float[np.ndarray, "kept A"],
    expert: int,
    n: int,
    context: int,
) -> Examples:
    """The examples of one expert: text `ids`, and one layer's choices with their weights."""
    position, rank = np.nonzero(chosen == expert)
    served = ids[position]
    tokens, first, counts = np.unique(served, return_index=True, return_counts=True)
    lift = counts / max(len(served), 1) / (np.bincount(ids)[tokens] / len(ids))
    divergence = counts * np.log(lift)

    def best(values):
        order = np.lexsort((first, -values))[:n]
        return tuple(TokenCount(int(tokens[i]), int(counts[i]), float(lift[i])) for i in order)

    heaviest = np.argsort(-weights[position, rank], kind="stable")
    _, one_each = np.unique(served[heaviest], return_index=True)
    at = position[heaviest[np.sort(one_each)[:n]]]
    weight = weights[at][chosen[at] == expert]
    return Examples(best(counts), best(divergence), tuple(map(_context(ids, context), at.tolist(), weight.tolist())))


def _context(ids: Int[np.ndarray, " kept"], reach: int):
    def around(position: int, weight: float) -> Context:
        left, right = ids[max(0, position - reach) : position], ids[position + 1 : position + 1 + reach]
        return Context(position, weight, tuple(left.tolist()), int(ids[position]), tuple(right.tolist()))

    return around
