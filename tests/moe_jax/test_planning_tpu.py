"""Whole programs by the real TPU compiler, where libtpu is installed: our kernels, no copies, small temporaries."""

import functools
import importlib.util
import re

import jaxtyping
import pytest

from moe_jax.benchmarks.hlo import parse
from moe_jax.benchmarks.models import find_config
from moe_jax.planning import Job, as_text, make_plan, open_topology
from moe_jax.planning.kernels import Kernel, kernels
from moe_jax.planning.programs import abstract_weights, compile_stage, device_bytes
from moe_jax.sharding.mesh import make_mesh

compiling = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
PROGRAMS = {
    "mixtral-8x7b": ("v5e:4x4", dict(expert=8, model=2), 16),
    "qwen3-30b-a3b": ("v5p:4x4x4", dict(data=4, expert=16), 64),
    "deepseek-v3": ("v6e:8x8", dict(expert=8, model=8), 64),
}
KERNELS = {
    "decode": {"moe_jax_expert_mlp_tpu", "moe_jax_routing_topk_tpu"},
    "prefill": {"moe_jax_expert_mlp_tpu", "moe_jax_routing_topk_tpu", "moe_jax_routing_rank_tpu"},
}
#: What makes no new array.
VIEWS = "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "custom-call"


@pytest.fixture(autouse=True)
def placeholders(monkeypatch):
    """Shapes go into the dataclasses, which their annotations do not allow."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@functools.cache
def job(name):
    return Job(name=name, config=find_config(name), batch=PROGRAMS[name][2], context=1024)


@compiling
@pytest.mark.parametrize("stage", ["decode", "prefill"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_real_models(name, stage):
    topology, sizes, _ = PROGRAMS[name]
    sharding = job(name).sharding(make_mesh(**sizes, devices=open_topology(topology).devices))
    weights = abstract_weights(job(name), sharding)
    made = compile_stage(job(name), sharding, stage, weights)
    assert made.memory is not None, made.refusal
    assert {one.name for one in kernels(made.text)} == KERNELS[stage]
    assert made.memory.temporaries < 0.1 * device_bytes(weights)
    block = sharding.local(job(name).config.architecture).block
    matrix = sorted((block.width, block.experts.hidden))
    program = parse(made.text)
    for computation, instructions in program.computations.items():
        if computation in program.inside:
            continue
        for one in instructions.values():
            if one.opcode not in VIEWS:  # neither whole stacks nor single experts
                assert all(sorted(shape[-2:]) != matrix for _, shape in one.arrays), one.text[:300]


@compiling
def test_a_plan_shows_kernels():
    given = find_config("configs/tiny/mixtral.json")
    one = Job(name="tiny", config=given, batch=8, context=64, new=16)
    text = as_text(make_plan(one, open_topology("v5e:2x2"), {"expert": 4}))
    assert re.search(r"decode: kernels +times +VMEM +bytes +GFLOP +at best, ms +limit", text)
    assert re.search(r"moe_jax_expert_mlp_tpu +\d+ +[\d.]+ kB", text)


CALL = """HloModule a
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %moe_jax_x_tpu.3 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", CONFIG
  %moe_jax_x_tpu.4 = f32[8]{0} custom-call(%moe_jax_x_tpu.3), custom_call_target="tpu_custom_call", CONFIG
  ROOT %other = f32[8]{0} custom-call(%moe_jax_x_tpu.4), custom_call_target="tpu_custom_call"
}
"""
CONFIG = (
    'backend_config={"custom_call_config":{"body":"x","cost_estimate":'
    '{"flops":"70","transcendentals":"1","bytes_accessed":"30"}},'
    '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}'
)


def test_equal_calls_of_a_kernel_are_one_row():
    assert kernels(CALL.replace("CONFIG", CONFIG)) == [Kernel("moe_jax_x_tpu", 4096, 30, 70, 2)]
