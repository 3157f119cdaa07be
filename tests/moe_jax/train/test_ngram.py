"""The trigram against a slow one that follows the textbook, and what a good baseline has to beat."""

import math
from collections import Counter

import numpy as np
import pytest

from moe_jax.train.data import load_corpus
from moe_jax.train.ngram import Trigram, trigram_bits_per_byte

TEXT = (
    b"to be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows " * 2
)[:190] + bytes(range(60, 90))


def slow(train, context, byte):
    """Interpolated modified Kneser-Ney by dictionaries, after Chen and Goodman (1999)."""
    padded = b"\n\n" + train
    grams = {3: Counter(padded[i : i + 3] for i in range(len(train)))}
    for n in (2, 1):
        grams[n] = Counter(gram[1:] for gram in grams[n + 1])

    def discount(counts, count):
        ones, twos, threes, fours = (sum(c == n for c in counts.values()) for n in (1, 2, 3, 4))
        if 0 in (ones, twos, threes, fours):
            return 0.5
        y = ones / (ones + 2 * twos)
        kind = min(count, 3)
        value = {1: 1 - 2 * y * twos / ones, 2: 2 - 3 * y * threes / twos, 3: 3 - 4 * y * fours / threes}[kind]
        return min(max(value, 0.05), kind - 0.05)

    def chance(n, context):
        if n == 0:
            return 1 / 256
        below = chance(n - 1, context[1:])
        here = {gram: count for gram, count in grams[n].items() if gram[:-1] == context}
        if not here:
            return below
        total, count = sum(here.values()), here.get(context + bytes([byte]), 0)
        taken = sum(discount(grams[n], c) for c in here.values())
        own = count - discount(grams[n], count) if count else 0
        return own / total + taken / total * below

    return chance(3, context)


@pytest.mark.parametrize("train", [TEXT, b"abracadabra", b"x"], ids=["estimated", "small", "one"])
def test_same_as_the_slow_one(train):
    model = Trigram(train)
    for context in (b"to", b"th", b"\n\n", b"zq", b"\xff\x00", b"ra"):
        got = [model.probabilities(context + bytes([byte]))[2] for byte in range(256)]
        np.testing.assert_allclose(got, [slow(train, context, byte) for byte in range(256)], rtol=1e-10)
        assert math.isclose(sum(got), 1, rel_tol=1e-10)
    np.testing.assert_allclose(model.probabilities(b"to")[:1], slow(train, b"\n\n", ord("t")), rtol=1e-10)


def test_every_context_sums_to_one():
    table = Trigram(TEXT).table
    assert table.min() > 0
    np.testing.assert_allclose(table.sum(-1), 1, rtol=1e-12)


def test_bits_per_byte_is_the_mean():
    chances = Trigram(TEXT).probabilities(b"the mind")
    assert math.isclose(trigram_bits_per_byte(TEXT, b"the mind"), -np.log2(chances).mean(), rel_tol=1e-12)
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    assert 8 <= trigram_bits_per_byte(noise, noise[::-1]) < 8.2


def test_it_is_a_strong_baseline():
    """Technical English and code at 2.77 bits per byte; the number differs a little between Python's versions."""
    corpus = load_corpus("pydoc_topics")
    train, held_out = ("\n".join(texts).encode() for texts in (corpus.train, corpus.held_out))
    assert 2.6 < trigram_bits_per_byte(train, held_out) < 2.9


def test_refusals():
    with pytest.raises(ValueError, match="train: no bytes"):
        Trigram(b"")
    with pytest.raises(ValueError, match="held_out: no bytes"):
        trigram_bits_per_byte(b"a", b"")
