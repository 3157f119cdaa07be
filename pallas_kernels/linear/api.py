"""The linear map behind a norm: signature, checks and choice of implementation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..dims import check_layer
from ..registry import Implementation, Operation
from . import triton_row, triton_rows, xla
from .norms import LayerNorm, RMSNorm, check_norm


def _with_gradient(run):
    """`run`, with the derivatives of XLA's products."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
    def differentiable(x, kernels, layer, norm, biases, residual, dtype, normed):
        return run(x, kernels, layer, norm, biases, residual, dtype, normed)

    def forward(x, kernels, layer, norm, biases, residual, dtype, normed):
        given = x, kernels, layer, norm, biases, residual
        return run(*given, dtype, normed), given

    def backward(dtype, normed, given, cotangents):
        return jax.vjp(lambda *given: xla.linear(*given, dtype, normed), *given)[1](cotangents)

    differentiable.defvjp(forward, backward)
    return differentiable


OPERATION = Operation(
    "linear",
    {
        "triton_row": Implementation(_with_gradient(triton_row.linear), triton_row.refuse, platform="cuda"),
        "triton_rows": Implementation(_with_gradient(triton_rows.linear), triton_rows.refuse, platform="cuda"),
        "xla": Implementation(xla.linear),
        "triton_row_interpreted": Implementation(
            _with_gradient(triton_row.interpreted), triton_row.refuse, by_choice=False
        ),
        "triton_rows_interpreted": Implementation(
            _with_gradient(triton_rows.interpreted), triton_rows.refuse, by_choice=False
        ),
    },
)


def linear(
    x: Float[AnyArray, "G K"],
    kernels: Sequence[Any],
    *,
    layer: int | Int[AnyArray, ""] | None = None,
    norm: RMSNorm | LayerNorm | None = None,
    biases: Sequence[AnyArray | None] | None = None,
    residual: Float[AnyArray, "G N"] | None = None,
    dtype: Any = None,
    normed: bool = False,
    implementation: str | None = None,
) -> list[Float[Array, "G _"]]:
    """`norm(x) @ kernel.T + bias` for one or several kernels `[N, K]` of the same input, plus `residual`.

    Args: `x` `[G, K]`; `kernels` arrays or `QuantizedArray`s `[N, K]`, the contraction last, or stacks `[L, N, K]`
    of which the integer `layer` in `[0, L)` is taken, which may be traced (no stack is sliced where that would copy
    it); `norm` of x; `biases` `[N]` or `[L, N]`, or None for each; `residual` `[G, N]` is added to the only
    product; `dtype` of the products, x's for None; `normed`: also return `norm(x)` in that of x. `implementation`:
    `triton_row` (CUDA, one row) and `triton_rows` (CUDA, up to 64), both for kernels in bfloat16, float16 or int8,
    or `xla`. All are differentiable.
    Returns the products `[G, N]` in the order of their kernels, then the normed rows if asked for; sums are formed in
    float32. Raises `ValueError` for shapes and dtypes that do not fit each other.

    >>> import jax.numpy as jnp
    >>> eye = 2 * jnp.eye(3)
    >>> norm = RMSNorm(jnp.ones(3), 0.0)
    >>> [y.tolist() for y in linear(jnp.array([[3.0, 0.0, 0.0]]), [eye[:1]], norm=norm, normed=True)]
    [[[3.464101552963257]], [[1.7320507764816284, 0.0, 0.0]]]
    """
    x = jnp.asarray(x)
    _check(x, kernels, layer, biases)
    if norm is not None:
        check_norm(norm, x)
    if residual is not None and (len(kernels) > 1 or residual.shape != (x.shape[0], kernels[0].shape[-2])):
        raise ValueError(f"residual: shape {residual.shape} beside kernels {[k.shape for k in kernels]}")
    if residual is not None and residual.dtype != (dtype or x.dtype):
        raise ValueError(f"residual: dtype {residual.dtype}, expected the products', {jnp.dtype(dtype or x.dtype)}")
    if biases is not None and all(bias is None for bias in biases):
        biases = None
    with jax.named_scope("linear"):
        given = x, tuple(kernels), layer, norm, None if biases is None else tuple(biases), residual, dtype, normed
        return OPERATION.run(implementation, *given)


def _check(x: Any, kernels: Sequence[Any], layer: Any, biases: Sequence[Any] | None) -> None:
    """`ValueError` unless kernels and biases fit x and each other."""
    if x.ndim != 2:
        raise ValueError(f"x: shape {x.shape}, expected [G, K]")
    if not kernels:
        raise ValueError("kernels: none are given")
    if biases is not None and len(biases) != len(kernels):
        raise ValueError(f"biases: {len(biases)} for {len(kernels)} kernels, None is one too")
    axes, width = (2 if layer is None else 3), x.shape[-1]
    for i, kernel in enumerate(kernels):
        if kernel.ndim != axes or kernel.shape[-1] != width:
            want = f"[{'L, ' * (axes - 2)}N, {width}]"
            raise ValueError(f"kernels: the one at {i} has shape {kernel.shape}, expected {want} for x of {x.shape}")
        bias = biases[i] if biases is not None else None
        if bias is not None and bias.shape != kernel.shape[:-1]:
            raise ValueError(f"biases: shape {bias.shape}, expected {kernel.shape[:-1]}")
    check_layer(layer, kernels[0].shape[0])
