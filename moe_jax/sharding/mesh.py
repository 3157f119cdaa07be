"""`make_mesh`: devices in the axes that `RULES` names."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

#: The axes of `make_mesh`, in order.
AXES = ("data", "expert", "model")


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes by axis out of "data=2,expert=4"; `ValueError` for other axes, numbers below 1, and axes given twice.

    >>> mesh_sizes("expert=4,model=2")
    {'expert': 4, 'model': 2}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in AXES or name in found or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"mesh: {text!r}, expected sizes of {', '.join(AXES)}, such as expert=4,model=2")
        found[name] = int(number)
    return found


def make_mesh(data: int = 1, expert: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `expert` and `model`, in this order.

    `model` varies fastest, so that its devices, which exchange most, are nearest to each other. `devices`: those to be
    used, in order; None: JAX's choice among all, of all processes. Raises `ValueError` for sizes that are not positive
    integers, and for another number of devices than their product.

    >>> dict(make_mesh().shape)
    {'data': 1, 'expert': 1, 'model': 1}
    """
    sizes = {"data": data, "expert": expert, "model": model}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: {size!r} is not a positive integer")
    need, types = data * expert * model, (AxisType.Auto,) * len(sizes)
    if devices is None:
        if need > len(jax.devices()):
            raise ValueError(f"mesh: {data} x {expert} x {model} is {need} devices, there are {len(jax.devices())}")
        if need == len(jax.devices()):
            return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
        devices = jax.devices()[:need]
    if len(devices) != need:
        raise ValueError(f"devices: {len(devices)} given for a mesh of {data} x {expert} x {model}")
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)
