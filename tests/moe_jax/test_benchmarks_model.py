"""Benchmarks of whole models on a CPU: what is counted, that first tokens are checked, what the command prints."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax import Model, ModelConfig
from moe_jax.benchmarks import device_model, model_run, models, table, timing, work
from moe_jax.cli import bench
from moe_jax.model import tiny_config

CPU = jax.devices("cpu")[0]
CEILINGS = timing.Ceilings(copy=10.0, read=20.0, matmul=100.0)
#: The tiny Mixtral: L=2, D=32, F=48, N=4, K=2, H=8, E=4, k=2, V=96; elements outside the experts and the embedding.
ATTENTION = 32 * 8 * (4 + 2 + 2 + 4)
EXPERT = 3 * 32 * 48
PLAIN = 2 * (ATTENTION + 2 * 32 + 4 * 32) + 32 + 96 * 32


def test_models_by_name_and_depth():
    assert len(models.find_config("qwen3").architecture.layers) == 48
    cut = models.find_config("gptoss", layers=3).architecture
    assert [layer.window for layer in cut.layers] == [128, None, 128]
    nested = models.find_config("configs/tiny/llama4.json", layers=2)
    assert len(nested.architecture.layers) == 2
    with pytest.raises(ValueError, match="layers: olmoe has 16, not 17"):
        models.find_config("olmoe", layers=17)
    with pytest.raises(ValueError, match="'nowhere' is none of olmoe, qwen3, gptoss, mixtral"):
        models.find_config("nowhere")
    with pytest.raises(ValueError, match="quantize: 'int4'"):
        models.make(tiny_config(), "float32", "int4")


def test_weights_and_steps():
    model = Model.initialize(tiny_config())
    found = work.weights_of(model)
    assert found.expert == 4 * EXPERT and found.plain == 4 * PLAIN
    assert found.total == 4 * (PLAIN + 96 * 32 + 2 * 4 * EXPERT)
    column = 2 * 2 * 2 * 8  # layers, keys and values, heads, width
    assert work.step_bytes(model, 3, 10, 5, 6.0) == 4 * (PLAIN + 6 * EXPERT + 3 * (12.5 * column + 32))
    assert work.cache_bytes(model, 3, 10, 5) == pytest.approx(4 * 3 * 32 * column, rel=0.05)


def test_int8_counts_values_and_scales():
    model = models.make(tiny_config(), "bfloat16", "int8")
    assert work.weights_of(model).expert == EXPERT + 4 * (48 + 48 + 32)


def test_mxfp4_counts_words_and_scales():
    config = models.find_config("configs/tiny/gpt_oss.json")
    model = models.make(config, "bfloat16", "mxfp4")
    d, f = model.architecture.block.width, model.architecture.block.experts.hidden
    assert work.weights_of(model).expert == 3 * d * f * (1 / 2 + 1 / 32) + 2 * (2 * f + d)


@pytest.mark.parametrize(
    "name, flag, want",
    [
        ("gptoss", None, "mxfp4"),
        ("gptoss", "mxfp4", "mxfp4"),
        ("gptoss", "int8", "int8"),
        ("gptoss", "none", None),
        ("qwen3", None, None),
        ("qwen3", "mxfp4", "mxfp4"),
        ("deepseek-v3", None, None),
    ],
)
def test_models_are_measured_as_they_are_released(name, flag, want, monkeypatch):
    taken = []
    monkeypatch.setattr(device_model, "run", lambda name, options: taken.append(options.quantized) or [(1, "failed")])
    monkeypatch.setattr(model_run, "ceilings_of", lambda *a: CEILINGS)
    monkeypatch.setattr(model_run, "machine", lambda platform: {})
    rows = []
    monkeypatch.setattr(model_run, "heading", lambda report: rows.extend(report.rows) or "")
    assert model_run.run(device_model.Options(device=CPU), (name,), quantize=flag) == 1
    assert taken == [want] and rows[0].dtype == "bfloat16" + (f", {want} weights" if want else "")


def test_windows_and_tied_tables_are_counted():
    hub = {"sliding_window": 4, "tie_word_embeddings": True}
    model = Model.initialize(ModelConfig.from_dict(tiny_config().to_dict() | hub))
    assert work.weights_of(model).plain == 4 * PLAIN  # the table is the head
    assert work.step_bytes(model, 1, 10, 5, 0.0) == 4 * (PLAIN + 4 * 64 + 32)
    seen = 2 * (1 + 2 + 3 + 4 + 4)
    want = 2 * 5 * 2 * (ATTENTION + 4 * 32 + 2 * EXPERT) + 2 * 4 * 16 * seen + 2 * 96 * 32
    assert work.prefill_flops(model.architecture, 3, 5) == 3 * want


def test_active_parameters_of_real_models():
    """OLMoE has 1.3 billion active parameters, two tables of 0.1 billion among them; Qwen3 3.3, two of 0.3."""
    for name, active in (("olmoe", 1.08e9), ("qwen3", 2.73e9)):
        flops = work.prefill_flops(models.find_config(name).architecture, 1, 64)
        assert flops / (2 * 64) == pytest.approx(active, rel=0.03)


def test_active_experts():
    model = Model.initialize(tiny_config())
    assert work.active_experts(work.recorded(model, np.asarray([[1, 2, 3]]), 4), 4) == 4.0  # two layers, two choices
    assert 4.0 < work.active_experts(work.recorded(model, np.arange(24).reshape(8, 3), 4), 4) <= 8.0


def test_uniform_routing(monkeypatch):
    options = device_model.Options(device=CPU, dtype="float32", batches=(8,), prompt=8, new=6, repeats=1)
    options = dataclasses.replace(options, routing="uniform")
    name, taken = "configs/tiny/deepspeed_moe.json", []
    monkeypatch.setattr(device_model, "uniform_routing", lambda *a: taken.append(work.uniform_routing(*a)) or taken[0])
    (found,) = device_model.run(name, options)
    (given,) = taken
    assert all(layer.shape == (8, 14, 1) and np.bincount(layer.ravel()).min() > 4 for layer in given)
    assert found.active == np.mean([sum(len(np.unique(layer[:, t])) for layer in given) for t in range(8, 13)])
    assert "uniform routing" in device_model.rows(name, options, [found], CEILINGS)[0].shape


def test_rows(monkeypatch):
    peaks = iter((5, 9 * 10**9, 10**10, 10**10, 10**10))
    monkeypatch.setattr(device_model, "_peak", lambda device: next(peaks))
    options = device_model.Options(device=CPU, dtype="float32", batches=(2, 1), prompt=4, new=4, repeats=1)
    cached = jax.config.values["jax_compilation_cache_dir"]
    found = device_model.run("configs/tiny/mixtral.json", options)
    assert jax.config.values["jax_compilation_cache_dir"] == cached
    assert [one.batch for one in found] == [1, 2]
    assert all(min(one.cold, one.warm, one.whole.median) > 0 for one in found)
    first = device_model.rows("mixtral", options, found, CEILINGS)[0]
    step = found[0].steps.median
    assert first.values["by steps"] == pytest.approx(3 / step)
    assert first.steady_ms == pytest.approx(1e3 * step / 3) and first.shape == "B=1 prompt 4 new 4"
    assert first.roofline == pytest.approx(found[0].nbytes / 20e9 / (step / 3))
    assert first.values["peak over"] == pytest.approx(9.0, rel=0.01)
    assert set(first.values) >= {"tokens/s", "first token, ms", "compile from cache, s", "active experts"}


def test_prefill_rows():
    options = device_model.Options(device=CPU, case="prefill", prompt=8, repeats=1, layers=3, quantized="int8")
    one = device_model.Measured(
        batch=2,
        cold=3.0,
        warm=2.0,
        whole=timing.Timing((0.5,)),
        first=timing.Timing((0.5,)),
        steps=None,
        nbytes=0.0,
        flops=1e10,
        active=None,
        peak=None,
        weights=10**9,
        cache=0,
    )
    row, failed = device_model.rows("m", options, [one, (4, "failed: no memory")], CEILINGS)
    assert (row.case, row.model, row.dtype) == ("prefill", "m, 3 layers", "bfloat16, int8 weights")
    assert row.steady_ms == 500 and row.roofline == pytest.approx(0.2) and row.compile_ms == 2500
    assert row.values["tokens/s"] == 32 and row.values["TFLOP"] == 0.01 and "peak memory" in row.note
    assert failed.steady_ms is None and failed.note == "failed: no memory"
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        device_model.Options(device=CPU, new=1)


def test_wrong_first_token_is_no_measurement(monkeypatch):
    model, ids = Model.initialize(tiny_config()), np.asarray([[1, 2, 3]])
    worst = int(np.asarray(model(ids))[0, -1].argmin())
    monkeypatch.setattr(device_model, "generate", lambda *a, **k: np.append(ids, [[worst]], 1))
    monkeypatch.setattr(device_model, "in_turns", lambda *a: pytest.fail("timed before it was checked"))
    monkeypatch.setattr(device_model, "make", lambda *a: model)
    options = device_model.Options(device=CPU, dtype="float32", batches=(1,), prompt=3, case="prefill")
    monkeypatch.setattr(
        device_model.np.random, "default_rng", lambda seed: argparse.Namespace(integers=lambda *a, **k: ids)
    )
    ((batch, note),) = device_model.run("configs/tiny/mixtral.json", options)
    assert batch == 1 and note.startswith("failed: ValueError: wrong first token")


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setattr(model_run, "ceilings_of", lambda *a: CEILINGS)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    ask = lambda words: bench.run(parser.parse_args(words.split()))
    out = tmp_path / "bench.json"
    tiny = "--device cpu --model configs/tiny/olmoe.json --layers 1 --repeats 1 --batch 1 --prompt 8 --quantize int8"
    assert ask(f"--what prefill {tiny} --json {out}") == 0
    printed = capsys.readouterr().out
    assert "| model | dtype | run | tokens/s | ms | of the products' rate |" in printed
    assert "| float32, int8 weights | B=1 prompt 8 |" in printed
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row) == {field.name for field in table.dataclasses.fields(table.Row)}
    for words, why in {
        "--what decode --model qwen3 --width 8": "width: sizes come from --model",
        "--what decode --model nowhere": "'nowhere' is none of olmoe",
        "--what decode --model olmoe --new 1": "at least 2 new tokens",
        "--what prefill --implementation a,b": "implementation: prefill takes one",
        "--what block --model olmoe --quantize int8": "quantize: block runs wide weights",
        "--what block --model olmoe --routing uniform": "routing: block draws its own choices",
    }.items():
        assert ask(f"--device cpu {words}") == 1
        assert why in capsys.readouterr().err
