"""The layer loop over patterns of layers: few bodies whatever the depth, settings looked up, experts left in place."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from test_config_values import build

from moe_jax import Model, decoder, engine, generation
from moe_jax import model as model_module
from moe_jax.block_config import LayerConfig
from moe_jax.decoder import Segment, segments, varying
from moe_jax.weights import nested, parameters

PATTERNS = {
    "all alike": ("mixtral", lambda n: {}),
    "dense, then MoE": ("deepseek_v3", lambda n: {"first_k_dense_replace": 2}),
    "dense and MoE by turns": ("llama4", lambda n: {}),
    "every third": ("qwen2_moe", lambda n: {"decoder_sparse_step": 3}),
    "alternating windows": ("gpt_oss", lambda n: {"layer_types": ["sliding_attention", "full_attention"] * (n // 2)}),
}


def _bodies(name, layers, changes, monkeypatch):
    """How often a block's body is traced in one forward pass, as (MoE, dense)."""
    architecture = build(name, num_hidden_layers=layers, **changes).architecture
    table = parameters(architecture)
    made = nested({n: jax.ShapeDtypeStruct(p.shape, jnp.float32) for n, p in table.items()})
    seen, block = [], decoder.block
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "block", lambda *a: seen.append(a[3].moe) or block(*a))
        run = model_module._forward.__wrapped__
        ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
        jax.eval_shape(lambda w: run(architecture, None, False, None, w, ids, mask, None)[0], made)
    return seen.count(True), seen.count(False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_traced_bodies_do_not_grow_with_depth(pattern, monkeypatch):
    name, changes = PATTERNS[pattern]
    few, many = (_bodies(name, layers, changes(layers), monkeypatch) for layers in (6, 24))
    assert few == many and 1 <= sum(many) <= 6  # a loop may trace its body twice to settle types


def test_segments_take_the_longest_repetition():
    F, T = False, True
    assert segments((F, F, T) * 4) == (Segment(0, (F, F, T), 4),)
    assert segments((F, T, T, F, T, T, F)) == (Segment(0, (F, T, T), 2), Segment(6, (F,), 1))
    assert segments((T,)) == (Segment(0, (T,), 1),)
    assert segments((F, F, F, T, T)) == (Segment(0, (F,), 3), Segment(3, (T,), 2))


def test_settings_that_agree_stay_plain_and_others_are_looked_up():
    alike = varying((LayerConfig(moe=True, window=4),) * 3, jnp.asarray(1))
    assert (alike.window, alike.chunk, alike.rotary, alike.temperature) == (4, None, True, None)
    layers = (
        LayerConfig(moe=True, window=4, chunk=8),
        LayerConfig(moe=True, rotary=False, temperature=(0.5, 16.0)),
        LayerConfig(moe=False, window=6),
    )
    for index, layer in enumerate(layers):
        found = jax.jit(lambda i: (lambda v: (v.window, v.chunk, v.rotary, v.temperature))(varying(layers, i)))(index)
        window, chunk, rotary, temperature = found
        assert window == (layer.window or 2**30) and chunk == (layer.chunk or 2**30) and bool(rotary) == layer.rotary
        assert [float(t) for t in temperature] == list(layer.temperature or (0.0, 1.0))


def _materialised(text):
    """Shape and operation of each array that a compiled program makes; what fusions hold inside is never stored."""
    inside = set(re.findall(r"calls=%([\w.\-]+)", text))
    for computation in re.split(r"\n(?=(?:ENTRY )?%)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", computation)
        if name and name[1] not in inside:
            for shape, operation in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", computation):
                yield tuple(int(n) for n in shape.split(",")), operation


def test_reading_a_program_finds_copies():
    """The reader that the next test relies on: a layer sliced out of its stack shows up."""
    stack = jnp.zeros((3, 4, 88, 64))
    sliced = jax.jit(lambda w, i: jnp.einsum("efd,xd->exf", jnp.sort(w[i], axis=0), jnp.ones((2, 64))))
    assert any(shape == (4, 88, 64) for shape, _ in _materialised(sliced.lower(stack, 1).compile().as_text()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"intermediate_size": 88}),
        ("deepseek_v3", {"moe_intermediate_size": 88, "n_shared_experts": 2, "intermediate_size": 40}),
        ("qwen2_moe", {"moe_intermediate_size": 88, "decoder_sparse_step": 2, "intermediate_size": 40}),
        ("deepspeed_moe", {"mlp_type": "standard", "num_experts": 4, "hidden_size": 64, "intermediate_size": 88}),
    ],
)
def test_compiled_decode_step_never_moves_experts(name, changes):
    """For layers all alike, in runs and by turns: no operation makes one expert, a layer's experts, or their stack."""
    config = build(name, **changes, num_hidden_layers=6, vocab_size=50)
    table = parameters(config.architecture)
    model = Model(config, nested({n: jnp.asarray(np.zeros(p.shape, np.float32)) for n, p in table.items()}))
    run = generation._Run(model, [[1, 2, 3]], None, 4, ())
    # Placeholders go into the dataclasses, which their annotations do not allow.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        state = jax.eval_shape(lambda: run.start() or run.state)
        program = engine.decode.lower(model.architecture, run.weights, state, run.request, 4).compile()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    made = list(_materialised(program.as_text()))
    assert len(made) > 100
    expert = {(64, 88), (88, 64)}
    moved = {pair for pair in made if pair[0][-2:] in expert}
    assert {op for _, op in moved} - {"bitcast"} == {"parameter", "get-tuple-element"}
