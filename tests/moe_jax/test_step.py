"""`step` against `block`: every family, a new token per row over a cache that rows have filled differently."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_models import golden_model, only
from test_config_values import TINY, build

from moe_jax import Model, decoder, engine, generation
from moe_jax import quantize as quantize_model
from moe_jax.attention import Span
from moe_jax.block import RoutingRequest
from moe_jax.block_config import LayerConfig
from moe_jax.cache import KVCache, make_cache
from moe_jax.step import plain_enough
from moe_jax.weights import nested, parameters

ROWS, COLUMNS = 3, 24
LENGTHS = jnp.array([0, 5, 22], jnp.int32)
#: What keeps a family's layers out of `step`.
OTHERS = {
    "deepspeed_moe": "residual experts and a pyramid",
    "flex_olmo": "norms behind the sublayers",
    "granitemoe": "scaled residuals",
    "hunyuan_v1_moe": "norms after the rotation",
    "llama4": "temperatures",
}
DEEPSPEED = dict(mlp_type="standard", num_experts=[0, 4, 0, 4], min_capacity=1)
#: Families as they are and with what their tiny configs leave out.
CALLS = {name: (name, {}) for name in TINY if name not in OTHERS} | {
    "windows by turns, sinks": ("gpt_oss", dict(num_hidden_layers=4, sliding_window=4)),
    "the same window everywhere": ("mixtral", dict(sliding_window=4)),
    "dense and MoE by turns": ("qwen2_moe", dict(decoder_sparse_step=2, num_hidden_layers=4)),
    "DeepSpeed's first choice, learned positions": ("deepspeed_moe", DEEPSPEED),
    "DeepSpeed's two choices, turned by pairs": (
        "deepspeed_moe",
        DEEPSPEED | dict(num_experts_per_tok=2, position_embedding_type="rope", rotate_half=False),
    ),
    "DeepSpeed's three choices, none dropped": (
        "deepspeed_moe",
        dict(mlp_type="standard", num_experts=8, num_experts_per_tok=3, drop_tokens=False),
    ),
    "dense layers first": ("glm4_moe", dict(num_hidden_layers=4, first_k_dense_replace=2)),
}


def draw(architecture, seed=11):
    """Weights of which none is zero or one."""
    rng = np.random.default_rng(seed)

    def array(name, parameter):
        leaf, found = name.rsplit(".", 1)[-1], rng.standard_normal(parameter.shape)
        if "norm" in name:
            return 1 + found / 4
        if "bias" in leaf or leaf in ("sinks", "scale"):
            return found / 4
        return found / np.sqrt(parameter.shape[-1])

    return nested({n: jnp.asarray(array(n, p), jnp.float32) for n, p in parameters(architecture).items()})


def one_token(architecture, weights, ids, entries, real, forced):
    """The stream, the cache and what the routers did, for a token of each row."""
    positions = LENGTHS[:, None]
    span = Span(positions, turn=decoder.make_turn(architecture.block.attention, positions, COLUMNS))
    cache, request = KVCache(entries, LENGTHS), RoutingRequest(real, forced)
    return decoder.decode(architecture, weights, ids, span, cache, request, True, LENGTHS)


def both(architecture, weights, monkeypatch, real=None, forced=None, dtype=jnp.float32):
    """What `step` makes of a token and what `block` does."""
    rng = np.random.default_rng(5)
    cache = make_cache(architecture, ROWS, COLUMNS, dtype).entries
    cache = {name: rng.standard_normal(stack.shape).astype(dtype) for name, stack in cache.items()}
    ids = rng.integers(0, architecture.vocab_size, (ROWS, 1)).astype(np.int32)
    found, used = [], []
    for plain in (plain_enough, lambda *given: False):
        with monkeypatch.context() as patch:
            for name in ("step", "block"):
                run = getattr(decoder, name)
                patch.setattr(decoder, name, lambda *a, name=name, run=run: used.append(name) or run(*a))
            patch.setattr(decoder, "plain_enough", plain)
            run = jax.jit(functools.partial(one_token, architecture))
            found.append(run(weights, ids, cache, real, forced))
    half = used.index("block")
    assert set(used[:half]) == {"step"} and set(used[half:]) == {"block"}
    return found


def assert_equal(got, want, rtol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if np.issubdtype(one.dtype, np.integer):
            np.testing.assert_array_equal(one, other)
        else:
            one, other = np.float32(one), np.float32(other)
            finite = np.isfinite(other)  # a pyramid's logits may not be
            assert finite.any() and np.abs(np.where(finite, one - other, 0)).max() <= rtol * np.abs(other[finite]).max()


#: Dense layers, shared experts and their gate; one norm of all heads, partial rotation, sigmoids; LayerNorm, capacity.
QUICK = ["dense and MoE by turns", "minimax_m2", "DeepSpeed's two choices, turned by pairs"]
LAYER_NORMS = [name for name, (family, _) in CALLS.items() if family in ("deepspeed_moe", "phimoe")]


@pytest.mark.parametrize("name", only(QUICK, CALLS))
def test_step_is_block(name, monkeypatch):
    family, changes = CALLS[name]
    architecture = build(family, **changes).architecture
    assert_equal(*both(architecture, draw(architecture), monkeypatch))


@pytest.mark.parametrize("name", only(["DeepSpeed's first choice, learned positions"], LAYER_NORMS))
def test_in_bfloat16(name, monkeypatch):
    family, changes = CALLS[name]
    architecture = build(family, **changes).architecture
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), draw(architecture))
    assert_equal(*both(architecture, weights, monkeypatch, dtype=jnp.bfloat16), rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 16])
def test_in_int8(group_size, monkeypatch):
    config = build("qwen2_moe")
    model = quantize_model(Model(config, draw(config.architecture)), group_size=group_size)
    assert_equal(*both(config.architecture, model.arrays(), monkeypatch))


@pytest.mark.slow
def test_experts_in_mxfp4(monkeypatch):
    model = golden_model("gpt_oss_mxfp4")
    assert_equal(*both(model.architecture, model.arrays(), monkeypatch))


def test_rows_that_have_ended_and_forced_choices(monkeypatch):
    architecture = build("qwen3_moe", num_hidden_layers=2).architecture
    router, weights = architecture.block.router, draw(architecture)
    rng = np.random.default_rng(3)
    forced = np.argsort(rng.random((len(architecture.moe_layers), ROWS, 1, router.num_experts)))[..., : router.top_k]
    forced[0, 1] = -1  # the router decides
    real = np.array([[True], [True], [False]])
    got, want = both(architecture, weights, monkeypatch, real, forced.astype(np.int32))
    assert_equal(got, want)
    ids = np.asarray(got[2].choices.ids)
    assert (ids[:, 2] == -1).all() and (np.sort(ids[:, 0]) == np.sort(forced[:, 0, 0])).all()


def test_rows_that_have_ended_take_no_place_of_deepspeeds_gate(monkeypatch):
    architecture = build("deepspeed_moe", **DEEPSPEED | dict(num_experts=4, num_hidden_layers=2)).architecture
    got, want = both(architecture, draw(architecture), monkeypatch, np.array([[True], [False], [True]]))
    assert_equal(got, want)
    assert (np.asarray(got[2].choices.ids)[:, 1] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt_oss", "qwen3_moe"])
def test_generation_is_the_same(case, monkeypatch):
    """Prompts of unequal lengths, and the logits of every step."""
    model = golden_model(case)
    mask = np.arange(9) >= np.array([[0], [6], [3]])
    ids = np.random.default_rng(4).integers(0, model.architecture.vocab_size, mask.shape)

    def run(plain):
        logits, sample = [], engine.sample

        def reporting(sampler, row, *rest):
            # not `ordered`, which JAX does not lower where the loop over layers depends on the platform
            jax.debug.callback(lambda row: logits.append(np.asarray(row)), row)
            return sample(sampler, row, *rest)

        engine.prefill.clear_cache()
        engine.decode.clear_cache()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "sample", reporting)
            patch.setattr(decoder, "plain_enough", plain)
            out = generation.generate(model, ids, mask, 6, eos_token_id=(), return_record=True)
            jax.effects_barrier()
        engine.prefill.clear_cache()
        engine.decode.clear_cache()
        return out, np.stack(logits)

    (got, logits), (want, others) = run(plain_enough), run(lambda *given: False)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_allclose(logits, others, atol=2e-5, rtol=0)


def places(architecture):
    """Every layer's place."""
    counts = iter(architecture.expert_counts)
    kinds = tuple(next(counts) if layer.moe else 0 for layer in architecture.layers)
    for segment in decoder.segments(kinds):
        for offset in range(len(segment.experts)):
            yield decoder._place(architecture, kinds, segment, jnp.int32(0), offset)


X, NEW = jax.ShapeDtypeStruct((ROWS, 1, 8), jnp.float32), Span(LENGTHS[:, None])


@pytest.mark.parametrize("name", TINY)
def test_which_families_are_plain_enough(name):
    architecture = build(name).architecture
    found = {plain_enough(architecture.block, X, place, NEW, {}) for place in places(architecture)}
    assert found == {name not in OTHERS}


PLAIN = build("qwen2_moe").architecture.block


@pytest.mark.parametrize(
    "changed",
    [
        dict(x=jax.ShapeDtypeStruct((ROWS, 2, 8), jnp.float32)),
        dict(entries=None),
        dict(span=Span(LENGTHS[:, None], LENGTHS[:, None])),
        dict(span=Span(LENGTHS[:, None], start=0)),
        dict(span=Span(LENGTHS[:, None], bias=jnp.zeros((ROWS, 1, 1, COLUMNS)))),
        dict(place=dict(first=3)),
        dict(varying=dict(temperature=(0.1, 8.0))),
        dict(varying=dict(rotary=jnp.asarray(True))),
        dict(varying=dict(score_divisor=jnp.asarray(2.0))),
        dict(block=dict(residual_scale=0.5)),
        dict(block=dict(skip_attention=False)),
        dict(block=dict(mix="experts_first", shared_gate=False)),
        dict(norm=dict(place="post")),
        dict(norm=dict(place="last")),
        dict(attention=dict(alibi=True)),
        dict(attention=dict(causal=False)),
        dict(attention=dict(clip=4.0)),
        dict(attention=dict(norm_after_rope=True)),
        dict(attention=dict(qk_norm="l2")),
    ],
    ids=str,
)
def test_what_is_not_plain_enough(changed):
    replaced = lambda value, name: dataclasses.replace(value, **changed.get(name, {}))
    norm, attention = replaced(PLAIN.norm, "norm"), replaced(PLAIN.attention, "attention")
    block = dataclasses.replace(PLAIN, norm=norm, attention=attention)
    varying = replaced(decoder.varying((LayerConfig(moe=True),), 0), "varying")
    place = types.SimpleNamespace(**dict(first=None, varying=varying, moe=True) | changed.get("place", {}))
    given = place, changed.get("span", NEW), changed.get("entries", {})
    assert not plain_enough(replaced(block, "block"), changed.get("x", X), *given)
    assert plain_enough(PLAIN, X, dataclasses.replace(next(places(build("qwen2_moe").architecture))), NEW, {})
