"""The cache: what is written where, in place, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import read_entries, write_entries

LAYERS, ROWS, HEADS, COLUMNS, WIDTH = 3, 4, 2, 10, 5


def draw(new, seed=0):
    """Stacks of a cache and one layer's new entries of `new` tokens, with heads and without."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)
    stacks = {
        "k": make(LAYERS, ROWS, HEADS, COLUMNS, WIDTH),
        "latent": make(LAYERS, ROWS, COLUMNS, WIDTH),
    }
    return stacks, {"k": make(ROWS, HEADS, new, WIDTH), "latent": make(ROWS, new, WIDTH)}


def written(stacks, new, layer, column):
    arrays = jax.tree.map(jnp.asarray, (stacks, new))
    return jax.tree.map(np.asarray, jax.jit(write_entries)(*arrays, layer, jnp.asarray(column)))


@pytest.mark.parametrize("column", [0, 6])
def test_the_same_columns_in_all_rows(column):
    stacks, new = draw(4)
    got = written(stacks, new, 1, column)
    for name in stacks:
        stacks[name][1][..., column : column + 4, :] = new[name]
        np.testing.assert_array_equal(got[name], stacks[name])


def test_one_column_per_row():
    stacks, new = draw(1)
    columns = np.array([3, 0, 9, 10], np.int32)  # the last row is full
    got = written(stacks, new, 2, columns)
    for row, column in enumerate(columns[:3]):
        stacks["k"][2, row, :, column] = new["k"][row, :, 0]
        stacks["latent"][2, row, column] = new["latent"][row, 0]
    for name in stacks:
        np.testing.assert_array_equal(got[name], stacks[name])
    layer = read_entries(jax.tree.map(jnp.asarray, got), 2)
    assert layer["k"].shape == (ROWS, HEADS, COLUMNS, WIDTH) and layer["latent"].shape == (ROWS, COLUMNS, WIDTH)
    np.testing.assert_array_equal(layer["latent"], got["latent"][2])


@pytest.mark.parametrize("rows", [1, ROWS])
def test_writing_moves_no_stack(rows):
    """The compiled program of donated stacks in a loop has no copy of one."""
    stacks, new = draw(1)
    cut = lambda a, axis: jnp.asarray(np.take(a, range(rows), axis))
    stacks, new = {n: cut(a, 1) for n, a in stacks.items()}, {n: cut(a, 0) for n, a in new.items()}

    def steps(stacks, columns):
        write = lambda i, carry: write_entries(carry, new, i % LAYERS, columns + i)
        return jax.lax.fori_loop(0, 5, write, stacks)

    text = jax.jit(steps, donate_argnums=0).lower(stacks, jnp.arange(rows, dtype=jnp.int32)).compile().as_text()
    shapes = {f"f32[{','.join(map(str, a.shape))}]" for a in stacks.values()}
    stored = lambda line: any(shape in line.split("copy(")[0] for shape in shapes)
    assert not [line for line in text.splitlines() if " copy(" in line and stored(line)]
