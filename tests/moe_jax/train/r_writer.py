"""Writes R packages with texts as their data, as R and dpkg-deb would."""

import bz2
import io
import lzma
import struct
import tarfile
import zlib

_LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}]


class Writer:
    """R's XDR serialisation of what a lazy-load database holds: dict (list with names), list[int] and list[str]."""

    def __init__(self, version=3, latin=False):
        self.version, self.latin, self.symbols = version, latin, []

    def document(self, value):
        head = b"X\n" + struct.pack(">3i", self.version, 0x040201, 0x020300)
        if self.version == 3:
            head += struct.pack(">i", 5) + b"UTF-8"
        return head + self.value(value)

    def string(self, text):
        if text is None:
            return struct.pack(">2i", 9, -1)
        flag = 1 << 6 if text.isascii() else 1 << 2 if self.latin else 1 << 3
        raw = text.encode("latin-1" if self.latin else "utf-8")
        return struct.pack(">2i", 9 | flag << 12, len(raw)) + raw

    def symbol(self, name):
        if name in self.symbols:
            return struct.pack(">i", (self.symbols.index(name) + 1) << 8 | 255)
        self.symbols.append(name)
        return struct.pack(">i", 1) + self.string(name)

    def value(self, value):
        if isinstance(value, dict):
            body = struct.pack(">2i", 19 | 1 << 9, len(value)) + b"".join(map(self.value, value.values()))
            names = struct.pack(">i", 2 | 1 << 10) + self.symbol("names") + self.value(list(value))
            return body + names + struct.pack(">i", 254)
        if value and isinstance(value[0], float):
            return struct.pack(f">2i{len(value)}d", 14, len(value), *value)
        if value and isinstance(value[0], int):
            return struct.pack(f">2i{len(value)}i", 13, len(value), *value)
        return struct.pack(">2i", 16, len(value)) + b"".join(map(self.string, value))


def packed(raw, kind, how=b"Z"):
    """Compressed as in the database; `how` under kinds 2 and 3: bzip2, LZMA or not at all."""
    size = struct.pack(">i", len(raw))
    if kind == 1:
        return size + zlib.compress(raw)
    pack = {b"2": bz2.compress, b"Z": lambda r: lzma.compress(r, lzma.FORMAT_RAW, filters=_LZMA2), b"0": bytes}[how]
    return size + how + pack(raw)


def deb(variables, *, kind=1, how=b"Z", version=3, latin=False, tar="xz"):
    """The bytes of a .deb of an R package with the character vectors `variables` as its data."""
    data, places = b"", {}
    for name, lines in variables.items():
        raw = packed(Writer(version, latin).document(lines), kind, how)
        places[name], data = [len(data), len(raw)], data + raw
    index = {"variables": places, "references": {}, "compressed": [kind]}
    files = {"Rdata.rdx": zlib.compress(Writer(version).document(index)), "Rdata.rdb": data, "Rdata.rds": b"no matter"}
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=f"w:{tar}") as archive:
        for name, raw in files.items():
            entry = tarfile.TarInfo(f"./usr/lib/R/site-library/thing/data/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{tar}": sink.getvalue()})


def ar(members):
    """An ar archive."""
    out = b"!<arch>\n"
    for name, raw in members.items():
        out += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(raw):<10}`\n".encode() + raw + b"\n" * (len(raw) % 2)
    return out
