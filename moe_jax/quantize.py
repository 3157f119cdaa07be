"""Int8 weights: a model whose kernels are `pallas_kernels.QuantizedArray`s; and back to floats."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import MXFP4Array, QuantizedArray
from pallas_kernels.quantized import check_group_size, is_quantized
from pallas_kernels.quantized import quantize as quantize_array

from .model import Model
from .weights import Parameter, flattened, is_kernel, nested, parameters


def quantize(model: Model, bits: int = 8, group_size: int | None = None) -> Model:
    """The same model with int8 kernels: those of attention, dense, shared and expert MLPs, embedding and head.

    `group_size` None: one scale per output channel; an integer such as 128: one per block of so many inputs, the last
    block of a row possibly shorter. Routers, norms, biases and sinks stay as they are, and so do experts in MXFP4.
    Weights take about half of bfloat16's bytes; products are computed in the model's dtype, on one layer's or expert's
    widened kernel at a time. Stacks are converted one by one, layer by layer; `model` keeps its own, which
    `load_pretrained(path, quantize="int8")` never holds. Raises `ValueError` for `bits` other than 8, a `group_size`
    that is not a positive integer, a model that has int8 weights already, and weights that are not finite. Method:
    symmetric absmax, see `pallas_kernels.quantized.quantize`.

    >>> from moe_jax.model import tiny_config
    >>> model = quantize(Model.initialize(tiny_config()), group_size=16)
    >>> model([[1, 2, 3]]).shape, model.arrays()["moe"]["up"].values.dtype
    ((1, 3, 96), dtype('int8'))
    """
    if bits != 8:
        raise ValueError(f"bits: {bits!r}; only 8 are supported")
    check_group_size(group_size)
    weights = flattened(model.arrays())
    if any(isinstance(array, QuantizedArray) for array in weights.values()):
        raise ValueError("quantize: the model's weights are int8 already")
    table = parameters(model.architecture)
    for name, array in weights.items():
        if is_kernel(name) and not isinstance(array, MXFP4Array):
            weights[name], finite = _quantize(array, group_size, table[name].layers is not None)
            if not finite:
                raise ValueError(f"quantize: {name} holds values that are not finite")
    return Model(model.config, nested(weights), model.generation, model.named)


def dequantize(model: Model) -> Model:
    """The same model with all weights in its dtype: what int8 and MXFP4 kernels stand for.

    To look at weights, to go on from them, or to save them for programs that read nothing else. MXFP4 experts take
    about four times the bytes in bfloat16 and eight times in float32. Stacks are widened one by one; `model` keeps its
    own.

    >>> from moe_jax.model import tiny_config
    >>> dequantize(quantize(Model.initialize(tiny_config()))).arrays()["moe"]["up"].dtype
    dtype('float32')
    """
    table, weights = parameters(model.architecture), flattened(model.arrays())
    for name, array in weights.items():
        if is_quantized(array):
            weights[name] = _dequantize(array, table[name].layers is not None)
    return Model(model.config, nested(weights), model.generation, model.named)


def encoder(name: str, parameter: Parameter, group_size: int | None) -> Any:
    """What `quantize` does with one layer of a parameter, for a loader that does it layer by layer; None: nothing."""
    return functools.partial(_quantize, group_size=group_size) if is_kernel(name) else None


@functools.partial(jax.jit, static_argnames=("group_size", "stacked"))
def _quantize(array: jax.Array, group_size: int | None, stacked: bool = False) -> tuple[QuantizedArray, jax.Array]:
    """The kernel or stack of kernels in int8, and whether all of it was finite."""

    def one(kernel):
        return quantize_array(kernel, group_size), jnp.isfinite(kernel).all()  # max passes over NaN on a CPU

    if not stacked:
        return one(array)
    arrays, finite = jax.lax.map(one, array)
    return arrays, finite.all()


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(array: Any, stacked: bool) -> jax.Array:
    """Layer by layer, so that nothing but the result has its size."""
    return jax.lax.map(lambda one: one.dequantize(), array) if stacked else array.dequantize()
