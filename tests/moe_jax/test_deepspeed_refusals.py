"""DeepSpeed checkpoints with missing, foreign or contradicting files and tensors: all refused, naming them."""

import shutil

import numpy as np
import pytest
from test_deepspeed_files import MAIN, STANDARD, refused, renamed, tree, write

from moe_jax.convert.deepspeed_files import open_checkpoint


@pytest.fixture(scope="module")
def standard():
    return tree(STANDARD)


def test_kinds_of_files_that_are_refused(tmp_path, standard):
    path = write(tmp_path, standard)
    for name, message in {
        "zero_pp_rank_0_mp_rank_00_model_states.pt": "ZeRO-3.*zero_to_fp32",
        "bf16_zero_pp_rank_1_mp_rank_00_model_states.pt": "ZeRO-3.*zero_to_fp32",
        "layer_00-model_00-model_states.pt": "pipeline-parallel",
        "layer_1_expert_02_mp_rank_00_model_states.pt": "layer_1_expert_02_.*and layer_1_expert_2_.*same file",
        "mp_rank_000_model_states.pt": "mp_rank_000_.* and mp_rank_00_.* are the same file",
        "layer_3_expert_0_mp_rank_00_model_states.pt": "MoE layers .* go up to 3, but these are missing: 2",
        "layer_1_expert_7_mp_rank_00_model_states.pt": "MoE layer 1 go up to 7, but these are missing: 4, 5, 6",
        "layer_1_expert_4000000000_mp_rank_00_model_states.pt": "missing: 4, 5, 6, 7, 8, 9, 10, 11$",
        "layer_1_expert_4_mp_rank_01_model_states.pt": "ranks \\[1\\], but main files are there for ranks 0 to 0",
        "mp_rank_02_model_states.pt": "go up to 2, but these are missing: 1",
    }.items():
        shutil.copy(path / "step" / MAIN, path / "step" / name)
        refused(path, message)
        (path / "step" / name).unlink()
    (path / "step" / MAIN).unlink()
    refused(path, "no mp_rank_00_model_states.pt")


def without(content, part):
    return {name: value for name, value in content.items() if part not in name}


def spoiled(files):
    """Files of which something is wrong, with what is said about it."""
    main, module = files[MAIN], files[MAIN]["module"]
    expert = "layer_1_expert_3_mp_rank_00_model_states.pt"
    other = files["layer_1_expert_2_mp_rank_00_model_states.pt"]
    wide = {
        n: np.ones((2, 16), np.float32) if n.endswith("position_embeddings.weight") else t for n, t in module.items()
    }
    yield {expert: other}, "layer_1_expert_3.*: holds .*experts.2.*, which is not of expert 3"
    yield {expert: main}, "holds module, which is not of expert 3"
    yield {expert: [1]}, "expected a dict"
    yield {expert: {}}, "layer 3 has 3 experts, but its gate has rows for 4"
    yield {expert: without(files[expert], "4h_to_h.bias")}, "missing: layers.3.mlp.experts.3.dense_4h_to_h.bias"
    yield {MAIN: {**main, "model": module}}, "'module' or 'model'"
    yield {MAIN: {"weights": module}}, "'module' or 'model'"
    yield {MAIN: [module]}, "'module' or 'model'"
    yield {MAIN: main | {"num_experts": [4, 8]}}, r"num_experts is \[4, 8\], but the MoE layers have \[4, 4\]"
    yield {MAIN: main | {"mp_world_size": 2}}, "mp_world_size is 2, but there are main files for 1"
    yield {MAIN: main | {"module": without(module, "layers.2.")}}, "missing: layers.2"
    yield {MAIN: main | {"module": without(module, "word_emb")}}, "missing: word_embeddings.weight"
    yield (
        {MAIN: main | {"module": without(module, "2.self_attention.dense.bias")}},
        "layers.2.self_attention.dense.bias",
    )
    yield {MAIN: main | {"module": without(module, "3.mlp.deepspeed_moe.gate")}}, "missing: layers.3.mlp.gate.weight"
    yield {MAIN: main | {"module": without(module, "2.mlp.dense_h_to_4h.w")}}, "layers.2.mlp.dense_h_to_4h.weight"
    yield {MAIN: main | {"module": {n: t[..., None] for n, t in wide.items()}}}, "dimensions|thirds"
    for part, shape in (("h_to_4h.weight", (60, 16)), ("final_layernorm.bias", (8,)), ("gate.wg.weight", (3, 16))):
        cut = {n: np.ones(shape, np.float32) if n.endswith(part) else t for n, t in module.items()}
        yield {MAIN: main | {"module": cut}}, "has shape|rows for 3"
    yield {MAIN: main | {"checkpoint_version": 7}}, "checkpoint_version 7 .* not supported"
    yield {MAIN: main | {"checkpoint_version": "2"}}, "checkpoint_version '2' .* not supported"
    yield {MAIN: main | {"args": {"num_attention_heads": "4"}}}, "number of heads is '4'"


def test_contents_that_contradict(tmp_path, standard):
    for number, (changes, message) in enumerate(spoiled(standard)):
        path = write(tmp_path / str(number), standard | changes)
        with pytest.raises(OSError, match=message):
            open_checkpoint(path, num_heads=None if "heads" in message else 4)


def test_moe_layers_out_of_order(tmp_path, standard):
    swap = {f"layer_{l}_expert_{e}_mp": f"layer_{1 - l}_expert_{e}_mp" for l in (0, 1) for e in range(4)}  # noqa: E741
    files = {name.replace(key := name.split("_rank")[0], swap.get(key, key)): c for name, c in standard.items()}
    refused(write(tmp_path / "swapped", files), r"hold layers \[3, 1\], which is not their order")
    name = "layer_1_expert_3_mp_rank_00_model_states.pt"
    files = standard | {name: renamed({name: standard[name]}, (r"layers\.3", "layers.1"))[name]}
    refused(write(tmp_path / "mixed", files), "holds .*layers.1.*, but MoE layer 1 is layer 3")
