"""The baseline that a trained model has to beat: a byte trigram with modified Kneser-Ney smoothing."""

import math

import numpy as np
from jaxtyping import Float, Int

_START = b"\n\n"  # what a text's first byte follows


class Trigram:
    """Probabilities of a byte given the two before it, from the bytes `train`.

    Interpolated modified Kneser-Ney (Chen and Goodman, "An empirical study of smoothing techniques for language
    modeling", 1999, section 3): of n-gram counts a discount is taken, by whether they are 1, 2 or more, and given to
    the next shorter context, where n-grams count by how many bytes they follow. Raises `ValueError` for no bytes.

    >>> model = Trigram(b"abracadabra")
    >>> model.probabilities(b"abra").round(2).tolist()
    [0.86, 0.7, 0.88, 0.93]
    """

    def __init__(self, train: bytes):
        if not train:
            raise ValueError("train: no bytes to count")
        counts = np.bincount(_codes(train), minlength=1 << 24).reshape(256, 256, 256).astype(np.int32)
        pairs = np.count_nonzero(counts, axis=0)
        single = np.count_nonzero(pairs, axis=0)
        below = _interpolated(single, np.full(256, 1 / 256))
        below = _interpolated(pairs, below)
        self.table: Float[np.ndarray, "256 256 256"] = _interpolated(counts, below)

    def probabilities(self, text: bytes) -> Float[np.ndarray, " N"]:
        """The probability of each byte of a text, of which the first follows two line ends."""
        return self.table.reshape(-1)[_codes(text)]


def _codes(text: bytes) -> Int[np.ndarray, " N"]:
    """Each byte with the two before it as one number."""
    row = np.frombuffer(_START + text, np.uint8).astype(np.int64)
    return row[:-2] << 16 | row[1:-1] << 8 | row[2:]


def _interpolated(
    counts: Int[np.ndarray, "*C 256"], below: Float[np.ndarray, "*C1 256"]
) -> Float[np.ndarray, "*C 256"]:
    """Discounted relative counts, and what the discounts took in proportion to `below`."""
    discounts = _discounts(counts)
    kinds = np.minimum(counts, 3)
    total = counts.sum(-1, keepdims=True)
    taken = sum(discounts[kind] * np.count_nonzero(kinds == kind, axis=-1, keepdims=True) for kind in (1, 2, 3))
    share = np.where(total > 0, taken / np.maximum(total, 1), 1.0)
    return (counts - discounts[kinds]) / np.maximum(total, 1) + share * below


def _discounts(counts: Int[np.ndarray, "*C 256"]) -> Float[np.ndarray, " 4"]:
    """What to take of counts of 0, 1, 2 and more; half of one where the text is too small for an estimate."""
    ones, twos, threes, fours = (int(np.count_nonzero(counts == n)) for n in (1, 2, 3, 4))
    if not (ones and twos and threes and fours):
        return np.array([0, 0.5, 0.5, 0.5])
    y = ones / (ones + 2 * twos)
    estimates = [1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    return np.array([0, *np.clip(estimates, 0.05, [0.95, 1.95, 2.95])])


def trigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """What each byte of `held_out` costs a `Trigram` of `train` in the mean, in bits.

    Raises `ValueError` where one of them is empty.

    >>> trigram_bits_per_byte(b"to be or not to be " * 9, b"to be") < 0.5
    True
    """
    if not held_out:
        raise ValueError("held_out: no bytes to predict")
    return -float(np.log(Trigram(train).probabilities(held_out)).mean()) / math.log(2)
