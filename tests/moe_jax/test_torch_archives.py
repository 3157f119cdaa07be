"""Archives that torch.save does not write: damaged, crafted, or of another kind. All are refused."""

import os
import random
import struct
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN
from torch_writer import archive, save, storage, tensor

from moe_jax.checkpoint import torch_pickle, torch_zip
from moe_jax.checkpoint.torch_file import LazyTensor, TorchFile

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}
PICKLED = tensor(storage()) + b"."


def refused(path, message):
    with pytest.raises(OSError, match=message) as raised:
        TorchFile(path)
    assert str(path) in str(raised.value)


def patched(path, old, new, count=-1):
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new, count))


@pytest.fixture
def path(tmp_path):
    """An honest archive, to be spoiled."""
    archive(tmp_path / "a.pt", PICKLED, FOUR)
    assert TorchFile(tmp_path / "a.pt").content.read().tolist() == [0, 1, 2, 3]
    return tmp_path / "a.pt"


def test_other_files(tmp_path):
    refused(GOLDEN / "torch/legacy.pt", "before torch 1.6 is not supported; save it again")
    refused(GOLDEN / "torch/module.pt", "torch.nn.modules.linear.Linear")
    refused(tmp_path / "missing.pt", "No such file")
    refused(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "not a regular file")
    for raw in (b"", b"PK\3\4", b"\x80\x02}.", b"\x93NUMPY", bytes(100)):
        (tmp_path / "odd.pt").write_bytes(raw)
        refused(tmp_path / "odd.pt", "not a torch zip archive|truncated")


def test_every_truncation(path):
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        refused(path, "not a torch zip archive|truncated|malformed")
    path.write_bytes(raw + b"more")
    refused(path, "something was appended")
    path.write_bytes(b"more" + raw)
    refused(path, "not a torch zip archive")


def test_compressed(tmp_path):
    archive(tmp_path / "a.pt", PICKLED, FOUR, compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "a.pt", "compressed")


@pytest.mark.parametrize("flag", [0x0001, 0x0040, 0x2000])
@pytest.mark.parametrize("where", [b"PK\x01\x02", b"PK\x03\x04"])
def test_encrypted(path, where, flag):
    at = path.read_bytes().index(where)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<H", raw, at + (8 if where == b"PK\x01\x02" else 6), flag)
    path.write_bytes(raw)
    refused(path, "encrypted|another header")


@pytest.mark.parametrize(
    "name",
    [
        "archive/../../0",
        "/archive/data/0",
        "archive//data/0",
        "archive/./0",
        "C:/archive/0",
        "archive\\0/a",
        "a/\x1b[2J",
    ],
)
def test_odd_names(tmp_path, name):
    archive(tmp_path / "a.pt", PICKLED, FOUR, [(name, b"x")])
    refused(tmp_path / "a.pt", "not a plain relative path")


def test_name_that_is_not_utf8(path):
    patched(path, b"archive/version", b"archive/versio\xff")
    refused(path, "not UTF-8")


def test_duplicates(tmp_path):
    archive(tmp_path / "a.pt", PICKLED, FOUR | {"1": bytes(16)})
    patched(tmp_path / "a.pt", b"archive/data/1", b"archive/data/0")
    refused(tmp_path / "a.pt", "two entries are named 'archive/data/0'")


def test_directory_and_headers_disagree(path):
    raw = path.read_bytes()
    patched(path, b"archive/data/0", b"archive/data/1", 1)
    refused(path, "another header")
    path.write_bytes(raw)
    at = raw.rindex(b"PK\x01\x02")  # of data/0
    for offset, message in ((0, "another header"), (1, "no header"), (1 << 30, "no header"), (2**32 - 1, "no header")):
        spoiled = bytearray(raw)
        struct.pack_into("<L", spoiled, at + 42, offset)
        path.write_bytes(spoiled)
        refused(path, message)
    for sizes, message in (((17, 17), "overlaps|claims"), ((1 << 30, 1 << 30), "overlaps"), ((16, 17), "compressed")):
        spoiled = bytearray(raw)
        struct.pack_into("<2L", spoiled, at + 20, *sizes)
        path.write_bytes(spoiled)
        refused(path, message)


def test_entries_that_share_bytes(path):
    """A small entry's length grown over the next one."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1)  # of byteorder
    struct.pack_into("<2L", raw, at + 20, 60, 60)
    path.write_bytes(raw)
    refused(path, "overlaps")


def test_directory_claims(path, monkeypatch):
    raw = path.read_bytes()
    for at, form, value in ((-14, "<H", 9), (-12, "<H", 9), (-10, "<L", 2**32 - 1), (-6, "<L", 2**31), (-6, "<L", 7)):
        spoiled = bytearray(raw)
        struct.pack_into(form, spoiled, len(raw) + at, value)
        path.write_bytes(spoiled)
        refused(path, "malformed archive")
    path.write_bytes(raw)
    monkeypatch.setattr(torch_zip, "_MAX_DIRECTORY", 50)
    refused(path, "directory takes")


def test_long_pickles_are_not_read(path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_BYTES", 50)
    refused(path, "a pickle of")


def test_contents(tmp_path):
    path = tmp_path / "a.pt"
    archive(path, PICKLED, FOUR, [("byteorder", b"big")])
    refused(path, "byte order b'big' is not supported")
    archive(path, PICKLED, {"0": bytes(15)})
    refused(path, "has 15 bytes")
    archive(path, PICKLED, {})
    refused(path, "storage 0 is missing")
    archive(path, PICKLED, FOUR, [("constants.pkl", b"N.")])
    refused(path, "TorchScript")
    archive(path, PICKLED, FOUR, [("other/data.pkl", PICKLED)])
    refused(path, "single folder")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3")
    refused(path, "single folder")


def test_64_bit_directories(tmp_path, monkeypatch):
    """Archives whose sizes stand in 64-bit records, as Python writes them beyond its limits, are read all the same."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    save(tmp_path / "a.pt", {"w": np.arange(6, dtype=np.int16)})
    assert b"PK\x06\x06" in (tmp_path / "a.pt").read_bytes()
    assert TorchFile(tmp_path / "a.pt").content["w"].read().tolist() == [0, 1, 2, 3, 4, 5]


def test_damage_at_random(tmp_path):
    """Whatever bytes are damaged, a file is read or refused by an OSError; nothing else happens."""
    whole, path = (GOLDEN / "torch/tensors.pt").read_bytes(), tmp_path / "a.pt"
    chance, refusals = random.Random(0), 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            raw[chance.randrange(len(raw))] = chance.choice([0, 1, 255, chance.randrange(256)])
        path.write_bytes(raw)
        try:
            content = TorchFile(path).content
            for value in content.values() if isinstance(content, dict) else ():
                value.read() if isinstance(value, LazyTensor) else None
        except OSError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 100
