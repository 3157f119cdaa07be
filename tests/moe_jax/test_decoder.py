"""Layers share compiled bodies, and no expert is ever sliced out of its stack."""

import jax
import numpy as np
import pytest
from compiled_program import materialised
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import ModelConfig, decoder, engine, generation
from moe_jax.decoder import segments
from moe_jax.model import Model, tiny_config


@given(st.lists(st.booleans(), min_size=1, max_size=24).map(tuple))
@settings(deadline=None, derandomize=True)
def test_segments_cover_all_layers_in_order(kinds):
    found = segments(kinds)
    assert sum((s.experts * s.repeats for s in found), ()) == kinds
    assert [s.start for s in found] == list(np.cumsum([0] + [len(s.experts) * s.repeats for s in found])[:-1])


@pytest.mark.parametrize(
    ("kinds", "bodies"),
    [((True,) * 48, 1), ((False,) * 3 + (True,) * 58, 2), ((False, True) * 24, 2), ((False, False, True) * 10, 3)],
)
def test_bodies_do_not_grow_with_depth(kinds, bodies):
    assert sum(len(s.experts) for s in segments(kinds)) == bodies


@pytest.mark.parametrize("layers", [4, 16])
def test_each_kind_of_layer_is_traced_once(layers, monkeypatch):
    calls, block = [], decoder.block
    monkeypatch.setattr(decoder, "block", lambda *a: calls.append(1) or block(*a))
    hub = tiny_config().to_dict() | {"num_hidden_layers": layers}
    model = Model.initialize(ModelConfig.from_dict(hub))
    jax.eval_shape(lambda: model([[1, 2, 3]]))
    assert len(calls) <= 2  # fori_loop may trace its body twice to settle types


def test_the_decode_step_leaves_the_experts_in_their_stack():
    """One token: no operation of the compiled program writes an array as large as one expert."""
    hub = tiny_config().to_dict() | {"num_hidden_layers": 6, "intermediate_size": 256, "num_local_experts": 8}
    model = Model.initialize(ModelConfig.from_dict(hub))
    run = generation._Run(model, [[1, 2, 3]], None, 4, ())
    run.start()
    leaves, tree = jax.tree.flatten((run.weights, run.state, run.request))
    step = lambda leaves: engine.decode.__wrapped__(model.architecture, *jax.tree.unflatten(tree, leaves), 4)
    text = jax.jit(step).lower(leaves).compile().as_text()
    # The cache's stacks are arrays of the loop, and smaller than an expert.
    assert materialised(text, 256 * 32) == []
