"""The GPU's expert MLP for one token lowered for CUDA without a GPU: what is chosen, what is refused, real shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from cuda import lowered
from expert_oracle import make_experts

from pallas_kernels import ACTIVATIONS, Experts, MXFP4Array, routed_mlp
from pallas_kernels.expert_mlp.api import OPERATION
from pallas_kernels.quantized import QuantizedArray, quantize, quantize_runs

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16 = ml_dtypes.bfloat16
KERNELS = '"moe_jax_expert_up_row"', '"moe_jax_expert_down_row"'
WIDTH, HIDDEN = 96, 64


def operands(num=4, choices=2, tokens=1, dtype=BFLOAT16, activation="swiglu", **options):
    """Shapes alone."""
    array = jax.ShapeDtypeStruct
    experts = make_experts(num, WIDTH, HIDDEN, dtype=dtype, activation=activation, **options)
    experts = jax.tree.map(lambda a: array(a.shape, a.dtype), experts)
    x, ids = array((tokens, WIDTH), dtype), array((tokens, choices), np.int32)
    return x, ids, array((tokens, choices), np.float32), experts


def stored(experts, function):
    kernels = {name: getattr(experts, name) for name in ("gate", "up", "down")}
    wide = {name: jnp.ones(kernel.shape, kernel.dtype) for name, kernel in kernels.items()}
    return dataclasses.replace(experts, **jax.eval_shape(lambda: {name: function(k) for name, k in wide.items()}))


def mixed(experts):
    return dataclasses.replace(experts, gate=stored(experts, quantize).gate)


@pytest.mark.parametrize(
    "call, reason",
    [
        (operands(tokens=2, layout="out_in"), "2 tokens, only one"),
        (operands(dtype=np.float32, layout="out_in"), "x of float32, only bfloat16 and float16"),
        (operands(layout="in_out"), "kernels with the contraction first"),
        ((*operands(layout="out_in")[:3], operands(layout="out_in", dtype=np.float32)[3]), "kernels of float32"),
        ((*operands()[:3], stored(operands(layout="out_in")[3], lambda k: quantize(k, 48))), "groups of 48 of 96"),
        ((*operands()[:3], stored(operands(layout="out_in")[3], lambda k: quantize(k, 64))), "groups of 64 of 96"),
        ((*operands()[:3], stored(operands(layout="out_in")[3], lambda k: quantize_runs(k, 2, 1))), "scales over runs"),
        ((*operands()[:3], mixed(operands(layout="out_in")[3])), "gate and up stored in different ways"),
    ],
)
def test_refusals(call, reason):
    for name in ("triton_row", "triton_row_interpreted"):
        with pytest.raises(ValueError, match=f"routed_mlp cannot run as '{name}': {reason}"):
            jax.eval_shape(functools.partial(routed_mlp, implementation=name), *call)
    assert OPERATION.chosen("cpu", *call, None, None, None) == "xla_tiles"
    assert OPERATION.chosen("cuda", *call, None, None, None) != "triton_row"
    assert jax.eval_shape(routed_mlp, *call).shape == call[0].shape  # not named, it runs


def test_a_residual_of_another_shape_and_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse it first
    call = operands(layout="out_in")
    with pytest.raises(ValueError, match=r"residual: shape \(1, 64\), expected that of x, \(1, 96\)"):
        jax.eval_shape(lambda *call: routed_mlp(*call, residual=jnp.ones((1, 64), BFLOAT16)), *call)
    with pytest.raises(ValueError, match="routed_mlp as 'triton_row' runs on cuda, the program is made for cpu"):
        lowered(functools.partial(routed_mlp, implementation="triton_row"), *call, platform="cpu")


def shapes(width, hidden, num, layers, store=None, biases=False, activation="swiglu"):
    """Experts without values."""
    array = lambda *shape: jax.ShapeDtypeStruct((layers, num, *shape), BFLOAT16)
    into, out = array(hidden, width), array(width, hidden)
    if store == "mxfp4":
        part = lambda kernel, n, dtype: jax.ShapeDtypeStruct((*kernel.shape[:-1], kernel.shape[-1] // n), dtype)
        into, out = (MXFP4Array(part(k, 8, np.uint32), part(k, 32, np.uint8), np.dtype(BFLOAT16)) for k in (into, out))
    elif store:
        into, out = (
            QuantizedArray(
                jax.ShapeDtypeStruct(kernel.shape, np.int8),
                jax.ShapeDtypeStruct((*kernel.shape[:-1], kernel.shape[-1] // store), np.float32),
                *(np.dtype(BFLOAT16), store),
            )
            for kernel in (into, out)
        )
    one, other = (array(hidden), array(width)) if biases else (None, None)
    return Experts(
        **dict(gate=into, up=into, down=out, gate_bias=one, up_bias=one, down_bias=other),
        **dict(activation=activation, layout="out_in"),
    )


@pytest.mark.parametrize(
    "width, hidden, num, choices, layers, options",
    [
        (2048, 768, 128, 8, 48, {}),
        (2048, 1024, 64, 8, 16, {}),
        (2880, 2880, 32, 4, 24, dict(biases=True, activation="swiglu_clamped")),
        (7168, 2048, 256, 8, 58, {}),
        (4096, 14336, 8, 2, 32, dict(activation="geglu")),
        (2048, 512, 512, 20, 4, {}),
        (2048, 768, 128, 8, 24, dict(store=128)),
        (2880, 2880, 32, 4, 24, dict(biases=True, activation="swiglu_clamped", store="mxfp4")),
    ],
)
def test_real_shapes_lower_and_are_chosen(width, hidden, num, choices, layers, options):
    experts = shapes(width, hidden, num, layers, **options)
    array = jax.ShapeDtypeStruct
    x, ids, weights = array((1, width), BFLOAT16), array((1, choices), np.int32), array((1, choices), np.float32)

    def call(x, ids, weights, experts, layer):
        return routed_mlp(x, ids, weights, experts, layer=layer, residual=x)

    program = lowered(call, x, ids, weights, experts, array((), np.int32))
    assert all(name in program for name in KERNELS) and "stablehlo.dot_general" not in program


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_lowers_named(activation):
    call = operands(layout="out_in", biases=True, activation=activation)
    assert all(name in lowered(functools.partial(routed_mlp, implementation="triton_row"), *call) for name in KERNELS)


def test_it_lowers_with_64_bit_types_and_for_no_other_call():
    with jax.enable_x64(True):
        for choices in (2, 20):
            call = operands(num=32, choices=choices, layout="out_in")
            assert all(name in lowered(routed_mlp, *call) for name in KERNELS)
    for call in (operands(), operands(tokens=2, layout="out_in"), operands(dtype=np.float32, layout="out_in")):
        assert not any(name in lowered(routed_mlp, *call) for name in KERNELS)
    assert not any(name in lowered(routed_mlp, *operands(layout="out_in"), platform="cpu") for name in KERNELS)
