"""Plans on eight emulated devices: against really sharded models, against formulas, and what is refused."""

import functools
import importlib.util
import json
from collections import defaultdict

import jax
import jaxtyping
import numpy as np
import pytest
from core_models import folder

from moe_jax import ModelConfig, engine, make_mesh
from moe_jax.benchmarks.models import find_config
from moe_jax.benchmarks.work import cache_bytes as cache_bytes_of
from moe_jax.benchmarks.work import prefill_flops, weights_of
from moe_jax.cli import main
from moe_jax.generation import _Run
from moe_jax.model import Model
from moe_jax.planning import Job, as_text, make_plan, open_topology, search
from moe_jax.planning.collectives import Collective, collectives
from moe_jax.planning.costs import cache_bytes, roofline, work
from moe_jax.planning.devices import DEVICES, parse
from moe_jax.planning.programs import abstract_state, abstract_weights, device_bytes
from moe_jax.planning.search import meshes
from moe_jax.planning.wire import expected

MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
AXES = ("data", "expert", "model")


@pytest.fixture(autouse=True)
def placeholders(monkeypatch):
    """Shapes go into the dataclasses, which their annotations do not allow."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@functools.cache
def job(case="mixtral", **options):
    given = dict(batch=16, context=96, new=16, dtype="float32") | options
    return Job(name=case, config=ModelConfig.from_json_file(folder(case) / "config.json"), **given)


@functools.cache
def planned(sizes):
    return make_plan(job(), open_topology("cpu:8"), dict(zip(AXES, sizes, strict=True)))


def sent(found):
    """Bytes by kind of what certainly runs."""
    totals = defaultdict(float)
    for one in found:
        if not one.branch:
            totals[one.kind] += one.sent
    return dict(totals)


def running(one, mesh):
    """`generate` of a really sharded model, before its first token."""
    model = Model.initialize(one.config, dtype=one.dtype, quantize=one.quantize, group_size=one.group_size, mesh=mesh)
    ids = np.ones((one.batch, one.context - one.new), np.int32)
    return _Run(model, ids, None, one.new, (), kv_cache_dtype=one.cache)


@pytest.mark.parametrize("sizes", MESHES)
def test_memory_is_that_of_the_programs_that_generate_runs(sizes):
    run, plan = running(job(), make_mesh(*sizes)), planned(sizes)
    given, sharding = (run.model.architecture, run.weights), run.sharding
    prompt = run.ids, run.lengths, run.forced
    first = engine.prefill.lower(given[0], run.sizes, False, given[1], *prompt, run.request, sharding=sharding)
    run.start()
    then = engine.step.lower(*given, run.state, run.request, sharding=sharding)
    for stage, lowered in zip(plan.stages, (first, then), strict=True):
        m = lowered.compile().memory_analysis()
        assert stage.memory.temporaries == m.temp_size_in_bytes
        assert stage.memory.arguments == m.argument_size_in_bytes
        taken = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        assert stage.memory.total == taken + m.temp_size_in_bytes + m.generated_code_size_in_bytes
    assert plan.weights == weights_of(run.model).total
    assert plan.cache == cache_bytes_of(run.model, job().batch, job().context - job().new, job().new)


def agree(ours, theirs):
    """Shapes, dtypes and bytes on a device of abstract arrays and of those that lie there."""
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), ours, theirs)
    assert all(jax.tree.leaves(same))
    assert device_bytes(ours) == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(theirs))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("deepseek_v3", dict(quantize="int8")),
        ("gpt_oss", dict(quantize="mxfp4")),
        ("olmoe", dict(quantize="int8", group_size=8)),
        ("qwen2_moe", dict(dtype="bfloat16")),
    ],
)
def test_weights_are_those_of_a_sharded_model(case, options):
    one, mesh = job(case, **options), make_mesh(2, 2, 2)
    agree(abstract_weights(one, one.sharding(mesh)), running(one, mesh).weights)


@pytest.mark.parametrize(("case", "stored"), [("deepseek_v3", None), ("qwen3_moe", "int8")])
def test_the_cache_is_that_of_a_sharded_model(case, stored):
    one, mesh = job(case, cache=stored, quantize="int8"), make_mesh(2, 2, 2)
    run, sharding = running(one, mesh), one.sharding(mesh)
    run.start()
    state = abstract_state(one, sharding, abstract_weights(one, sharding))
    agree(state, run.state)
    assert device_bytes(state.cache) == cache_bytes(one, sharding)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_compiled_program_sends_what_the_formula_says(sizes):
    sharding = job().sharding(make_mesh(*sizes))
    for stage in planned(sizes).stages:
        assert sent(stage.sent) == pytest.approx(sent(expected(job(), sharding, stage.stage)))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_gates_with_a_capacity_send_what_the_formula_says(sizes):
    config = find_config("configs/tiny/deepspeed_moe.json")
    config = ModelConfig.from_dict(config.to_dict() | {"num_experts": [0, 8, 0, 8], "hidden_size": 32})
    one = Job(name="deepspeed", config=config, batch=16, context=64, new=16, dtype="float32")
    plan = make_plan(one, open_topology("cpu:8"), dict(zip(AXES, sizes, strict=True)))
    for stage in plan.stages:
        wanted = expected(one, one.sharding(make_mesh(*sizes)), stage.stage)
        assert sent(stage.sent) == pytest.approx(sent(wanted))


@pytest.mark.parametrize("name", ["ring", "all_to_all"])
def test_other_exchanges_send_what_the_formula_says(name):
    one = job(exchange=name)
    plan = make_plan(one, open_topology("cpu:8"), {"expert": 8})
    for stage in plan.stages:
        assert sent(stage.sent) == pytest.approx(sent(expected(one, one.sharding(make_mesh(expert=8)), stage.stage)))
    assert any(c.branch for c in plan.stages[0].sent) == (name == "all_to_all")


@pytest.mark.parametrize("name", [None, "ring", "all_to_all"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_with_tokens_together_as_well(sizes, name):
    one = job(exchange=name, rules="together", batch=20)
    plan = make_plan(one, open_topology("cpu:8"), dict(zip(AXES, sizes, strict=True)))
    for stage in plan.stages:
        wanted = expected(one, one.sharding(make_mesh(*sizes)), stage.stage)
        assert sent(stage.sent) == pytest.approx(sent(wanted))


@pytest.mark.parametrize("rules", ["spread", "together"])
def test_experts_do_the_same_work_in_all_wherever_tokens_are(rules):
    """Of eight devices an eighth each; what is not experts' stands on one rank for each token, or on all."""
    one, mesh = job(rules=rules, batch=64), make_mesh(expert=8)
    alone = job(batch=64 // (8 if rules == "spread" else 1))
    for stage in ("prefill", "decode"):
        whole, rest, got = (
            work(j, s, stage, abstract_weights(j, s))
            for j, s in (
                (job(batch=64), job().sharding(make_mesh())),
                (alone, alone.sharding(make_mesh())),
                (one, one.sharding(mesh)),
            )
        )
        a, tokens = one.config.architecture, 64 * (one.context - one.new if stage == "prefill" else 1)
        experts = 2 * len(a.moe_layers) * a.block.router.top_k * 3 * a.block.width * a.block.experts.hidden
        plain = rest.flops - experts * tokens // (8 if rules == "spread" else 1)
        assert got.flops == pytest.approx(plain + experts * tokens / 8)
        assert got.nbytes < whole.nbytes


def test_many_rows_run_in_pieces_and_count_so():
    """Prompts of 4 times as many tokens as run at once: a loop around the loop over layers."""
    one = job(batch=1024, context=128, new=16)
    plan, sharding = make_plan(one, open_topology("cpu:8"), {"model": 8}), one.sharding(make_mesh(model=8))
    assert sent(plan.stages[0].sent) == pytest.approx(sent(expected(one, sharding, "prefill")))
    assert max(c.times for c in plan.stages[0].sent) > 3 * len(one.config.architecture.layers)


GROUPS = """HloModule a
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %s = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %y = f32[8]{0} all-reduce-done(%s)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}
%cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(2)
  %first = s32[] copy(%zero)
  %start = (s32[], f32[8]{0}) tuple(%first, %a)
  %w = (s32[], f32[8]{0}) while(%start), condition=%cond, body=%body
  %s.1 = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%a), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %d = f32[8]{0} collective-permute-done(%s.1)
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_asynchronous_forms_and_loops_by_their_constants():
    found = collectives(GROUPS.replace("LIMIT", "7"), 8)
    assert found == [
        Collective("all-reduce", 32, (0, 1, 2, 3), 5),
        Collective("collective-permute", 32, (0, 2)),
    ]
    assert [one.sent for one in found] == [240, 32]
    unknown = GROUPS.replace("s32[] constant(LIMIT)", "s32[] get-tuple-element(%p.1), index=0")
    assert [(one.times, one.counted) for one in collectives(unknown, 8)] == [(1, False), (1, True)]


CHAIN = """HloModule a
%begin (x: f32[8]) -> (f32[8], f32[16]) {
  %x = f32[8]{0} parameter(0)
  %g = f32[16]{0} all-gather(%x), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
  ROOT %c = (f32[8]{0}, f32[16]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%end (x.1: f32[8]) -> f32[16] {
  %x.1 = f32[8]{0} parameter(0)
  %g.1 = f32[16]{0} all-gather(%x.1), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = f32[16]{0} custom-call(%x.1, %g.1), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (a: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[16]{0}) fusion(%a), kind=kCustom, calls=%begin
  ROOT %d = f32[16]{0} fusion(%a), kind=kCustom, calls=%end
}
"""


RAGGED = """HloModule a
ENTRY %main (a: f32[8], b: f32[32], n: s32[2]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %b = f32[32]{0} parameter(1)
  %n = s32[2]{0} parameter(2)
  ROOT %r = f32[32]{0} ragged-all-to-all(%a, %b, %n, %n, %n, %n), replica_groups={{0,1},{2,3}}
}
"""


def test_no_more_is_sent_than_there_is():
    assert collectives(RAGGED, 4) == [Collective("ragged-all-to-all", 32, (0, 1))]


SCATTER = """HloModule a
%all-reduce-scatter.1 (x: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %slice = f32[4]{0} slice(%r), slice={[0:4]}
}
ENTRY %main (a: f32[8]) -> f32[4] {
  %a = f32[8]{0} parameter(0)
  ROOT %s = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_sum_that_a_tpu_scatters_is_no_whole_sum():
    assert collectives(SCATTER, 2) == [Collective("reduce-scatter", 16, (0, 1))]


def test_what_a_tpu_sends_during_fusions_counts_once():
    assert collectives(CHAIN, 2) == [Collective("all-gather", 64, (0, 1))]


def test_operations_are_those_that_benchmarks_count():
    one = job(case="mixtral", batch=3, context=48)
    sharding = one.sharding(make_mesh(1, 1, 1))
    found = work(one, sharding, "prefill", abstract_weights(one, sharding)).flops
    assert found == prefill_flops(one.config.architecture, one.batch, one.context - one.new)


def test_links_within_a_node_and_beyond():
    device = DEVICES["h100"]
    near, far = (Collective("all-gather", 16_000, tuple(range(n))) for n in (8, 16))
    idle = work(job(), job().sharding(make_mesh(8)), "decode", abstract_weights(job(), job().sharding(make_mesh(8))))
    assert roofline(idle, [near], device).wire == pytest.approx(14_000 / 450e9)
    assert roofline(idle, [far], device).wire == pytest.approx(15_000 / 50e9)
    assert roofline(idle, [near], device).limit == "memory"


def test_a_search_tries_all_meshes():
    found = search(job(), open_topology("cpu:8"), ["spread"])
    assert len(found) == len(meshes(8)) == 10
    both = search(job(), open_topology("cpu:8"))
    assert len(both) == 16 and set(map(repr, found)) < set(map(repr, both))  # of 10 meshes, 6 have ranks of experts
    assert all(np.prod(list(one.sizes.values())) == 8 for one in found)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)


def test_the_command(capsys):
    given = ["--model", str(folder("mixtral")), "--batch", "16", "--context", "96", "--max-new-tokens", "16"]
    assert main(["plan", *given, "--topology", "cpu:8", "--mesh", "expert=8", "--json"]) == 0
    plan = planned((1, 8, 1))
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == plan.weights and found["mesh"] == plan.sizes and found["fits"]
    assert found["stages"]["decode"]["memory"]["total"] == plan.stages[1].memory.total
    text = as_text(plan)
    assert "8 x CPU, mesh data 1, expert 8, model 1" in text and "KV cache" in text and "at best, ms" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "expert=4"], "devices: 8 given for a mesh of 1 x 4 x 1"),
        ([], "give --mesh or --search, one of them"),
        (["--mesh", "expert=8", "--search"], "give --mesh or --search, one of them"),
        (["--mesh", "expert=8", "--topology", "v9:8"], "'v9:8', expected one of v5e, v5p"),
        (["--mesh", "expert=8", "--topology", "cpu:2x4"], "cpu takes a number of devices, such as cpu:8"),
        (["--mesh", "expert=8", "--topology", "v5p"], "expected a size behind the colon"),
        (["--mesh", "expert=8", "--topology", "cpu:4096"], "needs 4096 CPU devices, JAX was started with 8"),
        (["--mesh", "expert=8", "--context", "4097"], "4097 tokens exceed the model's 128"),
        (["--mesh", "expert=8", "--context", "16", "--max-new-tokens", "16"], "leave none for the prompt"),
        (["--mesh", "expert=8", "--batch", "0"], "batch: 0 is not positive"),
        (["--mesh", "expert=8", "--quantize", "int8", "--group-size", "0"], "group_size"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message, capsys):
    given = ["--model", str(folder("mixtral")), "--topology", "cpu:8", "--context", "96", "--max-new-tokens", "16"]
    assert main(["plan", *given, *options]) == 2
    assert message in capsys.readouterr().err


def test_tpus_need_libtpu(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    given = ["--model", str(folder("mixtral")), "--context", "96", "--max-new-tokens", "16", "--mesh", "model=4"]
    assert main(["plan", *given, "--topology", "v5p:2x2x1"]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_gpus_without_a_cuda_plugin_are_emulated_and_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    topology = open_topology("h100:8")
    assert [device.platform for device in topology.devices] == ["cpu"] * 8
    assert "temporaries and collectives are those of XLA's CPU compiler" in topology.note
    assert topology.device == DEVICES["h100"] and parse("v7:2x2x1") == ("tpu7x", (2, 2, 1))
