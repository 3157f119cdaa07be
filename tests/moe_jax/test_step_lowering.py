"""The decode program of real models lowered for CUDA without a GPU: every kernel by name, no experts moved by XLA."""

import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from test_config_values import CONFIGS

from moe_jax import ModelConfig, engine
from moe_jax.cache import make_cache
from moe_jax.sampling import make_sampler
from moe_jax.weights import nested, parameters

sys.path.append(str(Path(__file__).parents[1] / "pallas_kernels"))
from cuda import mesh_of

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
ROUTED = {"moe_jax_routing_topk"}
ONE = {"moe_jax_linear_row", "moe_jax_attention_decode", "moe_jax_expert_up_row", "moe_jax_expert_down_row"}
FEW = {"moe_jax_linear_rows", "moe_jax_attention_decode", "moe_jax_expert_up", "moe_jax_expert_down"}
LAYERS = 3
MOVING = re.compile(r"stablehlo\.(dot_general|dynamic_slice|slice|gather|transpose|convert|concatenate)\b")


@pytest.fixture(autouse=True)
def placeholders(monkeypatch):
    """Shapes go into the dataclasses, which their annotations do not allow."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def program(name, rows, columns=256, **changes):
    """A model's configuration with few layers, and the text of its decode program."""
    hub = json.loads((CONFIGS / f"{name}.json").read_text()) | {"num_hidden_layers": LAYERS} | changes
    hub.pop("quantization_config", None)
    for name in ("layer_types", "num_experts"):
        if isinstance(hub.get(name), list):
            hub[name] = hub[name][:LAYERS]
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
        traced = engine.step.trace(architecture, weights, state, request)
        return architecture, traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """Names of the kernels that a program holds, Mosaic's without what it adds to them."""
    found = re.findall(r'"(moe_jax_[a-z_]+)"', text) + re.findall(r"(moe_jax_[a-z_]+)_mosaic_gpu", text)
    return {name.removesuffix("_mosaic_gpu") for name in found}


def of_experts(architecture, text):
    """Operations on a stack of expert kernels, whole or in part: those that could move or multiply one."""
    width, hidden = architecture.block.width, architecture.block.experts.hidden
    pair, found = {width, hidden}, set()
    for line in text.splitlines():
        operation = MOVING.search(line)
        if operation is None:
            continue
        for shape in re.findall(r"tensor<((?:\d+x)+)bf16>", line):
            sizes = [int(n) for n in shape.split("x") if n]
            if len(sizes) > 2 and set(sizes[-2:]) == pair and math.prod(sizes) >= width * hidden:
                found.add(operation[1])
    return found


@pytest.mark.parametrize(
    "name, rows, names",
    [
        ("qwen3-30b-a3b", 1, ONE | ROUTED),
        ("qwen3-30b-a3b", 32, FEW | ROUTED),
        ("gpt-oss-20b", 1, ONE | ROUTED),
        ("deepspeed-1.3b-moe-128", 1, ONE),
        ("deepspeed-1.3b-moe-128", 64, FEW),
        pytest.param("olmoe-1b-7b-0924", 1, ONE | ROUTED, marks=pytest.mark.slow),
        pytest.param("gpt-oss-20b", 8, FEW | ROUTED, marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", 1, ONE | ROUTED, marks=pytest.mark.slow),
        pytest.param("glm-4.5-air", 1, ONE | ROUTED, marks=pytest.mark.slow),
        pytest.param("qwen1.5-moe-a2.7b", 1, ONE | ROUTED, marks=pytest.mark.slow),
    ],
)
def test_decoding_runs_by_the_kernels(name, rows, names):
    architecture, text = program(name, rows)
    assert names <= kernels(text)
    assert not {"moe_jax_linear_row", "moe_jax_linear_rows"} - names & kernels(text)
    assert of_experts(architecture, text) == set()


@pytest.mark.slow
def test_a_long_cache_is_split():
    _, text = program("qwen3-30b-a3b", 1, columns=16384)
    assert ONE | ROUTED | {"moe_jax_attention_join"} <= kernels(text)


def test_what_is_not_plain_enough_still_takes_the_experts_kernels():
    architecture, text = program("granite-3.1-1b-a400m-base", 1)
    assert {"moe_jax_expert_up_row", "moe_jax_expert_down_row"} <= kernels(text)
    assert "moe_jax_attention_decode" not in kernels(text) and of_experts(architecture, text) == set()
