"""What a model's steps have to move and to compute: bytes of weights and cache, floating-point operations."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from .. import generate
from ..block_config import Architecture, LayerConfig
from ..cache import entry_shapes, make_cache
from ..generation import Generated, bucket
from ..model import Model
from ..weights import flattened, parameters


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes as they are stored on a device: all of them; what every step reads; one expert of one layer, or its part.

    Every step reads all that is neither an expert nor a table of which it takes rows (embedding, unless it is the head
    too, and positions).
    """

    total: int
    plain: int
    expert: float


def weights_of(model: Model) -> Weights:
    """Bytes of a model's weights."""
    architecture, table = model.architecture, parameters(model.architecture)
    arrays = flattened(model.arrays())
    sizes = {name: _on_one_device(arrays[name]) for name in table}
    experts = sum(size for name, size in sizes.items() if table[name].experts)
    rows = sum(sizes.get(name, 0) for name in ("positions", *(() if architecture.tied else ("embedding",))))
    count = sum(architecture.expert_counts) / ranks_of(model)
    total = sum(sizes.values())
    return Weights(total, total - experts - rows, experts / count if count else 0.0)


def _on_one_device(array: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(array))


def ranks_of(model: Model) -> int:
    """Over how many devices the experts are spread."""
    if model.sharding is None:
        return 1
    return math.prod(model.sharding.sizes[name] for name in model.sharding.axes.experts)


def cache_bytes(model: Model, batch: int, prompt: int, new: int) -> int:
    """Bytes of the cache that `generate` makes, on each device."""
    architecture = model.architecture
    if model.sharding is not None:
        architecture, batch = model.sharding.local(architecture), -(-batch // model.sharding.rows)
    length = bucket(prompt) + bucket(new)
    leaves = jax.eval_shape(lambda: jax.tree.leaves(make_cache(architecture, batch, length, model.dtype)))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)


def step_bytes(model: Model, batch: int, prompt: int, new: int, active: float) -> float:
    """Bytes that a device has to read for a decode step, the mean over the steps after `prompt` columns.

    The weights that every step reads, those of `active` experts (in all layers together), each row's embedding, and
    the columns of the cache that the new tokens see: no padding, and no more than a layer's window. Of a sharded model
    active experts are taken to be spread evenly.
    """
    architecture, weights = model.architecture, weights_of(model)
    if model.sharding is not None:
        architecture, batch = model.sharding.local(architecture), -(-batch // model.sharding.rows)
        active /= ranks_of(model)
    per_column = sum(math.prod(shape) for shape in entry_shapes(architecture.block.attention).values())
    columns = sum(_seen(layer, np.arange(prompt, prompt + new - 1)).mean() for layer in architecture.layers)
    width = architecture.block.width
    return weights.plain + active * weights.expert + batch * (columns * per_column + width) * model.dtype.itemsize


def prefill_flops(architecture: Architecture, batch: int, prompt: int) -> float:
    """Operations of a prefill: two per active parameter and token, attention's products, each row's last logits."""
    block, table = architecture.block, parameters(architecture)
    kernels = {name: math.prod(p.shape) for name, p in table.items() if p.contracted}
    for rows in ("embedding", "positions", "head.kernel"):
        kernels.pop(rows, None)
    experts = sum(size for name, size in kernels.items() if table[name].experts)
    active = float(sum(kernels.values()) - experts)
    if architecture.moe_layers:
        active += experts / sum(architecture.expert_counts) * block.router.top_k * len(architecture.moe_layers)
    seen = sum(_seen(layer, np.arange(prompt)).sum() for layer in architecture.layers)
    attention = 2 * block.attention.num_heads * (block.attention.head_dim + block.attention.value_dim) * seen
    head = 2 * architecture.vocab_size * block.width
    return batch * (2.0 * prompt * active + attention + head)


def _seen(layer: LayerConfig, positions: np.ndarray) -> np.ndarray:
    """Columns that a query at each of `positions` sees, its own among them."""
    seen = positions + 1
    if layer.chunk is not None:
        seen = positions % layer.chunk + 1
    return seen if layer.window is None else np.minimum(seen, layer.window)


def recorded(model: Model, ids: np.ndarray, new: int, routing: Any = None) -> Generated:
    """`new` tokens behind `ids` with the experts that ran; `routing`: see `generate`."""
    made: Any = generate(model, ids, max_new_tokens=new, eos_token_id=(), return_record=True, routing=routing)
    return made


def uniform_routing(model: Model, rows: int, columns: int) -> list[np.ndarray]:
    """Experts `[rows, columns, A]` for each MoE layer, seeded, every choice as likely as any other."""
    architecture, rng = model.architecture, np.random.default_rng(0)
    router = architecture.block.router
    if router is None:
        raise ValueError("routing: uniform, but the model has no experts")
    draw = lambda experts: rng.random((rows, columns, experts), np.float32).argpartition(router.top_k - 1)
    return [draw(experts)[..., : router.top_k] for experts in architecture.expert_counts]


def active_experts(made: Generated, new: int) -> float:
    """Mean over the decode steps of a record of the experts that a step runs, in all layers together."""
    total = made.ids.shape[1]
    steps = range(total - new, total - 1)
    count = lambda column: len(np.unique(column[column >= 0]))
    return float(np.mean([sum(count(layer[:, t]) for layer in made.expert_ids) for t in steps]))
