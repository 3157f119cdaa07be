"""Benchmarks: their tables have the right fields, and nothing is timed before its result is checked. Not how fast."""

import argparse
import json
import shutil

import numpy as np
import pytest

from moe_jax.benchmarks import block, decode, load, table, timing, torch_baseline
from moe_jax.cli import bench

CEILINGS = timing.Ceilings(copy=10.0, read=20.0, matmul=100.0)
SETTING = timing.Setting("cpu", CEILINGS, repeats=2, torch=False)
SMALL = block.BlockShape(width=16, hidden=8, experts=16, top_k=2)
MODEL = decode.ModelShape(layers=1, width=16, hidden=8, experts=4, top_k=2, vocab=40, heads=2)


class FakeBlock:
    """Stands for transformers' block: gives what it is told to."""

    def __init__(self, output):
        self.output = output

    def tensor(self, array):
        return array

    def __call__(self, implementation, x):
        return _Tensor(self.output(x))


class _Tensor:
    def __init__(self, value):
        self.value = value

    def numpy(self):
        return np.asarray(self.value)


def test_in_turns_alternates_and_warms_up():
    seen = []
    calls = {name: lambda turn, name=name: seen.append((name, turn)) for name in "ab"}
    times = timing.in_turns(calls, repeats=2)
    assert seen == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(times["a"].samples) == 2
    with pytest.raises(ValueError, match="repeats: 0"):
        timing.in_turns(calls, repeats=0)


def test_roofline_takes_the_slower_of_work_and_memory():
    assert CEILINGS.floor(flops=100e9, nbytes=0) == pytest.approx(1.0)
    assert CEILINGS.floor(flops=0, nbytes=40e9) == pytest.approx(2.0)
    assert timing.share(SETTING, 4.0, 0, 40e9) == pytest.approx(0.5)


def test_ceilings_are_measured():
    found = timing.measure_ceilings(repeats=1, megabytes=1, size=32)
    assert min(found.copy, found.read, found.matmul) > 0


def test_block_rows():
    rows = block.run(SMALL, (1, 3), SETTING)
    assert [row.shape for row in rows] == [f"G={g} D=16 F=8 E=16 k=2" for g in (1, 3)]
    for row in rows:
        assert (row.case, row.implementation, row.device, row.dtype) == ("block", "moe_jax", "cpu", "float32")
        assert row.steady_ms > 0 and row.compile_ms > 0 and row.roofline > 0
        assert row.baseline is None and row.speedup is None
        assert 2 <= row.values["active experts"] <= 6


def test_block_compares_with_the_fastest_that_agrees(monkeypatch):
    weights = block._make(SMALL)
    right = lambda x: block._ours(SMALL.top_k)(x, weights.router, weights.experts)
    rows = block._at(SMALL, 3, weights, FakeBlock(right), SETTING)
    assert [row.implementation for row in rows] == [
        "moe_jax",
        *(f"transformers {n}" for n in torch_baseline.IMPLEMENTATIONS),
    ]
    fastest = min(rows[1:], key=lambda row: row.steady_ms)
    assert rows[0].baseline == fastest.implementation and rows[0].speedup > 0 and rows[0].bar == 1.0
    monkeypatch.setattr(block, "in_turns", lambda *a: pytest.fail("timed before it was checked"))
    with pytest.raises(ValueError, match=r"transformers eager: differs by"):
        block._at(SMALL, 3, weights, FakeBlock(lambda x: 1.01 * right(x)), SETTING)


def test_block_checks_ours_before_timing(monkeypatch):
    monkeypatch.setattr(block, "in_turns", lambda *a: pytest.fail("timed before it was checked"))
    monkeypatch.setattr(block, "_ours", lambda k: lambda x, router, experts: x)
    with pytest.raises(ValueError, match="moe_jax: differs by"):
        block.run(SMALL, (3,), SETTING)


def test_scaling_rows_compare_with_eight_experts(monkeypatch):
    rows = block.scaling(SMALL, (3,), SETTING)
    assert [row.shape for row in rows] == ["G=3 D=16 F=8 E=8 k=2", "G=3 D=16 F=8 E=16 k=2"]
    assert rows[0].speedup is None and rows[1].baseline == "moe_jax E=8"
    assert rows[1].bar == pytest.approx(1 / 1.5)
    monkeypatch.setattr(block, "in_turns", lambda *a: pytest.fail("timed before it was checked"))
    monkeypatch.setattr(block, "check_close", lambda *a: (_ for _ in ()).throw(ValueError("checked")))
    with pytest.raises(ValueError, match="checked"):
        block.scaling(SMALL, (3,), SETTING)


def test_shapes_that_do_not_work_are_refused():
    with pytest.raises(ValueError, match="more choices than experts"):
        block.BlockShape(experts=4, top_k=8)
    with pytest.raises(ValueError, match="1 new tokens"):
        decode.run(MODEL, (1,), decode.Run(prompt=4, new=1), SETTING)


def test_decode_rows():
    (row,) = decode.run(MODEL, (2,), decode.Run(prompt=4, new=4), SETTING)
    assert row.case == "decode" and row.shape.startswith("B=2 L=1 D=16") and row.shape.endswith("prompt 4 new 4")
    assert row.values["tokens/s"] > 0 and row.values["prefill and first token, ms"] > 0
    assert row.compile_ms is not None and row.steady_ms is not None


def test_decode_checks_the_peer_before_timing(monkeypatch):
    class Peer:
        def logits(self, ids):
            return np.ones((*ids.shape, MODEL.vocab))

    monkeypatch.setattr(decode, "in_turns", lambda *a, **k: pytest.fail("timed before it was checked"))
    model = decode.Model.initialize(decode.ModelConfig.from_dict(MODEL.hub(32)))
    with pytest.raises(ValueError, match="logits of the prompt: differs"):
        decode._at(MODEL, 1, decode.Run(prompt=4, new=2), model, Peer(), SETTING)


def test_load_rows_and_peak(tmp_path, monkeypatch):
    (row,) = load.run(50_000, timing.Setting("cpu", CEILINGS, repeats=1, torch=False), MODEL, "bfloat16")
    assert row.dtype == "bfloat16 on disk, float32 loaded" and row.steady_ms > 0
    assert row.values["peak, GB"] > 0 and row.values["model, GB"] == pytest.approx(1e-4, rel=0.2)
    made = load.make_checkpoint(tmp_path, MODEL, 50_000, "float32")
    monkeypatch.setattr(load, "_load", lambda *a: {"seconds": 0.1, "peak_bytes": 4 * made.parameters, "sums": []})
    (row,) = load.peak(50_000, SETTING, MODEL)
    assert row.note.endswith("; kept") and row.values["asked for at most, GB"] > row.values["peak, GB"]


def test_load_notices_other_weights_and_failures(tmp_path):
    made = load.make_checkpoint(tmp_path, MODEL, 1000, "float32")
    wrong = load.MadeUp(made.nbytes, made.parameters, made.largest, (1.0, 2.0))
    with pytest.raises(ValueError, match="loaded weights sum to"):
        load._load("moe_jax", str(tmp_path), wrong)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RuntimeError, match="loading with moe_jax failed"):
        load._load("moe_jax", str(tmp_path), made)


def test_checkpoint_is_refused_where_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
    with pytest.raises(OSError, match="do not fit"):
        load.make_checkpoint(tmp_path, MODEL, 1000, "float32")


def test_checkpoint_shards_hold_no_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_SHARD", 10_000)
    load.make_checkpoint(tmp_path, MODEL, 1000, "float32")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = load.Path(tmp_path)
    weights = decode.Model(*_loaded(model)).arrays()
    assert all(np.asarray(array).all() for array in weights["moe"].values())


def _loaded(folder):
    from moe_jax import load_pretrained

    model = load_pretrained(folder)
    return model.config, model.arrays()


def test_absent_torch_is_said(monkeypatch):
    monkeypatch.setattr(torch_baseline.importlib.util, "find_spec", lambda name: None)
    assert torch_baseline.missing() == "torch and transformers: not installed"
    (row,) = block.run(SMALL, (1,), timing.Setting("cpu", CEILINGS, repeats=1, torch=True))
    assert row.note == "torch and transformers: not installed" and row.baseline is None


def test_command_writes_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda: CEILINGS)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "bench.json"
    words = "--what block --tokens 2 --width 16 --hidden 8 --experts 4 --top-k 2 --repeats 1 --no-torch --json"
    assert bench.run(parser.parse_args([*words.split(), str(out)])) == 0
    header = capsys.readouterr().out
    for column in ("device", "dtype", "shape", "compile, ms", "steady, ms", "of roofline", "baseline"):
        assert f"| {column} " in header
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "ceilings", "rows"}
    assert found["machine"]["device"] == "cpu" and found["ceilings"]["matmul"] == 100.0
    assert set(found["rows"][0]) == {field.name for field in table.dataclasses.fields(table.Row)}
    assert bench.run(parser.parse_args("--what block --experts 2 --top-k 4".split())) == 1
    assert "more choices than experts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--tokens", "0"])


def test_summary_names_what_is_short():
    row = table.Row(case="block", implementation="moe_jax", device="cpu", dtype="float32", shape="G=1", speedup=0.5)
    short = table.dataclasses.replace(row, bar=1.0)
    assert table.summary([row]) == ""
    assert table.summary([short]) == "Reached 0 of 1 asked for. Short: block (G=1): 0.50 of 1.00."
