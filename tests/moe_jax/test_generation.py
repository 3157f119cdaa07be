"""The engine, on a tiny random model: it sees token ids only."""

import jax
import numpy as np
import pytest

from moe_jax import engine, generate, generation, stream
from moe_jax.generation import Generated, bucket
from moe_jax.model import Model, tiny_config


@pytest.fixture(scope="module")
def model():
    return Model.initialize(tiny_config(), seed=3)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, n).tolist() for n in (9, 4, 6)]


def padded(prompts, left):
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), 7), np.zeros((len(prompts), width), int)
    for i, row in enumerate(prompts):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False])
def test_unequal_prompts_in_one_batch(model, prompts, left):
    ids, mask = padded(prompts, left)
    out = generate(model, ids, mask, max_new_tokens=8, eos_token_id=())
    assert out.shape == (3, 17) and out.dtype == np.int32
    np.testing.assert_array_equal(out[:, :9], ids)
    for row, prompt in zip(out, prompts, strict=True):
        np.testing.assert_array_equal(
            row[9:], generate(model, [prompt], max_new_tokens=8, eos_token_id=())[0, len(prompt) :]
        )


def test_padding_anywhere(model, prompts):
    """Between tokens too: text, and experts in the caller's columns, are those of the row without its padding."""
    rng = np.random.default_rng(1)
    ids, mask = np.full((3, 12), 7), np.zeros((3, 12), int)
    for row, prompt in enumerate(prompts):
        places = np.sort(rng.permutation(12)[: len(prompt)])
        ids[row, places], mask[row, places] = prompt, 1
    out = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), return_record=True)
    np.testing.assert_array_equal(out.ids[:, :12], ids)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=6, eos_token_id=(), return_record=True)
        np.testing.assert_array_equal(out.ids[row, 12:], alone.ids[0, len(prompt) :])
        for layer, want in zip(out.expert_ids, alone.expert_ids, strict=True):
            ran = np.concatenate([mask[row], np.ones(6, int)]).astype(bool)
            np.testing.assert_array_equal(layer[row, ran], want[0])
            assert (layer[row, ~ran] == -1).all()
    forced = [np.where(layer >= 0, [[[0, 2]]], -1) for layer in out.expert_ids]
    forced[0][0, mask[0].argmax()] = 1, 3  # one token differs, so its place matters
    other = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), return_record=True, routing=forced)
    for layer, want in zip(other.expert_ids, forced, strict=True):
        np.testing.assert_array_equal(layer, want)


def test_end_tokens(model, prompts):
    ids, mask = padded(prompts, left=True)
    free = generate(model, ids, mask, max_new_tokens=8, eos_token_id=())[:, 9:]
    end = int(free[0, 2])
    out = generate(model, ids, mask, max_new_tokens=8, eos_token_id=end)[:, 9:]
    for row, whole in zip(out, free, strict=True):
        stop = next((i for i, t in enumerate(whole) if t == end), 8)
        np.testing.assert_array_equal(row[: stop + 1], whole[: stop + 1])
        assert (row[stop + 1 :] == end).all()  # no pad token is known: filled with the end token
    own = Model(model.config, model.arrays(), {"eos_token_id": [end, 95], "pad_token_id": 1})
    filled = generate(own, ids, mask, max_new_tokens=8)[:, 9:]
    np.testing.assert_array_equal(np.where(filled == 1, end, filled)[0], out[0])
    assert (filled[0, 3:] == 1).all()


def test_stops_as_soon_as_all_have_ended(model, prompts):
    free = generate(model, [prompts[0]], max_new_tokens=8, eos_token_id=())[0, 9:]
    run = generation._Run(model, [prompts[0]], None, 100, int(free[2]))
    run.start()
    run.advance(100)
    assert int(run.state.step) == free.tolist().index(free[2]) + 1


def test_stream_equals_generate(model, prompts):
    ids, mask = padded(prompts, left=True)
    whole = generate(model, ids, mask, max_new_tokens=8, eos_token_id=())[:, 9:]
    np.testing.assert_array_equal(np.stack(list(stream(model, ids, mask, max_new_tokens=8, eos_token_id=())), 1), whole)
    end = int(whole[0, 2])
    steps = list(stream(model, ids[:1], mask[:1], max_new_tokens=8, eos_token_id=end))
    assert len(steps) == whole[0].tolist().index(end) + 1


def test_sampling_is_reproducible_and_independent_of_the_batch(model, prompts):
    ids, mask = padded(prompts, left=True)
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9, "eos_token_id": ()}
    one, same, other = (generate(model, ids, mask, key=k, **options) for k in (5, jax.random.key(5), 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(generate(model, ids[:2], mask[:2], key=5, **options), one[:2])
    greedy = generate(model, ids, mask, max_new_tokens=8, eos_token_id=())
    top = generate(model, ids, mask, max_new_tokens=8, temperature=2.0, top_k=1, key=0, eos_token_id=())
    np.testing.assert_array_equal(top, greedy)


def test_repetition_penalty_counts_prompt_and_output(model):
    out = generate(model, [[5, 6, 7]], max_new_tokens=12, repetition_penalty=1e6, eos_token_id=())[0]
    assert len(set(out.tolist())) == len(out)


def test_a_second_length_does_not_compile_again(model):
    generate(model, [[1, 2, 3]], max_new_tokens=5, eos_token_id=())
    before = engine.prefill._cache_size(), engine.decode._cache_size()
    generate(model, [[4, 5, 6, 7, 8, 9, 10]], max_new_tokens=11, eos_token_id=())
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == before


def test_buckets():
    lengths = [bucket(n) for n in range(1, 5000)]
    assert all(n <= b <= max(16, 1.25 * n + 16) for n, b in enumerate(lengths, 1))
    assert lengths == sorted(lengths) and len(set(lengths)) < 40


def test_record_and_replay(model, prompts):
    ids, mask = padded(prompts, left=True)
    out = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), return_record=True)
    assert isinstance(out, Generated) and len(out.expert_ids) == 2
    for layer in out.expert_ids:
        assert layer.shape == (3, 15, 2) and layer.dtype == np.int8
        ran = np.concatenate([mask, np.ones((3, 5), int), np.zeros((3, 1), int)], 1).astype(bool)
        assert (layer[~ran] == -1).all() and (layer[ran] >= 0).all() and (np.diff(layer[ran]) > 0).all()
    again = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), return_record=True, routing=out)
    np.testing.assert_array_equal(again.ids, out.ids)
    forced = [np.where(layer >= 0, [[[1, 3]]], -1) for layer in out.expert_ids]
    other = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), return_record=True, routing=forced)
    for layer, want in zip(other.expert_ids, forced, strict=True):
        np.testing.assert_array_equal(layer, want)
    with pytest.raises(ValueError, match="expected 2 arrays"):
        generate(model, ids, mask, max_new_tokens=5, routing=out)
    with pytest.raises(ValueError, match="expert 9 of 4"):
        generate(model, ids, mask, max_new_tokens=6, routing=[np.full((3, 15, 2), 9)] * 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[96]],), {}, "96 is outside the vocabulary of 96"),
        (([[-1]],), {}, "-1 is outside the vocabulary"),
        (([[]],), {}, "non-empty"),
        (([1, 2],), {}, r"expected a non-empty \[B, T\] array, got shape \(2,\)"),
        (([[1, 2], [3]],), {}, "rows differ in length"),
        (([[1.5]],), {}, "expected integers, got float64"),
        (([[1, 2]], [[0, 0]]), {}, "row 0 has no token"),
        (([[1, 2]], [[1, 2]]), {}, "values other than 0 and 1"),
        (([[1, 2]], [[1]]), {}, "shape"),
        (([[1] * 100],), {"max_new_tokens": 29}, "100 tokens and 29 new ones exceed the model's context of 128"),
        (([[1]],), {"max_new_tokens": -1}, "max_new_tokens: -1"),
        (([[1]],), {"temperature": 0.5}, "key: temperature 0.5 needs"),
        (([[1]],), {"temperature": -1.0}, "temperature: -1.0 is negative"),
        (([[1]],), {"top_k": 0}, "top_k: 0"),
        (([[1]],), {"top_p": 1.5}, "top_p: 1.5"),
        (([[1]],), {"min_p": 0.0}, "min_p: 0.0"),
        (([[1]],), {"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_arguments(model, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, *arguments, **options)


def test_no_new_tokens(model):
    np.testing.assert_array_equal(generate(model, [[1, 2]], max_new_tokens=0), [[1, 2]])
    assert list(stream(model, [[1, 2]], max_new_tokens=0)) == []


def test_numpy_integers_and_odd_pad_ids(model):
    rows, options = [[1, 2, 3]] * 3, {"temperature": 0.8, "top_p": 0.9}  # compiled above
    want = generate(model, rows, max_new_tokens=3, key=3, **options)
    got = generate(model, rows, max_new_tokens=np.int64(3), key=np.int64(3), **options)
    np.testing.assert_array_equal(got, want)
    padded = Model(model.config, model.arrays(), {"pad_token_id": -1, "eos_token_id": int(want[0, 3])})
    out = generate(padded, rows, max_new_tokens=3, key=3, **options)
    assert (out >= 0).all() and (out[0, 3:] == want[0, 3]).all()
