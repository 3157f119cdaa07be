"""Random DeepSpeed layer configs: each is refused with a message that names a field, or the layer traces.

    python scripts/random_deepspeed_configs.py --count 10000 --run 500

Anything else is a defect, printed with the config that shows it. `--run`: how many of the accepted ones run as well;
where `--count` configs hold fewer, more are drawn.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import random
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import MoEInference, MoEInferenceConfig

#: Values that mostly fit each other.
USUAL: dict[str, list[Any]] = {
    "hidden_size": [8, 16, 24, 32],
    "intermediate_size": [-1, 8, 12, 33],
    "heads": [1, 2, 4],
    "num_hidden_layers": [-1, 1, 3],
    "layer_norm_eps": [1e-12, 1e-5, 0.0],
    "mp_size": [1, 2],
    "dtype": [None, "fp16", "float32", "bf16", "torch.bfloat16", "int8"],
    "fp16": [False, True],
    "bf16": [False, True],
    "q_int8": [False, True],
    "pre_layer_norm": [True, False],
    "norm_type": ["LayerNorm", "RMSNorm", 1, 3],
    "scale_attention": [True, False],
    "triangular_masking": [True, False],
    "local_attention": [False, True],
    "window_size": [1, 2, 256],
    "rotary_dim": [-1, 0, 2, 4],
    "rotate_half": [False, True],
    "rotate_every_two": [True, False],
    "return_tuple": [True, False],
    "mlp_act_func_type": [1, 2, 3, 4, "GELU", "ReLU"],
    "bigscience_bloom": [False, True],
    "max_out_tokens": [1024, 8],
    "use_mup": [False, True],
    "scale_attn_by_inverse_layer_idx": [False, True],
    "num_kv": [-1, 1, 2, 4],
    "rope_theta": [10000, 1e6],
    "invert_mask": [True, False],
    "moe_experts": [1, 2, 4],
    "global_experts": [1, 4, 5],
    "k": [1, 2, 3, 4],
    "capacity_factor": [1.0, 1.25],
    "eval_capacity_factor": [1.0, 0.3, 2.0],
    "min_capacity": [0, 1, 4, 100],
    "noisy_gate_policy": [None, "None", "Jitter", "RSample"],
    "drop_tokens": [True, False],
    "use_rts": [False, True],
    "mlp_type": ["standard", "residual"],
    "drop_policy": ["probs", "position", "gate", "probs_upstream"],
    "gelu": [None, "tanh", "erf"],
    "quantize_groups": [1, 2, 4],
    "mlp_extra_grouping": [False, True],
    "merge_count": [1, 2],
    "local_rank": [-1, 0],
    "stochastic_mode": [False, True],
    "use_triton": [False, True],
}
#: Values that hardly any key takes.
ODD: list[Any] = [None, -1, 0, 3, 7, 10**6, -2.5, math.nan, math.inf, "", "GroupNorm", "fast", True, [1], {}, b"x"]
TOKENS, BATCH = 5, 2


def draw(rng: random.Random) -> dict[str, Any]:
    """A dictionary of some keys; one in three has an odd value, one in twenty an unknown key."""
    names = [name for name in USUAL if name in ("hidden_size", "heads") or rng.random() < 0.3]
    config = {name: rng.choice(USUAL[name]) for name in names}
    if rng.random() < 1 / 3:
        config[rng.choice(list(USUAL))] = rng.choice(ODD)
    if rng.random() < 1 / 20:
        config[rng.choice(["hiden_size", "moe", "epsilonn", "experts"])] = 1
    return config


def arguments(rng: random.Random, config: MoEInferenceConfig) -> dict[str, Any]:
    """A call's arguments beside the input."""
    seed = np.random.default_rng(rng.randrange(2**32))
    past = rng.choice([0, 0, 3])
    given: dict[str, Any] = {"use_cache": rng.random() < 0.3, "output_attentions": rng.random() < 0.3}
    if past:
        shape = (BATCH, config.kv_heads, past, config.head_dim)
        given["layer_past"] = tuple(seed.normal(size=shape).astype(np.float32) for _ in range(2))
    kind = rng.choice(["none", "integer", "bool", "float"])
    if kind != "none":
        mask = seed.random((BATCH, past + TOKENS)) < 0.8
        given["input_mask"] = {"integer": mask.astype(int), "bool": mask, "float": np.where(mask, 0.0, -1e4)}[kind]
    return given


def check(config: dict[str, Any], rng: random.Random, run: bool) -> str:
    """What happens: "refused", "traced" or "ran". Raises `AssertionError` or the defect's own error."""
    try:
        built = MoEInferenceConfig.from_dict(config)
        layer = lambda: MoEInference(built, layer_index=rng.choice([0, 2]), rngs=nnx.Rngs(0))
        given = arguments(rng, built)
        x = np.random.default_rng(0).normal(size=(BATCH, TOKENS, built.hidden_size)).astype(np.float32)
        shapes = jax.eval_shape(lambda x: layer()(x, **given), jax.ShapeDtypeStruct(x.shape, x.dtype))
    except ValueError as error:
        fields = {field.name for field in dataclasses.fields(MoEInferenceConfig)} | set(config) | {"input", "config"}
        words = set(str(error).replace(":", " ").replace(",", " ").replace("'", " ").split())
        assert words & fields, f"no field is named: {error}"
        return "refused"
    out = jax.tree.leaves(shapes)[0]
    assert (out.shape, out.dtype) == (x.shape, x.dtype), f"output {out}"
    if not run:
        return "traced"
    y = np.asarray(jax.tree.leaves(layer()(jnp.asarray(x), **given))[0])
    assert y.shape == x.shape and np.isfinite(y).all(), "not finite"
    return "ran"


def search(count: int, run: int, seed: int) -> tuple[collections.Counter, list[tuple[dict[str, Any], str]]]:
    """Outcomes of `count` random configs, or as many more as it takes until `run` have run; and the defects.

    The first accepted ones run. Of 20 configs at least one is accepted, or the search ends without the rest.
    """
    rng, outcomes, defects = random.Random(seed), collections.Counter(), []
    for i in itertools.count():
        if i >= count and (outcomes["ran"] >= run or i >= 20 * run):
            break
        if i % 250 == 249:
            jax.clear_caches()  # each config traces programs of its own
        config = draw(rng)
        try:
            outcomes[check(config, rng, outcomes["ran"] < run)] += 1
        except Exception as error:
            defects.append((config, f"{type(error).__name__}: {error}"))
    return outcomes, defects


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--run", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, defects = search(options.count, options.run, options.seed)
    print(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())) + f", {len(defects)} defects")
    for config, message in defects[:20]:
        print(f"{config}\n    {message}")
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main())
