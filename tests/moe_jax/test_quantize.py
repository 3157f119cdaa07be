"""Int8 models: the maths against widened weights, saving and loading, what is refused."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from core_models import golden_arrays, golden_model, only, tensors_of

import moe_jax
from moe_jax.checkpoint import load
from moe_jax.cli import main
from moe_jax.model import Model, tiny_config
from moe_jax.quantize import quantize
from moe_jax.weights import flattened, nested, parameters
from pallas_kernels import QuantizedArray
from pallas_kernels.quantized import dense, is_quantized, quantize_runs

# Between them: tied and untied heads, latent attention, fused, transposed and interleaved tensors on disk, dense and
# shared MLPs, biases, weights on the inputs. Group sizes that divide no width leave a shorter last block.
CASES = {
    "mixtral": None,
    "deepseek_v3": 12,
    "gpt_oss": None,
    "granitemoe_tied": 20,
    "llama4_text": 16,
    "qwen2_moe_sparse": 128,
}
KEPT = re.compile(r"moe\.router|.*(norm|bias|sinks).*|shared\.scale|.*\.scale")


@functools.cache
def pair(case):
    """The int8 model, and a float32 model of the weights that it stands for."""
    model = quantize(golden_model(case), group_size=CASES[case])
    wide = {name: dense(array) for name, array in flattened(model.arrays()).items()}
    return model, Model(model.config, nested(wide), model.generation)


def equal(one, other):
    a, b = flattened(one.arrays()), flattened(other.arrays())
    assert a.keys() == b.keys()
    for name in a:
        assert jax.tree.structure(a[name]) == jax.tree.structure(b[name]), name  # dtype, inputs, group size
        for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("case", only(["mixtral", "deepseek_v3"], CASES))
def test_logits_are_those_of_the_widened_weights(case):
    model, wide = pair(case)
    arrays = golden_arrays(case)
    ids, mask = arrays["left.input_ids"], arrays["left.attention_mask"]
    got, want = (np.asarray(m(ids, mask))[mask > 0] for m in (model, wide))
    np.testing.assert_allclose(got, want, atol=1e-4)
    float_logits = np.asarray(golden_model(case)(ids, mask))[mask > 0]
    assert np.abs(got - float_logits).max() > 1e-4  # int8 it is


QUICK = only(["mixtral", "deepseek_v3", "gpt_oss"], CASES)


@pytest.mark.parametrize("case", QUICK)
def test_every_kernel_and_nothing_else_is_int8(case):
    flat = flattened(pair(case)[0].arrays())
    before = flattened(golden_model(case).arrays())
    for name, array in flat.items():
        assert is_quantized(array) == (KEPT.fullmatch(name) is None), name
        assert array.shape == before[name].shape and array.dtype == before[name].dtype
    kernels = [a for a in flat.values() if is_quantized(a)]
    assert {a.values.dtype for a in kernels} == {np.dtype(np.int8)}
    if CASES[case] is None:
        assert all(a.scales.shape == (*a.values.shape[:-1], 1) for a in kernels)


@pytest.mark.parametrize("implementation", ["xla_ragged", "xla_tiles"])
def test_implementations_agree(implementation):
    model, wide = pair("mixtral")
    model = Model(model.config, model.arrays(), implementation=implementation)
    ids = golden_arrays("mixtral")["input_ids"]
    np.testing.assert_allclose(model(ids), wide(ids), atol=1e-4)


@pytest.mark.parametrize("case", only(["mixtral"], ["mixtral", "deepseek_v3"]))
def test_generation_and_records(case):
    model, wide = pair(case)
    prompt = golden_arrays(case)["prompt_ids"]
    got, want = (moe_jax.generate(m, prompt, max_new_tokens=6, eos_token_id=()) for m in (model, wide))
    np.testing.assert_array_equal(got, want)
    record = model(prompt, return_record=True)
    assert record.hidden_states.dtype == np.float32 and len(record.expert_ids) == len(model.architecture.moe_layers)


@pytest.mark.parametrize("case", QUICK)
def test_load_of_save_is_exact(case, tmp_path):
    model = pair(case)[0]
    moe_jax.save_pretrained(model, tmp_path, max_shard_bytes=60_000)
    equal(moe_jax.load_pretrained(tmp_path, dtype="float32"), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "moe_jax_int8", "bits": 8, "group_size": CASES[case]}
    moe_jax.save_pretrained(pair(case)[1], tmp_path)  # a float model of an int8 config
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    equal(moe_jax.load_pretrained(tmp_path, dtype="float32"), pair(case)[1])


def test_the_rest_keeps_its_dtype(tmp_path):
    source = golden_model("mixtral", "bfloat16")
    model = quantize(source)
    moe_jax.save_pretrained(model, tmp_path)
    loaded = moe_jax.load_pretrained(tmp_path, dtype="bfloat16")
    equal(loaded, model)
    assert loaded.dtype == model.dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = tensors_of(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert tensors[name].dtype == np.int8 and tensors[f"{name}_scale"].shape == (tensors[name].shape[0], 1)
    assert tensors["model.layers.0.block_sparse_moe.gate.weight"].dtype == ml_dtypes.bfloat16
    assert not any(n + "_scale" in tensors for n in tensors if "norm" in n or n.endswith("gate.weight"))
    wide = moe_jax.load_pretrained(tmp_path, dtype="float32")
    assert wide.dtype == np.float32 and is_quantized(wide.arrays()["attention"]["o"])


def test_bytes_are_about_half_of_bfloat16():
    values = tiny_config().to_dict() | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    source = Model.initialize(moe_jax.ModelConfig.from_dict(values), dtype=jnp.bfloat16)
    before = sum(a.nbytes for a in jax.tree.leaves(source.arrays()))
    after = sum(a.nbytes for a in jax.tree.leaves(quantize(source, group_size=128).arrays()))
    assert 0.5 < after / before < 0.53


def test_damaged_files_are_refused(tmp_path):
    moe_jax.save_pretrained(quantize(Model.initialize(tiny_config())), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**quantization):
        both = config | {"quantization_config": config["quantization_config"] | quantization}
        (tmp_path / "config.json").write_text(json.dumps(both))
        return moe_jax.load_pretrained(tmp_path)

    with pytest.raises(ValueError, match="bits 4, expected 8"):
        load(bits=4)
    with pytest.raises(ValueError, match="quantization_config: group_size: 0"):
        load(group_size=0)
    with pytest.raises(OSError, match=r"misshapen.*lm_head.weight_scale \(96, 1\), expected \(96, 2\)"):
        load(group_size=16)
    with pytest.raises(OSError, match=r"unexpected.*lm_head.weight_scale.*int8 without scales.*lm_head.weight"):
        load(quant_method=None)


def test_what_is_refused():
    model = Model.initialize(tiny_config())
    int8 = quantize(model)
    with pytest.raises(ValueError, match="int8 already"):
        quantize(int8)
    for bits in (4, 16):
        with pytest.raises(ValueError, match=f"bits: {bits}; only 8"):
            quantize(model, bits=bits)
    for group_size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"group_size: {group_size} is neither"):
            quantize(model, group_size=group_size)
    weights = model.arrays()
    weights["moe"]["up"] = weights["moe"]["up"].at[0, 1, 2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="moe.up holds values that are not finite"):
        quantize(Model(model.config, weights))


def test_only_our_layouts_are_saved(tmp_path):
    weights = Model.initialize(tiny_config()).arrays()
    weights["moe"]["up"] = quantize_runs(weights["moe"]["up"], 4, lead=2)
    model = Model(tiny_config(), weights)
    assert model([[1, 2]]).shape == (1, 2, 96)
    with pytest.raises(ValueError, match="cannot be saved: moe.up"):
        moe_jax.save_pretrained(model, tmp_path)
    mixed = quantize(Model.initialize(tiny_config())).arrays()
    up = mixed["moe"]["up"]
    mixed["moe"]["up"] = QuantizedArray(up.values, jnp.tile(up.scales, 2), up.dtype, 16)
    with pytest.raises(ValueError, match="a saved model has one"):
        moe_jax.save_pretrained(Model(tiny_config(), mixed), tmp_path)


def test_the_command_line(tmp_path, capsys):
    source, out = tmp_path / "float", str(tmp_path / "int8")
    moe_jax.save_pretrained(Model.initialize(tiny_config(), seed=2), source)
    convert = ["convert", "--model", str(source), "--output", out]
    assert main([*convert, "--quantize", "int8", "--group-size", "16"]) == 0
    assert moe_jax.load_pretrained(out).arrays()["embedding"].scales.shape == (96, 2)
    capsys.readouterr()
    assert main(["info", out, "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["bytes on disk"]
    assert main(["info", str(source), "--json"]) == 0
    assert sizes["I8"] * 4 < json.loads(capsys.readouterr().out)["bytes on disk"]["F32"] < sizes["I8"] * 4.2
    assert main([*convert, "--group-size", "16"]) == 2
    assert "only with --quantize" in capsys.readouterr().err


# -- while loading


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_while_loading_is_int8_after_it(case, dtype, tmp_path):
    source = golden_model(case, dtype)
    moe_jax.save_pretrained(source, tmp_path)
    got = moe_jax.load_pretrained(tmp_path, dtype=dtype, quantize="int8", group_size=CASES[case])
    equal(got, quantize(source, group_size=CASES[case]))


def test_int8_while_loading_a_pyramid(tmp_path):
    values = {"model_type": "deepspeed_moe", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    values |= {"num_hidden_layers": 3, "vocab_size": 40, "max_position_embeddings": 64, "num_experts": [0, 2, 4]}
    source = Model.initialize(moe_jax.ModelConfig.from_dict(values), seed=3)
    moe_jax.save_pretrained(source, tmp_path)
    equal(moe_jax.load_pretrained(tmp_path, quantize="int8"), quantize(source))


def test_int8_while_loading_holds_one_wide_layer(monkeypatch, tmp_path):
    moe_jax.save_pretrained(Model.initialize(tiny_config()), tmp_path)
    made, seen = load.aligned, []
    monkeypatch.setattr(load, "aligned", lambda shape, dtype: seen.append(shape) or made(shape, dtype))
    monkeypatch.setattr(load, "_encoded", lambda *args, call=load._encoded: seen.append(args[0].shape) or call(*args))
    moe_jax.load_pretrained(tmp_path, quantize="int8")
    table = parameters(tiny_config().architecture)
    stacks = {p.shape for name, p in table.items() if p.layers and not KEPT.fullmatch(name)}
    assert stacks and not stacks & set(seen)
    assert {shape[1:] for shape in stacks} <= set(seen)


def test_what_loading_refuses(tmp_path):
    weights = Model.initialize(tiny_config()).arrays()
    moe_jax.save_pretrained(quantize(Model(tiny_config(), weights)), tmp_path / "int8")
    with pytest.raises(ValueError, match="the checkpoint's weights are int8 already"):
        moe_jax.load_pretrained(tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="quantize: 'int4' is neither None nor 'int8'"):
        moe_jax.load_pretrained(tmp_path / "int8", quantize="int4")
    with pytest.raises(ValueError, match="group_size: 16, but quantize is None"):
        moe_jax.load_pretrained(tmp_path / "int8", group_size=16)
    with pytest.raises(ValueError, match="group_size: 0 is neither"):
        moe_jax.load_pretrained(tmp_path / "int8", quantize="int8", group_size=0)
    weights["moe"]["up"] = weights["moe"]["up"].at[1, 1, 2, 3].set(jnp.inf)
    moe_jax.save_pretrained(Model(tiny_config(), weights), tmp_path / "infinite")
    with pytest.raises(ValueError, match="moe.up holds values that are not finite"):
        moe_jax.load_pretrained(tmp_path / "infinite", quantize="int8")


@pytest.mark.parametrize("group_size", [None, 16])
def test_widened_again(group_size):
    model = quantize(Model.initialize(tiny_config(), dtype=jnp.bfloat16), group_size=group_size)
    wide = flattened(moe_jax.dequantize(model).arrays())
    for name, array in flattened(model.arrays()).items():
        assert not is_quantized(wide[name]) and wide[name].shape == array.shape and wide[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(wide[name], dense(array))


def test_commands_that_run_in_int8(tmp_path, capsys):
    moe_jax.save_pretrained(Model.initialize(tiny_config(), seed=2), tmp_path)
    given = ["generate", "1,2,3", "--ids", "--model", str(tmp_path), "--max-new-tokens", "4"]
    assert main([*given, "--quantize", "int8", "--group-size", "16"]) == 0
    model = moe_jax.load_pretrained(tmp_path, quantize="int8", group_size=16)
    want = moe_jax.generate(model, [[1, 2, 3]], max_new_tokens=4)[0, 3:].tolist()
    assert capsys.readouterr().out.strip() == ",".join(map(str, want))
    assert main([*given, "--group-size", "16"]) == 2
    assert "group_size: only with --quantize" in capsys.readouterr().err
