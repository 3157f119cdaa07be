"""Statistics of routing against counts made one by one out of records; windows, pyramids, examples, drift."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from core_models import golden_model, only

import moe_jax
from moe_jax import ModelConfig
from moe_jax.inspect import drift, usage
from moe_jax.inspect.usage import example
from moe_jax.model import Model, tiny_config
from moe_jax.upcycle import tiny_llama

IDS = np.random.default_rng(3).integers(0, 40, 27)
PYRAMID = {
    "model_type": "deepspeed_moe",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_new",
    "num_experts_per_tok": 2,
    "num_experts": [0, 4, 3],
    "drop_tokens": False,
}


def model_of(case: str) -> Model:
    if case == "pyramid":
        return Model.initialize(ModelConfig.from_dict(PYRAMID), seed=1)
    return golden_model(case)


def counted(model: Model, ids: np.ndarray, window: int):
    """The same sums, token by token, from records of single windows without padding."""
    experts = model.architecture.expert_counts
    counts, weights, pairs = (
        [np.zeros(shape) for shape in shapes] for shapes in (*[experts] * 2, [(e, e) for e in experts])
    )
    probability, entropy, choices = [np.zeros(e) for e in experts], np.zeros(len(experts)), [[] for _ in experts]
    for first in range(0, len(ids), window):
        record = model(ids[None, first : first + window], return_record=True)
        for layer, logits in enumerate(record.router_logits):
            logits = np.asarray(logits[0], np.float64)
            score = 1 / (1 + np.exp(-logits)) if model.architecture.block.router.score == "sigmoid" else np.exp(logits)
            score /= score.sum(-1, keepdims=True)
            probability[layer] += score.sum(0)
            entropy[layer] -= (score * np.log(score)).sum() / np.log(score.shape[-1])
            for chosen, gates in zip(
                record.expert_ids[layer][0].tolist(), record.expert_weights[layer][0], strict=True
            ):
                choices[layer].append(dict(zip(chosen, np.asarray(gates).tolist(), strict=True)))
                for expert, weight in choices[layer][-1].items():
                    counts[layer][expert] += 1
                    weights[layer][expert] += weight
                    for other in chosen:
                        pairs[layer][expert, other] += 1
    mean = [p / len(ids) for p in probability]
    return counts, weights, pairs, mean, entropy / len(ids), choices


@pytest.mark.parametrize("case", only(["pyramid"], ["mixtral", "pyramid", "deepseek_v3", "llama4_text"]))
def test_sums_are_those_of_single_windows(case):
    model = model_of(case)
    found = usage(model, IDS, window=8, batch=2)
    counts, weights, pairs, probability, entropy, choices = counted(model, IDS, 8)
    assert found.tokens == 27 and found.layers == model.architecture.moe_layers
    assert [c.dtype for c in found.counts] == [np.dtype(np.int64)] * len(counts)
    for layer in range(len(counts)):
        np.testing.assert_array_equal(found.counts[layer], counts[layer])
        np.testing.assert_array_equal(found.co_activation(layer), pairs[layer])
        np.testing.assert_allclose(found.weights[layer], weights[layer], rtol=1e-4)
        np.testing.assert_allclose(found.probability[layer], probability[layer], rtol=1e-4)
        kept = zip(found.expert_ids[layer].tolist(), found.expert_weights[layer].tolist(), strict=True)
        for (ids, gates), want in zip(kept, choices[layer], strict=True):
            assert gates == sorted(gates, reverse=True)
            assert dict(zip(ids, gates, strict=True)) == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(found.router_entropy, entropy, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "window", "batch"), [(17, 8, 2), (1, 8, 4), (27, 8, 1)])
def test_windows_and_batches_change_nothing_but_the_order_of_sums(tokens, window, batch):
    model = model_of("mixtral")
    found = usage(model, IDS[:tokens], window, batch, keep=20)
    want = [model(IDS[None, i : min(i + window, tokens)], return_record=True) for i in range(0, tokens, window)]
    chosen = np.concatenate([record.expert_ids[0][0] for record in want])
    np.testing.assert_array_equal(found.counts[0], np.bincount(chosen.ravel(), minlength=len(found.counts[0])))
    np.testing.assert_array_equal(np.sort(found.expert_ids[0]), chosen[:20])
    np.testing.assert_array_equal(found.ids, IDS[: min(tokens, 20)])
    assert all(np.isclose(p.sum(), 1) for p in found.probability)


def test_dropped_choices_are_no_choices():
    hub = PYRAMID | {"num_experts": [4, 4, 4], "drop_tokens": True, "eval_capacity_factor": 0.5, "min_capacity": 1}
    found = usage(Model.initialize(ModelConfig.from_dict(hub)), IDS, window=27, batch=1)
    assert all(count.max() <= 7 for count in found.counts)  # ceil(27 / 4 * 2 * 0.5)
    assert [int((ids >= 0).sum()) for ids in found.expert_ids] == [int(count.sum()) for count in found.counts]
    assert not found.expert_weights[found.expert_ids < 0].any()


def test_what_is_derived():
    found = example(counts=[[3, 1, 0, 4], [2, 2, 2]])
    np.testing.assert_allclose(found.share[0], [0.375, 0.125, 0, 0.5])
    want = -(0.375 * np.log(0.375) + 0.125 * np.log(0.125) + 0.5 * np.log(0.5)) / np.log(4)
    np.testing.assert_allclose(found.entropy, [want, 1])
    np.testing.assert_allclose(found.imbalance, [2, 1])
    np.testing.assert_allclose(found.least_share, [0, 1])
    assert example(counts=[[5]]).entropy.tolist() == [0]


def test_examples_are_those_of_a_search():
    found = usage(model_of("mixtral"), IDS, window=8)
    for layer, expert in ((0, 1), (1, 0)):
        at = [i for i in range(27) if expert in found.expert_ids[layer, i]]
        tokens = IDS[at].tolist()
        examples = found.examples(layer, expert, n=100, context=3)
        assert {t.token: t.count for t in examples.frequent} == {t: tokens.count(t) for t in tokens}
        assert [t.count for t in examples.frequent] == sorted((t.count for t in examples.frequent), reverse=True)
        for token in examples.typical:
            assert token.lift == pytest.approx(token.count / len(tokens) / (IDS.tolist().count(token.token) / 27))
        gains = [t.count * np.log(t.lift) for t in examples.typical]
        assert gains == sorted(gains, reverse=True)
        assert {c.token for c in examples.contexts} == set(tokens)
        weights = [c.weight for c in examples.contexts]
        assert weights == sorted(weights, reverse=True)
        for c in examples.contexts:
            rank = found.expert_ids[layer, c.position].tolist().index(expert)
            assert c.weight == found.expert_weights[layer, c.position, rank] and IDS[c.position] == c.token
            assert [*c.left, c.token, *c.right] == IDS[max(0, c.position - 3) : c.position + 4].tolist()
        assert len(found.examples(layer, expert, n=2).contexts) == 2
    unused = dataclasses.replace(found, expert_ids=np.zeros_like(found.expert_ids))
    assert unused.examples(0, 1) == type(unused.examples(0, 1))((), (), ())


def test_drift_by_hand():
    one = dataclasses.replace(example(counts=[[2, 2, 0]]), ids=np.arange(2), expert_ids=np.array([[[0, 1], [1, 0]]]))
    two = dataclasses.replace(one, counts=(np.array([2, 0, 2]),), expert_ids=np.array([[[0, 2], [2, 0]]]))
    found = drift(one, two)
    assert found.total_variation.tolist() == [0.5] and found.agreement.tolist() == [0.5]
    # the mean of the two is (1/2, 1/4, 1/4): 1.5 bits, of which one bit lies within each
    np.testing.assert_allclose(found.jensen_shannon, np.sqrt(0.5))
    same = drift(one, one)
    assert (same.total_variation, same.jensen_shannon, same.agreement) == (0, 0, 1)
    with pytest.raises(ValueError, match=r"drift: models with experts \(3,\) and \(2,\)"):
        drift(one, example(counts=[[2, 2]]))
    with pytest.raises(ValueError, match="drift: different texts, of 4 and 4 tokens"):
        drift(one, dataclasses.replace(two, ids=np.array([5, 6])))


def test_refusals():
    tiny = Model.initialize(tiny_config())
    with pytest.raises(ValueError, match="llama model has no MoE layers"):
        usage(Model.initialize(tiny_llama()), [1, 2])
    for ids in ([], [[1, 2]], [0.5]):
        with pytest.raises(ValueError, match="ids: expected integers"):
            usage(tiny, ids)
    with pytest.raises(ValueError, match="96 is outside the vocabulary"):
        usage(tiny, [1, 96])
    for name in ("window", "batch", "keep"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 0"):
            usage(tiny, [1, 2], **{name: 0})
    found = usage(tiny, [1, 2])
    with pytest.raises(ValueError, match="layer: 2 of 2"):
        found.co_activation(2)
    with pytest.raises(ValueError, match="expert: 4 of 4"):
        found.examples(0, 4)
    with pytest.raises(ValueError, match="n: expected an integer of at least 0, got -1"):
        found.examples(0, 0, n=-1)
    weights = tiny.arrays()
    weights["moe"]["router"] = weights["moe"]["router"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="router scores of layer 1 are not finite"):
        usage(Model(tiny.config, weights), [1, 2])


@pytest.mark.slow
def test_sharded_models_count_the_same():
    model = Model.initialize(tiny_config())
    sharded = moe_jax.shard(model, moe_jax.make_mesh(expert=2))
    one, two = usage(model, IDS, window=8), usage(sharded, IDS, window=8)
    np.testing.assert_array_equal(one.counts, two.counts)
    assert drift(one, two).agreement.tolist() == [1, 1]
