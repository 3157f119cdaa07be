"""Models out of DeepSpeed's checkpoints: logits, what the config must say, saving, generating; pyramids."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from torch_writer import save

import moe_jax
from moe_jax import Model, ModelConfig, MoEInferenceConfig, block, decoder
from moe_jax.convert.deepspeed import layer_from_state_dict, load_checkpoint, load_layers
from moe_jax.decoder import Segment
from moe_jax.model import _forward

FOLDERS = [GOLDEN / "deepspeed" / f"checkpoint_{kind}" for kind in ("standard", "residual")]


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_golden_logits_and_hidden_states(folder, tmp_path):
    model = load_checkpoint(folder, folder / "config.json")
    with np.load(folder / "expected.npz") as expected:
        record = model(expected["input_ids"], return_record=True)
        np.testing.assert_allclose(record.logits, expected["logits"], atol=5e-5)
        # DeepSpeed's last entry comes before the final norm
        np.testing.assert_allclose(record.hidden_states[:-1], expected["hidden_states"][:-1], atol=5e-5)
        again = reload(model, tmp_path)
        np.testing.assert_array_equal(again(expected["input_ids"], return_record=True).logits, record.logits)
        assert again.architecture == model.architecture


def reload(model, folder):
    moe_jax.save_pretrained(model, folder)
    return moe_jax.load_pretrained(folder)


def test_generation_continues_as_full_passes_do():
    """Without dropping: with it, an expert's capacity depends on how many tokens meet, as upstream."""
    model = load_checkpoint(FOLDERS[0], settings(FOLDERS[0]))
    ids = np.array([[5, 17, 30], [9, 2, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    made = moe_jax.generate(model, ids, mask, max_new_tokens=3)
    row = np.concatenate([[9, 2], made[1, 3:]])
    for length in (2, 3, 4):  # one compiled length
        kept = np.arange(5) < length
        assert int(model((row * kept)[None], kept[None].astype(int))[0, length - 1].argmax()) == row[length]


def test_recorded_choices_can_be_forced():
    model = load_checkpoint(FOLDERS[0], settings(FOLDERS[0]))
    ids, other = np.random.default_rng(0).integers(1, 64, (2, 2, 6))
    made = moe_jax.generate(model, ids, max_new_tokens=3, return_record=True)
    again = moe_jax.generate(model, ids, max_new_tokens=3, return_record=True, routing=made)
    np.testing.assert_array_equal(again.ids, made.ids)
    record = model(other, routing=[layer[:, :6] for layer in made.expert_ids], return_record=True)
    for layer, forced in zip(record.expert_ids, made.expert_ids, strict=True):
        np.testing.assert_array_equal(layer, forced[:, :6])


def test_padding_takes_no_capacity():
    model = load_checkpoint(FOLDERS[1], settings(FOLDERS[1]) | {"eval_capacity_factor": 0.5, "min_capacity": 1})
    ids = np.random.default_rng(0).integers(1, 64, (1, 6))
    plain = model(ids, return_record=True)
    assert (np.stack(plain.expert_ids) < 0).any()  # some choices are dropped
    for side in ((0, 4), (4, 0)):
        padded, mask = np.pad(ids, ((0, 0), side)), np.pad(np.ones_like(ids), ((0, 0), side))
        np.testing.assert_allclose(model(padded, mask)[mask.astype(bool)], plain.logits[0], atol=1e-5)


def test_other_spellings_and_a_layer_config_say_the_same():
    folder, given = FOLDERS[0], settings(FOLDERS[0])
    want = load_checkpoint(folder, given).config
    megatron = {
        "num_attention_heads": 4,
        "num_layers": 4,
        "padded_vocab_size": 96,
        "topk": 1,
        "checkpoint_version": 2.0,
    }
    megatron |= {"moe_eval_capacity_factor": 1.0, "moe_min_capacity": 4, "moe_token_dropping": False}
    assert load_checkpoint(folder, megatron).config == want
    layer = MoEInferenceConfig(
        hidden_size=16, heads=4, moe_experts=4, min_capacity=4, drop_tokens=False, layer_norm_eps=1e-5
    )
    assert load_checkpoint(folder / given["tag"], layer).config == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 32}, "hidden_size: 32 in the config, 16"),
        ({"vocab": 100}, "vocab_size: 100 in the config, 96"),
        ({"layers": 6}, "num_hidden_layers: 6 in the config, 4"),
        ({"experts": 8}, r"num_experts: \[8\] in the config, \[4, 4\]"),
        ({"expert_interval": 1}, "expert_interval: 1 in the config"),
        ({"use_residual": True}, "use_residual: True in the config, False"),
        ({"mlp_type": "residual"}, "mlp_type 'residual' contradicts use_residual False"),
        ({"num_layers": 5}, "num_hidden_layers is 4 and, as 'num_layers', 5"),
        ({"mystery": 1}, "key 'mystery' is not known"),
        ({"gelu": "quick"}, "gelu 'quick' is not one of"),
        ({"heads": 3}, "heads"),
        ({"k": 5}, "top_k: 5"),
        ({"eval_capacity_factor": 0}, "capacity_factor: 0"),
        ({"qkv_rows": "[?]"}, "qkv_rows"),
        ({"checkpoint_version": 0}, "qkv_rows"),
        ({"position_embedding_type": "rope"}, "position_embedding_type: 'rope', but there are learned positions"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_checkpoint(FOLDERS[0], settings(FOLDERS[0]) | change)


def test_a_stack_of_inference_layers(tmp_path):
    with np.load(GOLDEN / "deepspeed" / "moe_inference_layer.npz") as arrays:
        states = [
            {n.split("/", 2)[2]: arrays[n] for n in arrays.files if n.startswith(f"{case}/weights/")}
            for case in ("layer_00", "layer_17")
        ]
        x = arrays["layer_17/x"]
    config = dict(hidden_size=32, intermediate_size=64, heads=4, moe_experts=4, scale_attn_by_inverse_layer_idx=True)
    names = {f"transformer.layers.{i}.{n}": w for i, state in enumerate(states) for n, w in state.items()}
    (tmp_path / "latest").write_text("one")
    (tmp_path / "one").mkdir()
    save(tmp_path / "one" / "mp_rank_00_model_states.pt", {"module": names})
    layers = load_layers(tmp_path, config)
    assert len(layers) == 2
    for index, state in enumerate(states):
        np.testing.assert_array_equal(
            layers[index](x)[0], layer_from_state_dict(config, state, "standard", index)(x)[0]
        )


HUB = {
    "model_type": "deepspeed_moe",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_new",
    "num_experts_per_tok": 2,
    "eval_capacity_factor": 8.0,
}


@pytest.mark.parametrize("kind", ["residual", pytest.param("standard", marks=pytest.mark.slow)])
def test_a_pyramid_equals_its_layers_with_unreachable_experts(kind, tmp_path):
    """Layers of 2 and 4 experts give what layers of 4 do whose further experts no token can choose."""
    counts, hub = [0, 2, 4, 4], HUB | {"num_hidden_layers": 4, "mlp_type": kind}
    pyramid = Model.initialize(ModelConfig.from_dict(hub | {"num_experts": counts}), seed=1)
    uniform = Model.initialize(ModelConfig.from_dict(hub | {"num_experts": [0, 4, 4, 4]}), seed=2)
    weights = pyramid.arrays()
    moe, start = uniform.arrays()["moe"], 0
    for layer, count in enumerate(counts[1:]):
        for name, stack in weights["moe"].items():
            moe[name] = moe[name].at[layer, :count].set(stack[start : start + count])
        moe["router"] = moe["router"].at[layer, count:].set(0.0)
        start += count
    ids = np.random.default_rng(0).integers(0, 40, (2, 6))
    record = pyramid(ids, return_record=True)
    assert [r.shape[-1] for r in record.router_logits] == counts[1:]
    np.testing.assert_array_equal(reload(pyramid, tmp_path)(ids, return_record=True).logits, record.logits)
    want = reference(uniform, weights | {"moe": moe}, counts[1:], ids)
    np.testing.assert_allclose(record.logits, want, atol=2e-5)
    made = moe_jax.generate(pyramid, ids, max_new_tokens=2, return_record=True)
    assert [e.shape for e in made.expert_ids] == [(2, 8, 2)] * 3


def reference(uniform, weights, counts, ids):
    """The uniform model, layer by layer, each with a gate over its first `count` experts only."""
    layer, choose = iter(counts), block.choose

    def limited(config, own, rows, forced, real, axes):
        count = next(layer)
        logits, chosen = choose(config, {"router": own["router"][:count]}, rows, forced, real, axes)
        return jnp.pad(logits, ((0, 0), (0, own["router"].shape[0] - count))), chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "choose", limited)
        patch.setattr(decoder, "segments", lambda kinds: [Segment(i, (kind,), 1) for i, kind in enumerate(kinds)])
        _forward.clear_cache()
        logits = Model(uniform.config, weights)(ids)
    _forward.clear_cache()
    return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": [4, 4]}, "does not give each of 5 layers a whole number"),
        ({"num_experts": [1, 4, 4, 4, 4]}, "layer 0 with 1 experts does not fit the router"),
        ({"num_experts": -1}, r"num_experts \[-1, "),
        ({"mlp_type": "dense"}, "'mlp_type' is 'dense'"),
        ({"drop_policy": "random"}, "'drop_policy' is 'random'"),
    ],
)
def test_hub_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(HUB | {"num_experts": 4} | change)


def test_positions_other_than_learned_ones():
    kinds = ({"position_embedding_type": "alibi"}, {"position_embedding_type": "rope", "rotary_dim": 2})
    for kind in kinds:
        model = Model.initialize(ModelConfig.from_dict(HUB | {"num_experts": 4} | kind))
        assert "positions" not in model.arrays()
        a, b = model([[3, 4, 5, 6]]), model([[4, 3, 5, 6]])
        assert float(abs(a - b)[0, -1].max()) > 1e-4  # the order of tokens counts
