"""R's data in Debian's archive, made here as R makes it."""

import pytest
from r_writer import Writer, ar, deb

from moe_jax.train.r_data import _Reader, deb_texts

BOOKS = {"emma": ["EMMA", "", "By Jane Austen é “x”"], "zoo": ["one\r", "two"]}
TEXTS = {"emma": "EMMA\n\nBy Jane Austen é “x”\n", "zoo": "one\r\ntwo\n"}
PACKINGS = [(1, b""), (2, b"2"), (2, b"0"), (3, b"Z"), (3, b"2"), (3, b"0")]


@pytest.fixture
def read(tmp_path):
    def read(raw):
        (tmp_path / "thing.deb").write_bytes(raw)
        return deb_texts(tmp_path / "thing.deb")

    return read


@pytest.mark.parametrize(("kind", "how"), PACKINGS)
@pytest.mark.parametrize("version", [2, 3])
def test_every_packing(read, kind, how, version):
    assert read(deb(BOOKS, kind=kind, how=how, version=version)) == TEXTS


@pytest.mark.parametrize("tar", ["gz", "bz2", "xz"])
def test_every_archive_and_latin_1(read, tar):
    assert read(deb({"a": ["Zoë"]}, latin=True, tar=tar)) == {"a": "Zoë\n"}


def test_lists_without_names_and_numbers(read):
    """What else stands in an index: real numbers, empty lists, references back to symbols."""
    value = {"a": [1.5, 2.0], "b": {}, "c": ["x", None]}
    assert _Reader(Writer().document(value)).document() == value


def test_refusals(read, tmp_path):
    for raw, words in [
        (b"PK", "not a Debian package"),
        (ar({"debian-binary": b"2.0\n"}), r"no data.tar among \['debian-binary'\]"),
        (ar({"data.tar.zst": b"\x28\xb5\x2f\xfd" + b"\0" * 600}), "packed in a way|broken"),
        (deb(BOOKS)[:-40], "broken|EOFError"),
        (deb({"numbers": [1, 2]}), "TypeError"),
        (deb({"missing": ["a", None]}), "TypeError"),
    ]:
        with pytest.raises(OSError, match=f"thing.deb.*({words})"):
            read(raw)
    with pytest.raises(OSError, match="none.deb"):
        deb_texts(tmp_path / "none.deb")
