"""How tokens meet the experts of other devices: the forms by name, and the choice between them."""

import jax
import jax.numpy as jnp

from . import all_to_all, ragged, replicated, ring
from .value import Work


def _uncounted(run):
    return lambda work: (run(work), jnp.zeros((), jnp.int32))


EXCHANGES = {
    "replicated": _uncounted(replicated.exchange),
    "ring": _uncounted(ring.exchange),
    "all_to_all": all_to_all.exchange,
    "ragged_all_to_all": _uncounted(ragged.exchange),
}


def check(name: str | None) -> None:
    """`ValueError` for a name that is neither None nor one of the exchanges."""
    if name is not None and name not in EXCHANGES:
        raise ValueError(f"implementation: {name!r} is no exchange; there are: {', '.join(EXCHANGES)}")


def chosen(tokens: int, choices: int, ranks: int) -> str:
    """The exchange of `tokens` per rank where none is named.

    Tokens that go only where their experts are need fewer bytes once most ranks hold none of theirs, but one more step
    to find their places, and buffers: that pays for many tokens.

    >>> chosen(8, 8, 64), chosen(2048, 8, 4), chosen(2048, 8, 64)
    ('replicated', 'replicated', 'all_to_all')
    """
    return "all_to_all" if tokens >= 64 and all_to_all.room(tokens, choices, ranks) <= tokens // 2 else "replicated"


def exchange(name: str | None, work: Work) -> tuple[jax.Array, jax.Array]:
    """Every token's experts, wherever they are: the output `[G, D]`, and how many choices took a second pass.

    The exchange of that `name`, or for None the one that `chosen` says; all give the same but for the order of sums.
    """
    check(name)
    tokens, choices = work.ids.shape
    per_rank = tokens if work.spread else -(-tokens // work.ranks)
    with jax.named_scope("exchange"):
        return EXCHANGES[name or chosen(per_rank, choices, work.ranks)](work)
