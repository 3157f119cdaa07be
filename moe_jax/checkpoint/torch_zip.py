"""The directory of a torch zip archive: stored entries only, each inside the file and apart from the others.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT. Python's `zipfile` forgives much that only crafted
or damaged files have (duplicates, overlaps, sizes beyond the end), so the few records that torch writes are read here.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_MAX_DIRECTORY = 64 << 20
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that torch wrote before it used archives


class Span(NamedTuple):
    """Where an entry's bytes lie in the file."""

    offset: int
    nbytes: int


class _Record(NamedTuple):
    name: str
    header: int
    nbytes: int


def read_directory(descriptor: int, path: Path) -> dict[str, Span]:
    """Entries of the archive by name; `OSError` for what torch does not write (compression, odd names)."""
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 14, 0)
    if start == _LEGACY:
        raise OSError(f"{path}: the format from before torch 1.6 is not supported; save it again with torch.save")
    if start[:4] != b"PK\x03\x04":
        raise OSError(f"{path}: not a torch zip archive")
    count, where, length = _end(descriptor, path, size)
    records = _records(os.pread(descriptor, length, where), count, path)
    spans: dict[str, Span] = {}
    free = 0
    for record in sorted(records, key=lambda r: r.header):
        if record.name in spans:
            raise OSError(f"{path}: two entries are named {record.name!r}")
        span = _span(descriptor, record, path)
        if record.header < free or span.offset + span.nbytes > where:
            raise OSError(f"{path}: entry {record.name!r} overlaps what follows, or the file is truncated")
        free = span.offset + span.nbytes
        spans[record.name] = span
    return spans


def _end(descriptor: int, path: Path, size: int) -> tuple[int, int, int]:
    """Number of entries, offset and length of the directory, from the records at the very end of the file."""
    length = min(size, _LOCATOR.size + _END.size)
    tail = os.pread(descriptor, length, size - length)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise OSError(f"{path}: no archive directory at the end: truncated ({size} bytes), or something was appended")
    _, disk, first, here, count, nbytes, where, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    if tail[:4] == b"PK\x06\x07":
        at = _LOCATOR.unpack(tail[: _LOCATOR.size])[2]
        raw = os.pread(descriptor, _END64.size, at) if at < size else b""
        if len(raw) < _END64.size or raw[:4] != b"PK\x06\x06":
            raise OSError(f"{path}: malformed archive: no 64-bit directory record at {at}")
        wide = _END64.unpack(raw)
        disk, first, here, count, nbytes, where = wide[4:]
        end = at
    if disk or first or here != count or comment or where + nbytes > end:
        raise OSError(f"{path}: malformed archive: {count} entries in {nbytes} bytes at {where} of {size}")
    if nbytes > _MAX_DIRECTORY:
        raise OSError(f"{path}: the archive's directory takes {nbytes} bytes, more than {_MAX_DIRECTORY}")
    return count, where, nbytes


def _records(raw: bytes, count: int, path: Path) -> list[_Record]:
    records: list[_Record] = []
    at = 0
    while at < len(raw):
        if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            raise OSError(f"{path}: malformed archive directory after {len(records)} entries")
        fields = _CENTRAL.unpack_from(raw, at)
        flags, method, packed, nbytes, names, extras, comment, header = *fields[3:5], *fields[8:13], fields[16]
        at += _CENTRAL.size
        name = _name(raw[at : at + names], path)
        extra = raw[at + names : at + names + extras]
        at += names + extras + comment
        if flags & _ENCRYPTED:
            raise OSError(f"{path}: entry {name!r} is encrypted")
        nbytes, packed, header = _widen(extra, (nbytes, packed, header))
        if method or packed != nbytes:
            raise OSError(f"{path}: entry {name!r} is compressed; torch.save stores its entries as they are")
        records.append(_Record(name, header, nbytes))
    if len(records) != count or at != len(raw):
        raise OSError(f"{path}: malformed archive directory: {len(records)} of {count} entries")
    return records


def _name(raw: bytes, path: Path) -> str:
    """An entry's name, of plain parts only: nothing is written to disk, but an odd name has no honest reason."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: an entry's name is not UTF-8: {raw[:100]!r}") from error
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or {"\\", ":"} & set(name) or not name.isprintable():
        raise OSError(f"{path}: entry name {name[:100]!r} is not a plain relative path")
    return name


def _widen(extra: bytes, values: tuple[int, int, int]) -> tuple[int, ...]:
    """The sizes and the offset that stand in a 64-bit extra field because they do not fit into 32."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    result, used = [], 0
    for value in values:
        if value == 0xFFFFFFFF and used + 8 <= len(wide):
            value = int.from_bytes(wide[used : used + 8], "little")
            used += 8
        result.append(value)
    return tuple(result)


def _span(descriptor: int, record: _Record, path: Path) -> Span:
    """Where the bytes of an entry begin; its own header has to agree with the directory."""
    if record.header >= 1 << 62:
        raise OSError(f"{path}: entry {record.name!r} begins at byte {record.header}, after the file's end")
    name = record.name.encode()
    raw = os.pread(descriptor, _LOCAL.size + len(name), record.header)
    if len(raw) < _LOCAL.size + len(name) or raw[:4] != b"PK\x03\x04":
        raise OSError(f"{path}: entry {record.name!r} has no header at byte {record.header}; truncated?")
    fields = _LOCAL.unpack_from(raw)
    flags, method, names, extras = fields[2], fields[3], fields[9], fields[10]
    if flags & _ENCRYPTED or method or names != len(name) or raw[_LOCAL.size :] != name:
        raise OSError(f"{path}: entry {record.name!r} has another header than the directory announces")
    return Span(record.header + _LOCAL.size + names + extras, record.nbytes)
