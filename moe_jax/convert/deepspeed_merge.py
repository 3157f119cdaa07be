"""Tensors of several model-parallel ranks as whole ones, and rows of query_key_value as q, k and v."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..checkpoint.torch_file import LazyTensor

# Where slices join: column-parallel matmuls and vocabularies along rows, row-parallel matmuls along columns.
_ROWS = ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "word_embeddings.weight", "lm_head.weight")
_COLUMNS = ("self_attention.dense.weight", "dense_4h_to_h.weight")
_QKV = "self_attention.query_key_value."


def merge(
    ranks: Sequence[Mapping[str, LazyTensor]], version: float, heads: int | None, sliced: bool | None, folder: Path
) -> dict[str, LazyTensor]:
    """Whole tensors from those of each rank, with q, k and v apart.

    `version` is the checkpoint's (how rows of query_key_value lie), `sliced` whether experts are slices too or whole on
    every rank (None: compare). Raises `OSError` if ranks differ in names, shapes or dtypes, or in what has to be equal.
    """
    for rank, tensors in enumerate(ranks):
        if set(tensors) != set(ranks[0]):
            names = sorted(set(tensors) ^ set(ranks[0]))
            raise OSError(
                f"{folder}: model-parallel ranks 0 and {rank} do not have the same tensors: {', '.join(names)}"
            )
    if len(ranks) > 1 and sliced is None:
        sliced = _experts_are_sliced(ranks)
    merged: dict[str, LazyTensor] = {}
    for name in ranks[0]:
        slices = [tensors[name] for tensors in ranks]
        if len({s.dtype for s in slices}) > 1:
            raise OSError(
                f"{folder}: {name} has another dtype on every rank: {', '.join(str(s.dtype) for s in slices)}"
            )
        if _QKV in name:
            for index, part in enumerate("qkv"):
                merged[name.replace("query_key_value", part)] = _part(name, slices, index, version, heads, folder)
        else:
            merged[name] = _whole(name, slices, sliced, folder)
    return merged


def _experts_are_sliced(ranks: Sequence[Mapping[str, LazyTensor]]) -> bool:
    """Whether ranks hold slices of the experts: two slices of a trained weight are never equal, two copies are."""
    for name in ranks[0]:
        if _is_expert(name) and name.endswith("dense_h_to_4h.weight"):
            first, second = ranks[0][name], ranks[1][name]
            return first.shape != second.shape or not _equal(first.read(), second.read())
    return True


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name or ".mlp.residual." in name


def _whole(name: str, slices: list[LazyTensor], sliced: bool | None, folder: Path) -> LazyTensor:
    if len(slices) == 1:
        return slices[0]
    axis = 0 if name.endswith(_ROWS) else 1 if name.endswith(_COLUMNS) else None
    if axis is not None and (sliced or not _is_expert(name)):
        return _joined(name, slices, axis, folder)
    if len({s.shape for s in slices}) > 1:
        raise OSError(f"{folder}: {name} has to be equal on all ranks, but has shapes {[s.shape for s in slices]}")

    def read() -> np.ndarray:
        first = slices[0].read()
        for rank, other in enumerate(slices[1:], 1):
            if not _equal(first, other.read()):
                raise OSError(f"{folder}: {name} has to be equal on all ranks, but differs on ranks 0 and {rank}")
        return first

    if not _is_expert(name):
        read()  # small, so that a wrong checkpoint is refused before anything is made of it
    return LazyTensor(slices[0].shape, slices[0].dtype, read)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _joined(name: str, slices: list[LazyTensor], axis: int, folder: Path) -> LazyTensor:
    shapes = [s.shape for s in slices]
    if len(shapes[0]) <= axis or len({(*s[:axis], *s[axis + 1 :]) for s in shapes}) > 1:
        raise OSError(f"{folder}: {name} has slices of shapes {shapes}, which do not join along axis {axis}")
    total = sum(s[axis] for s in shapes)
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    return LazyTensor(shape, slices[0].dtype, lambda: np.concatenate([s.read() for s in slices], axis))


def _part(
    name: str, slices: list[LazyTensor], index: int, version: float, heads: int | None, folder: Path
) -> LazyTensor:
    """q, k or v (`index`) out of the rows of query_key_value on all ranks."""
    shape = slices[0].shape
    if any(s.shape != shape for s in slices) or not shape or shape[0] % 3:
        raise OSError(f"{folder}: {name} has slices of shapes {[s.shape for s in slices]}, expected equal thirds")
    rows = shape[0] // 3
    take: Callable[[np.ndarray], np.ndarray]
    if version < 1:  # [3, heads, width]
        take = lambda x: x[index * rows : (index + 1) * rows]
    else:
        if heads is None:
            raise ValueError(
                f"num_heads is needed: {folder} has version {version}, where rows of q, k and v alternate by head, and "
                "does not say how many heads there are"
            )
        if heads % len(slices) or rows % max(1, heads // len(slices)):
            raise ValueError(
                f"num_heads: {heads} heads do not fit {len(slices)} ranks with {rows} rows of each of q, k and v"
            )
        width = rows * len(slices) // heads
        if version < 2:  # [heads, width, 3]
            take = lambda x: x.reshape(-1, width, 3, *x.shape[1:])[:, :, index].reshape(rows, *x.shape[1:])
        else:  # [heads, 3, width]
            take = lambda x: x.reshape(-1, 3, width, *x.shape[1:])[:, index].reshape(rows, *x.shape[1:])
    whole = (rows * len(slices), *shape[1:])
    return LazyTensor(whole, slices[0].dtype, lambda: np.concatenate([take(s.read()) for s in slices]))
