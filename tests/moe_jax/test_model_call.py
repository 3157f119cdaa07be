"""Calling a model: the record's contract, padding, forced routing, and inputs that are refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from core_models import golden_arrays, golden_model, one_in

from moe_jax import Model, ModelConfig, Record
from moe_jax.model import ascending, check_inputs, id_dtype, tiny_config
from moe_jax.weights import flattened, parameters

IDS = np.random.default_rng(3).integers(0, 96, (2, 9))
LEFT = np.array([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])


@functools.cache
def tiny():
    return Model.initialize(tiny_config(), seed=1)


@functools.cache
def recorded():
    return tiny()(IDS, LEFT, return_record=True)


def test_record_shapes_and_dtypes():
    record = recorded()
    assert isinstance(record, Record) and record.logits.shape == (2, 9, 96) and record.logits.dtype == np.float32
    assert record.hidden_states.shape == (3, 2, 9, 32) and record.hidden_states.dtype == np.float32
    for field, shape, dtype in (
        (record.router_logits, (2, 9, 4), np.float32),
        (record.expert_ids, (2, 9, 2), np.int8),
        (record.expert_weights, (2, 9, 2), np.float32),
    ):
        assert isinstance(field, tuple) and [(a.shape, a.dtype) for a in field] == [(shape, dtype)] * 2


def test_record_says_what_the_router_did():
    """Ascending ids of the two largest logits, their softmax over the two, -1 where there is padding."""
    record, real = recorded(), LEFT.astype(bool)
    for logits, ids, weights in zip(record.router_logits, record.expert_ids, record.expert_weights, strict=True):
        assert (np.asarray(ids)[~real] == -1).all()
        logits, ids, weights = (np.asarray(a)[real] for a in (logits, ids, weights))
        np.testing.assert_array_equal(ids, np.sort(np.argsort(-logits, -1)[:, :2], -1))
        powers = np.exp(np.take_along_axis(logits, ids.astype(int), -1).astype(np.float64))
        np.testing.assert_allclose(weights, powers / powers.sum(-1, keepdims=True), rtol=2e-6)


def test_record_holds_embedding_and_final_norm():
    record, arrays, real = recorded(), tiny().arrays(), LEFT.astype(bool)
    np.testing.assert_array_equal(record.hidden_states[0][real], np.asarray(arrays["embedding"])[IDS[real]])
    last = np.asarray(record.hidden_states[-1], np.float64)
    np.testing.assert_allclose(last @ np.asarray(arrays["head"]["kernel"]).T, record.logits, atol=2e-6)
    np.testing.assert_allclose((last**2).mean(-1), 1, rtol=1e-3)  # the scale of a new model's norm is 1


def test_logits_to_keep():
    """The last columns' logits alone; the record's other parts stay whole."""
    kept = tiny()(IDS, LEFT, return_record=True, logits_to_keep=2)
    np.testing.assert_allclose(kept.logits, recorded().logits[:, -2:], rtol=0, atol=5e-7)  # two units in the last place
    assert kept.hidden_states.shape == (3, 2, 9, 32) and kept.expert_ids[0].shape == (2, 9, 2)
    np.testing.assert_array_equal(tiny()(IDS, LEFT, logits_to_keep=2), kept.logits)
    assert tiny()(IDS, logits_to_keep=99).shape == (2, 9, 96)  # as many as there are
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match=f"logits_to_keep: {bad}, expected an integer"):
            tiny()(IDS, logits_to_keep=bad)


def test_return_record_changes_nothing():
    np.testing.assert_allclose(tiny()(IDS, LEFT), recorded().logits, atol=1e-6)


@pytest.mark.parametrize("case", one_in(2, ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "llama_linear"]))
def test_padded_tokens_change_no_other_token(case):
    """Other ids under the mask, and ids that no vocabulary holds, leave every real token's bits alone."""
    model, gold = golden_model(case), golden_arrays(case)
    for way in ("right", "left"):
        ids, mask = gold[f"{way}.input_ids"], gold[f"{way}.attention_mask"]
        run = lambda ids, mask=mask: model(ids, mask, return_record=True).logits
        one = run(ids)
        for logits in (run(np.where(mask, ids, -100)), run(np.where(mask, ids, (ids + 7) % 90))):
            np.testing.assert_array_equal(logits[mask == 1], one[mask == 1])


def test_side_of_the_padding_does_not_matter():
    right_ids = np.concatenate([IDS[1:, 3:], np.zeros((1, 3), int)], 1)
    right = tiny()(np.concatenate([IDS[:1], right_ids]), np.stack([LEFT[0], LEFT[1, ::-1]]))
    np.testing.assert_allclose(right[1, :6], recorded().logits[1, 3:], atol=1e-6)
    np.testing.assert_allclose(right[0], recorded().logits[0], atol=1e-6)


@pytest.mark.parametrize("case", one_in(2, ["phimoe", "deepseek_v3", "llama4_text_k2"]))
def test_forcing_the_own_choice_changes_nothing(case):
    """Also where a router's rule depends on the order of the two, which a record does not keep."""
    model, ids = golden_model(case), golden_arrays(case)["input_ids"]
    record = model(ids, return_record=True)
    again = model(ids, return_record=True, routing=record)
    np.testing.assert_allclose(again.logits, record.logits, atol=1e-6)
    for one, other in zip(again.expert_ids, record.expert_ids, strict=True):
        np.testing.assert_array_equal(one, other)


def test_forced_choices_are_followed_and_weighed_by_the_router():
    rng = np.random.default_rng(0)
    forced = [np.sort(rng.permuted(np.tile(np.arange(4), (2, 9, 1)), axis=-1)[..., :2], -1) for _ in range(2)]
    record = tiny()(IDS, LEFT, return_record=True, routing=forced)
    real = LEFT.astype(bool)
    for want, logits, ids, weights in zip(
        forced, record.router_logits, record.expert_ids, record.expert_weights, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ids)[real], want[real])
        powers = np.exp(np.take_along_axis(np.asarray(logits, np.float64), want, -1))
        np.testing.assert_allclose(np.asarray(weights)[real], (powers / powers.sum(-1, keepdims=True))[real], rtol=2e-6)
    assert np.abs(record.logits - recorded().logits)[real].max() > 1e-2


def test_minus_one_leaves_the_router_free():
    free = [np.full((2, 9, 2), -1)] * 2
    np.testing.assert_allclose(tiny()(IDS, LEFT, routing=free), recorded().logits, atol=1e-6)
    one = [layer.copy() for layer in free]
    one[1][0, 4] = 0, 3  # one token of the last layer
    changed = np.abs(tiny()(IDS, LEFT, routing=one) - recorded().logits).max(-1) > 1e-6
    assert changed[0, 4] == (tuple(recorded().expert_ids[1][0, 4].tolist()) != (0, 3)) and changed.sum() <= 1


def test_dense_models_record_no_routing():
    model, ids = golden_model("llama_linear"), golden_arrays("llama_linear")["input_ids"]
    record = model(ids, return_record=True)
    assert (record.router_logits, record.expert_ids, record.expert_weights) == ((), (), ())
    np.testing.assert_allclose(model(ids, return_record=True, routing=record).logits, record.logits, atol=1e-6)
    with pytest.raises(ValueError, match="expected 0 arrays"):
        model(ids, routing=[np.zeros((2, 17, 2), int)])


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (
            [np.zeros((2, 9, 2), int)],
            r"expected 2 arrays \(one per MoE layer\) of shape \(2, 9, 2\), got \[\(2, 9, 2\)\]",
        ),
        ([np.zeros((2, 9, 3), int)] * 2, r"got \[\(2, 9, 3\), \(2, 9, 3\)\]"),
        ([np.zeros((1, 9, 2), int)] * 2, "expected 2 arrays"),
        ([np.full((2, 9, 2), 4)] * 2, "expert 4 of 4"),
        ([np.zeros((2, 9, 2))] * 2, "expected integers, got float64"),
        ([], "expected 2 arrays"),
    ],
)
def test_routing_that_does_not_fit(routing, words):
    with pytest.raises(ValueError, match=words):
        tiny()(IDS, routing=routing)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[96]], None, "96 is outside the vocabulary of 96"),
        ([[0, -1]], None, "-1 is outside the vocabulary of 96"),
        ([[1.0, 2.0]], None, "expected integers, got float64"),
        ([[True, False]], None, "expected integers, got bool"),
        ([1, 2], None, r"expected a non-empty \[B, T\] array, got shape \(2,\)"),
        ([[]], None, r"got shape \(1, 0\)"),
        ([[1, 2], [3]], None, "rows differ in length; pad them and pass attention_mask"),
        ([[1] * 129], None, "129 tokens exceed the model's context of 128"),
        ([[1, 2]], [[1, 1, 1]], r"shape \(1, 3\), expected that of input_ids, \(1, 2\)"),
        ([[1, 2]], [[2, 1]], "values other than 0 and 1"),
        ([[1, 2]], [[0.5, 1]], "values other than 0 and 1"),
        ([[1], [2]], [[1], [0]], "row 1 has no token"),
    ],
)
def test_inputs_that_do_not_fit(ids, mask, words):
    with pytest.raises(ValueError, match=words):
        check_inputs(tiny().config, ids, mask)


def test_inputs_that_fit():
    """Anything may stand under the mask, and padding does not count towards the context."""
    ids, mask = check_inputs(tiny().config, [[5] * 140], np.array([[0] * 20 + [1] * 120]), 8)
    assert ids.dtype == np.int32 and mask.dtype == bool and (ids[0, :20] == 0).all()
    with pytest.raises(ValueError, match="120 tokens and 9 new ones exceed the model's context of 128"):
        check_inputs(tiny().config, [[5] * 140], np.array([[0] * 20 + [1] * 120]), 9)
    ids, _ = check_inputs(tiny().config, np.array([[3, 2**40]]), np.array([[True, False]]))
    assert ids.tolist() == [[3, 0]]


@pytest.mark.parametrize(("experts", "dtype"), [(1, "int8"), (128, "int8"), (129, "int16"), (512, "int16")])
def test_smallest_type_of_ids(experts, dtype):
    assert np.dtype(id_dtype(experts)).name == dtype
    ids, weights = ascending(jnp.array([[experts - 1, -1]]), jnp.array([[0.25, 0.75]]), experts)
    assert ids.dtype == dtype and ids.tolist() == [[-1, experts - 1]] and weights.tolist() == [[0.75, 0.25]]


def test_initialize_follows_the_table_and_the_seed():
    model = tiny()
    shapes = {name: array.shape for name, array in flattened(model.arrays()).items()}
    assert shapes == {name: p.shape for name, p in parameters(model.architecture).items()}
    same, other = (flattened(Model.initialize(tiny_config(), seed=s, dtype=jnp.bfloat16).arrays()) for s in (1, 2))
    for name, array in flattened(model.arrays()).items():
        assert array.dtype == np.float32 and same[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(array).astype(jnp.bfloat16), same[name])
        assert ("norm" in name) == np.array_equal(same[name], other[name])
    assert np.asarray(model.arrays()["moe"]["down"]).std() == pytest.approx(48**-0.5, rel=0.02)


def test_zero_experts_and_k_above_their_number_never_become_a_model():
    for change in ({"num_local_experts": 0}, {"num_experts_per_tok": 5}):
        with pytest.raises(ValueError, match="experts"):
            Model.initialize(ModelConfig.from_dict(tiny_config().to_dict() | change))
