"""`step` against `block` where attention is latent, and in which kernels a GPU runs it."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from core_models import golden_model, only
from test_config_values import CONFIGS

from moe_jax import ModelConfig, decoder, engine
from moe_jax.attention import Span
from moe_jax.block import RoutingRequest
from moe_jax.cache import KVCache, make_cache
from moe_jax.sampling import make_sampler
from moe_jax.weights import nested, parameters

sys.path.append(str(Path(__file__).parents[1] / "pallas_kernels"))
from cuda import mesh_of

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
COLUMNS = 24
LENGTHS = np.array([0, 5, 22], np.int32)
CASES = ["deepseek_v2", "deepseek_v2_grouped", "deepseek_v3", "deepseek_v3_yarn", "kimi_k2"]


def streams(model, entries, ids, monkeypatch):
    """Stream and cache after one token of each row, by `step` and by `block`."""
    architecture = model.architecture

    def one_token(weights, ids, entries):
        positions = jnp.asarray(LENGTHS)[:, None]
        span = Span(positions, turn=decoder.make_turn(architecture.block.attention, positions, COLUMNS))
        cache = KVCache(entries, jnp.asarray(LENGTHS))
        request = RoutingRequest(None)
        x, cache, _ = decoder.decode(architecture, weights, ids, span, cache, request, column=cache.lengths)
        return x, cache.entries

    for plain in (decoder.plain_enough, lambda *given: False):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "plain_enough", plain)
            yield jax.jit(lambda *given: one_token(*given))(model.arrays(), ids, entries)


@pytest.mark.parametrize("case", only(["deepseek_v2", "deepseek_v3_yarn"], CASES))
def test_step_is_block(case, monkeypatch):
    model, rng = golden_model(case), np.random.default_rng(5)
    cache = make_cache(model.architecture, 3, COLUMNS, jnp.float32).entries
    entries = {name: rng.standard_normal(stack.shape).astype(np.float32) for name, stack in cache.items()}
    ids = rng.integers(0, model.architecture.vocab_size, (3, 1)).astype(np.int32)
    got, want = streams(model, entries, ids, monkeypatch)
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def program(name, rows, columns=256):
    """The decode program of a few layers of a model, for a GPU."""
    hub = json.loads((CONFIGS / f"{name}.json").read_text()) | {"num_hidden_layers": 4}
    hub.pop("quantization_config", None)
    architecture, array = ModelConfig.from_dict(hub).architecture, jax.ShapeDtypeStruct
    weights = nested({n: array(p.shape, jnp.bfloat16) for n, p in parameters(architecture).items()})
    state = engine.State(
        cache=jax.eval_shape(lambda: make_cache(architecture, rows, columns, jnp.bfloat16)),
        **dict(tokens=array((rows, 128), jnp.int32), done=array((rows,), bool), step=array((), jnp.int32)),
        **dict(seen=None, experts=None),
    )
    request = engine.Request(
        **dict(sampler=make_sampler(), key=None, eos=np.zeros(0, np.int32), pad=0, total=256, forced=None),
        implementation=None,
    )
    with mesh_of():
        traced = engine.decode.trace(architecture, weights, state, request, jnp.int32(100))
        return architecture, traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "name, rows", [("deepseek-v2-lite", 1), pytest.param("deepseek-v3", 8, marks=pytest.mark.slow)]
)
def test_a_gpu_runs_it_in_kernels(name, rows, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    architecture, text = program(name, rows)
    found = set(re.findall(r'"(moe_jax_[a-z_]+)"', text))
    linear = "moe_jax_linear_row" if rows == 1 else "moe_jax_linear_rows"
    assert {linear, "moe_jax_latent_products", "moe_jax_attention_latent"} <= found
    latent, heads = architecture.block.attention.latent, architecture.block.attention.num_heads
    up = f"tensor<{heads}x{latent.plain_dim + architecture.block.attention.value_dim}x{latent.rank}xbf16>"
    assert up not in text and f"tensor<1x{up.removeprefix('tensor<')}" not in text  # no layer's kernel is cut out
