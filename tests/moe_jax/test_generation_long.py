"""Prompts in pieces and caches that grow: the same text as in one go."""

import jax
import numpy as np
import pytest
from core_models import golden_model, only
from test_config_values import build

from moe_jax import Model, engine, generate, generation

#: Grouped heads, windows by turns and sinks, latent attention, chunks and layers without rotary positions.
FAMILIES = only(["mixtral", "gpt_oss"], ["mixtral", "gpt_oss", "deepseek_v3", "llama4"])
LENGTHS = (37, 20, 5, 33, 16)


def batch(vocabulary):
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(0, vocabulary, (len(LENGTHS), 40)), np.zeros((len(LENGTHS), 40), int)
    for row, length in enumerate(LENGTHS):
        mask[row, 40 - length :] = 1
    return ids, mask


def pieces(model, ids, mask):
    run = generation._Run(model, ids, mask, 8, ())
    return run.ids.shape, (run.sizes.rows, run.sizes.columns)


#: Tokens at once, columns that the prompt then has, and the pieces' rows and columns.
PIECES = ((32, 64, (1, 32)), (100, 48, (2, 48)))


@pytest.mark.parametrize("case", FAMILIES)
def test_prompts_in_pieces(case, monkeypatch):
    """By columns, and by rows of which the last piece repeats one: ids, experts and first logits agree."""
    model = golden_model(case)
    ids, mask = batch(model.architecture.vocab_size)
    options = {"max_new_tokens": 8, "eos_token_id": (), "return_record": True}
    whole = generate(model, ids, mask, **options)
    logits = first_logits(model, ids, mask)
    for tokens, width, sizes in PIECES:
        monkeypatch.setattr(generation, "_TOKENS", tokens)
        assert pieces(model, ids, mask) == ((5, width), sizes)
        cut = generate(model, ids, mask, **options)
        np.testing.assert_array_equal(cut.ids, whole.ids)
        for one, other in zip(cut.expert_ids, whole.expert_ids, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(first_logits(model, ids, mask), logits, atol=2e-5, rtol=0)
    again = generate(model, ids, mask, **options, routing=whole)
    np.testing.assert_array_equal(again.ids, whole.ids)


def first_logits(model, ids, mask):
    """Logits of the first new token."""
    found = []
    run, sample = generation._Run(model, ids, mask, 8, ()), engine.sample

    def reporting(sampler, logits, key, seen, first):
        jax.debug.callback(lambda a: found.append(np.asarray(a)), logits)
        return sample(sampler, logits, key, seen, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "sample", reporting)
        args = run.model.architecture, run.sizes, False, run.weights, run.ids, run.lengths, None, run.request
        jax.block_until_ready(jax.jit(engine.prefill.__wrapped__, static_argnums=(0, 1, 2))(*args))
        jax.effects_barrier()
    return found[0]


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_caches_that_grow(case, monkeypatch):
    model = golden_model(case)
    ids, mask = batch(model.architecture.vocab_size)
    options = {"eos_token_id": (), "return_record": True}
    ids, mask = ids[:, -6:], mask[:, -6:]
    whole = generate(model, ids, mask, 50, **options)
    monkeypatch.setattr(generation, "_COLUMNS", 16)
    run = generation._Run(model, ids, mask, 50, ())
    assert run.capacity == 32 and run.full == 80
    run.start()
    for limit, columns in ((10, 32), (27, 32), (28, 64), (50, 64)):  # 6 tokens and all new ones but the newest
        run.advance(limit)
        assert run.state.cache.entries[next(iter(run.state.cache.entries))].shape[-2] == run.capacity == columns
    np.testing.assert_array_equal(run.result(), whole.ids)
    cut = generate(model, ids, mask, 50, **options)
    np.testing.assert_array_equal(cut.ids, whole.ids)
    for one, other in zip(cut.expert_ids, whole.expert_ids, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cache_stops_growing_when_all_rows_have_ended(monkeypatch):
    model = golden_model("mixtral")
    ids, mask = batch(model.architecture.vocab_size)
    free = generate(model, ids[:1, -6:], None, 50, eos_token_id=())[0, 6:]
    monkeypatch.setattr(generation, "_COLUMNS", 16)
    end = int(free[3])
    run = generation._Run(model, ids[:1, -6:], None, 50, end)
    run.start()
    run.advance(50)
    assert run.capacity == 32 and int(run.state.step) == free.tolist().index(end) + 1


def test_first_sizes_of_caches():
    """All that can be needed, if that is little or not more than twice the prompt's columns."""
    model = Model.initialize(build("mixtral", max_position_embeddings=10**5))
    for prompt, new, capacity, full in ((5, 100, 128, 128), (5, 4000, 512, 4112), (1000, 700, 1792, 1792)):
        run = generation._Run(model, np.ones((1, prompt), int), None, new, ())
        assert (run.capacity, run.full) == (capacity, full)
    assert generation._Run(model, np.ones((1, 1000), int), None, 3000, ()).capacity == 2048


def test_tokens_at_once():
    """Narrow models are bounded by tokens, wide ones by bytes."""
    assert engine.tokens_at_once(build("mixtral").architecture, 4) == 16384
    wide = build("mixtral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    assert engine.tokens_at_once(wide.architecture, 2) == 4096
    assert engine.tokens_at_once(wide.architecture, 4) == 2048
