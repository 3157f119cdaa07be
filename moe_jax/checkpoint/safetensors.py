"""The safetensors format: headers and byte ranges, without copying more than is asked for.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of header length, a JSON header, raw tensors.
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: dtype name as in the header, shape, absolute offset and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """One `.safetensors` file. Opening reads its header only; `read` reads one tensor.

    Raises `OSError` for a file that is missing, truncated or not in the format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from error
        try:
            self.entries = self._header(os.fstat(self._descriptor).st_size)
        except BaseException:
            self.close()
            raise

    def _header(self, size: int) -> dict[str, Entry]:
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise OSError(f"{self.path}: not a safetensors file, or truncated ({size} bytes, header of {length})")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            header.pop("__metadata__", None)
            entries = {name: self._entry(value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{self.path}: malformed safetensors header ({error})") from error
        end = max((e.offset + e.nbytes for e in entries.values()), default=0)
        if end > size:
            cut = sorted(name for name, e in entries.items() if e.offset + e.nbytes > size)
            raise OSError(f"{self.path}: truncated, {size} of {end} bytes; incomplete tensors: {', '.join(cut)}")
        return entries

    @staticmethod
    def _entry(value: Mapping[str, Any], base: int) -> Entry:
        first, last = value["data_offsets"]
        dtype, shape = value["dtype"], tuple(value["shape"])
        if not isinstance(dtype, str) or any(not isinstance(n, int) or n < 0 for n in (first, *shape)) or last < first:
            raise ValueError(f"no tensor has dtype {dtype}, shape {shape} and bytes {first} to {last}")
        if dtype in DTYPES and math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != last - first:
            raise ValueError(f"{dtype} {shape} does not fill {last - first} bytes")
        return Entry(dtype, shape, base + first, last - first)

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """The tensor as a NumPy array: `into`, if its dtype and shape are the tensor's, else one of its own memory."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise OSError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which is not supported")
        dtype = DTYPES[entry.dtype]
        if into is None or (into.dtype, into.shape) != (dtype, entry.shape) or not into.flags.c_contiguous:
            into = np.empty(entry.shape, dtype)
        raw = into.reshape(-1).view(np.uint8)
        done = 0
        while done < entry.nbytes:
            got = os.preadv(self._descriptor, [memoryview(raw.data)[done:]], entry.offset + done)
            if got == 0:
                raise OSError(f"{self.path}: ends in the middle of tensor {name!r}")
            done += got
        return into

    def view(self, name: str) -> np.ndarray:
        """The tensor, mapped from the file until the last array of it goes: only what is looked at is read."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise OSError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which is not supported")
        if not entry.nbytes:
            return np.empty(entry.shape, DTYPES[entry.dtype])
        first = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = entry.offset - first
        pages = mmap.mmap(self._descriptor, skipped + entry.nbytes, access=mmap.ACCESS_READ, offset=first)
        raw = np.frombuffer(pages, np.uint8, entry.nbytes, skipped)
        if skipped % np.dtype(DTYPES[entry.dtype]).itemsize:  # a header of odd length
            raw = raw.copy()
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self):
        self.close() if getattr(self, "_descriptor", -1) >= 0 else None


#: Names, dtypes and shapes of a file's tensors, in order.
Layout = Mapping[str, tuple[Any, tuple[int, ...]]]


def write_file(path: str | Path, layout: Layout, arrays: Iterable[np.ndarray]) -> None:
    """Write tensors of known dtype and shape, taking `arrays` one by one in the order of `layout`.

    The file appears under its name only when it is whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = Path(f"{path}.partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), array in zip(layout.items(), arrays, strict=True):
            if array.dtype != np.dtype(dtype) or array.shape != tuple(shape):
                raise ValueError(f"{name}: got {array.dtype} {array.shape}, announced {np.dtype(dtype)} {shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    os.replace(partial, path)
