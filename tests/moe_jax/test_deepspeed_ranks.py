"""Checkpoints of several model-parallel ranks and of all versions merge into the tensors they were cut from."""

import numpy as np
import pytest
from test_deepspeed_files import RESIDUAL, STANDARD, read, refused, same, tree, write

HEADS = 4
COLUMNS = ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "word_embeddings.weight")
ROWS = ("self_attention.dense.weight", "dense_4h_to_h.weight")


def reordered(value, version):
    """Rows of query_key_value of version 2.0, [heads, 3, width], as another version has them."""
    split = value.reshape(HEADS, 3, -1, *value.shape[1:])
    order = {0: (1, 0, 2), 1: (0, 2, 1), 2: (0, 1, 2)}[min(int(version), 2)]
    return split.transpose(*order, *range(3, split.ndim)).reshape(value.shape)


def cut(name, value, ranks, version, whole_experts):
    """What each rank holds of a tensor."""
    if "query_key_value" in name:
        value = reordered(value, version)
        if version < 1:  # q, k and v are cut apart
            return [
                np.concatenate(parts) for parts in zip(*(np.split(p, ranks) for p in np.split(value, 3)), strict=True)
            ]
        return np.split(value, ranks)
    if whole_experts and ("deepspeed_experts" in name or "mlp.mlp." in name):
        return [value] * ranks
    axis = 0 if name.endswith(COLUMNS) else 1 if name.endswith(ROWS) else None
    return [value] * ranks if axis is None else [np.ascontiguousarray(v) for v in np.split(value, ranks, axis)]


def ranked(path, ranks, version, whole_experts=False, **extra):
    """The files of a golden checkpoint, cut into ranks."""
    files = {}
    for name, content in tree(path).items():
        tensors = content.get("module", content)
        pieces = {n: cut(n, value, ranks, version, whole_experts) for n, value in tensors.items()}
        for rank in range(ranks):
            part = {n: values[rank] for n, values in pieces.items()}
            if "module" in content:
                part = {"module": part, "num_experts": content["num_experts"], "mp_world_size": ranks, **extra}
            files[name.replace("mp_rank_00", f"mp_rank_{rank:02d}")] = part
    return files


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("path", [STANDARD, RESIDUAL], ids=["standard", "residual"])
def test_merging(tmp_path, path, ranks, version):
    stored = {} if version == 0 else {"checkpoint_version": version}  # absent means 0
    merged = read(write(tmp_path, ranked(path, ranks, version, **stored)), version=None)
    same(merged, read(path))


@pytest.mark.parametrize("told", [True, False])
def test_experts_that_every_rank_has_whole(tmp_path, told):
    extra = {"args": {"enable_expert_tensor_parallelism": False}} if told else {}
    files = ranked(RESIDUAL, 2, 2.0, whole_experts=True, **extra)
    same(read(write(tmp_path / "whole", files)), read(RESIDUAL))
    name = "layer_1_expert_1_mp_rank_01_model_states.pt"
    files[name] = {n: t + 1 for n, t in files[name].items()}
    with pytest.raises(OSError, match="layers.1.mlp.experts.1.*has to be equal on all ranks, but differs"):
        read(write(tmp_path / "differ", files))


def test_experts_said_to_be_sliced(tmp_path):
    files = ranked(RESIDUAL, 2, 2.0, args={"enable_expert_tensor_parallelism": True})
    same(read(write(tmp_path, files)), read(RESIDUAL))


def test_version_0_needs_no_heads(tmp_path):
    same(read(write(tmp_path, ranked(STANDARD, 2, 0)), version=None, heads=None), read(STANDARD))


def test_heads_are_needed_or_do_not_fit(tmp_path):
    path = write(tmp_path, ranked(STANDARD, 4, 2.0))
    refused(path, "num_heads is needed", ValueError, heads=None)
    refused(path, "num_heads: 2 heads do not fit 4 ranks", ValueError, heads=2)
    refused(path, "num_heads: 12 heads do not fit 4 ranks", ValueError, heads=12)
    refused(path, "number of heads is 0", ValueError, heads=0)
    refused(path, "checkpoint_version 1.5", ValueError, version=1.5)


MAIN_1 = "mp_rank_01_model_states.pt"


def test_ranks_that_disagree(tmp_path):
    prefix = "language_model.encoder."
    for name, change, message in (
        (
            "layers.0.input_layernorm.weight",
            lambda x: x + 1,
            "has to be equal on all ranks, but differs on ranks 0 and 1",
        ),
        ("layers.0.self_attention.dense.bias", lambda x: x[:8], "has to be equal on all ranks, but has shapes"),
        ("layers.1.mlp.deepspeed_moe.gate.wg.weight", lambda x: -x, "gate.weight has to be equal"),
        ("layers.2.mlp.dense_h_to_4h.weight", lambda x: x[:, :8], "do not join along axis 0"),
        ("layers.2.mlp.dense_4h_to_h.weight", lambda x: x[:8], "do not join along axis 1"),
        ("layers.2.mlp.dense_4h_to_h.weight", lambda x: x.astype(np.float16), "another dtype on every rank"),
        ("layers.3.self_attention.query_key_value.bias", lambda x: x[:12], "expected equal thirds"),
    ):
        files = ranked(STANDARD, 2, 2.0)
        files[MAIN_1]["module"][prefix + name] = change(files[MAIN_1]["module"][prefix + name])
        refused(write(tmp_path / str(len(list(tmp_path.iterdir()))), files), message)
    files = ranked(STANDARD, 2, 2.0)
    del files[MAIN_1]["module"][prefix + "final_layernorm.bias"]
    refused(write(tmp_path / "names", files), "do not have the same tensors: final_layernorm.bias")
    files = ranked(STANDARD, 2, 2.0)
    files[MAIN_1]["checkpoint_version"] = 2.0
    refused(write(tmp_path / "versions", files), r"differs between ranks: \[None, 2.0\]")


def test_ranks_that_are_missing(tmp_path):
    files = ranked(STANDARD, 4, 2.0)
    del files["layer_0_expert_1_mp_rank_02_model_states.pt"]
    refused(write(tmp_path / "expert", files), r"ranks \[0, 1, 3\], but main files are there for ranks 0 to 3")
    files = ranked(STANDARD, 4, 2.0)
    refused(write(tmp_path / "main", {n: c for n, c in files.items() if "mp_rank_03" not in n}), "mp_world_size is 4")
    del files[MAIN_1]
    refused(write(tmp_path / "middle", files), "go up to 3, but these are missing: 1")
