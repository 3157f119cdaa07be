"""Every exchange gives what the experts give on one device, wherever tokens and experts are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import exchange, make_mesh
from moe_jax.exchange import EXCHANGES, Work, all_to_all, chosen

EXPERTS, WIDTH, CHOICES = 16, 6, 3
RUNNING = [name for name in EXCHANGES if name != "ragged_all_to_all"]  # XLA has that one on accelerators only


@pytest.fixture(scope="module")
def matrices():
    return np.random.default_rng(0).standard_normal((EXPERTS, WIDTH, WIDTH))


def routings(tokens):
    """Ids `[G, A]` by what is odd about them."""
    rng = np.random.default_rng(1)
    spread = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)])
    padded = spread.copy()
    padded[::3] = -1
    first = np.tile(np.arange(CHOICES), (tokens, 1))
    return {"spread": spread, "padded": padded, "one expert": np.where(first > 0, -1, 5), "few experts": first}


def expected(matrices, rows, ids, weights):
    found = np.zeros(rows.shape)
    for g, a in np.argwhere(ids >= 0):
        found[g] += weights[g, a] * rows[g] @ matrices[ids[g, a]]
    return found


def run(name, matrices, rows, ids, weights, ranks, spread, size=None):
    """The output and the count of second passes over `ranks` of eight devices."""
    mesh = make_mesh(data=8 // ranks, expert=ranks)
    tokens = P("expert") if spread else P()
    form = functools.partial(all_to_all.exchange, size=size) if size else functools.partial(exchange.exchange, name)

    def on_one(matrices, rows, ids, weights):
        def own(rows, ids, weights, expected):
            parts = jnp.einsum("gd,gade->gae", rows, matrices[jnp.maximum(ids, 0)])
            return jnp.where(ids[..., None] >= 0, parts * weights[..., None], 0).sum(1)

        return form(Work(rows, ids, weights, own, len(matrices), ("expert",), spread))

    given = P("expert"), tokens, tokens, tokens
    mapped = jax.shard_map(on_one, mesh=mesh, in_specs=given, out_specs=(tokens, P()), check_vma=False)
    return jax.jit(mapped)(matrices.astype(np.float32), rows, ids, weights)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", RUNNING)
def test_all_give_the_same(name, ranks, spread, matrices):
    tokens = 24 if spread else 13  # 13 do not divide
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    weights = rng.random((tokens, CHOICES)).astype(np.float32)
    for ids in routings(tokens).values():
        got, _ = run(name, matrices, rows, ids.astype(np.int32), weights, ranks, spread)
        np.testing.assert_allclose(got, expected(matrices, rows, ids, weights), atol=2e-5)


@pytest.mark.parametrize(("routing", "size"), [("one expert", 1), ("one expert", 2), ("spread", 1), ("few experts", 8)])
def test_no_token_is_lost_where_there_is_no_room(routing, size, matrices):
    tokens, ranks = 32, 4
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    weights = rng.random((tokens, CHOICES)).astype(np.float32)
    ids = routings(tokens)[routing].astype(np.int32)
    got, beyond = run("all_to_all", matrices, rows, ids, weights, ranks, True, size)
    np.testing.assert_allclose(got, expected(matrices, rows, ids, weights), atol=2e-5)
    rank = np.where(ids >= 0, ids // (EXPERTS // ranks), ranks)
    pairs = (rank[:, :, None] == np.arange(ranks)).any(1).reshape(ranks, -1, ranks).sum(1)  # [from, to]
    assert int(beyond) == np.maximum(pairs - size, 0).sum()


def test_a_token_without_numbers_stays_alone(matrices):
    rows = np.ones((16, WIDTH), np.float32)
    rows[3] = np.nan
    ids = routings(16)["spread"].astype(np.int32)
    for name in RUNNING:
        got, _ = run(name, matrices, rows, ids, np.ones((16, CHOICES), np.float32), 8, True)
        assert np.isnan(got[3]).all()
        assert np.isfinite(np.delete(np.asarray(got), 3, 0)).all()


def test_the_choice_goes_by_size():
    assert chosen(tokens=1, choices=8, ranks=8) == "replicated"
    assert chosen(tokens=4096, choices=8, ranks=2) == "replicated"
    assert chosen(tokens=4096, choices=8, ranks=64) == "all_to_all"


def test_room_is_never_more_than_all_tokens_and_holds_uniform_routing():
    rng = np.random.default_rng(4)
    for tokens, choices, ranks in [(256, 8, 64), (1024, 2, 8), (64, 1, 4)]:
        size = all_to_all.room(tokens, choices, ranks)
        assert size <= tokens
        most = max((rng.integers(0, ranks, (tokens, choices)) == 0).any(1).sum() for _ in range(200))
        assert most <= size


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="'post' is no exchange; there are: replicated, ring, all_to_all, ragged"):
        exchange.check("post")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_ragged_exchange_lowers_for_accelerators(platform):
    mesh = make_mesh(expert=8)

    def on_one(rows, ids, weights):
        run = lambda rows, ids, weights, expected: rows * jnp.where(ids >= 0, weights, 0).sum(1, keepdims=True)
        work = Work(rows, ids, weights, run, 2, ("expert",), True)
        return EXCHANGES["ragged_all_to_all"](work)[0]

    mapped = jax.jit(jax.shard_map(on_one, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))
    given = jnp.zeros((64, 8)), jnp.zeros((64, 2), jnp.int32), jnp.zeros((64, 2))
    text = mapped.trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("ragged_all_to_all") >= 3
