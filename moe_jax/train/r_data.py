"""Texts out of an R package's data: Debian's archive around R's lazy-load database around serialised strings.

Formats: deb(5); R's src/library/base/R/lazyload.R and, for serialisation and compression, src/main/serialize.c.
"""

import bz2
import io
import lzma
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

# types of values, and flags beside them
_SYMBOL, _PAIRLIST, _STRING, _LOGICAL, _INTEGER, _REAL, _STRINGS, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_NIL, _REFERENCE = 254, 255
_ATTRIBUTES, _TAG, _LATIN1 = 1 << 9, 1 << 10, 1 << 14


def deb_texts(path: str | Path) -> dict[str, str]:
    """The character vectors in the data of an R package (a Debian .deb) by name, elements joined by line ends.

    Raises `OSError` where the file is something else or holds other data.

    >>> deb_texts(__file__)
    Traceback (most recent call last):
    OSError: ...r_data.py: no R package with texts as its data: ValueError: not a Debian package
    """
    try:
        files = _data_files(Path(path).read_bytes())
        index = _Reader(zlib.decompress(files["rdx"], 47)).document()
        variables, kind = index["variables"], int(index["compressed"][0])
        texts = {}
        for name, (offset, size) in variables.items():
            value = _Reader(_unpacked(files["rdb"][offset : offset + size], kind)).document()
            texts[name] = "\n".join(value) + "\n"
    except (KeyError, IndexError, TypeError, ValueError, EOFError, struct.error) as error:
        raise OSError(f"{path}: no R package with texts as its data: {type(error).__name__}: {error}") from error
    except (zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise OSError(f"{path}: broken, or packed in a way that this Python cannot read: {error}") from error
    return texts


def _data_files(raw: bytes) -> dict[str, bytes]:
    """The two files of the database, by their endings, out of the bytes of a .deb."""
    if not raw.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    place, members = 8, {}
    while place + 60 <= len(raw):
        name, size = raw[place : place + 16].decode().rstrip(" /"), int(raw[place + 48 : place + 58])
        members[name] = raw[place + 60 : place + 60 + size]
        if len(members[name]) < size:
            raise EOFError(f"{name}: {len(members[name])} bytes of {size}")
        place += 60 + size + size % 2
    data = next((value for name, value in members.items() if name.startswith("data.tar")), None)
    if data is None:
        raise ValueError(f"no data.tar among {sorted(members)}")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = [entry for entry in archive if entry.name.endswith(("/data/Rdata.rdx", "/data/Rdata.rdb"))]
        return {entry.name[-3:]: archive.extractfile(entry).read() for entry in found}


def _unpacked(raw: bytes, kind: int) -> bytes:
    """A value of the database, compressed in one of R's three ways (`kind`: 1, 2 or 3)."""
    if kind == 1:
        return zlib.decompress(raw[4:])
    how, raw = raw[4:5], raw[5:]
    if how == b"2":
        return bz2.decompress(raw)
    if how == b"Z":
        return lzma.decompress(raw, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    if how == b"0":
        return raw
    raise ValueError(f"compression {kind} {how!r}")


class _Reader:
    """Reads R's binary (XDR) serialisation: vectors as lists, vectors with names as dictionaries."""

    def __init__(self, raw: bytes):
        self.raw, self.place = raw, 0
        self.seen: list[str] = []

    def document(self) -> Any:
        """The value behind the header."""
        if self._take(2) != b"X\n":
            raise ValueError("not R's XDR serialisation")
        if (version := self._integers(3)[0]) not in (2, 3):
            raise ValueError(f"serialisation version {version}")
        if version == 3:
            self._take(self._integers(1)[0])  # the native encoding
        return self._value()

    def _take(self, size: int) -> bytes:
        part = self.raw[self.place : self.place + size]
        if size < 0 or len(part) < size:
            raise EOFError(f"{size} bytes wanted at {self.place} of {len(self.raw)}")
        self.place += size
        return part

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self._take(4 * count)))

    def _value(self) -> Any:
        flags = self._integers(1)[0]
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _REFERENCE:
            return self.seen[(flags >> 8 or self._integers(1)[0]) - 1]
        if kind == _SYMBOL:
            self.seen.append(self._value())
            return self.seen[-1]
        if kind == _STRING:
            size = self._integers(1)[0]
            return None if size < 0 else self._take(size).decode("latin-1" if flags & _LATIN1 else "utf-8")
        if kind == _PAIRLIST:
            return self._pairs(flags)
        vector = self._vector(kind)
        names = (self._value() or {}).get("names") if flags & _ATTRIBUTES else None
        return vector if names is None else dict(zip(names, vector, strict=True))

    def _pairs(self, flags: int) -> dict[str, Any]:
        pairs = {}
        while flags & 0xFF == _PAIRLIST:
            if flags & _ATTRIBUTES:
                self._value()
            name = self._value() if flags & _TAG else None
            pairs[name] = self._value()
            flags = self._integers(1)[0]
        return pairs

    def _vector(self, kind: int) -> list[Any]:
        count = self._integers(1)[0]
        if kind in (_INTEGER, _LOGICAL):
            return self._integers(count)
        if kind == _REAL:
            return list(struct.unpack(f">{count}d", self._take(8 * count)))
        if kind in (_STRINGS, _LIST):
            return [self._value() for _ in range(count)]
        raise ValueError(f"type {kind} is not supported")
