"""Expert surgery: models with fewer experts, by leaving out or merging those that a text shows to be spared easiest."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.dims import Float, Int
from pallas_kernels.quantized import is_quantized

from .block_config import Architecture
from .config import ModelConfig
from .inspect import Usage
from .model import Model, is_integer
from .shard import gather
from .text import score
from .weights import flattened, nested

#: Experts of each layer: one number for all, a part of what there is, or a number for each MoE layer.
Keep = int | float | Sequence[int]
#: For each MoE layer, the old experts that each new one is made of.
Groups = Sequence[Sequence[Sequence[int]]]
#: A text's token ids.
Ids = Sequence[int] | Int[np.ndarray, " tokens"]

#: How families spell the number of experts.
_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller model, which old experts each new one is made of, and the losses of a text before and after.

    `groups`: by MoE layer and new expert, old experts in ascending order. `before`, `after`: see `loss`; None where no
    text was given.
    """

    model: Model
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    before: float | None = None
    after: float | None = None


def loss(model: Model, ids: Ids, window: int = 512) -> float:
    """Mean negative log-likelihood of a text's tokens after the first, in nats per token; see `moe_jax.score`.

    >>> from moe_jax.model import tiny_config
    >>> model = Model.initialize(tiny_config())
    >>> bool(np.isclose(np.exp(loss(model, [1, 2, 3])), score(model, [1, 2, 3]).perplexity))
    True
    """
    return -float(score(model, np.asarray(ids).tolist(), window).log_probabilities.mean(dtype=np.float64))


def prune(model: Model, usage: Usage, keep: Keep, ids: Ids | None = None, window: int = 512) -> Surgery:
    """Leave out the experts with the smallest sums of router weights over a text; the others stay as they are.

    `usage`: of `model` (`moe_jax.inspect.usage`). `keep`: experts of each layer, a part in (0, 1] of them (rounded up),
    or a number for each MoE layer; a gate with groups of experts keeps as many in each group. Unequal numbers make a
    pyramid, which the config says under our own key `num_experts_per_layer`: such a folder only we can read,
    transformers cannot. `ids`: a text whose loss is taken before and after. The model comes back on one device.

    Raises `ValueError` for a `usage` of another model, numbers below the experts per token or above what there is,
    unequal numbers where the router has groups or biases, and quantised experts. Method: SEER-MoE (arXiv:2404.05089).

    >>> from moe_jax.inspect import usage
    >>> from moe_jax.model import tiny_config
    >>> model = Model.initialize(tiny_config())
    >>> pruned = prune(model, usage(model, range(40)), keep=[3, 2], ids=range(40))
    >>> pruned.model.architecture.expert_counts, [len(layer) for layer in pruned.groups], pruned.after > 0
    ((3, 2), [3, 2], True)
    """
    gate_groups = _checked(model, usage)
    groups = []
    for weights, number in zip(usage.weights, _numbers(model.architecture, keep), strict=True):
        best = np.argsort(-weights.reshape(gate_groups, -1), axis=1, kind="stable")[:, : number // gate_groups]
        first = np.arange(gate_groups)[:, None] * (weights.size // gate_groups)
        groups.append([(int(expert),) for expert in np.sort(best + first, axis=None)])
    return _operate(model, usage, groups, ids, window)


def merge(
    model: Model,
    usage: Usage,
    keep: Keep | None = None,
    groups: Groups | None = None,
    ids: Ids | None = None,
    window: int = 512,
) -> Surgery:
    """Replace groups of experts by their means, weighed by how often each was chosen; router rows and biases too.

    Groups are found or given. With `keep` (as in `prune`) the most used experts are the heads of groups, which each
    other expert joins where the router's row is most like its own: by cosine, from their mean, which a softmax does not
    see. `groups`: for each MoE layer, which old experts each new one is made of, every one once. The router knows a
    group by one row, so that its weight is not the sum of its experts' weights. Everything else is as in `prune`.

    Raises `ValueError` as `prune` does, for both or none of `keep` and `groups`, and for groups that leave out an
    expert, name one twice or cross the groups of the gate. Method: M-SMoE (arXiv:2310.01334) without its permutation
    of hidden units.

    >>> from moe_jax.inspect import usage
    >>> from moe_jax.model import tiny_config
    >>> model = Model.initialize(tiny_config())
    >>> merged = merge(model, usage(model, range(40)), groups=[[[0, 1], [2, 3]], [[0, 2, 3], [1]]])
    >>> merged.model.config.to_dict()["num_local_experts"], merged.model([[1, 2, 3]]).shape
    (2, (1, 3, 96))
    """
    gate_groups = _checked(model, usage)
    if (keep is None) == (groups is None):
        raise ValueError("merge: give keep or groups, not both" if groups is not None else "merge: give keep or groups")
    if groups is None:
        numbers = _numbers(model.architecture, keep)
        routers = _by_layer(gather(model).arrays()["moe"]["router"], model.architecture)
        given = zip(routers, usage.counts, numbers, strict=True)
        groups = [_alike(np.asarray(r, np.float32), count, number, gate_groups) for r, count, number in given]
    else:
        _check_groups(model.architecture, groups, gate_groups)
    return _operate(model, usage, groups, ids, window)


def _checked(model: Model, usage: Usage) -> int:
    """The groups of experts that the gate looks at, once model and usage are known to fit."""
    architecture = model.architecture
    counted = tuple(map(len, usage.counts))
    if not counted or counted != architecture.expert_counts or usage.layers != architecture.moe_layers:
        raise ValueError(f"usage: of layers with {counted} experts; the model has {architecture.expert_counts}")
    for name, array in flattened(model.arrays()).items():
        if name.startswith("moe.") and is_quantized(array):
            raise ValueError(f"surgery: {name} is quantised; moe_jax.dequantize the model first")
    return architecture.block.router.groups


def _numbers(architecture: Architecture, keep: Keep) -> list[int]:
    """How many experts each MoE layer keeps."""
    counts, router = architecture.expert_counts, architecture.block.router
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"keep: {keep} is no part in (0, 1]")
        numbers = [math.ceil(keep * count / router.groups - 1e-9) * router.groups for count in counts]
    else:
        numbers = [keep] * len(counts) if isinstance(keep, (int, np.integer)) else list(keep)
    if len(numbers) != len(counts) or not all(map(is_integer, numbers)):
        raise ValueError(f"keep: {keep!r} does not give each of {len(counts)} MoE layers a number")
    _check_numbers(architecture, numbers, "keep")
    return [int(number) for number in numbers]


def _check_numbers(architecture: Architecture, numbers: Sequence[int], name: str) -> None:
    router = architecture.block.router
    for layer, number, count in zip(architecture.moe_layers, numbers, architecture.expert_counts, strict=True):
        if not router.top_k <= number <= count:
            raise ValueError(f"{name}: {number} of {count} experts in layer {layer}, whose tokens take {router.top_k}")
        if number % router.groups:
            raise ValueError(f"{name}: {number} experts in layer {layer} do not fill {router.groups} groups evenly")
        if router.score == "sigmoid" and router.groups == number > 1:
            raise ValueError(
                f"{name}: {number} experts in layer {layer} are one for each group, ranked by its best two"
            )
    if len(set(numbers)) > 1 and (router.groups > 1 or router.logit_bias or router.selection_bias):
        raise ValueError(f"{name}: a router with groups or biases has as many experts in each layer, got {[*numbers]}")


def _check_groups(architecture: Architecture, groups: Groups, gate_groups: int) -> None:
    if len(groups) != len(architecture.moe_layers):
        raise ValueError(f"groups: of {len(groups)} layers; the model has {len(architecture.moe_layers)} MoE layers")
    _check_numbers(architecture, [len(layer) for layer in groups], "groups")
    for layer, count, own in zip(architecture.moe_layers, architecture.expert_counts, groups, strict=True):
        if sorted(expert for group in own for expert in group) != list(range(count)) or not all(map(len, own)):
            raise ValueError(f"groups: {own} in layer {layer} do not hold each of {count} experts once")
        old, new = count // gate_groups, len(own) // gate_groups
        if any(expert // old != i // new for i, group in enumerate(own) for expert in group):
            raise ValueError(f"groups: {own} in layer {layer} cross the gate's groups of {old} experts")


def _alike(router: Float[np.ndarray, "E D"], counts: Int[np.ndarray, " E"], number: int, gate_groups: int):
    """A layer's groups: the most used experts, each with those whose router rows are most like its own."""
    rows = router - router.mean(0)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    size, groups = len(rows) // gate_groups, []
    for first in range(0, len(rows), size):
        own = rows[first : first + size]
        heads = np.sort(np.argsort(-counts[first : first + size], kind="stable")[: number // gate_groups])
        joins = (own @ own[heads].T).argmax(axis=1)
        joins[heads] = np.arange(len(heads))
        groups += [tuple((first + np.flatnonzero(joins == head)).tolist()) for head in range(len(heads))]
    return groups


def _operate(model: Model, usage: Usage, groups: Groups, ids: Ids | None, window: int) -> Surgery:
    before = None if ids is None else loss(model, ids, window)
    model = gather(model)
    config = reduced(model.config, [len(layer) for layer in groups])
    flat = flattened(model.arrays())
    for name, stack in flat.items():
        if name.startswith("moe."):
            layers = zip(_by_layer(stack, model.architecture), groups, usage.counts, strict=True)
            means = [_means(*layer) for layer in layers]
            flat[name] = jnp.concatenate(means) if config.architecture.pyramid else jnp.stack(means)
    new = Model(config, nested(flat), model.generation, model.named)
    made = tuple(tuple(tuple(sorted(map(int, group))) for group in layer) for layer in groups)
    return Surgery(new, made, before, None if ids is None else loss(new, ids, window))


def _by_layer(stack: Array, architecture: Architecture) -> list[Array]:
    """A parameter's experts `[E, ...]`, layer by layer."""
    counts = architecture.expert_counts
    if not architecture.pyramid:
        return [stack[layer] for layer in range(len(counts))]
    first = np.cumsum((0, *counts))
    return [stack[first[i] : first[i + 1]] for i in range(len(counts))]


def _means(experts: Array, groups: Sequence[Sequence[int]], counts: Int[np.ndarray, " E"]) -> Array:
    """Each group's mean of one layer's `experts [E, ...]`, in float32; a group of one is that expert itself."""
    if all(len(group) == 1 for group in groups):
        return experts[np.array([group[0] for group in groups])]
    found = []
    for group in map(np.array, groups):
        share = counts[group] if counts[group].any() else np.ones(len(group))
        mean = jnp.tensordot(jnp.asarray(share / share.sum(), jnp.float32), experts[group].astype(jnp.float32), 1)
        found.append(experts[group[0]] if len(group) == 1 else mean.astype(experts.dtype))
    return jnp.stack(found)


def reduced(config: ModelConfig, counts: Sequence[int]) -> ModelConfig:
    """The config with other numbers of experts in its MoE layers, `counts [Lm]`.

    Equal ones stand under the family's own key, and so do unequal ones where that is a list (DeepSpeed's). Otherwise it
    has the largest, and `num_experts_per_layer` all, 0 for a dense layer. Raises `ValueError` for a config that does
    not say how many experts there are.

    >>> from moe_jax.model import tiny_config
    >>> hub = reduced(tiny_config(), [3, 2]).to_dict()
    >>> hub["num_local_experts"], hub["num_experts_per_layer"]
    (3, [3, 2])
    """
    hub: dict[str, Any] = config.to_dict()
    text = hub[config.family.nested_config] if config.family.nested_config else hub
    keys = [key for key in _KEYS if text.get(key) is not None]
    if not keys:
        raise ValueError(f"{config.model_type}: the config says its number of experts under none of {', '.join(_KEYS)}")
    per_layer = [0] * config.num_layers
    for layer, count in zip(config.architecture.moe_layers, counts, strict=True):
        per_layer[layer] = count
    text.pop("num_experts_per_layer", None)
    for key in keys:
        text[key] = per_layer if isinstance(text[key], list) else max(counts)
    if len(set(counts)) > 1 and per_layer not in map(text.get, keys):
        text["num_experts_per_layer"] = per_layer
    return ModelConfig.from_dict(hub)
