"""Random weights: drawn block by block what one draw would give, and int8 as rounding it gives; little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Model, ModelConfig, quantize, random_weights
from moe_jax.model import tiny_config
from moe_jax.weights import Parameter, flattened

KEY = jax.random.key(3)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 40 elements, in programs that are compiled anew."""
    monkeypatch.setattr(random_weights, "_BLOCK", 40)
    random_weights._filled.clear_cache()
    yield
    random_weights._filled.clear_cache()


@pytest.mark.parametrize("inputs", [1, 2])
def test_blocks_fill_the_whole_kernel(small_blocks, inputs):
    parameter = Parameter((3, 7, 2, 8), (0, 1, 2), inputs=inputs)
    w = np.asarray(random_weights.draw(KEY, "attention.o", parameter, jnp.float32))
    assert w.shape == parameter.shape and len(np.unique(w)) == w.size
    assert w.std() == pytest.approx((2 * 8 if inputs == 2 else 8) ** -0.5, rel=0.1)


def test_norms_biases_and_routers_keep_their_rules():
    draw = lambda name, shape: np.asarray(random_weights.draw(KEY, name, Parameter(shape, inputs=1), jnp.bfloat16))
    assert (draw("mlp_norm.scale", (2, 8)) == 1).all() and not draw("moe.router_bias", (8,)).any()
    assert draw("embedding", (5, 4)).dtype == jnp.bfloat16


@pytest.mark.parametrize("group_size", [None, 12])
def test_int8_is_what_quantize_gives(small_blocks, group_size):
    config = tiny_config()
    got = Model.initialize(config, seed=5, bits=8, group_size=group_size).arrays()
    want = quantize(Model.initialize(config, seed=5), group_size=group_size).arrays()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, array in flattened(want).items():
        for a, b in zip(jax.tree.leaves(flattened(got)[name]), jax.tree.leaves(array), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            ulp = int(a.dtype == np.int8)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-6, atol=ulp)


def test_refusals():
    with pytest.raises(ValueError, match="bits: 4"):
        Model.initialize(tiny_config(), bits=4)
    with pytest.raises(ValueError, match="group_size: 0"):
        Model.initialize(tiny_config(), bits=8, group_size=0)


@pytest.mark.parametrize("int8", [False, True])
def test_memory_is_the_weights_and_a_block(int8):
    """A stack of 2.4 GB as the program sees it, at Qwen3's widths: no second stack, no wide copy."""
    shape = (6, 128, 768, 2048)
    compiled = random_weights._filled.lower(KEY, shape, 1, jnp.dtype(jnp.bfloat16), int8, None).compile()
    rows, width = 6 * 128 * 768, 2048
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == rows * (width + 4 if int8 else 2 * width) + (16 if int8 else 0)
    assert memory.temp_size_in_bytes < 32 * random_weights._BLOCK


@pytest.mark.parametrize("inputs", [1, 2])
def test_the_program_gives_the_final_shape(inputs):
    """Whatever would follow it copies the stack."""
    parameter = Parameter((3, 7, 2, 8), (0, 1, 2), inputs=inputs)
    wide = jax.make_jaxpr(lambda key: random_weights.draw(key, "attention.o", parameter, jnp.bfloat16))(KEY)
    small = jax.make_jaxpr(lambda key: random_weights.draw_int8(key, parameter, jnp.bfloat16))(KEY)
    assert len(wide.eqns) == len(small.eqns) == 1


def test_large_config_is_drawn_with_its_shapes():
    config = ModelConfig.from_json_file("configs/tiny/gpt_oss.json")
    shapes = jax.eval_shape(lambda: Model.initialize(config, dtype=jnp.bfloat16, bits=8).arrays())
    assert shapes["moe"]["gate"].values.dtype == jnp.int8 and shapes["moe"]["router"].dtype == jnp.bfloat16
