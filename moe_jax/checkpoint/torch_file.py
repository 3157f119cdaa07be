"""Files of `torch.save`, read without torch and without executing what the pickle in them asks for."""

import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from . import torch_pickle
from .torch_values import LazyTensor, Record, Storage
from .torch_zip import Span, read_directory

__all__ = ["LazyTensor", "Record", "TorchFile"]

_MAX_DIMENSIONS = 32
_MAX_EXPANDED = 1 << 20


class TorchFile:
    """A `.pt` file that `torch.save` wrote: `content` is what was saved, with a `LazyTensor` for each tensor.

    Takes the file's path. Tensors, dicts, lists, tuples, sets, numbers, text, bytes and None are read; an OrderedDict
    keeps its order, a dtype is text (`"torch.float16"`), an `argparse.Namespace` is a dict (`Record`). Opening reads
    the archive's directory and the pickle, a tensor's bytes are read when it is asked for, and no descriptor stays open
    between reads: a model may have thousands of expert files. Raises `OSError`, naming the file, for anything else:
    other classes and functions (by name), compressed, damaged or truncated archives, legacy files.

    >>> file = TorchFile("tests/golden/torch/tensors.pt")
    >>> file.content["view"]
    LazyTensor(shape=(4, 3), dtype=dtype('float32'))
    >>> file.content["view"].read()[0].tolist()
    [0.0, 4.0, 8.0]
    """

    content: Any

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stamp: tuple[int, ...] = ()
        self._closed = False
        descriptor = self._open()
        try:
            self._entries = read_directory(descriptor, self.path)
            self._root = self._find_root()
            self._check_order(descriptor)
            span = self._entries[f"{self._root}/data.pkl"]
            if span.nbytes > torch_pickle.MAX_BYTES:
                raise OSError(f"{path}: a pickle of {span.nbytes} bytes, more than {torch_pickle.MAX_BYTES}")
            raw = os.pread(descriptor, span.nbytes, span.offset)
        finally:
            os.close(descriptor)
        self.content = torch_pickle.load(raw, self.path, self._tensor)

    def _open(self) -> int:
        """A descriptor of the file, which has to be the one that was opened first."""
        if self._closed:
            raise OSError(f"{self.path}: is closed")
        try:
            found = os.stat(self.path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{self.path}: not a regular file")
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror}") if error.strerror else error from None
        stamp = (found.st_size, found.st_mtime_ns)
        if self._stamp not in ((), stamp):
            os.close(descriptor)
            raise OSError(f"{self.path}: has changed since it was opened")
        self._stamp = stamp
        return descriptor

    def _find_root(self) -> str:
        """The one folder that holds everything in the archive."""
        roots = {name.split("/")[0] for name in self._entries}
        root = next(iter(roots), "")
        if len(roots) != 1 or f"{root}/data.pkl" not in self._entries:
            raise OSError(f"{self.path}: not an archive of torch.save: no data.pkl in a single folder")
        if f"{root}/constants.pkl" in self._entries:
            raise OSError(f"{self.path}: a TorchScript program, which is not supported; save its state_dict")
        return root

    def _check_order(self, descriptor: int) -> None:
        span = self._entries.get(f"{self._root}/byteorder")
        order = os.pread(descriptor, min(span.nbytes, 16), span.offset) if span else b"little"
        if order != b"little":
            raise OSError(f"{self.path}: byte order {order!r} is not supported, only little")

    def _tensor(self, storage: Storage, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        """A tensor on a storage, with all that the pickle claims held against the file."""
        what = f"{self.path}: storage {storage.key}"
        size = storage.dtype.itemsize
        span = self._entries.get(f"{self._root}/data/{storage.key}")
        if span is None or span.nbytes != storage.count * size:
            has = "is missing" if span is None else f"has {span.nbytes} bytes"
            raise OSError(f"{what} {has}, the pickle claims {storage.count} values of {storage.dtype}")
        lengths = (shape, strides)
        if any(type(n) is not tuple or len(n) > _MAX_DIMENSIONS for n in lengths) or len(shape) != len(strides):
            raise OSError(f"{what}: malformed tensor, without shape and strides")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise OSError(f"{what}: a tensor with offset {offset}, shape {shape} and strides {strides}")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if count else offset - 1
        if last >= storage.count or math.prod(n for n in shape if n) >= 1 << 48:
            raise OSError(f"{what} has {storage.count} values, too few for {shape}, strides {strides} from {offset}")
        if count > max(storage.count, _MAX_EXPANDED):
            raise OSError(f"{what} has {storage.count} values, repeated by strides {strides} to {count}")
        if not count:
            return LazyTensor(shape, storage.dtype, lambda: np.empty(shape, storage.dtype))
        part = Span(span.offset + offset * size, (last + 1 - offset) * size)
        steps = tuple(step * size if n > 1 else 0 for n, step in zip(shape, strides, strict=True))
        return LazyTensor(shape, storage.dtype, lambda: self._read(part, storage.dtype, shape, steps))

    def _read(self, span: Span, dtype: np.dtype, shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
        """The values of a tensor whose first one begins `span`, which holds all of them."""
        raw = np.empty(span.nbytes, np.uint8)
        descriptor = self._open()
        try:
            done = 0
            while done < span.nbytes:
                got = os.preadv(descriptor, [memoryview(raw.data)[done:]], span.offset + done)
                if got == 0:
                    raise OSError(f"{self.path}: ends in the middle of a tensor")
                done += got
        finally:
            os.close(descriptor)
        if dtype == np.bool_:  # any byte but 0 is true; NumPy knows only 1
            raw = (raw != 0).view(np.uint8)
        array = np.ndarray(shape, dtype, buffer=raw.data, strides=steps)
        return array if array.flags.c_contiguous else array.copy(order="C")

    def close(self) -> None:
        """No more reading."""
        self._closed = True
