"""The accelerator's benchmarks on a CPU: what is counted and compared; nothing wrong gets a time. Not how fast."""

import argparse
import dataclasses
import json
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.benchmarks import (
    accelerator,
    device_block,
    device_routing,
    grid,
    inputs,
    jax_baselines,
    numerics,
    programs,
    recorded,
    shapes,
    table,
    timing,
    torch_block,
)
from moe_jax.cli import bench

TINY = shapes.MoEShape(name="tiny", width=16, hidden=8, experts=4, top_k=2)
#: The least number of tokens that two inputs do for, and two inputs compile quickly.
TOKENS = 1025
CEILINGS = timing.Ceilings(copy=10.0, read=20.0, matmul=100.0)
PACE = programs.Pace(samples=2, burst=1e-4, warm=0.0)
OPTIONS = device_block.Options(device=jax.devices("cpu")[0], ceilings=CEILINGS, dtype="float32", pace=PACE, threads=2)
H100 = dataclasses.replace(
    OPTIONS, device=SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3"), dtype="bfloat16"
)
ABOUT = dict(case="block", device="gpu", dtype="bfloat16", shape="s", model="qwen3", tokens=8)


def test_shapes_by_name_and_path(tmp_path):
    assert str(shapes.find("mixtral")) == "D=4096 F=14336 E=8 k=2"
    named, path = shapes.find("olmoe-1b-7b-0924"), shapes.find("configs/olmoe-1b-7b-0924.json")
    assert named == path and not named.renormalize and named.plain and named.left_out == ()
    deepseek = shapes.find("deepseek-v3")
    assert deepseek.score == "sigmoid" and not deepseek.plain and "shared expert" in deepseek.left_out
    assert shapes.find("gpt-oss-20b").bias and shapes.find("gpt-oss-20b").activation.name == "swiglu_clamped"
    with pytest.raises(ValueError, match="give the path of a config.json"):
        shapes.find(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no layer with experts"):
        shapes.find("llama-3.1-8b")


def test_config_named_like_a_recorded_shape_is_not_taken_for_it():
    assert recorded.figures(shapes.find("configs/tiny/olmoe.json").name, 8) == {}


def test_counting_rules_give_the_recorded_floors():
    floors = {("mixtral", 1, 2.0): 227, ("qwen3", 8, 51.6): 157, ("qwen3", 4096, 128): 442, ("gptoss", 16384, 32): 4657}
    for (name, tokens, active), want in floors.items():
        shape = shapes.find(name)
        floor = max(shape.flops(tokens) / recorded.FLOPS, shape.nbytes(tokens, active, 2) / recorded.READ)
        assert 1e6 * floor == pytest.approx(want, rel=0.01)


def test_recorded_figures():
    assert recorded.best("qwen3", 1) == ("vLLM fused_moe", 50.0)
    assert recorded.best("mixtral", 16384) == ("torch._grouped_mm, handwritten", 19000.0)
    assert recorded.best("qwen3", 2) is None and len(recorded.figures("olmoe", 16384)) == 5
    assert all(recorded.VLLM in recorded.figures(name, g) for name in accelerator.MODELS for g in recorded.TOKENS)


def test_inputs():
    drawn = inputs.Inputs.draw(TINY, (1, 40), "float32")
    assert drawn.stacked(1).shape == (16, 1, 16) and drawn.stacked(40).shape == (8, 40, 16)
    want = np.argsort(-(drawn.rows @ drawn.router), 1)[:, :2]
    np.testing.assert_array_equal(np.sort(drawn.ids, 1), np.sort(want, 1))
    assert drawn.active(1) == 2.0 and 2 <= drawn.active(40) <= 4
    picks = drawn.picks(40)
    assert len(picks) == inputs.PICKS and len({i for i, _ in picks}) == 8 and all(row < 40 for _, row in picks)
    again = inputs.Inputs.draw(TINY, (1, 40), "float32")
    np.testing.assert_array_equal(drawn.rows, again.rows)
    everyone = inputs.Inputs.draw(dataclasses.replace(TINY, top_k=4), (1,), "float32")
    assert len(everyone.picks(1)) == inputs.PICKS


def test_pace_counts_calls():
    calls: list[int] = []
    found = programs.Pace(samples=3, burst=0, warm=0).measure(lambda: calls.append(0))
    assert len(found.samples) == 3 and len(calls) == 2 + 16 + 3 * 2
    assert len(programs.Pace(samples=9, burst=0, warm=0, limit=-1, least=4).measure(lambda: None).samples) == 4


def experts(dtype=jnp.float32):
    like = device_block._experts(dataclasses.replace(TINY, bias=True), dtype)
    return jax.tree.map(lambda w: 10 * w, jax.jit(lambda: device_block._draw(like))())


def test_expected_output_and_rounding():
    weights, x = experts(jnp.bfloat16), jax.random.normal(jax.random.key(1), (3, 16), jnp.bfloat16)
    router = jax.random.normal(jax.random.key(2), (16, 4), jnp.bfloat16)
    exact, rounded = jax.jit(numerics.expected(TINY))(x, router, weights)
    wide = lambda tree: jax.tree.map(lambda w: w.astype(jnp.float32), tree)
    reference = device_block.ours(TINY, "xla_tiles")
    np.testing.assert_allclose(exact, reference(*wide((x, router, weights))), rtol=1e-4, atol=1e-4)
    unavoidable = numerics.relative(np.asarray(rounded), np.asarray(exact))
    assert 1e-3 < unavoidable < 1e-2
    got = np.asarray(reference(x, router, weights))
    assert numerics.Standard(np.asarray(exact), unavoidable).check(got, ours=True) <= 1.2 * unavoidable
    with pytest.raises(ValueError, match="wrong result"):
        numerics.Standard(np.asarray(exact), unavoidable).check(np.full_like(got, np.nan), ours=False)


def test_block_over_a_grouped_product_is_right():
    weights = dataclasses.replace(experts(), gate_bias=None, up_bias=None, down_bias=None)
    x, router = jax.random.normal(jax.random.key(1), (5, 16)), jax.random.normal(jax.random.key(2), (16, 4))
    block = jax.jit(jax_baselines.grouped_block(TINY, jax.lax.ragged_dot))
    want = device_block.ours(TINY, None)(x, router, weights)
    np.testing.assert_allclose(block(x, router, weights), want, rtol=1e-4, atol=1e-4)


def test_baselines_that_are_missing_say_why():
    found = jax_baselines.blocks(TINY, 8)
    assert found["tokamax ragged_dot mosaic"] == "tokamax: not installed"
    assert "GB of temporaries" in jax_baselines.blocks(shapes.find("qwen3"), 16384)["xla_ragged"]
    assert set(jax_baselines.blocks(dataclasses.replace(TINY, bias=True), 8)) == {"xla_tiles", "xla_ragged"}


def test_block_rows(monkeypatch):
    monkeypatch.setattr(jax_baselines, "blocks", lambda *a: {"missing": "not there"})
    (cell,) = device_block.run(TINY, (TOKENS,), dataclasses.replace(OPTIONS, baselines=True))
    row, missing = cell
    assert row.implementation == "moe_jax xla_tiles" and (row.model, row.tokens) == ("tiny", TOKENS)
    assert row.steady_ms > 0 and row.compile_ms > 0 and row.roofline > 0
    assert row.values["relative error"] < 1e-5 and row.values["active experts"] == 4
    assert missing.steady_ms is None and missing.note == "failed: ValueError: not there"


def test_wrong_block_gets_no_time(monkeypatch):
    monkeypatch.setattr(device_block, "ours", lambda *a: lambda x, router, experts: x)
    monkeypatch.setattr(programs.Pace, "measure", lambda *a: pytest.fail("timed before it was checked"))
    (((row,)),) = device_block.run(TINY, (TOKENS,), OPTIONS)
    assert row.steady_ms is None and row.note.startswith("failed: ValueError: wrong result: relative error")
    assert grid.failures([row]) == [row]


def test_routing_rows():
    (row,) = device_routing.run(TINY, (TOKENS,), OPTIONS)
    assert row.implementation == "xla" and row.steady_ms > 0 and row.compile_ms > 0 and row.speedup is None


def test_wrong_routing_is_refused():
    logits = device_routing._logits(TINY, 3)
    run = jax.jit(device_routing.step(TINY, 3, None))
    right = [jax.device_get(run(one)) for one in logits]
    device_routing.check_choices(TINY, logits, right)
    device_routing.check_equal(right, right)
    with pytest.raises(ValueError, match="not those of the largest"):
        device_routing.check_choices(TINY, -logits, right)
    for place, name in enumerate(device_routing._OUTPUTS):
        wrong = [tuple(y + (i == place) for i, y in enumerate(outputs)) for outputs in right]
        with pytest.raises(ValueError, match=f"{name} differs"):
            device_routing.check_equal(right, wrong)


def test_rows_are_judged_and_compared():
    result = {"model": "qwen3", "tokens": 8, "implementation": "torch", "seconds": 384e-6, "samples": 20, "error": 0.0}
    theirs = device_block.of_torch(result | {"active": 51.6}, shapes.find("qwen3"), H100)
    assert theirs.values["times vLLM's speed (recorded)"] == pytest.approx(0.5)
    assert theirs.values["share of fixed ceilings"] == pytest.approx(157 / 384, rel=0.01)
    failed = device_block.of_torch({**ABOUT, "implementation": "t", "note": "no"}, shapes.find("qwen3"), H100)
    assert failed.steady_ms is None and failed.note == "no"
    mine = dataclasses.replace(theirs, implementation="moe_jax a", steady_ms=0.192)
    rows = device_block.compared([mine, theirs, failed])
    assert rows[0].speedup == pytest.approx(2.0) and rows[0].baseline == "torch" and rows[1].speedup is None
    text = grid.grids(rows)
    assert "| vLLM fused_moe (recorded on one H100, 2026-11-22) | 192 |" in text and "- T=8: t: no" in text
    assert "| ours: times as fast as the best baseline | 2.00 |" in text


def test_torch_results(monkeypatch):
    ask = lambda: torch_block.measure(["qwen3"], [1, 8], "bfloat16", "cuda", PACE)
    monkeypatch.setattr(torch_block.torch_baseline, "missing", lambda: "torch: not installed")
    assert [found["note"] for found in ask()] == ["torch: not installed"] * 2
    monkeypatch.setattr(torch_block.torch_baseline, "missing", lambda: "")
    line = json.dumps({"model": "qwen3", "tokens": 1, "implementation": "a", "seconds": 1.0})
    ended = SimpleNamespace(stdout=f"noise\n{line}\n", returncode=3)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: ended)
    first, second = ask()
    assert first["seconds"] == 1.0 and second["note"] == "its process ended with status 3" and second["tokens"] == 8


def test_command_measures_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(accelerator, "accelerator_ceilings", lambda *a: CEILINGS)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    ask = lambda words: bench.run(parser.parse_args(words.split()))
    out = tmp_path / "bench.json"
    assert ask(f"--what routing --model configs/tiny/mixtral.json --tokens 2 --repeats 1 --no-torch --json {out}") == 0
    assert "routing of" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "ceilings", "rows"}
    assert set(found["rows"][0]) == {field.name for field in dataclasses.fields(table.Row)}
    for words, why in {
        "--model qwen3 --width 8": "width: sizes come from --model",
        "--model qwen3 --what scaling": "what: scaling is measured on a CPU",
        "--model nowhere": "'nowhere' is none of mixtral",
        "--model qwen3 --implementation fastest": "'fastest' is no implementation of routed_mlp",
    }.items():
        assert ask(f"--device cpu {words}") == 1
        assert why in capsys.readouterr().err
