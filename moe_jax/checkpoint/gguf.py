"""Reading GGUF files (llama.cpp's single-file checkpoints) with NumPy alone.

Layout: header, metadata, tensor table, padding, tensor data; all little-endian. Source: the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the block layouts in ggml-common.h of that repository.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Value types of the metadata: number -> struct code. 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
# Tensor types: number -> (name, elements per block, bytes per block).
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
# Named only so that a refusal can say what the file holds.
_OTHER_TYPES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}
_BLOCKS = {name: (elements, size) for name, elements, size in _TYPES.values()}
_DEPTH = 4  # arrays of arrays are legal; the limit keeps a hostile file from exhausting the stack


class GGUFTensor(NamedTuple):
    """Where a tensor lies: `shape` in logical order ([out, in]), `type` by name, `offset` in bytes of the file."""

    shape: tuple[int, ...]
    type: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file; 0 for a type that cannot be read."""
        elements, size = _BLOCKS.get(self.type, (1, 0))
        return math.prod(self.shape) // elements * size


def _half(raw: np.ndarray) -> np.ndarray:
    """Reads the float16 numbers of columns of bytes as float32."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Splits bytes into all the low halves, then all the high halves, as the 32-element blocks store them."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Spreads the 4 bytes that hold bit 4 of each of the 32 numbers of a Q5 block."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _q4_k(b: np.ndarray) -> np.ndarray:
    """Reads blocks of 256: 8 groups of 32, each with a 6-bit scale and a 6-bit minimum packed into 12 bytes."""
    packed = b[:, 4:16]
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6) << 4], axis=1).astype(np.float32)
    minima = np.concatenate([high & 63, (mixed >> 4) | (high >> 6) << 4], axis=1).astype(np.float32)
    numbers = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    scales, minima = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima
    return np.asarray(scales[:, :, None] * numbers - minima[:, :, None])


def _q6_k(b: np.ndarray) -> np.ndarray:
    """Reads blocks of 256: 4 low bits, 2 high bits, and an 8-bit scale for each 16 numbers."""
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4).astype(np.float32) - 32
    scales = _half(b[:, 208:]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return scales[:, :, None] * numbers


# Each takes uint8 [blocks, bytes per block] and gives float32 [blocks, ...], elements in order.
_DEQUANTISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda b: b.view("<f4").astype(np.float32),
    "F16": lambda b: b.view("<f2").astype(np.float32),
    "BF16": lambda b: (b.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "Q4_0": lambda b: _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8),
    "Q4_1": lambda b: _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4]),
    "Q5_0": lambda b: _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16),
    "Q5_1": lambda b: _half(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _half(b[:, 2:4]),
    "Q8_0": lambda b: _half(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8),
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


class GGUFFile:
    """Opens a GGUF file (version 2 or 3) as a memory map and reads its metadata and tensor table.

    `metadata` maps keys to Python values (arrays of numbers become lists), `tensors` maps names to `GGUFTensor`.
    Raises OSError where the file is absent, foreign, truncated or inconsistent; the message names the field.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "empty.gguf"
    >>> _ = path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    >>> GGUFFile(path).tensors
    {}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._at = 0
        # An empty file cannot be mapped, and is told like any other truncated one.
        size = self.path.stat().st_size
        self._data: np.ndarray = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        self._bytes = self._data.data  # slicing it is ten times faster than slicing the map
        if bytes(self._bytes[:4]) != b"GGUF":
            raise OSError(f"{self.path}: not a GGUF file: it starts with {bytes(self._bytes[:4])!r}")
        self._at = 4
        (version,) = self._take("I", "version")
        if version not in (2, 3):
            swapped = version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            raise self._bad(f"version {'is big-endian' if swapped else version}; 2 and 3, little-endian, are read")
        count, keys = self._take("QQ", "the counts")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise self._bad(f"metadata key {key!r} occurs twice")
            self.metadata[key] = self._value(self._take("I", key)[0], key)
        self.tensors = self._table(count)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as a new float32 array of its logical shape, dequantised where it is quantised.

        Raises ValueError where the file has no such tensor or its type is not supported.
        Source: the dequantize_row functions of ggml-quants.c; results are equal bit for bit.

        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "one.gguf"
        >>> table = struct.pack("<Q1sIQIQ", 1, b"x", 1, 2, 0, 0)  # tensor "x" of shape [2], float32, at the beginning
        >>> file = (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table).ljust(64, bytes(1))
        >>> _ = path.write_bytes(file + struct.pack("<2f", 1.5, -2.0))
        >>> GGUFFile(path).read("x").tolist()
        [1.5, -2.0]
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}")
        shape, kind, offset = self.tensors[name]
        if kind not in _BLOCKS:
            raise ValueError(f"{self.path}: tensor {name!r} has type {kind}; supported are {', '.join(_BLOCKS)}")
        elements, size = _BLOCKS[kind]
        length = int(np.prod(shape, dtype=object)) // elements * size
        blocks = np.asarray(self._data[offset : offset + length]).reshape(-1, size)
        # Scales of a damaged file may be infinite; the loader judges the numbers, not this reader.
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(_DEQUANTISE[kind](blocks).reshape(shape), np.float32, order="C")

    def _bad(self, what: str) -> OSError:
        return OSError(f"{self.path}: bad GGUF file: {what}")

    def _need(self, size: int, what: str) -> None:
        if self._at + size > len(self._data):
            raise self._bad(f"truncated in {what}: bytes {self._at} to {self._at + size} of {len(self._data)}")

    def _take(self, code: str, what: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code)
        self._need(size, what)
        self._at += size
        return struct.unpack_from("<" + code, self._bytes, self._at - size)

    def _string(self, what: str) -> str:
        (size,) = self._take("Q", what)
        self._need(size, what)
        self._at += size
        try:
            return bytes(self._bytes[self._at - size : self._at]).decode()
        except UnicodeDecodeError as error:
            raise self._bad(f"{what} is not UTF-8: {error}") from error

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == 8:
            return self._string(key)
        if kind in _SCALARS:
            return self._take(_SCALARS[kind], key)[0]
        if kind != 9 or depth == _DEPTH:
            raise self._bad(f"metadata {key!r} has type {kind} at depth {depth}")
        kind, count = self._take("IQ", key)
        if kind in _SCALARS:
            # Checked before the format is built: a wild count must not become a wild allocation.
            self._need(count * struct.calcsize(_SCALARS[kind]), key)
            return list(self._take(f"{count}{_SCALARS[kind]}", key))
        self._need(count * 8, key)
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _table(self, count: int) -> dict[str, GGUFTensor]:
        """Reads the tensor table and checks that every tensor of a known type lies within the file."""
        rows = []
        for _ in range(count):
            name = self._string("a tensor name")
            (rank,) = self._take("I", name)
            if rank > 4:
                raise self._bad(f"tensor {name!r} has {rank} dimensions; at most 4 are legal")
            # The file lists the fastest dimension first.
            rows.append((name, self._take(f"{rank}Q", name)[::-1], *self._take("IQ", name)))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._bad(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        table: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in rows:
            kind, elements, size = _TYPES.get(number, (_OTHER_TYPES.get(number, f"number {number}"), 1, 0))
            if name in table or (shape[-1:] or (1,))[0] % elements or offset % alignment:
                raise self._bad(f"tensor {name!r}, {kind} {shape} at {offset}: twice, misaligned or not whole blocks")
            self._at = start + offset
            self._need(int(np.prod(shape, dtype=object)) // elements * size, f"tensor {name!r}")
            table[name] = GGUFTensor(shape, kind, self._at)
        return table
