"""TPU kernels by the real compiler, where libtpu is installed: some of what scripts/compile_for_tpu.py compiles."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from compile_for_tpu import MODELS, expert_mlp, ranks, routing, table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
#: A generation for each model, so that each has some; v7 as far as libtpu knows it.
TARGETS = dict(zip(MODELS, ("v5e", "v5p", "v6e", "v5e", "v6e"), strict=True))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_the_expert_mlp(name, tokens, kind):
    made = expert_mlp(TARGETS[name], MODELS[name], kind, tokens)
    assert not made.error and 0 < made.vmem <= 0.75 * (64 << 20 if TARGETS[name] == "v5p" else 128 << 20)
    assert made.cut.startswith("in place") == (tokens <= 64)


@pytest.mark.parametrize("generation", ["v5p", "v7"])
def test_every_kernel_on_other_generations(generation):
    made = expert_mlp(generation, MODELS["qwen3"], "bfloat16", 8), expert_mlp(generation, MODELS["qwen3"], "int8", 8192)
    made += routing(generation, MODELS["qwen3"], 8192), ranks(generation, MODELS["qwen3"], 8192)
    assert not any(one.error for one in made) and all(one.vmem for one in made)


@pytest.mark.parametrize("name", MODELS)
def test_routing_and_ranks(name):
    for tokens in (1, 1024):
        made = routing(TARGETS[name], MODELS[name], tokens), ranks(TARGETS[name], MODELS[name], tokens)
        assert all(one is None or not one.error and 0 < one.vmem < 16 << 20 for one in made)
        assert (made[1] is None) == (tokens == 1)


def test_the_table():
    model = MODELS["olmoe"]
    found = {("routing", "olmoe", "float32", tokens, "v5e"): routing("v5e", model, tokens) for tokens in (1, 1024)}
    lines = table("routing", found, ["v5e"]).splitlines()
    assert lines[0] == "| routing | tokens | v5e |" and lines[2].startswith("| olmoe, float32 | 1 | ")
    assert all(line.endswith(("KiB |", "MiB |")) for line in lines[2:])
