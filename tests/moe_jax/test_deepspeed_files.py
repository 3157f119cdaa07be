"""DeepSpeed checkpoints of one rank: both golden ones, every spelling of their names, and what is refused."""

import argparse
import re

import numpy as np
import pytest
from conftest import GOLDEN
from torch_writer import save

from moe_jax.checkpoint.torch_file import LazyTensor, TorchFile
from moe_jax.convert.deepspeed_files import open_checkpoint, stack_state_dicts

STANDARD, RESIDUAL = (GOLDEN / f"deepspeed/checkpoint_{case}" for case in ("standard", "residual"))
MAIN = "mp_rank_00_model_states.pt"
EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts"


def plain(value):
    """Contents with arrays in the place of lazy tensors."""
    if isinstance(value, LazyTensor):
        return value.read()
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def tree(path):
    """A golden checkpoint's files by name, as arrays, without optimizer states."""
    files = {p.name: plain(TorchFile(p).content) for p in path.glob("*/*model_states.pt")}
    files[MAIN] = {key: files[MAIN][key] for key in ("module", "num_experts", "mp_world_size")}
    return files


def write(folder, files, tag="step"):
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    for name, content in files.items():
        save(folder / tag / name, content)
    return folder


def opened(path, heads=4, version=2.0, **keywords):
    return open_checkpoint(path, num_heads=heads, checkpoint_version=version, **keywords)


def read(path, **keywords):
    files = opened(path, **keywords)
    found = {name: tensor.read() for name, tensor in files.tensors.items()}
    assert all((found[n].shape, found[n].dtype) == (t.shape, t.dtype) for n, t in files.tensors.items())
    return found


def same(left, right):
    assert set(left) == set(right)
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name, strict=True)


@pytest.fixture(scope="module")
def standard():
    return tree(STANDARD)


def renamed(files, *changes):
    """The files with tensor names changed by regular expressions."""

    def new(name):
        for old, to in changes:
            name = re.sub(old, to, name)
        return name

    files = {name: dict(content) for name, content in files.items()}
    for name, content in files.items():
        if name == MAIN:
            content["module"] = {new(n): t for n, t in content["module"].items()}
        else:
            files[name] = {new(n): t for n, t in content.items()}
    return files


def refused(path, message, kind=OSError, **keywords):
    with pytest.raises(kind, match=message) as raised:
        opened(path, **keywords)
    assert str(path) in str(raised.value) or kind is ValueError


@pytest.mark.parametrize(("path", "heads"), [(STANDARD, 4), (RESIDUAL, 2)])
def test_golden_checkpoints(path, heads):
    """Every tensor is one of the files', under its canonical name; q, k and v are rows of query_key_value."""
    expected, width = {}, 16 // heads
    for name, content in tree(path).items():
        for old, value in content.get("module", content).items():
            new = re.sub(r"^language_model\.(encoder\.|embedding\.)", "", old)
            new = new.replace("deepspeed_moe.gate.wg", "gate").replace(
                "deepspeed_moe.experts.deepspeed_experts", "experts"
            )
            new = new.replace("mlp.mlp.", "mlp.residual.")
            assert ("expert" in new) == (name != MAIN)
            if "query_key_value" not in new:
                expected[new] = value
                continue
            for index, part in enumerate("qkv"):
                rows = [(3 * head + index) * width + row for head in range(heads) for row in range(width)]
                expected[new.replace("query_key_value", part)] = value[rows]
    same(read(path, heads=heads), expected)


def test_facts():
    files = opened(STANDARD)
    assert (files.tag, files.num_layers, files.hidden_size, files.intermediate_size) == ("global_step10", 4, 16, 64)
    assert (files.vocab_size, files.max_positions, files.num_experts) == (96, 32, {1: 4, 3: 4})
    assert (files.residual, files.checkpoint_version, files.args, files.num_heads) == (False, 2.0, None, 4)
    files.close()
    with pytest.raises(OSError, match="closed"):
        files.tensors["layers.0.self_attention.q.weight"].read()
    files = opened(RESIDUAL, heads=2)
    assert (files.tag, files.num_experts, files.residual) == ("global_step3", {0: 2, 1: 2}, True)


def test_where_the_checkpoint_is(tmp_path, standard):
    expected = read(STANDARD)
    same(read(STANDARD / "global_step10"), expected)
    same(read(STANDARD, tag="global_step10"), expected)
    same(read(STANDARD / "global_step10", tag="global_step10"), expected)
    path = write(tmp_path, standard)
    (path / "step/expp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never opened")
    (path / "latest").write_text("step\n")
    same(read(path), expected)
    for tag in ("../step", "/etc", "..", "", "a\x00b", "step/."):
        (path / "latest").write_text(tag)
        refused(path, "is not the name of a folder")
    (path / "latest").write_text("step2")
    refused(path, "no folder for the tag 'step2'")
    (path / "latest").unlink()
    refused(path, "no file named latest; give one of the tags there: step")
    refused(path / "nowhere", "no such folder")
    assert opened(path / "step").tag == "step"


NAMES = {
    "transformer": [(r"^language_model\.encoder\.", "transformer."), (r"^language_model\.embedding\.", "")],
    "language_model.transformer": [(r"\.encoder\.", ".transformer."), (r"self_attention", "attention")],
    "module": [("^", "module.")],
    "inner moe": [(r"mlp\.deepspeed_moe", "mlp.moe.deepspeed_moe")],
    "all inner": [(r"mlp\.(deepspeed_moe|mlp|coefficient)", r"mlp.moe.\1")],
}


@pytest.mark.parametrize("case", ["standard", "residual"])
@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
def test_spellings(tmp_path, changes, case):
    path = {"standard": STANDARD, "residual": RESIDUAL}[case]
    same(read(write(tmp_path, renamed(tree(path), *changes))), read(path))


def test_megatron_nests(tmp_path, standard):
    """Weights under `model`, in dicts in dicts, with args that tell the heads and a version."""
    module, nested = standard[MAIN]["module"], {"embedding": {}, "encoder": {}}
    for name, value in module.items():
        _, group, rest = name.split(".", 2)
        nested[group].update({rest.split(".")[0]: {"weight": value}} if group == "embedding" else {rest: value})
    args = argparse.Namespace(num_attention_heads=4, params_dtype="torch.float32")
    main = {"model": {"language_model": nested}, "args": args, "checkpoint_version": 3.0, "iteration": 10}
    path = write(tmp_path, standard | {MAIN: main})
    same(read(path, heads=None, version=None), read(STANDARD))
    files = opened(path, version=3)
    assert files.args == {"num_attention_heads": 4, "params_dtype": "torch.float32"} and files.checkpoint_version == 3
    refused(path, "num_heads: 2 contradicts", ValueError, heads=2, version=None)
    refused(path, "checkpoint_version: 1.0 contradicts", ValueError, version=1.0)


def test_older_layout(tmp_path, standard):
    """One file holds an expert of all MoE layers; the number of experts is not a list."""
    files = {MAIN: standard[MAIN] | {"num_experts": 4}}
    for e in range(4):
        pair = [standard[f"layer_{l}_expert_{e}_mp_rank_00_model_states.pt"] for l in range(2)]  # noqa: E741
        files[f"expert_{e}_mp_rank_00_model_states.pt"] = pair[0] | pair[1]
    same(read(write(tmp_path / "old", files)), read(STANDARD))
    refused(write(tmp_path / "both", standard | files), "older layout beside")
    del files["expert_1_mp_rank_00_model_states.pt"]
    refused(write(tmp_path / "gap", files), "expert files go up to 3, but these are missing: 1")


def test_pyramids_and_the_order_of_numbers(tmp_path, standard):
    """Layers differ in their number of experts, and expert 10 comes after expert 9."""
    name = "language_model.encoder.layers.{}." + EXPERTS + ".{}."
    files = dict(standard) | {MAIN: standard[MAIN] | {"module": dict(standard[MAIN]["module"]), "num_experts": [4, 12]}}
    files[MAIN]["module"]["language_model.encoder.layers.3.mlp.deepspeed_moe.gate.wg.weight"] = np.ones((12, 16), "f4")
    for e in range(4, 12):
        old = files["layer_1_expert_0_mp_rank_00_model_states.pt"]
        new = {n.replace(name.format(3, 0), name.format(3, e)): t + e for n, t in old.items()}
        files[f"layer_1_expert_{e}_mp_rank_00_model_states.pt"] = new
    path = write(tmp_path, files)
    assert opened(path).num_experts == {1: 4, 3: 12}
    found = read(path)
    first = found["layers.3.mlp.experts.0.dense_4h_to_h.bias"]
    np.testing.assert_array_equal(found["layers.3.mlp.experts.11.dense_4h_to_h.bias"], first + 11)


def test_names_that_are_not_known(tmp_path, standard):
    buffers = {
        "language_model.encoder.layers.0.self_attention.bias": np.ones((1, 1, 4, 4), bool),
        "language_model.encoder.layers.0.attention.masked_bias": np.full((), -1e4, np.float32),
        "language_model.rotary_pos_emb.inv_freq": np.ones(4, np.float32),
        "language_model.encoder.layers.1.self_attention.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    main = standard[MAIN]
    files = standard | {MAIN: main | {"module": main["module"] | buffers}}
    same(read(write(tmp_path / "buffers", files)), read(STANDARD))
    odd = {"language_model.pooler.weight": np.ones(2), "x.layers.0.mlp.gamma": np.ones(2)}
    files = standard | {MAIN: main | {"module": main["module"] | odd}}
    refused(write(tmp_path / "odd", files), "not known .*: language_model.pooler.weight, x.layers.0.mlp.gamma$")
    twice = {"word_embeddings.weight": np.ones((96, 16), np.float32)}
    files = standard | {MAIN: main | {"module": main["module"] | twice}}
    refused(write(tmp_path / "twice", files), "word_embeddings.weight is there twice, also as language_model.embedding")
    head = {"language_model.output_layer.weight": np.ones((96, 16), np.float32)}
    files = standard | {MAIN: main | {"module": main["module"] | head}}
    np.testing.assert_array_equal(read(write(tmp_path / "head", files))["lm_head.weight"], np.ones((96, 16)))
    files = standard | {MAIN: main | {"module": main["module"] | {"lm_head.weight": "tied"}}}
    refused(write(tmp_path / "text", files), "lm_head.weight is a str, not a tensor")


def test_stack_of_inference_layers(tmp_path):
    numbers = np.random.default_rng(0)
    names = """norm_w norm_b attn_nw attn_nb attention.attn_qkvw attention.attn_qkvb attention.attn_ow attention.attn_ob
      mlp.0.inter_w mlp.0.inter_b mlp.0.output_w mlp.0.output_b mlp.10.inter_w res_mlp.inter_w res_mlp.output_b res_coef
      moe_gate.wg.weight""".split()
    layers = [{name: numbers.normal(size=(2, 3)).astype(np.float32) for name in names} for _ in range(11)]
    for prefix in ("layers.", "model.decoder.3.blocks.", ""):
        module = {f"{prefix}{i}.{n}": t for i, layer in reversed(list(enumerate(layers))) for n, t in layer.items()}
        path = write(tmp_path / f"good {prefix}", {MAIN: {"module": module}})
        found = stack_state_dicts(path)
        assert len(found) == 11
        for got, expected in zip(found, layers, strict=True):
            same(got, expected)
    for changes, message in (
        ({"layers.12.norm_w": np.ones(2)}, "without a gap"),
        ({"other.0.norm_w": np.ones(2)}, "prefixes"),
        ({"layers.0.norm_x": np.ones(2), "head": np.ones(2)}, "no inference layer has: layers.0.norm_x, head"),
    ):
        module = {f"layers.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()} | changes
        with pytest.raises(OSError, match=message):
            stack_state_dicts(write(tmp_path / message[:4], {MAIN: {"module": module}}))
    with pytest.raises(OSError, match="one main file"):
        stack_state_dicts(STANDARD)
