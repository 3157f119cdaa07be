"""Profiles: kernels find their stage by name, tables add up, a model's steps are profiled on a CPU."""

import re

import jax
import pytest

from moe_jax import Model, ModelConfig
from moe_jax.benchmarks.hlo import parse
from moe_jax.benchmarks.kernels import Kernel, kernel_seconds, kernels_of
from moe_jax.benchmarks.profile import Profile, by_stage, layer_kernels, one_layer, profile, summary
from moe_jax.benchmarks.stages import STAGES, Stages, stage_of_scope

BODY = "jit(_decode)/while/body/while/body/eval_jaxpr"
FUSION = f"""
%fused_add (p: bf16[8]) -> bf16[8] {{
  %p = bf16[8]{{0}} parameter(0)
  %scaled = bf16[8]{{0}} multiply(%p, %p), metadata={{op_name="{BODY}/moe/expert_mlp/cond/combine/mul"}}
  ROOT %added = bf16[8]{{0}} add(%scaled, %p), metadata={{op_name="{BODY}/moe/add"}}
}}

ENTRY %main (x: bf16[8]) -> bf16[8] {{
  %x = bf16[8]{{0}} parameter(0)
  %input_reduce_fusion.1 = bf16[8]{{0}} reduce(%x), metadata={{op_name="{BODY}/attention/reduce" deduplicated_name="input_reduce_fusion.6"}}
  %input_reduce_fusion.6 = bf16[8]{{0}} reduce(%x), metadata={{op_name="jit(_decode)/while/body/logits/reduce"}}
  %pallas_call.1 = bf16[8]{{0}} custom-call(%x), metadata={{op_name="{BODY}/attention/linear/moe_jax_linear_row/pallas_call"}}
  %pallas_call.2 = bf16[8]{{0}} custom-call(%x), metadata={{op_name="{BODY}/moe/router/linear/moe_jax_linear_row/pallas_call"}}
  %norm-fusion = bf16[8]{{0}} multiply(%x, %x), metadata={{op_name="{BODY}/moe/mul"}}
  %custom-call.1 = bf16[8]{{0}} custom-call(%x), custom_call_target="__cublas$lt$matmul"
  ROOT %loop_add_fusion = bf16[8]{{0}} fusion(%x), kind=kLoop, calls=%fused_add, metadata={{op_name="{BODY}/moe/add"}}
}}
"""  # noqa: E501


def test_scopes():
    assert stage_of_scope(f"{BODY}/attention/jit(dynamic_index_in_dim)/dynamic_slice") == "attention"
    assert stage_of_scope(f"{BODY}/moe/expert_mlp/cond/moe_jax_routing_place/pallas_call") == "plan"
    assert stage_of_scope("jit(_decode)/while/body/gather") == "embedding"
    assert stage_of_scope(f"{BODY}/attention/gather") == "attention"
    assert stage_of_scope("") is None


def test_kernels_find_their_stage():
    stages = Stages(parse(FUSION))
    assert stages.candidates("loop_add_fusion") == {"combine"}
    assert stages.candidates("norm_fusion") == {"block"}
    assert stages.candidates("input_reduce_fusion_6") == {"attention", "logits"}
    assert stages.candidates("moe_jax_linear_row_kernel") == {"attention", "router"}
    assert stages.candidates("moe_jax_expert_up_mosaic_gpu_kernel") == {"expert_mlp"}
    assert stages.candidates("nvjet_sm90") == set() and stages.candidates("nvjet_sm90", "norm-fusion") == {"block"}
    assert stages.candidates("memcpy128", "norm-fusion") == {"copies"}


def test_neighbours_decide_between_stages():
    stages = Stages(parse(FUSION))
    names = "input_reduce_fusion_1 memcpy128 nvjet input_reduce_fusion_6 moe_jax_routing_topk moe_jax_linear_row nvjet"
    names = [*names.split(), "moe_jax_expert_up", "input_reduce_fusion_6", "MemcpyD2H"]
    found = stages.of([(name, "call.3") for name in names])
    assert found == "attention copies attention attention router router other expert_mlp attention copies".split()


def _profile(layers=2):
    """Two steps of `layers` layers: attention 1 us, a gap of 2 us, experts 4 us; logits 1 us after each step."""
    kernels, stages, now = [], [], 0.0
    for _ in range(2):
        names = ["attend", "moe_jax_expert_down"] * layers + ["logits"]
        for name, seconds in zip(names, [1e-6, 4e-6] * layers + [1e-6], strict=True):
            now += 2e-6 if name == "moe_jax_expert_down" else 0.0
            kernels.append(Kernel(name, now, seconds))
            stages.append({"attend": "attention", "logits": "logits"}.get(name, "expert_mlp"))
            now += seconds
    return Profile(tuple(kernels), tuple(stages), 2, layers, "")


def test_tables_add_up():
    found = _profile()
    lines = by_stage(found).splitlines()[2:]
    rows = {line.split(" | ")[0][2:]: float(line.split(" | ")[1]) for line in lines}
    assert rows == pytest.approx({"attention": 2.0, "expert_mlp": 8.0, "logits": 1.0, "gaps": 4.0, "all": 15.0})
    assert lines[-1].endswith("| 100.0% | 5.0 |")
    assert layer_kernels(found) == 2
    assert [(k.name, stage, round(1e6 * gap)) for k, stage, gap in one_layer(found)] == [
        ("attend", "attention", 0),
        ("moe_jax_expert_down", "expert_mlp", 2),
    ]
    assert one_layer(_profile(layers=1)) == [] and layer_kernels(_profile(layers=1)) is None


def test_overlapping_kernels_leave_no_gap():
    kernels = Kernel("a", 0.0, 5e-6), Kernel("b", 1e-6, 1e-6), Kernel("c", 6e-6, 1e-6)
    found = Profile(kernels, ("attention",) * 3, 1, 1, "")
    assert found.gaps == pytest.approx([0.0, 0.0, 1e-6]) and found.span == pytest.approx(7e-6)


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_a_model_is_profiled(what, tmp_path):
    config = ModelConfig.from_json_file("configs/tiny/qwen3_moe.json")
    model = Model.initialize(config, quantize="int8" if what == "prefill" else None)
    found = profile(model, batch=2, prompt=6, steps=3, what=what, folder=str(tmp_path))
    assert re.match(rf"HloModule jit_+{what}", found.program)
    assert found.steps == (3 if what == "decode" else 1) and set(found.stages) <= set(STAGES)
    assert {"attention", "expert_mlp", "router", "logits"} <= set(found.stages)
    assert len(found.kernels) == len(found.stages) and all(k.instruction for k in found.kernels)
    text = "\n".join(summary(found))
    assert "| stage | us a step |" in text and "kernels: " in text and "gaps: " in text
    assert kernels_of(str(tmp_path), gpu=True) == []
    assert len(kernels_of(str(tmp_path), gpu=False)) == len(found.kernels)


def test_gpu_kernels_of_a_cpu_are_none():
    assert kernel_seconds(lambda: jax.numpy.ones(3) + 1, calls=1) == {}
