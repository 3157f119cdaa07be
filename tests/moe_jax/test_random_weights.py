"""Random weights: drawn block by block what one draw would give, int8 as rounding it gives, MXFP4; little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Model, ModelConfig, quantize, random_weights
from moe_jax.model import tiny_config
from moe_jax.weights import Parameter, flattened, parameters
from pallas_kernels import MXFP4Array

KEY = jax.random.key(3)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 40 elements, in programs that are compiled anew."""
    monkeypatch.setattr(random_weights, "_BLOCK", 40)
    random_weights._filled.clear_cache()
    yield
    random_weights._filled.clear_cache()


def test_blocks_fill_the_whole_kernel(small_blocks):
    parameter = Parameter((3, 7, 16), (0, 1, 2), contracted=True)
    w = np.asarray(random_weights.draw(KEY, "attention.o", parameter, jnp.float32))
    assert w.shape == parameter.shape and len(np.unique(w)) == w.size
    assert w.std() == pytest.approx(16**-0.5, rel=0.1)


def test_norms_biases_and_routers_keep_their_rules():
    draw = lambda name, shape: np.asarray(
        random_weights.draw(KEY, name, Parameter(shape, contracted=True), jnp.bfloat16)
    )
    assert (draw("mlp_norm.scale", (2, 8)) == 1).all() and not draw("moe.router_bias", (8,)).any()
    assert draw("embedding", (5, 4)).dtype == jnp.bfloat16


@pytest.mark.parametrize("group_size", [None, 12])
def test_int8_is_what_quantize_gives(small_blocks, group_size):
    config = tiny_config()
    got = Model.initialize(config, seed=5, quantize="int8", group_size=group_size).arrays()
    want = quantize(Model.initialize(config, seed=5), group_size=group_size).arrays()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, array in flattened(want).items():
        for a, b in zip(jax.tree.leaves(flattened(got)[name]), jax.tree.leaves(array), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            ulp = int(a.dtype == np.int8)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-6, atol=ulp)


GPT_OSS = ModelConfig.from_json_file("configs/tiny/gpt_oss.json")


def test_mxfp4_is_of_experts_only():
    model = Model.initialize(GPT_OSS, dtype=jnp.bfloat16, quantize="mxfp4")
    flat = flattened(model.arrays())
    assert {name for name, w in flat.items() if isinstance(w, MXFP4Array)} == {"moe.gate", "moe.up", "moe.down"}
    table = parameters(model.architecture)
    for name, array in flat.items():
        assert array.shape == table[name].shape and array.dtype == jnp.bfloat16
    assert flat["moe.up"].blocks.dtype == jnp.uint32 and flat["moe.up"].scales.dtype == jnp.uint8
    assert np.isfinite(model([[1, 2, 3]])).all()


@pytest.mark.parametrize("width", [64, 96, 2880])
def test_mxfp4_has_the_standard_deviation(width):
    """The mean of n squares is off by about 1.1 of them over sqrt(n), and by what the scales' share is off."""
    parameter = Parameter((2, 4, 200_000 // width, width), (0, 1), experts=4, contracted=True)
    w = random_weights.draw(KEY, "moe.up", parameter, jnp.float32, "mxfp4")
    values = np.asarray(w.dequantize(), np.float64)
    assert (values**2).mean() * width == pytest.approx(1, rel=0.02) and abs(values.mean()) < 0.003 * width**-0.5
    assert len(np.unique(w.scales)) == 2 and int(np.ptp(w.scales)) == 1


def test_mxfp4_fills_the_whole_kernel(small_blocks):
    parameter = Parameter((2, 3, 7, 32), (0, 1), experts=3, contracted=True)
    w = random_weights.draw(KEY, "moe.up", parameter, jnp.float32, "mxfp4")
    assert w.blocks.shape == (2, 3, 7, 4) and w.scales.shape == (2, 3, 7, 1)
    assert len(np.unique(w.blocks)) == w.blocks.size and w.scales.min() > 0


def test_refusals():
    refuse = lambda why: pytest.raises(ValueError, match=why)
    with refuse("quantize: 'int4'"):
        Model.initialize(tiny_config(), quantize="int4")
    with refuse("group_size: 0"):
        Model.initialize(tiny_config(), quantize="int8", group_size=0)
    for form in (None, "mxfp4"):
        with refuse(f"group_size: 32, but quantize is {form}"):
            Model.initialize(GPT_OSS, quantize=form, group_size=32)
    with refuse("multiples of 32, moe.down has 48"):
        Model.initialize(tiny_config(), quantize="mxfp4")
    with refuse("mxfp4 is for experts"):
        Model.initialize(ModelConfig.from_json_file("configs/tiny/llama.json"), quantize="mxfp4")


@pytest.mark.parametrize("form, row", [(None, 2 * 2048), ("int8", 2048 + 4), ("mxfp4", 2048 // 2 + 2048 // 32)])
def test_memory_is_the_weights_and_a_block(form, row):
    """A stack of 2.4 GB as the program sees it, at Qwen3's widths: no second stack, no wide copy."""
    shape = (6, 128, 768, 2048)
    compiled = random_weights._filled.lower(KEY, shape, jnp.dtype(jnp.bfloat16), form, None).compile()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == 6 * 128 * 768 * row + (16 if form else 0)
    assert memory.temp_size_in_bytes < 32 * random_weights._BLOCK


def test_the_program_gives_the_final_shape():
    """Whatever would follow it copies the stack."""
    parameter = Parameter((3, 7, 2, 8), (0, 1, 2), contracted=True)
    wide = jax.make_jaxpr(lambda key: random_weights.draw(key, "attention.o", parameter, jnp.bfloat16))(KEY)
    small = jax.make_jaxpr(lambda key: random_weights.draw(key, "attention.o", parameter, jnp.bfloat16, "int8"))(KEY)
    assert len(wide.eqns) == len(small.eqns) == 1


@pytest.mark.parametrize("form", ["int8", "mxfp4"])
def test_large_config_is_drawn_with_its_shapes(form):
    config = ModelConfig.from_json_file("configs/gpt-oss-20b.json")
    shapes = jax.eval_shape(lambda: Model.initialize(config, dtype=jnp.bfloat16, quantize=form).arrays())
    gate = shapes["moe"]["gate"]
    assert gate.shape == (24, 32, 2880, 2880) and shapes["moe"]["router"].dtype == jnp.bfloat16
    assert jax.tree.leaves(gate)[0].dtype == (jnp.int8 if form == "int8" else jnp.uint32)
