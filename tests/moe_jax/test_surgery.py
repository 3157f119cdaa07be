"""Pruned and merged models against the models they were made of: forced routing, NumPy's means, equal experts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from core_models import golden_model, only
from tokenizers import Tokenizer, models, pre_tokenizers

import moe_jax
from moe_jax import ModelConfig, merge, prune
from moe_jax.cli import main
from moe_jax.inspect import usage
from moe_jax.inspect.usage import example
from moe_jax.model import Model, tiny_config
from moe_jax.surgery import loss
from moe_jax.upcycle import tiny_llama

IDS = np.random.default_rng(5).integers(1, 40, 24)
FAMILIES = "mixtral deepseek_v3 kimi_k2 glm4_moe ernie4_5_moe_bias gpt_oss minimax_m2 llama4_text_k2 qwen3_moe".split()
FAMILIES += "granitemoe_tied hunyuan_v1_moe".split()


def tiny(**more) -> Model:
    return Model.initialize(ModelConfig.from_dict(tiny_config().to_dict() | more), seed=1)


@pytest.mark.parametrize("case", only(["gpt_oss"], FAMILIES))
def test_a_pruned_model_is_the_old_one_with_its_choices(case, tmp_path):
    """What the pruned routers choose, forced on the old model, gives the same logits: all its weights are in place."""
    model = golden_model(case)
    keep = model.architecture.expert_counts[0] - model.architecture.block.router.groups
    done = prune(model, usage(model, IDS), keep=keep)
    record = done.model(IDS[None], return_record=True)
    kept = [np.array(layer)[:, 0] for layer in done.groups]
    old = [own[np.asarray(ids)] for own, ids in zip(kept, record.expert_ids, strict=True)]
    want = model(IDS[None], return_record=True, routing=old)
    np.testing.assert_allclose(record.logits, want.logits, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(record.router_logits[0], want.router_logits[0][..., kept[0]], atol=1e-4)
    moe_jax.save_pretrained(done.model, tmp_path)
    again = moe_jax.load_pretrained(tmp_path, dtype="float32")
    assert "num_experts_per_layer" not in again.config.text
    np.testing.assert_array_equal(again(IDS[None]), done.model(IDS[None]))


@pytest.mark.parametrize("case", only(["olmoe"], ["ernie4_5_moe", "olmoe", "minimax_m2"]))
def test_pruned_routers_choose_among_the_kept(case):
    """The first layer's choices are NumPy's on the kept logits; a softmax that is not renormalised sums over them."""
    model = golden_model(case)
    found, router = usage(model, IDS), model.architecture.block.router
    done = prune(model, found, keep=0.5)
    kept = np.array(done.groups[0])[:, 0]
    best = np.argsort(-found.weights[0], kind="stable")[: -(-router.num_experts // 2)]
    assert kept.tolist() == sorted(best.tolist())
    logits = np.asarray(model(IDS[None], return_record=True).router_logits[0][0], np.float64)[:, kept]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = 1 / (1 + np.exp(-logits)) if router.score == "sigmoid" else scores
    bias = np.asarray(model.arrays()["moe"]["selection_bias"])[0, kept] if router.selection_bias else 0
    chosen = np.sort(np.argsort(-(scores + bias), axis=-1)[:, : router.top_k])
    record = done.model(IDS[None], return_record=True)
    np.testing.assert_array_equal(record.expert_ids[0][0], chosen)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    weights = weights / weights.sum(-1, keepdims=True) if router.renormalize else weights
    np.testing.assert_allclose(record.expert_weights[0][0], weights, rtol=1e-4)


@pytest.mark.parametrize("case", only(["mixtral"], ["mixtral", "granitemoe", "llama4", "deepspeed"]))
def test_what_no_token_uses_can_go(case, tmp_path):
    """Layers differ in what they keep; a text that used only that has the logits it had."""
    if case == "deepspeed":
        hub = {"model_type": "deepspeed_moe", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
        hub |= {"num_hidden_layers": 3, "vocab_size": 40, "max_position_embeddings": 64, "hidden_act": "gelu_new"}
        hub |= {"num_experts_per_tok": 2, "num_experts": [8, 0, 6], "drop_tokens": False, "mlp_type": "residual"}
        model = Model.initialize(ModelConfig.from_dict(hub), seed=1)
    else:
        model = (
            tiny(num_local_experts=8)
            if case == "mixtral"
            else golden_model({"granitemoe": "granitemoe_untied"}.get(case, case))
        )
    first = model.architecture.block.router.top_k
    ids = next(IDS[i : i + 3] for i in range(20) if differs(usage(model, IDS[i : i + 3])))
    found = usage(model, ids)
    keep = [max(first, int((count > 0).sum())) for count in found.counts]
    done = prune(model, found, keep, ids=ids)
    assert done.model.architecture.expert_counts == tuple(keep) and done.model.architecture.pyramid
    assert done.after == pytest.approx(done.before, abs=1e-4) and done.before == loss(model, ids)
    np.testing.assert_allclose(done.model(ids[None]), model(ids[None]), atol=1e-4)
    moe_jax.save_pretrained(done.model, tmp_path)
    again = moe_jax.load_pretrained(tmp_path, dtype="float32")
    np.testing.assert_array_equal(again(ids[None]), done.model(ids[None]))
    own = again.config.text.get("num_experts_per_layer", again.config.text.get("num_experts"))
    assert [count for count in own if count] == keep and len(own) == again.config.num_layers
    even = prune(again, usage(again, ids), [first] * len(keep)).model.config.text
    assert "num_experts_per_layer" not in even


def differs(found) -> bool:
    return len({int((count > 0).sum()) for count in found.counts}) > 1


def test_equal_experts_merge_into_one_of_them():
    dense = Model.initialize(tiny_llama(), seed=1)
    model = moe_jax.upcycle(dense, num_experts=6, top_k=2)
    done = merge(model, usage(model, IDS), [2, 5], ids=IDS)
    np.testing.assert_allclose(done.model(IDS[None]), dense(IDS[None]), atol=1e-4)
    assert done.after == pytest.approx(done.before, abs=1e-5)
    assert [sorted(sum(layer, ())) for layer in done.groups] == [list(range(6))] * 2


def test_merged_experts_are_means_by_use():
    model = golden_model("gpt_oss_full")
    found = usage(model, IDS)
    counts = np.array([3, 1, 0, 0])
    found = dataclasses.replace(found, counts=(counts, *found.counts[1:]))
    groups = [[[1, 0], [3, 2]], *[[[0], [3, 1, 2]]] * (len(found.counts) - 1)]
    done = merge(model, found, groups=groups)
    assert done.groups[0] == ((0, 1), (2, 3)) and done.groups[1] == ((0,), (1, 2, 3))
    for name, old in model.arrays()["moe"].items():
        new, old = np.asarray(done.model.arrays()["moe"][name]), np.asarray(old, np.float64)
        np.testing.assert_allclose(new[0, 0], 0.75 * old[0, 0] + 0.25 * old[0, 1], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(new[0, 1], (old[0, 2] + old[0, 3]) / 2, rtol=1e-5, atol=1e-7)  # unused: evenly
        np.testing.assert_array_equal(new[1, 0], old[1, 0])
    assert done.model(IDS[None]).shape == (1, 24, model.architecture.vocab_size)


def test_alike_rows_come_together():
    model = tiny()
    rows = np.random.default_rng(0).normal(size=(2, 32))
    router = np.stack([rows[0], rows[1], rows[0] * 1.1, rows[1] * 0.9]) + 5.0  # 5: what all share does not count
    weights = model.arrays()
    weights["moe"]["router"] = jnp.asarray(np.stack([router, router[::-1]]), jnp.float32)
    model = Model(model.config, weights)
    found = dataclasses.replace(usage(model, IDS), counts=(np.array([9, 8, 1, 2]), np.array([1, 2, 9, 8])))
    assert merge(model, found, keep=2).groups == (((0, 2), (1, 3)), ((0, 2), (1, 3)))
    assert prune(model, dataclasses.replace(found, weights=(np.array([1.0, 4, 4, 2]),) * 2), 2).groups[0] == (
        (1,),
        (2,),
    )


def test_groups_of_a_gate_stay_together():
    model = golden_model("deepseek_v3")  # 8 experts in 2 groups
    found = usage(model, IDS)
    for done in (prune(model, found, keep=0.4), merge(model, found, keep=4)):
        for layer in done.groups:
            assert [expert // 4 for group in layer for expert in group] == sorted(e // 4 for g in layer for e in g)
            assert [group[0] // 4 for group in layer] == [0, 0, 1, 1]
        assert np.isfinite(done.model(IDS[None])).all()
        assert done.model.config.to_dict()["n_routed_experts"] == 4
    layers = len(found.counts)
    with pytest.raises(ValueError, match="cross the gate's groups of 4 experts"):
        merge(model, found, groups=[[[0, 4], [1, 2, 3], [5, 6], [7]]] * layers)
    with pytest.raises(ValueError, match="5 experts in layer . do not fill 2 groups evenly"):
        prune(model, found, keep=5)
    four = golden_model("deepseek_v3_yarn")  # 8 in 4
    with pytest.raises(ValueError, match="4 experts in layer . are one for each group, ranked by its best two"):
        prune(four, usage(four, IDS), keep=4)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (1, "keep: 1 of 4 experts in layer 0, whose tokens take 2"),
        (5, "keep: 5 of 4 experts in layer 0"),
        (0.0, r"keep: 0.0 is no part in \(0, 1\]"),
        (1.5, "keep: 1.5 is no part"),
        (0.25, "keep: 1 of 4 experts"),
        ([3], r"keep: \[3\] does not give each of 2 MoE layers a number"),
        ([3, 2.0], "does not give each of 2 MoE layers a number"),
        ([3, True], "does not give each of 2 MoE layers a number"),
    ],
)
def test_numbers_that_are_refused(keep, message):
    model, found = Model(tiny_config(), {}), example(counts=[[1, 1, 1, 1]] * 2)
    for operate in (prune, merge):
        with pytest.raises(ValueError, match=message):
            operate(model, found, keep)


def test_refusals():
    model = tiny()
    found = usage(model, IDS)
    for given in ({}, {"keep": 2, "groups": [[[0, 1], [2, 3]]] * 2}):
        with pytest.raises(ValueError, match="merge: give keep or groups"):
            merge(model, found, **given)
    for groups, message in (
        ([[[0, 1], [2, 3]]], "groups: of 1 layers; the model has 2"),
        ([[[0, 1], [2, 2]]] * 2, "do not hold each of 4 experts once"),
        ([[[0, 1], [2, 3], []]] * 2, "do not hold each of 4 experts once"),
        ([[[0, 1, 2, 3]]] * 2, "groups: 1 of 4 experts in layer 0"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(model, found, groups=groups)
    with pytest.raises(ValueError, match=r"usage: of layers with \(2,\) experts; the model has \(4, 4\)"):
        prune(model, example(counts=[[1, 1]]), keep=2)
    with pytest.raises(ValueError, match="is quantised; moe_jax.dequantize the model first"):
        prune(moe_jax.quantize(model), found, keep=2)
    biased = golden_model("gpt_oss_full")
    numbers = [3, *[2] * (len(biased.architecture.moe_layers) - 1)]
    with pytest.raises(
        ValueError, match=r"a router with groups or biases has as many experts in each layer, got \[3, 2"
    ):
        prune(biased, usage(biased, IDS), numbers)
    for counts in ([3], [3, 0], [3, "2"], [5, 2]):
        with pytest.raises(ValueError, match="num_experts_per_layer|layers: "):
            ModelConfig.from_dict(tiny_config().to_dict() | {"num_local_experts": 3, "num_experts_per_layer": counts})
    nameless = {
        key: value for key, value in golden_model("granitemoe_tied").config.to_dict().items() if "local" not in key
    }
    unsaid = Model.initialize(ModelConfig.from_dict(nameless))
    with pytest.raises(ValueError, match="the config says its number of experts under none of"):
        prune(unsaid, usage(unsaid, IDS), keep=4)


@pytest.mark.slow
def test_sharded_models_come_back_on_one_device():
    model = tiny()
    sharded, found = moe_jax.shard(model, moe_jax.make_mesh(expert=2)), usage(model, IDS)
    for operate in (prune, merge):
        one, two = operate(model, found, 2), operate(sharded, found, 2)
        assert one.groups == two.groups and two.model.sharding is None
        np.testing.assert_array_equal(one.model(IDS[None]), two.model(IDS[None]))


def test_convert(tmp_path, capsys):
    words = {word: i for i, word in enumerate("the cat sat on a mat".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    moe_jax.save_pretrained(tiny(), tmp_path / "old")
    tokenizer.save(str(tmp_path / "old" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 4)
    given = ["convert", "--model", str(tmp_path / "old"), "--output", str(tmp_path / "new")]
    text = ["--text", str(tmp_path / "text.txt")]
    for how, counts in ((["--prune", "3,2"], (3, 2)), (["--merge", "0.5"], (2, 2)), (["--merge", "3"], (3, 3))):
        assert main([*given, *how, *text]) == 0
        out = capsys.readouterr().out.split()
        assert moe_jax.load_pretrained(tmp_path / "new").architecture.expert_counts == counts
        ids = list(range(6)) * 4
        assert float(out[1]) == pytest.approx(loss(tiny(), ids), abs=1e-3)
        assert float(out[3]) == pytest.approx(loss(moe_jax.load_pretrained(tmp_path / "new"), ids), abs=1e-3)
    for wrong, message in (
        (["--prune", "3"], "text: needed by --prune and --merge"),
        (text, "text: needed by --prune and --merge"),
        (["--prune", "9", *text], "keep: 9 of 4 experts"),
        (["--prune", "3", *text, "--quantize", "int8"], "quantize: not with --prune"),
    ):
        assert main([*given, *wrong]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
