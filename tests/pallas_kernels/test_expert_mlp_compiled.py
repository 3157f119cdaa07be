"""What XLA makes of a loop over layers that calls `routed_mlp` on the whole stack: no layer's experts are copied."""

import jax
import jax.numpy as jnp
import pytest
from compiled_program import materialised

from pallas_kernels import Experts, routed_mlp

L, E, D, F, A = 3, 8, 64, 96, 2
JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])


def layers(x, ids, weights, experts):
    return jax.lax.fori_loop(0, L, lambda i, x: x + routed_mlp(x, ids, weights, experts, layer=i), x)


def sliced(x, ids, weights, experts):
    """What must not happen: a scan over the stack."""
    return jax.lax.scan(lambda x, layer: (x + routed_mlp(x, ids, weights, layer), None), x, experts)[0]


def compiled(program, tokens, dtype, layout="out_in", biases=True):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    into, out = (array(L, E, D, F), array(L, E, F, D))[:: 1 if layout == "in_out" else -1]
    bias = array(L, E, F) if biases else None
    experts = Experts(
        gate=into, up=into, down=out, gate_bias=bias, up_bias=bias, down_bias=array(L, E, D), layout=layout
    )
    ids = jax.ShapeDtypeStruct((tokens, A), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, A), jnp.float32)
    return jax.jit(program).lower(array(tokens, D), ids, weights, experts).compile().as_text()


# XLA of jax 0.10 converts a whole bfloat16 stack to float32 before the loop on a CPU (docs/decisions.md).
DTYPES = ["float32", "float16"] + ["bfloat16"] * (JAX >= (0, 12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_copies_no_expert(dtype):
    """One row per tile: the products read the kernels where they lie."""
    assert materialised(compiled(layers, 1, dtype), D * F) == []


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_a_batch_copies_no_layer(layout):
    """Tiles of 8 rows may copy their expert, never the layer's."""
    text = compiled(layers, 13, "float32", layout)
    assert materialised(text, E * D * F) == []
    assert materialised(text, D * 13) != []  # the parser sees the loop's own arrays


def test_the_check_sees_a_layer_that_is_sliced_out():
    assert any(
        found.endswith((f"[{E},{F},{D}]", f"[1,{E},{F},{D}]"))
        for found in materialised(compiled(sliced, 1, "float32"), E * D * F)
    )
