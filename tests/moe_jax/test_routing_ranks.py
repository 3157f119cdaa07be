"""Ranks within buckets: both ways to find them against a loop."""

import numpy as np
import pytest

from moe_jax import routing

BUCKETS = 5


def ranks(bucket, key):
    """Rows of a bucket in the order of their keys, NaN last, equal ones by row."""
    order = sorted(range(len(bucket)), key=lambda i: (np.isnan(key[i]), 0 if np.isnan(key[i]) else key[i], i))
    rank, seen = np.zeros(len(bucket), int), np.zeros(BUCKETS + 1, int)
    for i in order:
        rank[i] = seen[bucket[i]]
        seen[bucket[i]] += 1
    return rank, seen[:BUCKETS]


@pytest.mark.parametrize("pairs", [0, 100], ids=["sorted", "compared"])
@pytest.mark.parametrize("rows", [0, 1, 100])
@pytest.mark.parametrize("dtype", [None, "int32", "float32"])
def test_ranks(pairs, rows, dtype, monkeypatch):
    monkeypatch.setattr(routing, "_PAIRS", pairs)
    rng = np.random.default_rng(rows)
    bucket = rng.integers(0, BUCKETS + 1, rows)
    key = rng.choice([-1.0, 0.0, 0.5, 2.0, np.inf, -np.inf, np.nan], rows) if dtype == "float32" else None
    if dtype == "int32":
        key = rng.integers(-2, 3, rows).astype(np.int32)
    rank, counts = routing.rank_within(bucket, BUCKETS, key)
    wanted = ranks(bucket, np.zeros(rows) if key is None else np.asarray(key, float))
    assert rank.dtype == counts.dtype == np.int32
    np.testing.assert_array_equal(rank, wanted[0])
    np.testing.assert_array_equal(counts, wanted[1])
