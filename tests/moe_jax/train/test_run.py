"""Whole runs: stopped and gone on with, bit by bit; checkpoints, broken ones too; what is written; what is refused."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from core_models import one_in

import moe_jax
from moe_jax.cli import main
from moe_jax.model import Model
from moe_jax.train import Settings, train
from moe_jax.train.checkpoints import Checkpoints
from moe_jax.train.log import read
from moe_jax.train.run import tiny_byte_model
from moe_jax.train.settings import Mesh
from moe_jax.train.text import byte_tokenizer

# reads that Orbax leaves under way when another one fails find its event loop closed, at any time later
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TEXT = " ".join(f"{n} times {m} is {n * m}." for n in range(1, 40) for m in range(1, 30))


@pytest.fixture(autouse=True)
def nothing_left_under_way():
    """Such reads end with the test that has the filter."""
    yield
    gc.collect()


class Killed(BaseException):
    """As abrupt as it gets without another process."""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def settings_of(corpus, **more):
    data = {"corpus": corpus, "length": 16, "batch_size": 8}
    values = {"model": tiny_byte_model(), "data": data, "steps": 10, "checkpoint_every": 4}
    return Settings.from_dict(values | {"optimizer": {"learning_rate": 1e-2, "warmup": 2}} | more)


def killing(step):
    def watch(line):
        if line["step"] == step:
            raise Killed

    return watch


def weights_of(folder):
    return moe_jax.load_pretrained(folder / "model", dtype="float32").arrays()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_run_that_is_killed_goes_on_bit_by_bit(corpus, tmp_path):
    settings = settings_of(corpus)
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train(settings, tmp_path / "parts", watch=killing(6))
    assert [line["step"] for line in read(tmp_path / "parts/metrics.jsonl")] == list(range(1, 7))
    parts = train(settings, tmp_path / "parts")
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert parts.evaluation.bits_per_byte == whole.evaluation.bits_per_byte
    lines = [read(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert [line["step"] for line in lines[1]] == list(range(1, 11))
    again = train(settings, tmp_path / "parts")  # finished: nothing is left to do
    assert again.evaluation.bits_per_byte == whole.evaluation.bits_per_byte
    with pytest.raises(ValueError, match="seed: not those that the run in .* began with"):
        train(dataclasses.replace(settings, seed=1), tmp_path / "parts")


def test_a_run_goes_on_over_another_mesh(corpus, tmp_path):
    settings = settings_of(corpus)
    train(settings, tmp_path / "one")
    with pytest.raises(Killed):
        train(dataclasses.replace(settings, mesh=Mesh(data=2, expert=2)), tmp_path / "other", watch=killing(6))
    train(dataclasses.replace(settings, mesh=Mesh(data=1, expert=4, model=2)), tmp_path / "other")
    one, other = (weights_of(tmp_path / name) for name in ("one", "other"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_sigterm_saves_and_returns(corpus, tmp_path):
    settings = settings_of(corpus, checkpoint_every=None)
    handler = signal.getsignal(signal.SIGTERM)
    outcome = train(settings, tmp_path, watch=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert not outcome.finished and 1 <= outcome.step < 10
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == list(range(1, outcome.step + 1))
    assert signal.getsignal(signal.SIGTERM) is handler
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [outcome.step]
    assert train(settings, tmp_path).finished


def test_what_is_not_finite_ends_the_run(corpus, tmp_path):
    settings = settings_of(corpus, optimizer={"learning_rate": 1e30, "warmup": 0, "clip": None}, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"step (\d+): loss .*, gradient norm .*") as error:
        train(settings, tmp_path)
    step = int(str(error.value).split(":")[0].removeprefix("step "))
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == list(range(1, step))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert max(checkpoints.steps()) == step - 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of two checkpoints, the settings, and where the largest files of the newer one are."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "table.txt").write_text(TEXT, encoding="utf-8")
    settings = settings_of(str(folder / "table.txt"))
    train(settings, folder / "run")
    return folder, settings


KINDS = ["manifest.ocdbt", "_METADATA", "d/*", "ocdbt.process_0/d/*"]


@pytest.mark.parametrize("pattern", one_in(3, KINDS))
def test_a_truncated_checkpoint_is_passed_over(checkpoint, tmp_path, pattern):
    made, settings = checkpoint
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run/outcome.json").unlink()
    newest = tmp_path / "run/checkpoints/step_10"
    largest = max((newest / "default").glob(pattern), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"checkpoint .*step_10 is not readable, going on from step 8"):
        train(settings, tmp_path / "run")
    assert equal(weights_of(tmp_path / "run"), weights_of(made / "run"))
    assert newest.with_name("step_10.unreadable").is_dir()


def test_no_readable_checkpoint_is_an_error(checkpoint, tmp_path):
    made, settings = checkpoint
    shutil.copytree(made / "run", tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/default/manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(OSError, match=r"checkpoint .*step_10 is not readable.*step_8 is not readable"):
        train(settings, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*")) == ["step_10", "step_8"]


def test_half_written_checkpoints_are_none(checkpoint, tmp_path):
    made, settings = checkpoint
    shutil.copytree(made / "run", tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    (folder / "step_10").rename(folder / "step_10.orbax-checkpoint-tmp-3")
    train(settings, tmp_path / "run")
    assert equal(weights_of(tmp_path / "run"), weights_of(made / "run"))


def test_command_line(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    values = settings_of(corpus, steps=4, evaluate_every=2).to_dict()
    (tmp_path / "small.json").write_text(json.dumps(values), encoding="utf-8")
    assert main(["train", "small.json"]) == 0
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(outcome) == {"bits_per_byte", "trigram", "min_expert_share", "seconds"}
    assert outcome == json.loads((tmp_path / "runs/small/outcome.json").read_text())
    lines = read(tmp_path / "runs/small/metrics.jsonl")
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [2]
    assert (tmp_path / "runs/small/metrics.png").read_bytes().startswith(b"\x89PNG")
    assert main(["train", "small.json", "--steps", "2"]) == 0  # a finished run stays as it is
    assert (tmp_path / "runs/small-2/outcome.json").exists()
    assert main(["train", "small.json", "--output", "runs/small", "--seed", "7"]) == 2
    assert "seed: not those" in capsys.readouterr().err
    assert main(["generate", "3 times", "--model", "runs/small/model", "--max-new-tokens", "4"]) == 0


def test_bytes_are_tokens():
    tokenizer = byte_tokenizer()
    everything = "".join(map(chr, [*range(1, 128), 233, 0x20AC, 0x1F600]))
    assert tokenizer.encode(everything) == list(everything.encode())
    assert tokenizer.decode(everything.encode()) == everything


BAD = [
    ({"steps": 0}, "steps: 0, expected at least 1"),
    ({"speed": 1}, "speed: unknown; there are: model, data"),
    ({"data": {"corpus": "x", "batch_size": 8, "held_out": 1.5}}, "held_out: 1.5"),
    ({"optimizer": {"rate": 1}}, "optimizer.rate: unknown"),
    ({"optimizer": {"schedule": "square"}}, "schedule: 'square' is not one of"),
    ({"optimizer": {"accumulation": 3}}, "batch_size: 16 windows do not divide into 3 parts"),
    ({"routing": {"balance": -1}}, "balance: -1, expected a number of at least 0"),
    ({"mesh": {"expert": 0}}, "expert: 0, expected at least 1"),
    ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
    ({"model": 3}, "model: 3 is neither"),
    ({"upcycle": {"experts": 4}}, "upcycle: .* expected values of noise, num_experts"),
    ({"data": {"corpus": []}}, r"corpus: \(\), expected a name"),
    ({"data": {"corpus": None}}, "corpus: None, expected a name"),
    ({"optimizer": {"betas": 5}}, "betas: 5, expected two numbers"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_settings_are_checked(change, words):
    values = {"model": "demo", "data": {"corpus": "x"}, "steps": 1}
    assert Settings.from_dict(values).to_dict() == Settings.from_dict(Settings.from_dict(values).to_dict()).to_dict()
    with pytest.raises(ValueError, match=words):
        Settings.from_dict(values | change)


def test_models_that_do_not_fit_the_text(corpus, tmp_path):
    with pytest.raises(ValueError, match="model: a vocabulary of 96, but the tokenizer has 256"):
        train(settings_of(corpus, model=tiny_byte_model() | {"vocab_size": 96}), tmp_path / "a")
    with pytest.raises(ValueError, match="length: 16 tokens, but the model's context is 8"):
        train(settings_of(corpus, model=tiny_byte_model() | {"max_position_embeddings": 8}), tmp_path / "b")


def test_a_checkpoint_is_upcycled_and_trained(corpus, tmp_path):
    dense = {"model_type": "llama"} | {
        k: v for k, v in tiny_byte_model().items() if "expert" not in k and k != "model_type"
    }
    moe_jax.save_pretrained(Model.initialize(moe_jax.ModelConfig.from_dict(dense)), tmp_path / "dense")
    settings = settings_of(corpus, model=str(tmp_path / "dense"), upcycle={"num_experts": 4, "top_k": 2}, steps=3)
    assert train(settings, tmp_path / "run").finished
    assert moe_jax.load_pretrained(tmp_path / "run/model").config.model_type == "mixtral"


@pytest.mark.slow
def test_no_kill_loses_a_checkpoint():
    """Five of the kills of `scripts/kill_training.py`, which by itself makes 200."""
    script = Path(__file__).parents[3] / "scripts" / "kill_training.py"
    command = [sys.executable, str(script), "--kills", "5", "--longest", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 kills, 0 faults"


def test_a_start_that_fails_claims_nothing(corpus, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        train(settings_of("nowhere.txt", steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"held_out: 1e-06 of this text are \d tokens, too few"):
        data = {"corpus": corpus, "length": 16, "batch_size": 8, "held_out": 1e-6}
        train(settings_of(corpus, steps=1, data=data), tmp_path / "run")
    assert train(settings_of(corpus, steps=1), tmp_path / "run").finished


def test_a_run_belongs_to_one_process(corpus, tmp_path):
    settings = settings_of(corpus, steps=2)

    def again(line):
        with pytest.raises(OSError, match="another process is at work on this run"):
            train(settings, tmp_path)

    assert train(settings, tmp_path, watch=again).finished


def test_ids_that_the_model_does_not_have(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(900) % 300)
    with pytest.raises(ValueError, match=r"ids\.npy: ids from \d+ to 299, the model has 256"):
        train(settings_of(str(tmp_path / "ids.npy"), steps=2), tmp_path / "run")


def test_no_memory_is_no_broken_checkpoint(checkpoint, tmp_path, monkeypatch):
    made, settings = checkpoint
    shutil.copytree(made / "run", tmp_path / "run")

    def full(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", full)
    with pytest.raises(MemoryError, match="no room for the checkpoint of step 10"):
        train(settings, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step_10").is_dir()
