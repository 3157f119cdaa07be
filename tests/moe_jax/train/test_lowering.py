"""A training step lowered for an H100 without one: it holds the kernels of both passes."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from moe_jax import ModelConfig
from moe_jax.train import Data, Settings, Training

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIG = {"model_type": "mixtral", "vocab_size": 96, "max_position_embeddings": 128} | SIZES | EXPERTS


def test_kernels_of_both_passes():
    data = Data(corpus="", length=64, batch_size=4)
    architecture = ModelConfig.from_dict(CONFIG).architecture
    training = Training(architecture, Settings(model="", data=data, steps=4, dtype="bfloat16"))
    shape = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    given = jax.tree.map(shape, training.abstract()), jax.ShapeDtypeStruct((4, 65), jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        text = training.step.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    found = {name.removesuffix("_mosaic_gpu") for name in re.findall(r"moe_jax_expert_\w+", text)}
    kernels = "up down d_hidden d_x d_in_kernel d_out_kernel"
    assert {f"moe_jax_expert_{name}" for name in kernels.split()} <= found
