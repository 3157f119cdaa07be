"""A tokenizer learned here: lossless, the same each time, and read back."""

import pytest

import moe_jax
from moe_jax.train.bpe import END, train_tokenizer
from moe_jax.train.data import load_corpus


def test_learned_saved_and_loaded(tmp_path):
    corpus = load_corpus("pydoc_topics")
    tokenizer = train_tokenizer(corpus.train, 512)
    text = corpus.held_out[0] + "\n\tnaïve 日本 🙂\x00"
    ids = tokenizer.encode(text)
    assert len(ids) < 0.6 * len(text.encode()) and max(ids) < tokenizer.vocab_size == 512
    assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path / "saved")
    again = moe_jax.load_tokenizer(tmp_path / "saved")
    assert again.encode(text) == ids and again.eos_token_ids == (0,) and again.decode([0]) == ""
    assert again.decode([0], skip_special_tokens=False) == END
    train_tokenizer(corpus.train, 512).save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_refusals():
    with pytest.raises(ValueError, match="vocab_size: 256; "):
        train_tokenizer(["abc"], 256)
    with pytest.raises(ValueError, match="vocab_size: 400, but the texts give 258 tokens"):
        train_tokenizer(["ab"], 400)
