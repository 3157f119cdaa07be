"""Loading part by part: the same arrays in the same places as a whole model that is moved, and nothing else is read."""

import jax
import numpy as np
import pytest
from core_models import folder, golden_model

import moe_jax
from moe_jax import make_mesh
from moe_jax.checkpoint import safetensors
from moe_jax.weights import flattened

#: What is odd about loading each: fused and transposed experts, MXFP4, latent attention and a selection bias in
#: float32, biases, tied embeddings, several files, bfloat16 on disk.
CASES = "gpt_oss gpt_oss_mxfp4 deepseek_v3 qwen2_moe granitemoe_tied llama4 qwen3_moe_sharded mixtral_bf16".split()


def assert_same(got, want):
    got, want = flattened(got.arrays()), flattened(want.arrays())
    assert got.keys() == want.keys()
    for name in want:
        assert jax.tree.structure(got[name]) == jax.tree.structure(want[name])
        for ours, theirs in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            about = [(array.shape, array.dtype, array.sharding.spec) for array in (ours, theirs)]
            assert about[0] == about[1], name
            for shard, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
                assert (shard.device, shard.index) == (other.device, other.index)
                np.testing.assert_array_equal(shard.data, other.data, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_parts_are_those_of_the_whole(case):
    for sizes in [(1, 4, 2), (2, 1, 4)] if case != "gpt_oss_mxfp4" else [(1, 4, 2), (8, 1, 1)]:
        mesh = make_mesh(*sizes)
        assert_same(moe_jax.load_pretrained(folder(case), "float32", mesh), moe_jax.shard(golden_model(case), mesh))


@pytest.mark.parametrize("group_size", [None, 8])
def test_int8_while_loading_is_int8_of_the_whole(group_size):
    mesh, whole = make_mesh(1, 2, 2), moe_jax.quantize(golden_model("mixtral"), group_size=group_size)
    given = dict(quantize="int8", group_size=group_size)
    assert_same(moe_jax.load_pretrained(folder("mixtral"), "float32", mesh, **given), moe_jax.shard(whole, mesh))


def test_int8_on_disk(tmp_path):
    whole = moe_jax.quantize(golden_model("mixtral"), group_size=8)
    moe_jax.save_pretrained(whole, tmp_path)
    mesh = make_mesh(2, 2, 2)
    assert_same(moe_jax.load_pretrained(tmp_path, "float32", mesh), moe_jax.shard(whole, mesh))


def test_what_no_device_needs_is_not_read(monkeypatch):
    """A mesh whose other half lies in another process: its experts' tensors are never opened."""
    read, view = [], safetensors.TensorFile.view

    def noting(file, name):
        read.append(name)
        return view(file, name)

    monkeypatch.setattr(safetensors.TensorFile, "view", noting)
    monkeypatch.setattr(safetensors.TensorFile, "read", lambda file, name, into=None: noting(file, name))
    named = jax.sharding.NamedSharding
    every = named.addressable_devices_indices_map
    first_half = lambda self, shape: {d: i for d, i in every(self, shape).items() if d.id < 4}
    monkeypatch.setattr(named, "addressable_devices_indices_map", first_half)
    made = lambda shape, lies, arrays: jax.ShapeDtypeStruct(shape, arrays[0].dtype)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", made)
    monkeypatch.setattr(moe_jax.pretrained, "Model", lambda *given: given)
    moe_jax.load_pretrained(folder("mixtral"), "float32", make_mesh(expert=8))
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
    assert experts == {0, 1, 2, 3}
    assert len(read) == len(set(read))


def test_files_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    for path in folder("mixtral").iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated"):
        moe_jax.load_pretrained(tmp_path, mesh=make_mesh(expert=8))
