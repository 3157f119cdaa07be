"""Reading compiled programs: what only moves weights is found, what reads them in passing is not."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.benchmarks.hlo import parse, weight_movements
from pallas_kernels.quantized import quantize

STACK = jnp.ones((4, 96, 64))
LAYER = 96 * 64 * 4

#: A GPU program's loop body, shortened: a layer copied by an asynchronous fusion, a product that reads it, a reduction.
GPU = """HloModule jit__decode, is_scheduled=true

%fused_dynamic_slice.3.clone (param_0.516: bf16[16,16,128,2048], param_1.550: s32[]) -> bf16[1,16,128,2048] {
  %param_0.516 = bf16[16,16,128,2048]{3,2,1,0} parameter(0), metadata={scheduling_name="param_0.516"}
  %param_1.550 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dynamic_slice.65.2 = bf16[1,16,128,2048]{3,2,1,0} dynamic-slice(%param_0.516, %param_1.550, %zero, %zero, %zero), dynamic_slice_sizes={1,16,128,2048}, metadata={op_name="jit(_decode)/while/body/attention/dynamic_slice"}
}

%add (lhs: f32[], rhs: f32[]) -> f32[] {
  %lhs = f32[] parameter(0)
  %rhs = f32[] parameter(1)
  ROOT %sum = f32[] add(%lhs, %rhs)
}

%fused_reduce (param_0: bf16[16,16,128,2048]) -> f32[16,16,128] {
  %param_0 = bf16[16,16,128,2048]{3,2,1,0} parameter(0)
  %wide = f32[16,16,128,2048]{3,2,1,0} convert(%param_0)
  %none = f32[] constant(0)
  ROOT %reduced = f32[16,16,128]{2,1,0} reduce(%wide, %none), dimensions={3}, to_apply=%add
}

%fused_dequantise (param_0: s8[64,2048], param_1: f32[64]) -> bf16[64,2048] {
  %param_0.1 = s8[64,2048]{1,0} parameter(0)
  %wide.1 = f32[64,2048]{1,0} convert(%param_0.1)
  %param_1.1 = f32[64]{0} parameter(1)
  %scale = f32[64,2048]{1,0} broadcast(%param_1.1), dimensions={0}
  %product = f32[64,2048]{1,0} multiply(%wide.1, %scale)
  ROOT %narrow = bf16[64,2048]{1,0} convert(%product)
}

ENTRY %main (w: bf16[16,16,128,2048], i: s32[], q: s8[64,2048], s: f32[64]) -> f32[16,16,128] {
  %w = bf16[16,16,128,2048]{3,2,1,0} parameter(0), metadata={op_name="weights[\\'attention\\'][\\'k\\']"}
  %i = s32[] parameter(1)
  %q = s8[64,2048]{1,0} parameter(2)
  %s = f32[64]{0} parameter(3)
  %fusion-start.4 = ((bf16[16,16,128,2048]{3,2,1,0}, s32[]), bf16[1,16,128,2048]{3,2,1,0}, u32[]) fusion-start(%w, %i), kind=kLoop, calls=%fused_dynamic_slice.3.clone, metadata={op_name="jit(_decode)/while/body/attention/dynamic_slice"}
  %fusion-done.4 = bf16[1,16,128,2048]{3,2,1,0} fusion-done(%fusion-start.4)
  %copy-start = (s8[64,2048]{0,1}, s8[64,2048]{1,0}, u32[]) copy-start(%q)
  %copy-done = s8[64,2048]{0,1} copy-done(%copy-start)
  %dequantised = bf16[64,2048]{1,0} fusion(%q, %s), kind=kLoop, calls=%fused_dequantise
  ROOT %input_reduce_fusion = f32[16,16,128]{2,1,0} fusion(%w), kind=kInput, calls=%fused_reduce
}
"""  # noqa: E501


def _text(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_gpu_programs():
    found = weight_movements(GPU, 1000)
    assert [(m.name, m.kind, m.source, m.nbytes) for m in found] == [
        ("fusion-start.4", "dynamic-slice", "weights['attention']['k']", 16 * 128 * 2048 * 2),
        ("copy-start", "copy", "q", 64 * 2048),
        ("dequantised", "dequantisation", "q", 64 * 2048 * 2),
    ]
    assert str(found[0]).startswith(
        "fusion-start.4: dynamic-slice of weights['attention']['k'] to bf16[1,16,128,2048], 8.39 MB"
    )
    assert weight_movements(GPU, 16 * 128 * 2048 * 2 + 1) == []


@pytest.mark.parametrize(
    ("kind", "move"),
    [
        ("dynamic-slice", lambda w, i: jax.lax.dynamic_index_in_dim(w, i)),
        ("copy", lambda w, i: w[1].T),
        ("convert", lambda w, i: w[1:3].astype(jnp.bfloat16)),
    ],
)
def test_plain_movements_on_a_cpu(kind, move):
    found = weight_movements(_text(move, STACK, 1), LAYER)
    assert [m.kind for m in found] == [kind] and found[0].nbytes >= LAYER


def test_movements_in_a_loop_name_the_argument():
    def last(x, weights):
        return jax.lax.fori_loop(0, 4, lambda i, y: jnp.tanh(jnp.sort(weights["k"][i], 0).T @ y), x)

    found = weight_movements(_text(last, jnp.ones((64, 3)), {"k": jnp.ones((4, 64, 64)), "q": STACK}), 64 * 64 * 4)
    assert "weights['k']" in {m.source for m in found} and "weights['q']" not in {m.source for m in found}


def test_int8_that_is_widened_is_found():
    small = quantize(STACK)
    widened = _text(lambda w: w.dequantize(), small)
    assert [m.kind for m in weight_movements(widened, STACK.nbytes)] == ["dequantisation"]


def test_arithmetic_is_no_movement():
    text = _text(lambda w, x: (w * 2 + 1, jnp.tanh(w[0]) @ x), STACK, jnp.ones((64, 3)))
    assert weight_movements(text, LAYER) == []


def test_programs_are_read_whole():
    program = parse(GPU)
    assert program.inside == {"fused_dynamic_slice.3.clone", "fused_reduce", "fused_dequantise", "add"}
    fusion = program.computations["main"]["input_reduce_fusion"]
    assert fusion.root and [i.opcode for i in program.within(fusion)] == ["convert", "reduce"]
    assert program.computations["main"]["w"].op_name == "weights[\\'attention\\'][\\'k\\']"
