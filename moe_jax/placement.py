"""Which rank holds which expert: a `Placement` for expert parallelism, made from counts of past routing.

Hot experts are held several times and their tokens split evenly, as in DeepSeek-V3 (arXiv:2412.19437, section 3.4;
https://github.com/deepseek-ai/EPLB). How often an expert is held and where it lies are chosen together, so that the
busiest rank has as little to do as possible. Letters of this file: `Lm` MoE layers, `P` slots of a layer on all ranks,
`M` most copies of an expert. Rank `r` of `n` holds the slots `[r * P/n, (r + 1) * P/n)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dims import Array, Float, Int

#: A layer's search ends this close to a lower bound, after so many rounds, or so many in a row without anything better.
_TOLERANCE, _ROUNDS, _PATIENCE = 0.005, 20, 5
#: Most copies that change owner in a try; spread of the factors that shuffle the order of packing.
_TRANSFERS, _SHUFFLE = 4, 0.3

_Loads = Float[np.ndarray, "tries ..."]
_Counts = Int[np.ndarray, "tries E"]
_Slots = Int[np.ndarray, "tries n P/n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The expert in each slot of each layer, and the number of ranks that share the slots evenly.

    `slots [Lm, P]` (kept as read-only int32): ids of experts; every expert lies in at least one slot of each layer.
    Compares and hashes by value. Raises `ValueError` where a field is not so.

    >>> placement = Placement([[0, 1, 0, 2]], ranks=2)
    >>> placement.num_experts, placement.num_slots
    (3, 4)
    >>> placement.imbalance([6, 1, 3])                      # 3 + 1 and 3 + 3 tokens, 5 in the mean
    array([1.2])
    """

    slots: Int[np.ndarray, "Lm P"]
    ranks: int

    def __post_init__(self):
        _integer("ranks", self.ranks, 1)
        slots = np.asarray(self.slots)
        if slots.ndim != 2 or not slots.size or slots.dtype.kind not in "iu":
            raise ValueError(f"slots: expected integers [Lm, P], got {slots.dtype} {list(slots.shape)}")
        if slots.shape[1] % self.ranks:
            raise ValueError(f"ranks: {self.ranks} do not share {slots.shape[1]} slots evenly")
        wrong = slots[(slots < 0) | (slots >= slots.shape[1])]
        if wrong.size:
            raise ValueError(f"slots: {wrong[0]} is no expert, of which {slots.shape[1]} slots hold no more")
        missing = np.argwhere(_count(slots) == 0)
        if len(missing):
            raise ValueError(f"slots: layer {missing[0, 0]} has no slot for expert {missing[0, 1]}")
        object.__setattr__(self, "slots", slots.astype(np.int32))
        self.slots.setflags(write=False)
        object.__setattr__(self, "ranks", int(self.ranks))

    @classmethod
    def identity(cls, layers: int, experts: int, ranks: int) -> "Placement":
        """Every expert once, in order; `ValueError` if `ranks` does not divide `experts`.

        >>> Placement.identity(2, 4, 2).slots.tolist()
        [[0, 1, 2, 3], [0, 1, 2, 3]]
        """
        return cls(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), ranks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Placement":
        """From what `to_dict` gives; `ValueError` for other keys.

        >>> Placement.from_dict({"slots": [[1, 0]], "ranks": 2}).to_dict()
        {'slots': [[1, 0]], 'ranks': 2}
        """
        if set(values) != {"slots", "ranks"}:
            raise ValueError(f"placement: expected the keys slots and ranks, got {sorted(values)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; see `from_dict`."""
        return {"slots": self.slots.tolist(), "ranks": self.ranks}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.ranks, self.slots.shape, self.slots.tobytes()))

    @property
    def num_experts(self) -> int:
        """Experts of a layer, `E`."""
        return int(self.slots.max()) + 1

    @property
    def num_slots(self) -> int:
        """Slots of a layer on all ranks together, `P`."""
        return self.slots.shape[1]

    def table(self) -> tuple[Int[np.ndarray, "Lm E M"], Int[np.ndarray, "Lm E"]]:
        """What `slots_of` looks up: each expert's slots, padded by repeating them, and how many there are; int32.

        Expert `e` of `c` copies begins with copy `e % c`, so that few tokens do not all meet the first ranks.

        >>> first_slots, copies = Placement([[0, 1, 0, 2]], ranks=2).table()
        >>> first_slots.tolist(), copies.tolist()
        ([[[0, 2], [1, 1], [3, 3]]], [[2, 1, 1]])
        """
        copies = _count(self.slots)
        turns = np.arange(copies.max()) + np.arange(self.num_experts)[:, None]
        index = (copies.cumsum(1) - copies)[..., None] + turns % copies[..., None]
        by_expert = np.argsort(self.slots, axis=1, kind="stable").astype(np.int32)
        by_copy = np.take_along_axis(by_expert, index.reshape(len(index), -1), axis=1)
        return by_copy.reshape(index.shape), copies.astype(np.int32)

    def imbalance(self, stats: Any) -> Float[np.ndarray, " Lm"]:
        """The busiest rank's tokens over the mean of the ranks, for each layer; 1 is perfect.

        `stats`: as for `balance`, of as many layers and experts. The tokens of an expert are split evenly among its
        copies. Raises `ValueError` for other shapes and values.
        """
        load = _loads(stats)
        if load.shape != (len(self.slots), self.num_experts):
            placed = f"{len(self.slots)} layers of {self.num_experts} experts"
            raise ValueError(f"stats: {placed} are placed, and {len(load)} of {load.shape[1]} counted")
        share = np.take_along_axis(load / _count(self.slots), self.slots, axis=1)
        totals = share.reshape(len(load), self.ranks, -1).sum(-1)
        return totals.max(1) / totals.mean(1)


def balance(stats: Any, expert_axis: int, replicas: int = 0) -> Placement:
    """A placement whose busiest rank has as few tokens as could be found.

    `stats [Lm, E]` (or `[E]`: one layer): tokens per layer and expert, at any scale; a layer of zeros counts as
    uniform. `expert_axis`: ranks. `replicas`: slots of a layer beyond `E`; 12.5 % bring Zipf(1.2) loads of 64 to 256
    experts within 1 % of the mean. No rank holds an expert twice unless it holds all of them. Layers are placed
    independently, equal numbers equally; without replicas, never worse than `Placement.identity`. Raises `ValueError`
    for other values, and for slots that the ranks cannot share evenly.

    Copies start where the largest share is (EPLB's rule) and are packed by longest processing time (Graham, 1969,
    doi:10.1137/0117039) and pairwise swaps; where that is not enough, copies change owner.

    >>> placement = balance([60, 20, 5, 5, 5, 5], expert_axis=2, replicas=2)
    >>> placement.slots.reshape(2, 4).tolist(), placement.imbalance([60, 20, 5, 5, 5, 5])
    ([[0, 1, 2, 4], [0, 1, 3, 5]], array([1.]))
    >>> balance([60, 20, 5, 5, 5, 5], expert_axis=4, replicas=1)
    Traceback (most recent call last):
    ...
    ValueError: replicas: 6 experts and 1 replicas are 7 slots, which 4 ranks do not share evenly; 2 replicas would do
    """
    load = _loads(stats)
    _integer("expert_axis", expert_axis, 1)
    _integer("replicas", replicas, 0)
    experts = load.shape[1]
    width, left = divmod(experts + replicas, expert_axis)
    if left:
        near = [str(r) for r in (replicas - left, replicas - left + expert_axis) if r >= 0]
        slots = f"{experts} experts and {replicas} replicas are {experts + replicas} slots"
        uneven = f"which {expert_axis} ranks do not share evenly; {' or '.join(near)} replicas would do"
        raise ValueError(f"replicas: {slots}, {uneven}")
    if width >= experts:
        return Placement(np.tile(np.arange(width * expert_axis) % width % experts, (len(load), 1)), expert_axis)
    return Placement(np.stack([_place(row, int(replicas), int(expert_axis)) for row in load]), expert_axis)


def slots_of(ids: Int[Array, "G A"], table: Int[Array, "E M"], copies: Int[Array, " E"]) -> Int[Array, "G A"]:
    """The slots that one layer's choices go to: token `g` takes copy `g % copies` of its expert.

    `ids`: experts; what is outside `[0, E)`, such as the -1 of a padded token, gives -1. `table`, `copies`: a layer of
    `Placement.table()`. Under `jit` too.

    >>> first_slots, copies = Placement([[0, 1, 0, 2]], ranks=2).table()
    >>> slots_of(jnp.array([[0, 1], [0, 2], [-1, 0]]), first_slots[0], copies[0]).tolist()
    [[0, 1], [2, 3], [-1, 0]]
    """
    ids, table, copies = (jnp.asarray(a) for a in (ids, table, copies))
    known = (ids >= 0) & (ids < table.shape[0])
    expert = jnp.where(known, ids, 0)
    return jnp.where(known, table[expert, jnp.arange(ids.shape[0])[:, None] % copies[expert]], -1)


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _loads(stats: Any) -> Float[np.ndarray, "Lm E"]:
    """Checked statistics in float64, each layer's largest 1, all 1 where it was 0."""
    values = np.asarray(stats)
    if values.ndim not in (1, 2) or not values.size or values.dtype.kind not in "iuf":
        raise ValueError(f"stats: expected counts [Lm, E] or [E], got {values.dtype} {list(values.shape)}")
    wrong = values[~((values >= 0) & (values < np.inf))]
    if wrong.size:
        raise ValueError(f"stats: {wrong[0]} is not a count of tokens")
    load = np.atleast_2d(values).astype(np.float64)
    load[~load.any(axis=1)] = 1
    return load / load.max(axis=1, keepdims=True)


def _count(slots: Int[np.ndarray, "Lm P"]) -> Int[np.ndarray, "Lm E"]:
    return np.stack([np.bincount(row, minlength=int(slots.max()) + 1) for row in slots])


def _place(load: Float[np.ndarray, " E"], replicas: int, ranks: int) -> Int[np.ndarray, " P"]:
    """One layer's slots: greedy copies, packed, and then random changes of both for as long as they help."""
    experts = load.size
    copies = np.ones(experts, np.int64)
    for _ in range(replicas):
        copies[np.where(copies < ranks, load / copies, -1).argmax()] += 1
    (slots,), (worst,) = _pack(load, copies[None], ranks, np.ones((1, experts)))
    coldest = 0 if replicas else np.sort(load)[: experts // ranks - 1].sum()
    floor = max(load.sum() / ranks, (load / copies).max() + coldest)
    random, stale, tries = np.random.default_rng(0), 0, min(max(4096 // experts, 8), 64)
    for _ in range(_ROUNDS):
        if worst <= floor * (1 + _TOLERANCE) or stale == _PATIENCE:
            break
        moved = _transfer(load, copies, ranks, random, tries) if replicas else np.tile(copies, (tries, 1))
        spread = _SHUFFLE * (np.arange(tries) >= (tries // 2 if replicas else 0))
        found, each = _pack(load, moved, ranks, np.exp(spread[:, None] * random.normal(size=moved.shape)))
        best = each.argmin()
        stale = 0 if each[best] < worst * (1 - 1e-9) else stale + 1
        if not stale:
            copies, slots, worst = moved[best], found[best], each[best]
    if not replicas and load.reshape(ranks, -1).sum(1).max() <= worst * (1 + 1e-9):
        return np.arange(experts)
    return np.sort(slots, axis=1).reshape(-1)


def _transfer(
    load: Float[np.ndarray, " E"], copies: Int[np.ndarray, " E"], ranks: int, random: np.random.Generator, tries: int
) -> _Counts:
    """`copies`, of which in each try one to `_TRANSFERS` have changed owner; every other try favours large shares."""
    moved, rows = np.tile(copies, (tries, 1)), np.arange(tries)
    number = random.integers(1, _TRANSFERS + 1, tries)
    for turn in range(_TRANSFERS):
        moving = turn < number
        giver = np.where(moved > 1, random.random(moved.shape), -1).argmax(1)
        moved[rows, giver] -= moving
        order = np.argsort(np.where(moved < ranks, -load / moved, np.inf), axis=1, kind="stable")
        place = random.random(tries) ** (1 + rows % 2) * (moved < ranks).sum(1)
        moved[rows, order[rows, place.astype(int)]] += moving
    return moved


def _pack(load: Float[np.ndarray, " E"], copies: _Counts, ranks: int, factors: _Loads) -> tuple[_Slots, _Loads]:
    """Slots for each try's `copies`, and its busiest rank's load `[tries]`; `factors` shuffle the order of packing."""
    share = load / copies
    slots = _fill(share, copies, ranks, np.argsort(-share * factors, axis=1, kind="stable"), False)
    stuck = (slots < 0).any(axis=(1, 2))
    if stuck.any():
        order = np.lexsort((-(share * factors)[stuck], copies[stuck] == 1))
        slots[stuck] = _fill(share[stuck], copies[stuck], ranks, order, True)
    return _swap(share, slots)


def _fill(share: _Loads, copies: _Counts, ranks: int, order: _Counts, even: bool) -> _Slots:
    """Expert by expert, the copies on the ranks that have least to do and a slot left; -1 where none was.

    `even`: experts of several copies, which must come first, go where most slots are left. So they always find enough.
    """
    tries, width = len(share), int(copies[0].sum()) // ranks
    slots = np.full((tries, ranks, width), -1)
    used, total = np.zeros((tries, ranks), np.int64), np.zeros((tries, ranks))
    rows = np.arange(tries)
    for expert in order.T:
        number, most = copies[rows, expert], int(copies[rows, expert].max())
        last = np.where((number > 1)[:, None] & even, used, used == width)
        busy = total + last * 2 * share.shape[1]  # no load is larger: shares are at most 1
        chosen = busy.argsort(axis=1, kind="stable")[:, :most] if most > 1 else busy.argmin(axis=1)[:, None]
        row, turn = np.nonzero((np.arange(most) < number[:, None]) & (used[rows[:, None], chosen] < width))
        rank = chosen[row, turn]
        slots[row, rank, used[row, rank]] = expert[row]
        used[row, rank] += 1
        total[row, rank] += share[row, expert[row]]
    return slots


def _swap(share: _Loads, slots: _Slots) -> tuple[_Slots, _Loads]:
    """Local search: the busiest rank swaps the slot that helps most, until none does; ends, as squared loads fall."""
    size = np.take_along_axis(share, slots.reshape(len(slots), -1), axis=1).reshape(slots.shape)
    total, active = size.sum(-1), np.arange(len(slots))
    while active.size:
        busy = total[active].argmax(1)
        same = slots[active, busy][:, :, None, None] == slots[active][:, None]
        gain = size[active, busy][:, :, None, None] - size[active][:, None]
        most = np.maximum(total[active, busy][:, None, None, None] - gain, total[active][:, None, :, None] + gain)
        most = np.where(same.any(3, keepdims=True) | same.any(1, keepdims=True), np.inf, most)
        best = most.reshape(len(most), -1).argmin(1)
        better = most.min((1, 2, 3)) < total[active, busy] * (1 - 1e-9)
        active, busy = active[better], busy[better]
        mine, other, slot = (index[better] for index in np.unravel_index(best, most.shape[1:]))
        here, there = (active, busy, mine), (active, other, slot)
        for array in (slots, size):
            array[here], array[there] = array[there], array[here]
        total[active] = size[active].sum(-1)
    return slots, total.max(1)
