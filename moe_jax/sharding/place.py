"""Weights from one device to where their parts belong on a mesh, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pallas_kernels.mxfp4 import GROUP, WORD
from pallas_kernels.quantized import QuantizedArray, is_quantized

from .sharding import Sharding
from .shares import Share


def placed(name: str, array: Any, share: Share, shape: tuple[int, ...], sharding: Sharding) -> Any:
    """A parameter of `shape`, or a quantised kernel that stands for one, over the mesh."""
    if not is_quantized(array):
        return _moved(array, share, sharding)
    leaves, structure = jax.tree.flatten(array)
    lies = [share.of_stored(name, shape, block, sharding.sizes) for block in blocks_of(array)]
    made = [_moved(leaf, lie, sharding) for leaf, lie in zip(leaves, lies, strict=True)]
    return jax.tree.unflatten(structure, made)


def whole(name: str, array: Any, share: Share, shape: tuple[int, ...], sharding: Sharding) -> Any:
    """The inverse of `placed`, on the default device."""
    if not is_quantized(array):
        return _whole(array, share, shape)
    leaves, structure = jax.tree.flatten(array)
    made = []
    for leaf, block in zip(leaves, blocks_of(array), strict=True):
        lie = share.of_stored(name, shape, block, sharding.sizes)
        length = 1 if block is None else -(-shape[-1] // block)
        made.append(_whole(leaf, lie, (*shape[:-1], length)))
    return jax.tree.unflatten(structure, made)


def unit_of(flat: Mapping[str, Any]) -> int:
    """Hidden units that are stored together as inputs of a quantised kernel; hidden widths are cut between them."""
    units = [1]
    for name, array in flat.items():
        if name.endswith(".down") and is_quantized(array):
            units.append(blocks_of(array)[1] or 1)
    return max(units)


def blocks_of(array: Any) -> tuple[int, int | None]:
    """How many inputs an element of each array stands for that a quantised kernel is stored as; None: all of a row."""
    return (1, array.group_size) if isinstance(array, QuantizedArray) else (WORD, GROUP)


def _moved(array: Any, share: Share, sharding: Sharding) -> jax.Array:
    """A parameter from one device to where its parts belong."""
    for axis, source in enumerate(share.sources):
        if source is None:
            continue
        places = np.where(source < 0, array.shape[axis], source)
        if source.ndim == 2:  # experts of each layer
            array = array[np.arange(len(source))[:, None], places]
        else:
            array = jnp.take(array, places, axis, mode="fill", fill_value=0)
    return jax.device_put(array, NamedSharding(sharding.mesh, share.spec))


def _whole(array: jax.Array, share: Share, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_moved`."""
    array = jax.device_put(array, _default_device())
    for axis, source in enumerate(share.sources):
        if source is None:
            continue
        first = lambda row: np.array([np.argmax(row == i) for i in range(shape[axis])])  # noqa: B023
        if source.ndim == 2:
            array = array[np.arange(len(source))[:, None], np.stack([first(row) for row in source])]
        else:
            array = jnp.take(array, first(source), axis)
    return array


def _default_device() -> jax.Device:
    return next(iter(jnp.zeros(()).devices()))
