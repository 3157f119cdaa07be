"""A checkpoint folder as a flat collection of named tensors, quantised ones presented as what they stand for."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .int8 import METHOD, Int8Format
from .mxfp4 import BLOCKS, SCALES
from .quantized import widen_fp8, widen_mxfp4
from .safetensors import Entry, TensorFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie and what they become: `kind` plain, mxfp4 or fp8; `shape` after widening.

    `parts`: the plain tensors that an MXFP4 one is made of, which can be read as well.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: str
    nbytes: int
    parts: dict[str, "Stored"] | None = None


class TensorSource(Protocol):
    """What the loader reads from: named tensors with shapes, one at a time."""

    folder: Path
    tensors: dict[str, Stored]

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """One tensor; `into` itself where the file holds just what fits there."""

    def view(self, name: str) -> np.ndarray:
        """One tensor of which only a part may be wanted: mapped, where the file holds just what is asked for."""

    def close(self) -> None:
        """No more reading."""


class Checkpoint:
    """All tensors of a folder with `model.safetensors`, or shards with an index.

    Opening reads headers only. Pickled weights (`.bin`, `.pt`) are never read. Raises `OSError` for files that are
    missing, truncated or malformed, naming all of them; `ValueError` for a quantisation that is not supported.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.files = {name: TensorFile(self.folder / name) for name in self._file_names()}
        self._where = {tensor: file for file in self.files.values() for tensor in file.entries}
        self._check_index()
        self._block = _fp8_block(config or {})
        self.tensors = self._present()

    def _file_names(self) -> list[str]:
        if not self.folder.is_dir():
            raise OSError(f"{self.folder}: no such folder")
        index = self.folder / _INDEX
        if not index.exists():
            if (self.folder / _SINGLE).exists():
                return [_SINGLE]
            pickles = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            hint = f" (there are pickled weights, {pickles[0]}, which are never read)" if pickles else ""
            raise OSError(f"{self.folder}: neither {_SINGLE} nor {_INDEX}{hint}")
        try:
            self._index = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(self._index.values()))
            if any(not isinstance(name, str) for name in names):
                raise TypeError(f"file names {names}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{index}: malformed index ({error!r})") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise OSError(f"{index}: names files outside the folder: {', '.join(outside)}")
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise OSError(f"{self.folder}: shards named by the index are missing: {', '.join(missing)}")
        return names

    def _check_index(self) -> None:
        index = getattr(self, "_index", {})
        wrong = sorted(t for t, name in index.items() if t not in self.files[name].entries)
        if wrong:
            raise OSError(f"{self.folder}: shards lack tensors that the index puts there: {', '.join(wrong)}")

    def _present(self) -> dict[str, Stored]:
        self._refuse_unscaled()
        tensors = {}
        for name, file in self._where.items():
            entry = file.entries[name]
            # Scales that fit nothing are left as they are, and end up among the unexpected tensors.
            if name.endswith("_scales") and self._is_mxfp4(name[:-7]):
                continue
            if name.endswith(".weight_scale_inv") and self._is_fp8(name.removesuffix("_scale_inv")):
                continue
            if name.endswith("_blocks") and self._is_mxfp4(name[:-7]):
                experts, out, groups, half = entry.shape
                shape = (experts, groups * half * 2, out)
                tensors[name[:-7]] = Stored(shape, "mxfp4", "MXFP4", entry.nbytes, self._parts(name[:-7]))
            elif self._is_fp8(name):
                tensors[name] = Stored(entry.shape, "fp8", entry.dtype, entry.nbytes)
            else:
                tensors[name] = Stored(entry.shape, "plain", entry.dtype, entry.nbytes)
        return tensors

    def _parts(self, name: str) -> dict[str, Stored]:
        parts = {name + part: self._entry(name + part) for part in (BLOCKS, SCALES)}
        return {part: Stored(e.shape, "plain", e.dtype, e.nbytes) for part, e in parts.items()}

    def _is_mxfp4(self, name: str) -> bool:
        """Whether `name` is stored as blocks of 32 values with a scale each."""
        blocks, scales = self._entry(f"{name}_blocks"), self._entry(f"{name}_scales")
        if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
            return False
        return len(blocks.shape) == 4 and blocks.shape[3] == 16 and blocks.shape[:3] == scales.shape

    def _is_fp8(self, name: str) -> bool:
        """Whether `name` is an FP8 matrix with one factor per block."""
        weight, factors = self._entry(name), self._entry(f"{name}_scale_inv")
        if weight is None or factors is None or not weight.dtype.startswith("F8") or len(weight.shape) != 2:
            return False
        return factors.shape == tuple(-(-n // size) for n, size in zip(weight.shape, self._block, strict=True))

    def _entry(self, name: str) -> Entry | None:
        return self._where[name].entries[name] if name in self._where else None

    def _refuse_unscaled(self) -> None:
        """FP8 values mean nothing without their factors."""
        eights = [name for name, file in self._where.items() if file.entries[name].dtype.startswith("F8")]
        alone = sorted(n for n in eights if n.removesuffix("weight") + "weight_scale_inv" not in self._where)
        if alone:
            raise OSError(f"{self.folder}: FP8 tensors without their weight_scale_inv: {', '.join(alone)}")

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """A tensor, widened to float32 where it is stored quantised; `into` itself where it can be read there."""
        kind = self.tensors[name].kind if name in self.tensors else "plain"  # a part
        if kind == "mxfp4":
            return widen_mxfp4(self._raw(f"{name}_blocks"), self._raw(f"{name}_scales"))
        if kind == "fp8":
            return widen_fp8(self._raw(name), self._raw(f"{name}_scale_inv"), self._block)
        return self._raw(name, into)

    def view(self, name: str) -> np.ndarray:
        """A tensor, mapped from its file where it is stored plain: only what is looked at is read."""
        plain = name not in self.tensors or self.tensors[name].kind == "plain"
        return self._where[name].view(name) if plain else self.read(name)

    def _raw(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        return self._where[name].read(name, into)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Block of a config's FP8 quantisation; other quantisations than fp8, mxfp4 and our int8 are refused by name."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config: {quantization!r} is not a dictionary")
    method = quantization.get("quant_method")
    if method not in (None, "fp8", "mxfp4", METHOD):
        supported = f"fp8, mxfp4, {METHOD}"
        raise ValueError(f"quantization_config: quant_method {method!r} is not supported; supported: {supported}")
    Int8Format.of(quantization)  # refuses what it does not know
    block = quantization.get("weight_block_size") or (128, 128)
    if method == "fp8" and not quantization.get("weight_block_size"):
        raise ValueError("quantization_config: fp8 without weight_block_size is not supported, only block-scaled fp8")
    if not isinstance(block, (list, tuple)) or len(block) != 2 or any(not isinstance(n, int) or n < 1 for n in block):
        raise ValueError(f"quantization_config: weight_block_size is {block!r}, expected two positive integers")
    return tuple(block)
