"""Windows that are a pure function of text, seed and step; held-out windows that predict everything once."""

import hashlib

import numpy as np
import pytest

from moe_jax.tokenizer import example_tokenizer
from moe_jax.train.bpe import train_tokenizer
from moe_jax.train.data import Windows, held_out_batches, load_tokens, tokenize


def epoch(windows, number):
    """The windows of an epoch, in order, from batches of one."""
    return [windows.batch(number * windows.per_epoch + i)[0] for i in range(windows.per_epoch)]


@pytest.mark.parametrize(("size", "length"), [(100, 8), (96, 8), (9, 8), (17, 8), (50, 1)])
def test_an_epoch_is_a_partition_of_the_ring(size, length):
    windows = Windows(np.arange(size), 1, length, seed=3)
    assert windows.per_epoch == size // length
    for number in range(3):
        rows = epoch(windows, number)
        for row in rows:
            np.testing.assert_array_equal(row, (row[0] + np.arange(length + 1)) % size)
        targets = np.concatenate([row[1:] for row in rows])
        assert len(targets) == len(set(targets.tolist())) == size // length * length


def test_epochs_differ_in_order_and_in_cut():
    windows = Windows(np.arange(1000), 1, 10, seed=0)
    starts = [[row[0] for row in epoch(windows, number)] for number in range(3)]
    assert len({start[0] % 10 for start in starts}) > 1
    assert all(np.any(np.diff(np.array(start)) % 1000 != 10) for start in starts)
    other = Windows(np.arange(1000), 1, 10, seed=1)
    assert [row[0] for row in epoch(other, 0)] != starts[0]


def test_a_step_alone_gives_its_batch():
    tokens = np.random.default_rng(0).integers(0, 256, 500).astype(np.int32)
    walked = Windows(tokens, 3, 7, seed=5)
    batches = [walked.batch(step) for step in range(60)]  # two and a half epochs
    for step in (59, 0, 24, 23):
        again = Windows(tokens, 3, 7, seed=5).batch(step)
        assert again.dtype == np.int32 and again.shape == (3, 8)
        np.testing.assert_array_equal(again, batches[step])


def test_batches_do_not_change():
    """Known bytes: resuming under another NumPy must go on with the same windows."""
    windows = Windows(np.arange(5000), 16, 32, seed=11)
    raw = b"".join(windows.batch(step).astype("<i4").tobytes() for step in (0, 9, 1000))
    assert hashlib.sha256(raw).hexdigest() == "663f591fa2592d167dcc0ecc5d13b6214ba51278482c4eb2556eec405f54ec4b"


def test_a_batch_larger_than_an_epoch_goes_on_in_the_next():
    tokens = np.arange(25)
    large, single = Windows(tokens, 8, 8, seed=2), Windows(tokens, 1, 8, seed=2)
    assert large.per_epoch == 3
    expected = [single.batch(step)[0] for step in range(16)]
    np.testing.assert_array_equal(np.concatenate([large.batch(0), large.batch(1)]), expected)


def test_rows_are_a_part_of_the_batch():
    windows = Windows(np.arange(300), 6, 5, seed=0)
    whole = windows.batch(4)
    parts = [windows.batch(4, slice(i * 2, (i + 1) * 2)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(windows.batch(4, slice(1, None, 3)), whole[1::3])


def test_window_refusals():
    with pytest.raises(ValueError, match=r"tokens: 8, fewer than one window of 8 \+ 1"):
        Windows(np.arange(8), 1, 8, 0)
    for sizes in ((0, 8, 0), (1, 0, 0), (1, 8, -1)):
        with pytest.raises(ValueError, match=f"batch_size {sizes[0]}, length {sizes[1]}.*seed {sizes[2]}"):
            Windows(np.arange(20), *sizes)
    with pytest.raises(ValueError, match="step: -1"):
        Windows(np.arange(20), 1, 8, 0).batch(-1)


@pytest.mark.parametrize("size", [2, 5, 6, 7, 12, 13, 14, 40])
def test_held_out_tokens_are_predicted_once(size):
    tokens = np.random.default_rng(1).integers(1, 99, size)
    batches = list(held_out_batches(tokens, 3, 4))
    predicted = []
    for ids, mask in batches:
        assert ids.shape == (3, 5) and ids.dtype == np.int32 and mask.shape == (3, 4) and mask.dtype == np.float32
        for row, counted in zip(ids, mask, strict=True):
            assert (row[1:][counted == 0] == 0).all()
            predicted += row[1:][counted == 1].tolist()
    assert predicted == tokens[1:].tolist()
    assert len(batches) == -(-(size - 1) // 12)


def test_held_out_refusals():
    with pytest.raises(ValueError, match="1 tokens: at least 2"):
        held_out_batches(np.arange(1), 1, 4)
    with pytest.raises(ValueError, match="length 0"):
        held_out_batches(np.arange(9), 1, 0)


def test_tokenize_puts_eos_behind_each_document():
    tokenizer = train_tokenizer(["an apple and an orange " * 9], 262)
    ids = tokenize(["an apple", "", "é"], tokenizer)
    assert ids.dtype == np.int32 and (ids == 0).sum() == 3 and ids[-1] == 0
    assert tokenizer.decode(ids, skip_special_tokens=False) == "an apple<|endoftext|><|endoftext|>é<|endoftext|>"
    assert tokenize([], tokenizer).shape == (0,)


def test_tokenize_without_eos_joins():
    assert tokenize(["ab", "a"], example_tokenizer()).tolist() == example_tokenizer().encode("ab\na")
    assert tokenize(["ü", "b"], "bytes").tolist() == [0xC3, 0xBC, 10, 98]
    with pytest.raises(ValueError, match="tokenizer: 'byte'"):
        tokenize(["a"], "byte")


def test_token_files_are_mapped(tmp_path):
    ids = np.arange(2000, dtype=np.uint16) * 30
    np.save(tmp_path / "ids.npy", ids.astype(np.uint32))
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    expected = Windows(ids[:1800].astype(np.int32), 4, 16, seed=1).batch(3)
    for name in ("ids.npy", "ids.bin"):
        train, held_out = load_tokens(tmp_path / name, 0.1)
        assert isinstance(train, np.memmap) and (len(train), len(held_out)) == (1800, 200)
        got = Windows(train, 4, 16, seed=1).batch(3)
        np.testing.assert_array_equal(got, expected)
        assert type(got) is np.ndarray
        first, _ = next(held_out_batches(held_out, 2, 8))
        np.testing.assert_array_equal(first[0], ids[1800:1809])


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "real.npy", np.zeros(3))
    np.save(tmp_path / "two.npy", np.zeros((3, 2), np.int32))
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for name in ("real.npy", "two.npy", "text.npy", "odd.bin", "none.npy", "none.bin"):
        with pytest.raises(OSError, match=name):
            load_tokens(tmp_path / name)
    with pytest.raises(ValueError, match="held_out: 1.0"):
        load_tokens(tmp_path / "real.npy", 1.0)
