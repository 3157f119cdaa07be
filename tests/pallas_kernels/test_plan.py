"""`make_plan` against a plain Python oracle, and its contract as properties."""

import dataclasses
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_tpu import without_races  # noqa: F401  a fixture for all tests

from pallas_kernels import Plan, make_plan
from pallas_kernels.plan import tile_bound

plan_of = jax.jit(make_plan, static_argnums=(1, 2))


def host(plan):
    """The plan's fields as NumPy arrays and plain values (a `Plan` itself holds JAX arrays only)."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    fields = {name: v if isinstance(v, int) else np.asarray(v) for name, v in fields.items()}
    return types.SimpleNamespace(**fields, max_tiles=plan.max_tiles)


# G, A, E, tile_rows; the last column says what the shape is there for.
SHAPES = [
    (13, 2, 5, 4),  # E not a power of two, several tiles per expert
    (13, 2, 5, 1),  # one row per tile
    (13, 2, 5, 16),  # in place, rows to spare
    (4, 3, 3, 4),  # k = E, in place with tile_rows = G
    (7, 5, 5, 3),  # k = E
    (3, 2, 60, 2),  # more experts than rows
    (1, 1, 1, 1),  # the least
    (0, 2, 5, 8),  # no token
    (3, 0, 5, 2),  # no choice
]


def oracle(ids, num_experts, tile_rows):
    """Tiles as (expert, rows), a row being the list of choices it may serve, and each choice's row."""
    tokens, choices = ids.shape
    in_place = tile_rows >= tokens
    tiles, slot = [], {}
    for e in range(num_experts):
        mine = [(g, a) for g in range(tokens) for a in range(choices) if ids[g, a] == e]
        if in_place and mine:
            for g, a in mine:
                slot[g, a] = len(tiles) * tile_rows + g
            tiles.append((e, [[g * choices + a for h, a in mine if h == g] for g in range(tile_rows)]))
        for start in range(0, 0 if in_place else len(mine), tile_rows):
            part = mine[start : start + tile_rows]
            for i, (g, a) in enumerate(part):
                slot[g, a] = len(tiles) * tile_rows + i
            rows = [[g * choices + a] for g, a in part]
            tiles.append((e, rows + [[]] * (tile_rows - len(part))))
    return tiles, slot


def patterns(shape):
    """Choices of every kind for `shape`: name -> ids."""
    tokens, choices, experts, _ = shape
    rng = np.random.default_rng(3)
    distinct = np.argsort(rng.random((tokens, max(experts, choices))), axis=1)[:, :choices]
    return {
        "distinct": distinct,
        "duplicates in a row": rng.integers(0, experts, (tokens, choices)),
        "outside": rng.integers(-2, experts + 3, (tokens, choices)),
        "all outside": np.where(rng.random((tokens, choices)) < 0.5, -1, experts),
        "far outside": np.where(rng.random((tokens, choices)) < 0.5, np.iinfo(np.int32).min, np.iinfo(np.int32).max),
        "one expert takes all": np.full((tokens, choices), experts - 1),
    }


def check(plan, ids, num_experts, tile_rows):
    """Every field of `plan`, host arrays, against the oracle."""
    tokens, choices = ids.shape
    rows = tokens * choices
    tiles, slot = oracle(ids, num_experts, tile_rows)
    bound = max(1, min(math.ceil(rows / tile_rows) + min(num_experts, rows), rows))

    assert plan.max_tiles == plan.tile_expert.shape[0] <= bound
    assert plan.row_choice.shape == (plan.max_tiles * tile_rows,)
    assert all(v.dtype == np.int32 for v in (plan.row_choice, plan.slot, plan.tile_expert, plan.num_tiles))
    assert plan.num_tiles == len(tiles) <= plan.max_tiles
    assert plan.in_place == (tile_rows >= tokens) and plan.tile_rows == tile_rows

    past = [num_experts - 1] * (plan.max_tiles - len(tiles))
    assert plan.tile_expert.tolist() == [e for e, _ in tiles] + past
    nowhere = plan.max_tiles * tile_rows
    want = [[slot.get((g, a), nowhere) for a in range(choices)] for g in range(tokens)]
    assert plan.slot.tolist() == want
    served = [choice for _, tile in tiles for choice in tile] + [[]] * (tile_rows * len(past))
    assert len(served) == plan.row_choice.shape[0]
    for choice, allowed in zip(plan.row_choice.tolist(), served, strict=True):
        assert choice in (allowed or [rows])


@pytest.mark.parametrize("implementation", [None, "tpu_interpreted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_field_is_the_oracles(shape, implementation):
    run = jax.jit(lambda ids: make_plan(ids, *shape[2:], implementation=implementation))
    for ids in patterns(shape).values():
        ids = ids.astype(np.int32)
        if implementation and (shape[3] >= shape[0] or shape[1] == 0):
            with pytest.raises(ValueError, match="a plan in place, which needs no ranks|no choices"):
                run(ids)
        else:
            check(host(run(ids)), ids, *shape[2:])


def test_a_duplicate_in_place_shares_the_row_of_its_token():
    plan = plan_of(np.array([[2, 2, 9], [1, 2, -1], [1, 1, 1], [9, 9, 9]], np.int32), 3, 4)
    assert plan.in_place and plan.num_tiles == 2
    nowhere = plan.max_tiles * 4
    assert plan.slot.tolist() == [[4, 4, nowhere], [1, 5, nowhere], [2, 2, 2], [nowhere] * 3]


def test_the_plan_is_a_pytree_with_static_layout():
    plan = plan_of(np.zeros((1, 1), np.int32), 1, 1)
    leaves, treedef = jax.tree.flatten(plan)
    assert len(leaves) == 4
    again = jax.jit(lambda p: p)(plan)
    assert isinstance(again, Plan) and (again.tile_rows, again.in_place) == (1, True)
    assert treedef != jax.tree.structure(dataclasses.replace(plan, tile_rows=2))
    assert treedef != jax.tree.structure(dataclasses.replace(plan, in_place=False))


def test_the_bound_is_its_formula_and_holds_the_worst_case():
    for rows, num_experts, tile_rows in itertools.product((0, 1, 7, 61, 128), (1, 5, 60), (1, 3, 8, 100)):
        bound = tile_bound(rows, num_experts, tile_rows)
        assert bound == max(1, min(math.ceil(rows / tile_rows) + min(num_experts, rows), rows))
        # Most tiles: one row each for all active experts but one, the rest for that one.
        active = min(num_experts, rows)
        assert rows == 0 or active - 1 + math.ceil((rows - active + 1) / tile_rows) <= bound


PROPERTY_SHAPES = [shape for shape in SHAPES if shape in {(13, 2, 5, 4), (13, 2, 5, 16), (3, 2, 60, 2)}]


@functools.partial(settings, max_examples=60, deadline=None, derandomize=True, database=None)(
    suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
@pytest.mark.parametrize("shape", PROPERTY_SHAPES, ids=str)
def test_properties(shape, data):
    tokens, choices, experts, tile_rows = shape
    flat = data.draw(st.lists(st.integers(-2, experts + 2), min_size=tokens * choices, max_size=tokens * choices))
    ids = np.array(flat, np.int32).reshape(tokens, choices)
    plan = host(plan_of(ids, experts, tile_rows))
    valid = (ids >= 0) & (ids < experts)
    nowhere, sentinel = plan.max_tiles * tile_rows, tokens * choices

    # Every valid choice has exactly one row, in a tile that runs and that is its expert's; any other has none.
    assert (plan.slot[~valid] == nowhere).all()
    slots = plan.slot[valid]
    assert (slots < plan.num_tiles * tile_rows).all()
    assert (plan.tile_expert[slots // tile_rows] == ids[valid]).all()
    if plan.in_place:  # duplicates of an id in a row share the token's row
        assert (slots % tile_rows == np.nonzero(valid)[0]).all()
    else:
        assert len(set(slots.tolist())) == valid.sum()
        assert (plan.row_choice[slots] == np.flatnonzero(valid)).all()
    # Every other row is padding, and every tile that runs has work.
    padding = np.ones(nowhere, bool)
    padding[slots] = False
    assert (plan.row_choice[padding] == sentinel).all()
    assert (plan.row_choice[~padding] < sentinel).all()
    working = (~padding).reshape(-1, tile_rows).any(1)
    assert working[: plan.num_tiles].all() and not working[plan.num_tiles :].any()


@pytest.mark.parametrize(
    "ids, num_experts, tile_rows, message",
    [
        (np.zeros(3, int), 2, 2, r"ids: expected integers of shape \[G, A\], got int64 \(3,\)"),
        (np.zeros((3, 1), np.float32), 2, 2, "ids: expected integers .* float32"),
        (np.zeros((3, 1), int), 0, 2, "num_experts and tile_rows must be at least 1, got 0 and 2"),
        (np.zeros((3, 1), int), 2, 0, "num_experts and tile_rows must be at least 1, got 2 and 0"),
    ],
)
def test_refusals(monkeypatch, ids, num_experts, tile_rows, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse it first
    with pytest.raises(ValueError, match=message):
        make_plan(ids, num_experts, tile_rows)


def test_with_64_bit_types_enabled_the_plan_stays_32_bit():
    ids = np.array([[0, 9], [2, 1], [-1, 2]])
    with jax.enable_x64(True):
        plan = host(plan_of(jnp.asarray(ids), 3, 2))
    check(plan, ids, 3, 2)
