"""One stacked parameter, part by part for the devices of this process: nothing else is read, nothing whole is held."""

import concurrent.futures
import dataclasses
import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from ..sharding import Sharding
from ..sharding.shares import Share
from .layout import Piece, from_disk
from .mxfp4 import on_disk
from .quantized import convert
from .source import TensorSource


@dataclasses.dataclass(frozen=True)
class Reader:
    """What parts are read with: the files, threads, and the bar that shows how far they are."""

    checkpoint: TensorSource
    pool: concurrent.futures.Executor
    bar: tqdm

    def all(self, calls: Iterable[Callable[[], None]]) -> None:
        """Run all, in threads; the first error is raised."""
        for future in [self.pool.submit(call) for call in calls]:
            future.result()


def sharded_stack(
    reader: Reader, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: np.dtype, share: Share, sharding: Sharding
) -> jax.Array:
    """A parameter of `shape` on the devices of a mesh, of which this process fills its own."""
    stored, lies = share.stored_shape(shape), NamedSharding(sharding.mesh, share.spec)
    arrays = []
    for region, devices in regions(lies, stored).items():
        host = aligned(tuple(stop - start for start, stop in region), dtype)
        _fill(reader, pieces, host, region, share)
        arrays += [jax.device_put(host, device) for device in devices]
        jax.block_until_ready(arrays)  # the host's copy goes before there is the next one
    return jax.make_array_from_single_device_arrays(stored, lies, arrays)


def encoded_stack(
    reader: Reader,
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    dtype: np.dtype,
    share: Share,
    sharding: Sharding,
    encode: Callable[[np.ndarray], Any],
    blocks: Sequence[int | None],
) -> Any:
    """`sharded_stack` of what `encode` makes of each layer, for which whole rows are read even where they are cut."""
    stored, lies = share.stored_shape(shape), NamedSharding(sharding.mesh, share.spec)
    *rows, total = stored
    layered = bool(pieces[0].index)
    own_lies = [share.of_stored(pieces[0].parameter, shape, block, sharding.sizes) for block in blocks]
    leaves: list[list[jax.Array]] = []
    for region, devices in regions(lies, stored).items():
        full = (*region[:-1], (0, total))
        made = []
        for layer in range(*region[0]) if layered else (None,):
            own = full if layer is None else ((layer, layer + 1), *full[1:])
            host = np.zeros(tuple(stop - start for start, stop in own), dtype)
            _fill(reader, pieces, host, own, share)
            made.append(jax.tree.map(np.asarray, encode(host[0] if layered else host)))
        one = jax.tree.map(lambda *parts: np.stack(parts) if layered else parts[0], *made)
        structure, widths = jax.tree.structure(one), [leaf.shape[-1] for leaf in jax.tree.leaves(one)]
        leaves = leaves or [[] for _ in widths]
        for found, leaf, block in zip(leaves, jax.tree.leaves(one), blocks, strict=True):
            if block is not None:
                start, stop = (edge * leaf.shape[-1] // total for edge in region[-1])
                leaf = np.ascontiguousarray(leaf[..., start:stop])
            found += [jax.device_put(leaf, device) for device in devices]
        jax.block_until_ready(leaves)
    whole = []
    for found, width, lie in zip(leaves, widths, own_lies, strict=True):
        where = NamedSharding(sharding.mesh, lie.spec)
        whole.append(jax.make_array_from_single_device_arrays((*rows, width), where, found))
    return jax.tree.unflatten(structure, whole)


def regions(lies: NamedSharding, shape: tuple[int, ...]) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The parts of an array that this process holds, as starts and ends by axis, and the devices that hold each."""
    found: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in lies.addressable_devices_indices_map(shape).items():
        region = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        found.setdefault(region, []).append(device)
    return found


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros on a page boundary, which JAX on a CPU takes over without a copy."""
    count = int(np.prod(shape, dtype=np.int64))
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _fill(reader: Reader, pieces: Sequence[Piece], host: np.ndarray, region, share: Share) -> None:
    """Read what a region holds, from the pieces that have a part in it."""
    target = on_disk(host)
    factor = target.shape[-1] // host.shape[-1] if host.ndim and host.shape[-1] else 1
    wanted = [_wanted(source, *part) for source, part in zip(share.sources, region, strict=True)]
    if factor > 1:  # bytes of words
        fine = wanted[-1][:, None] * factor + np.arange(factor)
        wanted[-1] = np.where(wanted[-1][:, None] < 0, -1, fine).reshape(-1)

    def read(piece: Piece, places: list[np.ndarray]) -> None:
        sources = [_of_layer(source, piece) for source in wanted[len(places) :]]
        real = [np.flatnonzero(source >= 0) for source in sources]
        if any(not len(where) for where in (*places, *real)):
            return
        share_of = from_disk(piece, reader.checkpoint.view(piece.name))
        for axis, (source, where) in enumerate(zip(sources, real, strict=True)):
            if (len(where), len(source)) != (share_of.shape[axis],) * 2:
                taken = _as_slice(source[where])
                share_of = share_of[(slice(None),) * axis + (taken,)]
        block = convert(share_of, target.dtype)
        for place in np.ndindex(*(len(p) for p in places)):
            at = tuple(int(p[i]) for p, i in zip(places, place, strict=True))
            room = target[at]
            if all(len(where) == size for where, size in zip(real, room.shape, strict=True)):
                room[...] = block
            else:
                room[np.ix_(*real)] = block
        reader.bar.update(block.nbytes)

    calls = []
    for piece in pieces:
        if any(isinstance(index, slice) for index in piece.index):  # a pyramid's routers, which are never cut
            whole = from_disk(piece, reader.checkpoint.view(piece.name))
            target[piece.index] = convert(whole, target.dtype)
            continue
        along = zip(wanted, piece.index, strict=False)
        places = [np.flatnonzero(_of_layer(source, piece) == index) for source, index in along]
        if all(map(len, places)):
            calls.append(lambda piece=piece, places=places: read(piece, places))
    reader.all(calls)


def _wanted(source: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop) if source is None else source[..., start:stop]


def _of_layer(source: np.ndarray, piece: Piece) -> np.ndarray:
    return source[piece.index[0]] if source.ndim == 2 else source


def _as_slice(indices: np.ndarray) -> Any:
    """Consecutive indices as a slice, which takes a view."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
