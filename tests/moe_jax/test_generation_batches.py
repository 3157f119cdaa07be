"""Generation on stored models: rows of a batch, end tokens, replay, and what compiles again.

`test_generation` has the basics on a random model.
"""

import contextlib
import inspect

import jax
import jaxtyping
import numpy as np
import pytest
from core_models import golden_arrays, golden_model

import moe_jax
from moe_jax import Model, engine, generate, generation, stream

NEW = 12
LENGTHS = (9, 3, 6)


def batch(left, filler=0):
    """Three prompts of unequal length out of the golden one, padded to 9 columns."""
    text = np.concatenate([golden_arrays("mixtral")["prompt_ids"][0], [5, 17, 40, 41]])
    ids, mask = np.full((3, 9), filler), np.zeros((3, 9), int)
    for row, length in enumerate(LENGTHS):
        place = slice(9 - length, 9) if left else slice(0, length)
        ids[row, place], mask[row, place] = text[row : row + length], 1
    return ids, mask


def run(ids, mask, case="mixtral", **options):
    return generate(golden_model(case), ids, mask, NEW, **{"eos_token_id": ()} | options)


def with_settings(**settings):
    model = golden_model("mixtral")
    return Model(model.config, model.arrays(), settings)


@contextlib.contextmanager
def any_type(needed):
    """Values that the annotations, which only tests check, do not list."""
    jaxtyping.config.update("jaxtyping_disable", needed)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def free():
    return run(*batch(left=True))[:, 9:]


def test_side_and_filler_of_the_padding_change_nothing(free):
    for left in (True, False):
        for filler in (0, 99, -100):
            out = run(*batch(left, filler))
            np.testing.assert_array_equal(out[:, 9:], free)
            np.testing.assert_array_equal(out[:, :9], batch(left, filler)[0])  # the prompt as it was given


def test_each_row_is_as_if_alone(free):
    """In its own batch of three, so that no program is compiled for it; test_generation compares with single rows."""
    ids, mask = batch(left=True)
    for row in range(3):
        same = run(np.repeat(ids[row : row + 1], 3, 0), np.repeat(mask[row : row + 1], 3, 0))
        np.testing.assert_array_equal(same[:, 9:], np.repeat(free[row : row + 1], 3, 0))


def test_greedy_is_deterministic(free):
    np.testing.assert_array_equal(run(*batch(left=True))[:, 9:], free)


def expected(free, ends, pad):
    """What stopping at `ends` makes of free text."""
    out = free.copy()
    for row in out:
        stops = [i for i, token in enumerate(row) if token in ends]
        if stops:
            row[stops[0] + 1 :] = pad
    return out


@pytest.mark.parametrize("how", ["int", "tuple", "list", "array", "numpy int"])
def test_end_tokens_as_any_sequence(free, how):
    first, second = int(free[0, 3]), int(free[2, 5])
    given = {"int": first, "tuple": (first,), "list": [first], "array": np.array([first]), "numpy int": np.int64(first)}
    with any_type(how in ("list", "array", "numpy int")):
        out = run(*batch(left=True), eos_token_id=given[how])[:, 9:]
    np.testing.assert_array_equal(out, expected(free, {first}, 0))  # the config's pad token
    out = run(*batch(left=True), eos_token_id=(first, second))[:, 9:]
    np.testing.assert_array_equal(out, expected(free, {first, second}, 0))
    assert (out == 0).any()


def test_end_and_pad_tokens_of_the_model(free):
    ids, mask = batch(left=True)
    first, second = int(free[0, 3]), int(free[1, 4])
    both = with_settings(eos_token_id=[first, second], pad_token_id=11)
    np.testing.assert_array_equal(generate(both, ids, mask, NEW)[:, 9:], expected(free, {first, second}, 11))
    np.testing.assert_array_equal(generate(both, ids, mask, NEW, eos_token_id=())[:, 9:], free)
    one = with_settings(eos_token_id=first)
    np.testing.assert_array_equal(generate(one, ids, mask, NEW)[:, 9:], expected(free, {first}, 0))
    own = golden_model("mixtral").config.token_ids("eos")
    assert own == () or not np.isin(free, own).all()
    np.testing.assert_array_equal(generate(with_settings(), ids, mask, NEW)[:, 9:], expected(free, set(own), 0))


def test_decoding_ends_when_every_row_has(free):
    ids, mask = batch(left=True)
    ends = tuple({int(row[4]) for row in free})
    stops = [next(i for i, token in enumerate(row) if token in ends) for row in free]
    state = generation._Run(golden_model("mixtral"), ids, mask, NEW, ends)
    state.start()
    state.advance(NEW)
    assert int(state.state.step) == max(stops) + 1 < NEW and bool(state.state.done.all())
    steps = list(stream(golden_model("mixtral"), ids, mask, max_new_tokens=NEW, eos_token_id=ends))
    assert len(steps) == max(stops) + 1 and steps[0].shape == (3,)
    np.testing.assert_array_equal(np.stack(steps, 1), expected(free, set(ends), 0)[:, : len(steps)])


def test_stream_takes_what_generate_takes():
    """Arguments and errors, which come with the call and not with the first step."""
    ids, mask = batch(left=True)
    options = {"temperature": 0.8, "top_k": 20, "key": 4, "eos_token_id": (), "max_new_tokens": NEW}
    whole = generate(golden_model("mixtral"), ids, mask, **options)[:, 9:]
    np.testing.assert_array_equal(np.stack(list(stream(golden_model("mixtral"), ids, mask, **options)), 1), whole)
    with pytest.raises(ValueError, match="key: temperature 0.8"):
        stream(golden_model("mixtral"), ids, mask, temperature=0.8)
    with pytest.raises(ValueError, match="max_new_tokens: True"):
        stream(golden_model("mixtral"), ids, mask, max_new_tokens=True)
    names = set(inspect.signature(generate).parameters) - {"model", "input_ids", "attention_mask", "return_record"}
    assert names == {*options, "top_p", "min_p", "repetition_penalty", "routing", "kv_cache_dtype"}


def test_draws_do_not_depend_on_the_other_rows():
    ids, mask = batch(left=True)
    options = {"temperature": 1.2, "top_k": 20, "key": 9}
    out = run(ids, mask, **options)[:, 9:]
    for others in ([0, 0, 2], [1, 1, 1], [2, 1, 0]):
        changed = run(ids[others], mask[others], **options)[:, 9:]
        for row, other in enumerate(others):
            assert np.array_equal(changed[row], out[row]) == (row == other)
        assert len({tuple(row) for row in changed.tolist()}) == 3  # equal prompts still draw each their own text
    np.testing.assert_array_equal(run(ids, mask, **options | {"key": jax.random.key(9)})[:, 9:], out)
    assert (run(ids, mask, **options | {"key": 10})[:, 9:] != out).any()
    longer = generate(golden_model("mixtral"), ids, mask, NEW + 3, eos_token_id=(), **options)
    np.testing.assert_array_equal(longer[:, 9 : 9 + NEW], out)  # a longer run starts alike


def test_only_new_shapes_and_kinds_of_sampling_compile():
    ids, mask = batch(left=True)
    count = lambda: engine.prefill._cache_size() + engine.decode._cache_size()
    options = {"temperature": 0.9, "top_k": 20, "key": 1}
    run(ids, mask, **options)
    before = count()
    run(ids, mask, temperature=0.3, top_k=20, key=2)
    generate(golden_model("mixtral"), ids[:, 2:], mask[:, 2:], 16, eos_token_id=(), **options)
    generate(golden_model("mixtral"), np.repeat(ids[:1], 3, 0)[:, :1], None, 1, eos_token_id=(), **options)
    generate(golden_model("mixtral"), np.ones((3, 16), int), None, 3, eos_token_id=(), **options)
    assert count() == before
    generate(golden_model("mixtral"), np.ones((3, 17), int), None, 3, eos_token_id=(), **options)
    assert count() == before + 2


@pytest.mark.parametrize("case", ["phimoe", "deepseek_v3"])
def test_replaying_a_record(case):
    """It gives the same text; free entries give it too; other choices are followed to the letter."""
    gold, model = golden_arrays(case), golden_model(case)
    prompt, router = gold["prompt_ids"], model.architecture.block.router
    options = {"eos_token_id": (), "return_record": True}
    first = generate(model, prompt, None, NEW, **options, routing=[np.full((1, 20, router.top_k), -1)] * layers(model))
    np.testing.assert_array_equal(first.ids[:, 8:], gold["generated_ids"][:, :NEW])
    again = generate(model, prompt, None, NEW, **options, routing=first)
    np.testing.assert_array_equal(again.ids, first.ids)
    other = [np.where(layer < 0, -1, np.arange(router.top_k)).astype(np.int8) for layer in first.expert_ids]
    forced = generate(model, prompt, None, NEW, **options, routing=other)
    for one, same, want, got in zip(first.expert_ids, again.expert_ids, other, forced.expert_ids, strict=True):
        assert one.dtype == np.int8 and one.shape == (1, 20, router.top_k)
        assert (one[:, -1] == -1).all() and (one[:, :-1] >= 0).all() and (np.diff(one[:, :-1]) > 0).all()
        np.testing.assert_array_equal(same, one)
        np.testing.assert_array_equal(got, want)
    assert (forced.ids != first.ids).any()


def test_rows_that_have_ended_take_no_expert(free):
    ids, mask = batch(left=True)
    end = int(free[0, 3])
    out = run(ids, mask, eos_token_id=end, return_record=True)
    ended = [next((i for i, token in enumerate(row) if token == end), NEW - 1) for row in free]
    assert ended[0] <= 3 and len(set(ended)) > 1
    for layer in out.expert_ids:
        for row, last in enumerate(ended):  # the end token itself is never run
            assert (layer[row, 9 : 9 + last] >= 0).all() and (layer[row, 9 + last :] == -1).all()
            np.testing.assert_array_equal(layer[row, :9] >= 0, np.repeat(mask[row, :, None] == 1, 2, 1))


def test_a_model_of_numpy_arrays(free):
    model = golden_model("mixtral")
    held = Model(model.config, jax.tree.map(np.asarray, model.arrays()))
    np.testing.assert_array_equal(generate(held, *batch(left=True), NEW, eos_token_id=())[:, 9:], free)


def test_steps_one_by_one_as_a_gpu_takes_them(monkeypatch):
    """They run on for a while when the row has ended, and the cache grows on the way."""
    ids, mask = (values[:1] for values in batch(left=True))
    monkeypatch.setattr(generation, "_COLUMNS", 16)
    monkeypatch.setattr(generation, "_STEPS", 2)
    end = int(run(ids, mask)[0, 9 + 6])
    given, options = (golden_model("mixtral"), ids, mask), {"max_new_tokens": 50, "eos_token_id": end}
    want, tokens = generate(*given, return_record=True, **options), list(stream(*given, **options))
    assert len(tokens) <= 7
    monkeypatch.setattr(generation, "_on_gpu", lambda weights: True)
    got = generate(*given, return_record=True, **options)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_array_equal(list(stream(*given, **options)), tokens)
    made = generation._Run(*given, 50, end)
    made.start()
    made.advance(50)
    assert len(tokens) <= made.count <= len(tokens) + 4  # asked every two steps, answered two later


def layers(model):
    return len(model.architecture.moe_layers)


def test_a_dense_model_records_nothing():
    model, prompt = golden_model("llama_linear"), golden_arrays("llama_linear")["prompt_ids"]
    out = generate(model, prompt, None, 24, eos_token_id=(), return_record=True)
    assert out.expert_ids == ()
    np.testing.assert_array_equal(out.ids[:, 8:], golden_arrays("llama_linear")["generated_ids"])
    again = generate(model, prompt, None, 24, eos_token_id=(), return_record=True, routing=out)
    np.testing.assert_array_equal(again.ids, out.ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"routing": [np.zeros((3, 20, 2), int)] * 3}, r"of shape \(3, 21, 2\), got"),
        ({"routing": [np.full((3, 21, 2), 8)] * 3}, "expert 8 of 8"),
        ({"max_new_tokens": 1.0}, "max_new_tokens: 1.0 is not a non-negative integer"),
        ({"max_new_tokens": 0, "return_record": True}, "nothing is run with max_new_tokens=0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"max_new_tokens": 10**6}, "9 tokens and 1000000 new ones exceed the model's context of"),
    ],
)
def test_arguments_that_are_refused(options, words):
    ids, mask = batch(left=True)
    given = {"max_new_tokens": NEW} | options
    with pytest.raises(ValueError, match=words), any_type("max_new_tokens" in options):
        moe_jax.generate(golden_model("mixtral"), ids, mask, **given)
