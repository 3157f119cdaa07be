"""What compiled programs of sharded models hold: no expert of another device, no copy of an own one."""

import re

import jax
import pytest
from compiled_program import materialised

import moe_jax
from moe_jax import ModelConfig, engine, generation, make_mesh
from moe_jax.model import Model, tiny_config

_HIDDEN, _EXPERTS = 256, 16


@pytest.fixture(scope="module")
def run():
    """A step of one row on each of eight devices, whose experts are larger than anything else."""
    hub = tiny_config().to_dict() | {
        "num_hidden_layers": 6,
        "intermediate_size": _HIDDEN,
        "num_local_experts": _EXPERTS,
    }
    model = Model.initialize(ModelConfig.from_dict(hub), mesh=make_mesh(expert=8))
    run = generation._Run(model, [[1, 2, 3]] * 8, None, 4, ())
    run.start()
    return run


def compiled(run):
    leaves, tree = jax.tree.flatten((run.weights, run.state, run.request))

    def step(leaves):
        return engine.step.__wrapped__(run.model.architecture, *jax.tree.unflatten(tree, leaves), sharding=run.sharding)

    return jax.jit(step).lower(leaves).compile()


@pytest.fixture(scope="module")
def program(run):
    return compiled(run)


def test_no_expert_crosses_the_wire(program):
    width, text = 32, program.as_text()
    moved = re.findall(r"= \(?(.*?)\)? (all-[\w\-]+|reduce-scatter|collective-permute)[\w\-]*\(", text)
    assert moved
    for shapes, kind in moved:
        for sizes in re.findall(r"\w+\[([\d,]*)\]", shapes):
            count = 1
            for size in filter(None, sizes.split(",")):
                count *= int(size)
            assert count < _HIDDEN * width, f"{kind} {shapes}"


def test_each_device_holds_its_experts_and_little_else(run, program):
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(run.weights))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(run.weights))
    experts = sum(run.weights["moe"][name].nbytes for name in ("gate", "up", "down"))
    assert own == whole - experts * 7 // 8
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < experts / 8 / 10
    assert memory.argument_size_in_bytes < 1.2 * own


def test_one_token_leaves_the_experts_in_their_stack(run):
    """One row on one of two devices: no operation writes an array as large as an expert."""
    model = moe_jax.shard(moe_jax.gather(run.model), make_mesh(expert=2))
    one = generation._Run(model, [[1, 2, 3]], None, 4, ())
    one.start()
    assert materialised(compiled(one).as_text(), _HIDDEN * 32) == []
