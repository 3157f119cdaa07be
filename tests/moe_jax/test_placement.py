"""Placements of experts on ranks: near the mean on skewed routing, near the optimum where that can be enumerated.

Loads fall off as Zipf(1.2) with another order of the experts in each layer; traces draw each token's experts from them.
"""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement import Placement, balance, slots_of

SIZES = [(64, 8), (128, 8), (256, 8), (256, 32)]


def zipf(layers, experts, seed=0):
    weights = np.arange(1, experts + 1) ** -1.2
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(weights) for _ in range(layers)])


def trace(weights, tokens, top_k=8, seed=0):
    """Experts `[Lm, G, A]` drawn without replacement: the largest of log weights with Gumbel noise."""
    random = np.random.default_rng(seed)
    keys = np.log(weights)[:, None] + random.gumbel(size=(len(weights), tokens, weights.shape[1]))
    return np.argpartition(-keys, top_k, axis=-1)[..., :top_k].astype(np.int32)


def counts(ids, experts):
    return np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in ids])


def by_rank(placement):
    return placement.slots.reshape(len(placement.slots), placement.ranks, -1)


def holds_twice(placement):
    ordered = np.sort(by_rank(placement), axis=-1)
    return bool((ordered[..., 1:] == ordered[..., :-1]).any())


def floor_without_replicas(load, ranks):
    """The hottest expert's rank at best holds the coldest besides; no rank is below the mean."""
    ordered = np.sort(np.asarray(load, float), axis=1)
    forced = ordered[:, -1] + ordered[:, : load.shape[1] // ranks - 1].sum(1)
    return np.maximum(forced / ordered.sum(1) * ranks, 1)


def packings(slots, ranks):
    """All ways to share out `slots` slots evenly, `[ways, ranks, slots / ranks]`."""

    def rest(left):
        if not left:
            yield ()
        for others in itertools.combinations(left[1:], slots // ranks - 1) if left else ():
            group = (left[0], *others)
            for more in rest([slot for slot in left if slot not in group]):
                yield (group, *more)

    return np.array(list(rest(list(range(slots)))))


def optimum(load, ranks, replicas):
    """A layer's least imbalance over all numbers of copies and all packings without an expert twice on a rank."""
    experts, least = len(load), np.inf
    ways = packings(experts + replicas, ranks)
    for extra in itertools.combinations_with_replacement(range(experts), replicas):
        copies = 1 + np.bincount(np.array(extra, int), minlength=experts)
        groups = np.sort(np.repeat(np.arange(experts), copies)[ways], axis=-1)
        groups = groups[~(groups[..., 1:] == groups[..., :-1]).any((1, 2))]
        least = min(least, (load / copies)[groups].sum(-1).max(-1).min(initial=np.inf))
    return least / load.sum() * ranks


@pytest.mark.parametrize("experts, ranks", SIZES)
def test_an_eighth_more_slots_balance_zipf_loads(experts, ranks):
    load = zipf(8, experts)
    placement = balance(load, ranks, experts // 8)
    assert placement.num_slots == experts * 9 // 8 and placement.num_experts == experts
    assert placement.imbalance(load).max() < 1.001
    assert not holds_twice(placement)


@pytest.mark.parametrize("experts, ranks", SIZES)
def test_tokens_not_counted_before_are_balanced_too(experts, ranks):
    """Statistics of 8192 tokens place the experts for 8192 others, whose slots `slots_of` chooses under `jit`."""
    weights = zipf(3, experts, seed=1)
    past, ids = trace(weights, 8192, seed=2), trace(weights, 8192, seed=3)
    assert Placement.identity(3, experts, ranks).imbalance(counts(ids, experts)).min() > 1.25
    placement = balance(counts(past, experts), ranks, experts // 8)
    assert placement.imbalance(counts(past, experts)).max() < 1.005
    slots = np.asarray(jax.jit(jax.vmap(slots_of))(jnp.asarray(ids), *placement.table()))
    np.testing.assert_array_equal(placement.slots[np.arange(3)[:, None, None], slots], ids)
    load = counts(slots, placement.num_slots).reshape(3, ranks, -1).sum(-1)
    assert (load.max(1) / load.mean(1)).max() < 1.1
    np.testing.assert_allclose(load.max(1) / load.mean(1), placement.imbalance(counts(ids, experts)), rtol=0.02)


def test_many_layers_take_seconds():
    load = zipf(64, 256)
    start = time.process_time()
    placement = balance(load, 32, 32)
    assert time.process_time() - start < 10  # 0.6 s on an idle core
    assert placement.imbalance(load).max() < 1.001


@pytest.mark.parametrize("experts, ranks", SIZES)
def test_without_replicas_only_the_hottest_expert_is_in_the_way(experts, ranks):
    for load in (zipf(4, experts), counts(trace(zipf(4, experts), 2048), experts)):
        placement = balance(load, ranks)
        np.testing.assert_allclose(placement.imbalance(load), floor_without_replicas(load, ranks), rtol=0.006)
        assert placement.imbalance(load).max() < Placement.identity(4, experts, ranks).imbalance(load).max() - 0.1


def test_without_replicas_never_worse_than_in_order():
    random = np.random.default_rng(0)
    for experts, ranks in [(4, 2), (6, 3), (9, 3), (12, 4), (16, 16), (30, 2)]:
        load = random.gamma(1.0, size=(20, experts))
        kept = Placement.identity(20, experts, ranks)
        gain = kept.imbalance(load) - balance(load, ranks).imbalance(load)
        assert gain.min() >= 0
        assert gain.max() > 0.01 or ranks == experts


def test_what_is_balanced_stays_in_order():
    np.testing.assert_array_equal(balance(np.full((2, 12), 7), 4).slots, Placement.identity(2, 12, 4).slots)


@pytest.mark.parametrize(
    "experts, ranks, replicas", [(9, 3, 0), (12, 3, 0), (5, 4, 3), (6, 4, 2), (6, 3, 3), (8, 2, 2)]
)
def test_close_to_exhaustive_search(experts, ranks, replicas):
    load = np.random.default_rng(0).lognormal(size=(10, experts))
    best = np.array([optimum(row, ranks, replicas) for row in load])
    ratio = balance(load, ranks, replicas).imbalance(load) / best
    assert ratio.min() > 1 - 1e-9  # or the search was not exhaustive
    assert ratio.max() < 1.03 and ratio.mean() < 1.004


def test_copies_are_chosen_for_the_ranks_and_not_only_for_the_largest_share():
    """Two copies each for three of five equal experts would leave a rank 1.2 times the mean; four of one leave none."""
    placement = balance(np.ones(5), 4, 3)
    assert sorted(placement.table()[1][0].tolist()) == [1, 1, 1, 1, 4]
    np.testing.assert_allclose(placement.imbalance(np.ones(5)), 1)


def test_no_rank_holds_an_expert_twice():
    random = np.random.default_rng(0)
    for _ in range(60):
        experts, ranks = int(random.integers(2, 20)), int(random.integers(2, 9))
        width = int(random.integers(-(-experts // ranks), experts + 1))
        load = random.choice([np.ones(experts), random.gamma(0.3, size=experts), random.integers(0, 2, experts)])
        placement = balance(load, ranks, width * ranks - experts)
        assert placement.num_experts == experts and not holds_twice(placement)


def test_ranks_that_hold_everything_do_the_same():
    placement = balance([5.0, 0, 1], 2, 7)
    np.testing.assert_array_equal(placement.slots, [[0, 1, 2, 0, 1] * 2])
    assert placement.imbalance([5.0, 0, 1]) == 1
    np.testing.assert_array_equal(balance([[3, 1, 2]], 1).slots, [[0, 1, 2]])


def test_a_layer_depends_on_its_own_proportions_only():
    load = np.random.default_rng(0).gamma(0.5, size=(6, 16)).astype(np.float32)
    together = balance(load, 4, 4)
    scaled = balance(load.astype(float) * 2.0 ** np.arange(-900, 901, 360)[:, None], 4, 4)
    assert scaled == together
    for row, slots in zip(load, together.slots, strict=True):
        np.testing.assert_array_equal(balance(row, 4, 4).slots, slots[None])
    assert together == balance(load.astype(float), np.int64(4), np.int32(4)) == balance(jnp.asarray(load), 4, 4)


def test_no_tokens_count_as_uniform():
    load = np.array([[0, 0, 0, 0, 0, 0], [9, 1, 1, 1, 1, 5]])
    uniform = np.where(load.any(1, keepdims=True), load, 1)
    assert balance(load, 4, 2) == balance(uniform, 4, 2)
    np.testing.assert_array_equal(balance(load, 4, 2).imbalance(load), balance(load, 4, 2).imbalance(uniform))


def test_imbalance_by_hand():
    placement = Placement([[0, 1, 2, 0], [2, 1, 0, 2]], 2)
    stats = [[4, 1, 3], [1, 1, 8]]  # ranks: 2 + 1 and 3 + 2; 4 + 1 and 1 + 4
    found = placement.imbalance(stats)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [5 / 4, 1])


def test_table_lists_every_copy_and_repeats():
    placement = balance(zipf(3, 16), 4, 8)
    table, copies = placement.table()
    assert table.dtype == copies.dtype == np.int32
    assert table.shape == (3, 16, copies.max()) and copies.max() > 2 and copies.min() == 1
    for layer, expert in np.ndindex(3, 16):
        row, number = table[layer, expert], copies[layer, expert]
        assert sorted(row[:number]) == np.flatnonzero(placement.slots[layer] == expert).tolist()
        np.testing.assert_array_equal(row, np.resize(row[:number], len(row)))


def test_first_copies_are_not_all_on_the_first_ranks():
    """A step of one token takes first copies only."""
    table, copies = Placement([[*range(8), *range(8)]], 4).table()
    assert (copies == 2).all() and set((table[0, :, 0] // 4).tolist()) == {0, 1, 2, 3}


def test_slots_of_takes_copies_in_turn():
    table, copies = (a[0] for a in balance(zipf(1, 16), 4, 8).table())
    ids = np.random.default_rng(0).integers(-2, 18, (50, 3)).astype(np.int32)
    found = np.asarray(jax.jit(slots_of)(ids, table, copies))
    assert found.dtype == np.int32
    for (token, choice), expert in np.ndenumerate(ids):
        want = table[expert, token % copies[expert]] if 0 <= expert < 16 else -1
        assert found[token, choice] == want
    others = ids.copy()
    others[1::2] = -1
    np.testing.assert_array_equal(slots_of(others, table, copies)[::2], found[::2])
    assert slots_of(jnp.zeros((0, 3), int), table, copies).shape == (0, 3)


def test_the_tokens_of_an_expert_are_split_evenly():
    table, copies = (a[0] for a in balance([90, 5, 5, 10], 4, 4).table())
    slots = np.asarray(slots_of(np.zeros((101, 1), np.int32), table, copies))
    split = np.bincount(slots[:, 0])[table[0, : copies[0]]]
    assert copies[0] == 4 and split.sum() == 101 and np.ptp(split) == 1


def test_to_json_and_back():
    placement = balance(zipf(2, 8), np.int64(4), 4)
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert again == placement and hash(again) == hash(placement)
    assert again != Placement(placement.slots, 2) and again != Placement(placement.slots[:1], 4) and again != 1


def test_placements_do_not_change():
    slots = np.array([[0, 1]])
    placement = Placement(slots, 1)
    slots[0, 0] = 1
    assert placement.slots.tolist() == [[0, 1]] and placement.slots.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        placement.slots[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.ranks = 2


@pytest.mark.parametrize(
    "stats, expert_axis, replicas, message",
    [
        ([1, -2], 1, 0, "stats: -2 is not a count"),
        ([[1.0, np.nan]], 1, 0, "stats: nan is not a count"),
        ([1.0, np.inf], 1, 0, "stats: inf is not a count"),
        (3, 1, 0, r"stats: expected counts \[Lm, E\] or \[E\], got int64 \[\]"),
        (np.ones((1, 2, 3)), 1, 0, r"stats: .* float64 \[1, 2, 3\]"),
        ([], 1, 0, r"stats: .* \[0\]"),
        (["a"], 1, 0, "stats: .* <U1"),
        ([1, 2], 0, 0, "expert_axis: .* at least 1, got 0"),
        ([1, 2], 2.0, 0, "expert_axis: .* got 2.0"),
        ([1, 2], 1, -1, "replicas: .* at least 0, got -1"),
        ([1, 2], 1, True, "replicas: .* got True"),
        (np.ones(64), 8, 13, "64 experts and 13 replicas are 77 slots, which 8 ranks .* evenly; 8 or 16 replicas"),
        (np.ones(6), 4, 1, "7 slots, which 4 ranks do not share evenly; 2 replicas would do"),
        (np.ones(6), 4, 0, "6 slots, which 4 ranks do not share evenly; 2 replicas would do"),
    ],
)
def test_refusals(stats, expert_axis, replicas, message):
    with pytest.raises(ValueError, match=message):
        balance(stats, expert_axis, replicas)


@pytest.mark.parametrize(
    "slots, ranks, message",
    [
        ([0, 1], 1, r"slots: expected integers \[Lm, P\], got int64 \[2\]"),
        ([[0.0, 1.0]], 1, "slots: .* float64"),
        (np.zeros((0, 2), int), 1, r"slots: .* \[0, 2\]"),
        ([[0, 1, 2]], 2, "ranks: 2 do not share 3 slots"),
        ([[0, 1]], 0, "ranks: .* got 0"),
        ([[0, -1]], 1, "slots: -1 is no expert"),
        ([[0, 7]], 1, "slots: 7 is no expert"),
        ([[0, 1, 2], [0, 2, 2]], 1, "slots: layer 1 has no slot for expert 1"),
    ],
)
def test_placements_are_checked(slots, ranks, message):
    with pytest.raises(ValueError, match=message):
        Placement(slots, ranks)


def test_other_refusals():
    with pytest.raises(ValueError, match="ranks: 4 do not share 6 slots"):
        Placement.identity(1, 6, 4)
    with pytest.raises(ValueError, match="keys slots and ranks, got .*'rank'"):
        Placement.from_dict({"slots": [[0]], "rank": 1})
    with pytest.raises(ValueError, match="stats: 1 layers of 2 experts are placed, and 1 of 3 counted"):
        Placement([[0, 1]], 1).imbalance([1, 2, 3])
