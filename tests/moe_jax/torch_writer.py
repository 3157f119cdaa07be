"""Writes torch's zip archives without torch: honest ones from arrays, and others from opcodes by hand."""

import argparse
import struct
import zipfile
from collections import OrderedDict

import numpy as np

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}


def named(module, name):
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def text(value):
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*parts):
    """TUPLE of encoded parts."""
    return b"(" + b"".join(parts) + b"t"


def storage(key="0", count=4, kind="FloatStorage", module="torch"):
    """A persistent id."""
    return group(text("storage"), named(module, kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(storage, offset=0, shape=(4,), strides=(1,), view=b""):
    """A call of `_rebuild_tensor_v2`."""
    lengths = [group(*map(number, ns)) for ns in (shape, strides)]
    hooks = named("collections", "OrderedDict") + b")R"
    args = group(storage, number(offset), *lengths, b"\x89", hooks, view)
    return named("torch._utils", "_rebuild_tensor_v2") + args + b"R"


class Writer:
    """Encodes values as opcodes and collects the storages; arrays that share memory share a storage."""

    def __init__(self):
        self.storages = {}

    def encode(self, value):
        """Opcodes that build `value`."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return number(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return text(value)
        if isinstance(value, tuple):
            return group(*map(self.encode, value))
        if isinstance(value, list):
            return b"](" + b"".join(map(self.encode, value)) + b"e"
        if isinstance(value, argparse.Namespace):
            return named("argparse", "Namespace") + b")\x81" + self.encode(vars(value)) + b"b"
        empty = named("collections", "OrderedDict") + b")R" if isinstance(value, OrderedDict) else b"}"
        return empty + b"(" + b"".join(self.encode(k) + self.encode(v) for k, v in value.items()) + b"u"

    def _array(self, array):
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        base = base if base.flags.c_contiguous and base.dtype == array.dtype else (array := array.copy())
        key, _ = self.storages.setdefault(id(base), (str(len(self.storages)), base))
        size = array.itemsize
        offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // size
        kind = f"{STORAGES[array.dtype.name]}Storage"
        return tensor(storage(key, base.size, kind), offset, array.shape, [s // size for s in array.strides])


def save(path, value):
    """Write `value`: dicts, lists, tuples, numbers, text, `argparse.Namespace` and arrays."""
    writer = Writer()
    pickled = b"\x80\x02" + writer.encode(value) + b"."
    archive(path, pickled, {key: base.tobytes() for key, base in writer.storages.values()})


def archive(path, pickled, storages, entries=(), root="archive", compression=zipfile.ZIP_STORED):
    """Write an archive of a pickle, storages by key and further entries by name."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", pickled)
        for name, raw in dict({"byteorder": b"little", "version": b"3\n"}, **dict(entries)).items():
            file.writestr(f"{root}/{name}" if "/" not in name else name, raw)
        for key, raw in storages.items():
            file.writestr(f"{root}/data/{key}", raw)
