"""`mlp_function` and `MoEMLP` against the formula in float64, and which of them has gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepspeed_oracle import activated
from flax import nnx

from moe_jax import MoEInferenceConfig
from moe_jax.deepspeed import MoEMLP, mlp_function
from pallas_kernels import Activation

# our name: DeepSpeed's function and form of the GELU
ACTIVATIONS = {
    "gelu_tanh": ("GELU", "tanh"),
    "gelu": ("GELU", "erf"),
    "relu": ("ReLU", None),
    "geglu": ("GATED_GELU", "erf"),
    "geglu_tanh": ("GATED_GELU", "tanh"),
    "swiglu": ("GATED_SILU", None),
}


def operands(name="gelu_tanh", batch=(3, 2), width=4, hidden=6):
    generator = np.random.default_rng(3)
    columns = 2 * hidden if Activation(name).gated else hidden
    shapes = (*batch, width), (width, columns), (columns,), (hidden, width), (width,)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def formula(name, x, inter_w, inter_b, output_w, output_b):
    wide = [np.asarray(a, np.float64) for a in (x, inter_w, inter_b, output_w, output_b)]
    rows = wide[0].reshape(-1, wide[0].shape[-1]) @ wide[1] + wide[2]
    hidden = np.array([activated(*ACTIVATIONS[name], row) for row in rows])
    return (hidden @ wide[3] + wide[4]).reshape(x.shape)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_function_is_its_formula(name, inference):
    given = operands(name)
    for activation in (name, Activation(name)):
        y = mlp_function(*given, activation, inference=inference)
        np.testing.assert_allclose(y, formula(name, *given), rtol=1e-5, atol=2e-6)


def test_any_number_of_leading_axes():
    given = operands()
    for x in (given[0][0, 0], given[0][0], given[0][None]):
        np.testing.assert_allclose(
            mlp_function(x, *given[1:]), formula("gelu_tanh", x, *given[1:]), rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("argnum", range(5))
def test_in_inference_a_gradient_is_an_error(argnum):
    loss = lambda *given: mlp_function(*given).sum()
    with pytest.raises(RuntimeError, match="inference mode.* no backward"):
        jax.grad(loss, argnum)(*operands())
    with pytest.raises(RuntimeError, match="inference=False"):
        jax.jit(jax.grad(loss, argnum))(*operands())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])
def test_elsewhere_the_gradient_is_the_formulas(name):
    given = operands(name, batch=(2,), width=3, hidden=4)
    weight = np.random.default_rng(5).standard_normal(given[0].shape)
    loss = lambda *given: (mlp_function(*given, name, inference=False) * weight.astype(np.float32)).sum()
    gradients = jax.grad(loss, range(5))(*given)
    for i, gradient in enumerate(gradients):
        for place in np.ndindex(given[i].shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [np.array(a, np.float64) for a in given]
                moved[i][place] += step
                ends.append((formula(name, *moved) * weight).sum())
            np.testing.assert_allclose(gradient[place], (ends[0] - ends[1]) / 2e-5, rtol=2e-5, atol=1e-5)


def test_relu_has_the_formulas_gradient():
    x, *weights = operands("relu")
    plain = lambda x, a, b, c, d: (jnp.maximum(x @ a + b, 0) @ c + d).sum()
    ours = lambda *given: mlp_function(*given, "relu", inference=False).sum()
    for got, want in zip(jax.grad(ours, range(5))(x, *weights), jax.grad(plain, range(5))(x, *weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (3, 5), r"x: float32 \(3, 5\), expected floats \[..., 4\]"),
        (1, (4, 12), r"inter_w.*\(4, 12\).* 'gelu_tanh'"),
        (2, (5,), r"inter_b.*\(5,\)"),
        (3, (5, 4), r"output_w.*\(5, 4\)"),
        (3, (6,), r"output_w.*\(6,\)"),
        (4, (5,), r"output_b.*\(5,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(place, shape, message):
    given = operands()
    given[place] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        mlp_function(*given)


def test_what_is_no_float_or_no_activation_is_refused():
    x, *weights = operands()
    with pytest.raises(ValueError, match="x: int32"):
        mlp_function(np.ones(x.shape, np.int32), *weights)
    with pytest.raises(ValueError, match="softplus"):
        mlp_function(x, *weights, "softplus")
    with pytest.raises(ValueError, match=r"inter_w.*'swiglu'"):  # half the columns of a gated one
        mlp_function(x, *weights, "swiglu")


@pytest.mark.parametrize("kind", ["GELU", "ReLU", "GATED_GELU", "GATED_SILU"])
def test_each_expert_of_the_stack_is_the_function(kind):
    config = MoEInferenceConfig(hidden_size=8, heads=2, intermediate_size=6, moe_experts=3, mlp_act_func_type=kind)
    experts, x = MoEMLP(config, rngs=nnx.Rngs(0)), np.random.default_rng(0).standard_normal((3, 2, 5, 8))
    biases = np.random.default_rng(1)
    for bias in (experts.inter_b, experts.output_b):
        bias[...] = jnp.asarray(biases.standard_normal(bias.shape), jnp.float32)
    y = experts(x.astype(np.float32))
    weights = [np.asarray(w[...]) for w in (experts.inter_w, experts.inter_b, experts.output_w, experts.output_b)]
    for e in range(3):
        own = [w[e] for w in weights]
        np.testing.assert_allclose(y[e], formula(config.activation, x[e], *own), rtol=1e-5, atol=3e-6)


def test_the_stack_of_experts_is_trainable_and_checks_its_input():
    config = MoEInferenceConfig(hidden_size=4, heads=2, bf16=True)
    experts = MoEMLP(config, 2, rngs=nnx.Rngs(0))
    assert experts.inter_w.shape == (2, 4, 16) and experts.output_w.dtype == jnp.bfloat16
    x = np.ones((2, 3, 4), np.float32)
    gradients = nnx.grad(lambda experts: experts(x).astype(jnp.float32).sum())(experts)
    assert all(jnp.any(g[...] != 0) for g in (gradients.inter_w, gradients.output_w, gradients.output_b))
    with pytest.raises(ValueError, match="q_int8"):
        MoEMLP(MoEInferenceConfig(hidden_size=4, heads=2, q_int8=True), rngs=nnx.Rngs(0))
    for shape in ((3, 3, 4), (2, 3, 5), (2,)):
        with pytest.raises(ValueError, match=r"expected \[2, ..., 4\]"):
            experts(np.ones(shape, np.float32))
