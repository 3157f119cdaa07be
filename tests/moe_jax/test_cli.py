"""The command line, on a tiny model with a tiny tokenizer."""

import json

import pytest
from conftest import GOLDEN
from tokenizers import Tokenizer, models, pre_tokenizers

import moe_jax
from moe_jax.cli import main
from moe_jax.model import Model
from moe_jax.upcycle import tiny_llama

WORDS = "<end> the cat sat on a mat and saw dog".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    moe_jax.save_pretrained(Model.initialize(tiny_llama(), seed=1), path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": template}))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_generate(folder, capsys):
    assert main(["generate", "the cat", "--model", str(folder), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the cat") and "tokens, first after" in err


def test_generate_a_batch(folder, capsys):
    given = ["--model", str(folder), "--max-new-tokens", "3", "--temperature", "0.8", "--seed", "1"]
    assert main(["generate", "the cat", "a dog sat on", *given]) == 0
    out = capsys.readouterr().out
    assert "the cat" in out and "a dog sat on" in out


def test_generate_ids(folder, capsys):
    given = ["--ids", "--model", str(folder), "--max-new-tokens", "3", "--repetition-penalty", "1"]
    assert main(["generate", "1,2", "3,4,5", *given]) == 0
    rows = [[int(i) for i in line.split(",")] for line in capsys.readouterr().out.splitlines()]
    want = moe_jax.generate(moe_jax.load_pretrained(folder), [[3, 4, 5]], max_new_tokens=3)
    assert len(rows) == 2 and rows[1] == want[0, 3:].tolist()


def test_chat(folder, capsys):
    assert main(["chat", "the cat sat", "--model", str(folder), "--max-new-tokens", "3"]) == 0
    assert "3 tokens" in capsys.readouterr().err
    assert main(["chat", "hi", "--model", str(folder), "--max-new-tokens", "-3"]) == 2
    assert "max_new_tokens" in capsys.readouterr().err


def test_score(folder, capsys):
    assert main(["score", "the cat sat on a mat", "--model", str(folder), "--json", "--tokens"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tokens"] == 6 and len(values["log_probabilities"]) == 5
    assert values["log_probability"] == pytest.approx(sum(values["log_probabilities"]), rel=1e-5)
    assert main(["score", "the cat", "--model", str(folder)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_info(folder, capsys):
    assert main(["info", str(folder)]) == 0
    assert "family" in (out := capsys.readouterr().out) and "F32" in out
    assert main(["info", "configs/qwen3-30b-a3b.json", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] == 30_532_122_624 and values["KV bytes per token (bf16)"] == 98304
    assert 3.3e9 < values["active parameters"] < 3.4e9


def test_convert_upcycles(folder, tmp_path, capsys):
    out = str(tmp_path / "moe")
    assert main(["convert", "--model", str(folder), "--upcycle", "3", "--output", out]) == 0
    assert moe_jax.load_pretrained(out).config.model_type == "mixtral"
    assert main(["score", "the cat sat", "--json", "--model", out]) == 0
    assert main(["score", "the cat sat", "--json", "--model", str(folder)]) == 0
    first, second = (json.loads(line)["perplexity"] for line in capsys.readouterr().out.splitlines())
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "neither a folder nor a hub id"),
        (["generate", "x", "--model", "nowhere.gguf"], "nowhere.gguf"),
        (["generate", "x", "--model", "FOLDER", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--model", "FOLDER", "--dtype", "int8"], "dtype"),
        (["generate", "1,x", "--ids", "--model", "FOLDER"], "not token ids"),
        (["score", "--model", "FOLDER"], "give a text or --file"),
        (["info", "tests/golden/hf/switch_transformers/config.json"], "not supported"),
    ],
)
def test_errors_are_one_line(arguments, message, folder, capsys):
    assert main([str(folder) if a == "FOLDER" else a for a in arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"moe-jax {arguments[0]}: ") and message in err


def test_convert_reads_deepspeed_checkpoints(tmp_path, capsys):
    checkpoint, out = GOLDEN / "deepspeed" / "checkpoint_standard", str(tmp_path / "out")
    arguments = ["convert", "--model", str(checkpoint), "--deepspeed", str(checkpoint / "config.json"), "--output", out]
    assert main([*arguments, "--quantize", "int8", "--group-size", "8"]) == 0
    assert main(["info", out]) == 0
    shown = capsys.readouterr().out
    assert "deepspeed_moe" in shown and "I8" in shown


@pytest.mark.parametrize("command", "generate chat score info convert train inspect bench plan".split())
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "example: moe-jax" in capsys.readouterr().out
