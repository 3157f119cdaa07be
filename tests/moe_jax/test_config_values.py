"""Values of configs, over all families: files round-trip, odd values give `ValueError`s, nothing can be changed."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
from conftest import golden_cases
from core_models import folder

from moe_jax import ModelConfig
from moe_jax.families import FAMILIES

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = sorted(p.stem for p in (CONFIGS / "tiny").glob("*.json"))
#: Values that no key takes in every family: each is refused, or happens to be a legal value.
ODD = ["x", [[1]], {"a": 1}, -1, 0, 1.5, True, float("inf")]


@functools.cache
def _read(path):
    return json.loads(Path(path).read_text())


def tiny(name):
    """A tiny config to change, and the part of it that describes the text model."""
    values = copy.deepcopy(_read(CONFIGS / "tiny" / f"{name}.json"))
    return values, values.get("text_config", values)


def build(name="mixtral", **changes):
    values, text = tiny(name)
    text.update(changes)
    return ModelConfig.from_dict(values)


FILES = [CONFIGS / "tiny" / f"{name}.json" for name in TINY] + [folder(case) / "config.json" for case in golden_cases()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.parent.name + "-" + p.stem)
def test_files_round_trip(path):
    config = ModelConfig.from_json_file(path)
    assert config.num_layers == config.text["num_hidden_layers"] == len(config.architecture.layers)
    assert config.to_dict() == _read(path)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config) and again.architecture == config.architecture


def test_every_family_has_a_tiny_config():
    assert {tiny(name)[0]["model_type"] for name in TINY} | {"llama4_text"} == set(FAMILIES)


@pytest.mark.parametrize(
    "path",
    [folder("jetmoe") / "config.json", folder("switch_transformers") / "config.json"],
    ids=["jetmoe", "switch_transformers"],
)
def test_files_of_other_families_are_refused(path):
    with pytest.raises(ValueError, match=f"'{_read(path)['model_type']}' is not supported; supported are deepseek_v2,"):
        ModelConfig.from_json_file(path)


@pytest.mark.parametrize("values", [{}, {"model_type": None}, {"model_type": 3}, {"hidden_size": 4}])
def test_model_type_is_needed(values):
    with pytest.raises(ValueError, match="'model_type'"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b""])
def test_unreadable_files(tmp_path, raw):
    (tmp_path / "bad.json").write_bytes(raw)
    with pytest.raises(OSError, match=r"bad\.json: not a JSON file"):
        ModelConfig.from_json_file(tmp_path / "bad.json")


@pytest.mark.parametrize("name", TINY)
def test_unknown_key_is_named_in_every_family(name):
    with pytest.raises(ValueError, match=r"'mystery_factor' is not known \(value 2\.5\)"):
        build(name, mystery_factor=2.5)
    assert build(name, mystery_factor=None).architecture == build(name).architecture  # null counts as unset


@pytest.mark.parametrize("name", TINY)
def test_missing_key_is_named_or_has_a_default(name):
    """Where a default contradicts the other keys, the message shows numbers."""
    needed = "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings".split()
    for key in tiny(name)[1]:
        values, text = tiny(name)
        del text[key]
        if key in needed:
            with pytest.raises(ValueError, match=f"'{key}' is missing"):
                ModelConfig.from_dict(values)
        elif key != "model_type" or text is not values:
            try:
                assert ModelConfig.from_dict(values).num_layers == text["num_hidden_layers"]
            except ValueError as error:
                assert f"'{key}' is missing" in str(error) or any(c.isdigit() for c in str(error))


@pytest.mark.parametrize("name", TINY)
def test_odd_values_give_value_errors_only(name):
    """No `TypeError`, no `ZeroDivisionError`, no NumPy warning (warnings are errors here), whatever the file says."""
    refused = 0
    for key, value in tiny(name)[1].items():
        places = [(key,)] + ([(key, inner) for inner in value] if isinstance(value, dict) else [])
        for place in places:
            for odd in ODD:
                values, text = tiny(name)
                (text if len(place) == 1 else text[key])[place[-1]] = odd
                try:
                    ModelConfig.from_dict(values)
                except ValueError:
                    refused += 1
    assert refused > 80


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 0}, "top_k: expected a positive integer, got 0"),
        ({"num_attention_heads": 128}, "hidden_size 64 does not reach for num_attention_heads 128"),
        ({"rms_norm_eps": True}, "'rms_norm_eps' is True, expected a number"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, expected a number"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1, expected true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported; supported: silu"),
        ({"rope_scaling": 5}, "'rope_scaling' is 5, expected a dictionary"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, expected a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, expected a number above 1"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor 2.0 is not in (0, 1]"),
    ],
)
def test_wrong_values_are_named_with_their_numbers(changes, words):
    with pytest.raises(ValueError) as error:
        build("mixtral", **changes)
    assert words in str(error.value)


@pytest.mark.parametrize("name", [name for name in TINY if tiny(name)[0].get("rope_theta")])
def test_both_spellings_of_rope(name):
    values, _ = tiny(name)
    scaling = dict(values.pop("rope_scaling", None) or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    theta = values.pop("rope_theta")
    new = values | {"rope_parameters": scaling | {"rope_theta": theta}}
    assert ModelConfig.from_dict(new).architecture == build(name).architecture
    other = values | {"rope_parameters": scaling | {"rope_theta": 2 * theta}}
    assert ModelConfig.from_dict(other).architecture != build(name).architecture


def test_two_rope_spellings_that_contradict():
    linear = {"rope_type": "linear", "factor": 2.0}
    assert build(rope_scaling=linear, rope_parameters=dict(linear)).architecture.block.attention.rope
    with pytest.raises(ValueError, match="contradict each other"):
        build(rope_scaling=linear, rope_parameters=linear | {"factor": 4.0})


def test_nested_config():
    config = build("llama4")
    assert config.text["hidden_size"] == 64 and config.num_layers == 4 and config.token_ids("eos") == (2, 3, 4)
    flat = ModelConfig.from_dict(tiny("llama4")[1])
    assert flat.architecture == config.architecture and flat.model_type == "llama4_text"
    values, _ = tiny("llama4")
    with pytest.raises(ValueError, match="'text_config' is missing"):
        ModelConfig.from_dict(values | {"text_config": 3})
    with pytest.raises(ValueError, match="'mystery' is not known"):
        ModelConfig.from_dict(values | {"mystery": 1})
    with pytest.raises(ValueError, match="'tie_word_embeddings' is True"):
        ModelConfig.from_dict(values | {"tie_word_embeddings": True})


def test_nothing_can_be_changed():
    values, _ = tiny("granitemoe")
    values["id2label"] = {"0": "a"}
    config = ModelConfig.from_dict(values)
    values["hidden_size"], values["id2label"]["0"] = 1, "b"
    config.to_dict()["id2label"]["0"] = "c"
    assert config.to_dict()["hidden_size"] == 64 and config.hub["id2label"] == {"0": "a"}
    for name in ("hub", "family", "architecture", "new"):
        with pytest.raises(AttributeError, match=f"frozen; build a new one to change {name}"):
            setattr(config, name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.architecture.block.width = 1
    with pytest.raises(TypeError, match="positional"):
        type(config.architecture.block.norm)("rms")


def test_token_ids_and_repr():
    config = build()
    assert config.token_ids("eos") == (2,) and config.token_ids("pad") == ()
    assert build(eos_token_id=[5, 7]).token_ids("eos") == (5, 7) and build(eos_token_id=0).token_ids("eos") == (0,)
    assert config != build(vocab_size=130) and config != 3
    assert repr(config) == "ModelConfig(mixtral, layers=2, width=64, experts=4, top_k=2)"
    assert repr(build("llama")) == "ModelConfig(llama, layers=2, width=64)"
