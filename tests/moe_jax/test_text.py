"""Text around the engine, with a tokenizer of a few lines: one character, one token."""

import numpy as np
import pytest

from moe_jax import ModelConfig, text
from moe_jax.generation import generate
from moe_jax.model import Model, tiny_config


class Letters:
    """Token i is the i-th printable character."""

    eos_token_ids = (95,)

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(32 + i) for i in ids)

    def decode_stream(self):
        outer = self

        class Stream:
            def push(self, token):
                return outer.decode([token])

            def flush(self):
                return ""

        return Stream()


@pytest.fixture(scope="module")
def model():
    return Model.initialize(tiny_config(), seed=3)


def test_generate_text_equals_ids(model):
    prompts = ["Hello", "a longer prompt", [5, 6]]
    texts = text.generate_text(model, Letters(), prompts, max_new_tokens=10, eos_token_id=())
    for prompt, got in zip(prompts, texts, strict=True):
        ids = [Letters().encode(prompt) if isinstance(prompt, str) else prompt]
        want = generate(model, ids, max_new_tokens=10, eos_token_id=())[0, len(ids[0]) :]
        assert got == Letters().decode(want)


def test_stop_strings_end_rows(model):
    (whole,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=())
    cut = whole[4:6]
    (short,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=(), stop=[cut])
    assert short == whole[: whole.index(cut)]
    steps = list(text.stream_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=(), stop=[cut]))
    assert len(steps) <= whole.index(cut) + 2


def test_end_token_is_not_shown(model):
    (whole,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=())
    end = Letters().encode(whole)[3]
    (short,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=end)
    assert short == whole[: whole.index(Letters().decode([end]))]


def test_held_back_text_comes_in_the_end(model):
    (whole,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=())
    stop = whole[-1] + "\x00"  # begins, but never ends
    assert text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=(), stop=[stop]) == [whole]


@pytest.mark.parametrize("pieces", [["abcXYd"], ["abcX", "Yd"], ["a", "b", "c", "X", "Y", "d"]])
def test_stop_filter_however_the_text_is_cut(pieces):
    stop = text.StopFilter(["XY", "Q"])
    assert "".join(map(stop.push, pieces)) + stop.flush() == "abc" and stop.stopped


def test_stop_filter_lets_false_starts_pass():
    stop = text.StopFilter(["aab"])
    assert "".join(map(stop.push, "aaac")) + stop.flush() == "aaac" and not stop.stopped
    with pytest.raises(ValueError, match="empty stop string"):
        text.StopFilter([""])


def test_score_equals_log_softmax(model):
    ids = np.random.default_rng(0).integers(0, 96, 40)
    logits = np.asarray(model(ids[None]), np.float64)[0]
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(chances[:-1], ids[1:, None], axis=-1)[:, 0]
    found = text.score(model, ids.tolist())
    np.testing.assert_allclose(found.log_probabilities, want, atol=2e-5)
    assert found.perplexity == pytest.approx(np.exp(-want.mean()), rel=1e-5)


def test_score_in_windows(model):
    """Each token is scored once, with at least half a window before it where there is that much."""
    ids = np.random.default_rng(1).integers(0, 96, 50)
    found = text.score(model, ids.tolist(), window=16).log_probabilities
    assert found.shape == (49,)
    for token in (3, 16, 30, 49):
        begin = 0 if token < 16 else (token - 16) // 8 * 8 + 8
        seen = np.resize(ids[begin : token + 1], 16)  # what stands behind the token changes nothing before it
        logits = np.asarray(model(seen[None]), np.float64)[0, token - begin - 1]
        want = logits[ids[token]] - np.log(np.exp(logits).sum())
        assert found[token - 1] == pytest.approx(want, abs=2e-5)


def test_bad_values(model):
    with pytest.raises(ValueError, match="prompts: empty"):
        text.encode(Letters(), [])
    with pytest.raises(ValueError, match="number 1 has no token"):
        text.encode(Letters(), ["a", ""])
    with pytest.raises(ValueError, match="1 tokens"):
        text.score(model, [3])


def test_one_stop_string_is_not_taken_letter_by_letter(model):
    (whole,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=())
    cut = whole[4:7]
    (short,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=(), stop=cut)
    assert short == whole[: whole.index(cut)]


def test_the_configs_end_token_counts_beside_the_tokenizers(model):
    (whole,) = text.generate_text(model, Letters(), ["Hello"], max_new_tokens=10, eos_token_id=())
    end = Letters().encode(whole)[3]
    config = ModelConfig.from_dict(model.config.to_dict() | {"eos_token_id": end})
    (short,) = text.generate_text(Model(config, model.arrays()), Letters(), ["Hello"], max_new_tokens=10)
    assert short == Letters().decode(Letters().encode(whole)[: Letters().encode(whole).index(end)])
