"""The dimension key: the letters used in annotations, einsum strings and documentation of both packages.

=====  =================================================  =====  ==========================================
`B`    batch                                              `G`    flattened tokens, `B * T`
`T`    query positions                                    `E`    experts
`S`    cache (key) positions                              `A`    experts chosen per token (top-k)
`D`    model width                                        `C`    capacity slots per expert
`N`    query heads                                        `R`    routed rows, `G * A`
`K`    key/value heads                                    `F`    expert hidden width
`H`    head width                                         `V`    vocabulary
`Hv`   value head width                                   `L`    layers
`Z`    latent width (multi-head latent attention)
=====  =================================================  =====  ==========================================

Letters of one file only are explained there. Annotations are checked while the tests run (`tests/conftest.py`
installs jaxtyping's import hook) and cost nothing otherwise.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

#: What public functions accept wherever they say "array".
Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "check_layer"]


def check_layer(layer: Any, layers: int) -> None:
    """`ValueError` for a `layer` of a stack that there is not; a traced one is the caller's care.

    >>> check_layer(-1, 4)
    Traceback (most recent call last):
    ...
    ValueError: layer: -1 of 4 layers
    """
    if layer is not None and not isinstance(layer, jax.core.Tracer) and not 0 <= int(layer) < layers:
        raise ValueError(f"layer: {layer} of {layers} layers")
