"""Products of each head with its own part of latent attention's up projection: before and after the attention."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..quantized import dense
from ..registry import Implementation, Operation
from . import latent_products_triton as triton


def _xla(x, kv_up, layer, plain, up):
    kernel = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), kv_up)
    kernel = dense(kernel, x.dtype)
    if up:
        return jnp.einsum("bnz,nvz->bnv", x, kernel[:, plain:])
    return jnp.einsum("bnh,nhz->bnz", x[..., :plain], kernel[:, :plain])


OPERATION = Operation(
    "latent_products",
    {
        "triton": Implementation(triton.products, triton.refuse, platform="cuda"),
        "xla": Implementation(_xla),
        "triton_interpreted": Implementation(triton.interpreted, triton.refuse, by_choice=False),
    },
)


def absorb(
    q: Float[AnyArray, "B N H"],
    kv_up: Any,
    plain: int,
    *,
    layer: int | Int[AnyArray, ""],
    implementation: str | None = None,
) -> Float[Array, "B N Z"]:
    """The first `plain` components of each query head times the head's key projection, `[B, N, Z]`.

    Args: `q [B, N, H]`; `kv_up [L, N, plain + V, Z]`, array or `QuantizedArray`, the keys' part first, of whose layers
    `layer`, which may be traced, is read where it lies. Products are in q's dtype.
    `implementation`: `triton` (CUDA, bfloat16 and float16) or `xla`. Raises `ValueError` for shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> absorb(jnp.array([[[2.0, 9.0]]]), jnp.array([[[[1.0, 3.0], [5.0, 7.0]]]]), 1, layer=0).tolist()
    [[[2.0, 6.0]]]
    """
    return _run(implementation, q, kv_up, layer, plain, False)


def latent_values(
    mixed: Float[AnyArray, "B N Z"],
    kv_up: Any,
    plain: int,
    *,
    layer: int | Int[AnyArray, ""],
    implementation: str | None = None,
) -> Float[Array, "B N V"]:
    """Each head's mix of latents times the head's value projection, `[B, N, V]`; arguments as in `absorb`.

    >>> import jax.numpy as jnp
    >>> latent_values(jnp.ones((1, 1, 2)), jnp.array([[[[1.0, 3.0], [5.0, 7.0]]]]), 1, layer=0).tolist()
    [[[12.0]]]
    """
    return _run(implementation, mixed, kv_up, layer, plain, True)


def _run(implementation, x, kv_up, layer, plain, up):
    x = jnp.asarray(x)
    width = kv_up.shape[-1] if up else plain
    if kv_up.ndim != 4 or x.shape[1] != kv_up.shape[1] or not 0 < plain < kv_up.shape[2]:
        raise ValueError(f"kv_up: shape {kv_up.shape} with {plain} plain components for heads of {x.shape}")
    if x.shape[2] < width or up and x.shape[2] > width:
        raise ValueError(f"{'mixed' if up else 'q'}: shape {x.shape} does not fit kv_up of {kv_up.shape}")
    with jax.named_scope("latent_values" if up else "absorb"):
        return OPERATION.run(implementation, x, kv_up, jnp.asarray(layer, jnp.int32), plain, up)
