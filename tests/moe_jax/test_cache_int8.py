"""Generation over keys and values in int8: close to the wide cache, in half the memory, wherever it is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_models import golden_model, only

import moe_jax
from moe_jax import generation
from moe_jax.cache import Corner, grow, make_cache, read_entries, write_entries
from moe_jax.cli import main
from pallas_kernels.quantized import QuantizedArray

CASES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"]


def prompts(model):
    ids = np.random.default_rng(4).integers(0, model.architecture.vocab_size, (3, 9))
    return ids, np.arange(9) >= np.array([[0], [6], [3]])


@pytest.mark.parametrize("case", only(["qwen3_moe", "deepseek_v3"], CASES))
def test_generation_is_close(case):
    """Greedy tokens are the same but where two were nearly as likely: most of them."""
    model = golden_model(case)
    ids, mask = prompts(model)
    given = dict(max_new_tokens=8, eos_token_id=())
    wide = moe_jax.generate(model, ids, mask, **given)
    narrow = moe_jax.generate(model, ids, mask, kv_cache_dtype="int8", **given)
    assert narrow.shape == wide.shape and (narrow[:, :10] == wide[:, :10]).all()
    assert (narrow == wide).mean() > 0.8


@pytest.mark.parametrize("case", only(["qwen3_moe"], ["qwen3_moe", "deepseek_v3"]))
def test_caches_that_grow_and_prompts_in_pieces(case, monkeypatch):
    model = golden_model(case)
    ids, mask = prompts(model)
    given = dict(max_new_tokens=20, eos_token_id=(), kv_cache_dtype="int8")
    want = moe_jax.generate(model, ids, mask, **given)
    monkeypatch.setattr(generation, "_COLUMNS", 16)
    np.testing.assert_array_equal(moe_jax.generate(model, ids, mask, **given), want)
    steps = np.stack(list(generation.stream(model, ids, mask, **given)), 1)
    np.testing.assert_array_equal(steps, want[:, 9:])
    monkeypatch.setattr(generation, "_TOKENS", 16)
    pieces = moe_jax.generate(model, np.tile(ids, 3), np.tile(mask, 3), **given)
    monkeypatch.setattr(generation, "_TOKENS", None)
    whole = moe_jax.generate(model, np.tile(ids, 3), np.tile(mask, 3), **given)
    assert (pieces == whole).mean() > 0.8  # what was read back was in int8


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3"])
def test_memory(case):
    architecture = golden_model(case).architecture
    count = lambda stored: sum(a.nbytes for a in jax.tree.leaves(make_cache(architecture, 2, 64, "bfloat16", stored)))
    widths = [stack.shape[-1] for stack in make_cache(architecture, 1, 1, "bfloat16").entries.values()]
    assert count("int8") <= count(None) * (0.5 + 2 / min(widths)) + 64
    cache = make_cache(architecture, 2, 64, "bfloat16", "int8")
    longer = grow(cache, 96)
    assert all(isinstance(stack, QuantizedArray) and stack.shape[-2] == 96 for stack in longer.entries.values())


def test_writing_and_reading():
    """In all three ways that columns are named; an entry comes back to half a step of its scale."""
    rng = np.random.default_rng(1)
    architecture = golden_model("qwen3_moe").architecture
    entries = make_cache(architecture, 3, 16, jnp.float32, "int8").entries
    shape = entries["k"].shape
    for column, rows, tokens in ((4, 3, 5), (Corner(1, 2), 2, 3), (np.array([3, 16, 0], np.int32), 3, 1)):
        new = {n: rng.standard_normal((rows, shape[2], tokens, shape[4])).astype(np.float32) for n in "kv"}
        column = jnp.asarray(column) if isinstance(column, np.ndarray) else column
        found = jax.jit(write_entries, static_argnums=2)(entries, new, 1, column)
        back = read_entries(found, 1)
        for name in "kv":
            want = np.zeros(shape[1:], np.float32)
            if isinstance(column, Corner):
                want[1:, :, 2:5] = new[name]
            elif isinstance(column, int):
                want[:, :, 4:9] = new[name]
            else:
                want[0, :, 3], want[2, :, 0] = new[name][0, :, 0], new[name][2, :, 0]
            bound = np.abs(want).max(-1, keepdims=True) / 127 * 0.51
            assert (np.abs(np.asarray(back[name]) - want) <= bound).all()
            assert not np.asarray(found[name].values)[[0, *range(2, shape[0])]].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_writing_moves_no_stack(rows):
    entries = make_cache(golden_model("qwen3_moe").architecture, rows, 64, jnp.float32, "int8").entries
    shape = entries["k"].shape
    new = {n: jnp.ones((rows, shape[2], 1, shape[4])) for n in "kv"}

    def steps(entries, columns):
        write = lambda i, carry: write_entries(carry, new, i % shape[0], columns + i)
        return jax.lax.fori_loop(0, 5, write, entries)

    program = jax.jit(steps, donate_argnums=0).lower(entries, jnp.arange(rows, dtype=jnp.int32)).compile()
    shapes = {f"[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(entries)}
    lines = program.as_text().splitlines()
    assert not [line for line in lines if " copy(" in line and any(s in line.split("copy(")[0] for s in shapes)]


def test_errors_and_command_line(capsys):
    with pytest.raises(ValueError, match="kv_cache_dtype: 'int4' is neither None nor 'int8'"):
        moe_jax.generate(golden_model("qwen3_moe"), [[1]], kv_cache_dtype="int4")
    from core_models import folder

    path = str(folder("qwen3_moe"))
    assert (
        main(["generate", "1,2,3", "--ids", "--model", path, "--max-new-tokens", "4", "--kv-cache-dtype", "int8"]) == 0
    )
    assert len(capsys.readouterr().out.strip().split(",")) == 4
