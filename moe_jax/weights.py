"""Which parameters an architecture has, under which names, in which shapes."""

import dataclasses
from typing import Any

from .block_config import Architecture, AttentionConfig, BlockConfig, MLPConfig

Shapes = dict[str, tuple[int, ...]]
#: Nested dictionary of arrays: `tree["attention"]["q"]` is the parameter "attention.q".
Weights = dict[str, Any]
#: Last part of a kernel's name; routers, norms, biases, sinks and other small things are not among them.
_KERNELS = frozenset("q k v o q_down q_up kv_down kv_up gate up down embedding kernel".split())


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Shape of one parameter. `layers`: which model layers its leading axis holds (None: it belongs to no layer).

    `experts`: length of the expert axis behind the layer axis, 0 without. `counts`: in pyramids, how many experts
    each of `layers` has; the leading axis then holds them all, layer by layer, in place of a layer axis.
    `contracted`: whether the last axis is that of an input, as it is of every matrix.
    """

    shape: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    experts: int = 0
    contracted: bool = False
    counts: tuple[int, ...] | None = None


def parameters(architecture: Architecture) -> dict[str, Parameter]:
    """Every parameter by its dotted name, layers of a kind stacked along the first axis.

    Attention and norms hold all layers, `dense` the dense ones, `moe` and `shared` the MoE layers. Kernels are
    `[out, in]`, the contraction last, as in checkpoints (docs/decisions.md says why); attention keeps heads apart:
    `q [L, N, H, D]`, but for `o [L, D, N * Hv]`, in which they are contracted.
    """
    block, width, vocab = architecture.block, architecture.block.width, architecture.vocab_size
    table = {"embedding": Parameter((vocab, width), contracted=True)}
    every = tuple(range(len(architecture.layers)))
    _stack(table, every, {f"attention.{k}": v for k, v in _attention(block.attention, width).items()})
    for norm in ("attention_norm", "mlp_norm"):
        _stack(table, every, {f"{norm}.{k}": v for k, v in _norm(block).items()})
    if architecture.dense_layers:
        shapes = _mlp(block.dense, width)
        _stack(table, architecture.dense_layers, {f"dense.{k}": v for k, v in shapes.items()})
    if architecture.moe_layers:
        _moe(table, architecture)
    if architecture.learned_positions:
        table["positions"] = Parameter((architecture.context, width), contracted=True)
    table |= {f"final_norm.{k}": Parameter(v) for k, v in _norm(block).items()}
    if not architecture.tied:
        table["head.kernel"] = Parameter((vocab, width), contracted=True)
    if architecture.head_bias:
        table["head.bias"] = Parameter((vocab,))
    return table


def _stack(table, layers, shapes, experts=0):
    lead = (len(layers), experts) if experts else (len(layers),)
    for name, shape in shapes.items():
        vector = len(shape) == 1 or name.endswith(("_bias", "_norm"))
        table[name] = Parameter((*lead, *shape), layers, experts, not vector)


def _norm(block: BlockConfig) -> Shapes:
    shapes: Shapes = {"scale": (block.width,)}
    return shapes | ({"bias": (block.width,)} if block.norm.kind == "layer" else {})


def _mlp(mlp: MLPConfig, width: int) -> Shapes:
    shapes: Shapes = {"up": (mlp.hidden, width), "down": (width, mlp.hidden)}
    if mlp.activation.gated:
        shapes["gate"] = shapes["up"]
    if mlp.bias:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
    return shapes


def _moe(table: dict[str, Parameter], architecture: Architecture) -> None:
    block, layers, counts = architecture.block, architecture.moe_layers, architecture.expert_counts
    router, pyramid = block.router, architecture.pyramid
    per_layer: Shapes = {} if pyramid else {"moe.router": (router.num_experts, block.width)}
    if router.logit_bias:
        per_layer["moe.router_bias"] = (router.num_experts,)
    if router.selection_bias:
        per_layer["moe.selection_bias"] = (router.num_experts,)
    if block.shared is not None:
        per_layer |= {f"shared.{k}": v for k, v in _mlp(block.shared, block.width).items()}
    if block.shared_gate:
        per_layer["shared.scale"] = (block.width,)
    if block.mix:
        per_layer["shared.mix"] = (2, block.width)
    if block.mix_bias:
        per_layer["shared.mix_bias"] = (2,)
    _stack(table, layers, per_layer)
    experts = {f"moe.{k}": v for k, v in _mlp(block.experts, block.width).items()}
    if not pyramid:
        _stack(table, layers, experts, router.num_experts)
        return
    total = sum(counts)
    table["moe.router"] = Parameter((total, block.width), layers, 0, True, counts)
    for name, shape in experts.items():
        table[name] = Parameter((total, *shape), layers, total, len(shape) > 1, counts)


def _attention(config: AttentionConfig, width: int) -> Shapes:
    heads, kv_heads, head, value = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
    shapes: Shapes = {"o": (width, heads * value)}
    if config.out_bias:
        shapes["o_bias"] = (width,)
    if config.sinks:
        shapes["sinks"] = (heads,)
    if config.latent is not None:
        return shapes | _latent(config, width)
    shapes |= {"q": (heads, head, width), "k": (kv_heads, head, width), "v": (kv_heads, value, width)}
    if config.qkv_bias:
        shapes |= {f"{name}_bias": shapes[name][:-1] for name in "qkv"}
    if config.qk_norm == "head":
        shapes |= {"q_norm": (head,), "k_norm": (head,)}
    elif config.qk_norm == "full":
        shapes |= {"q_norm": (heads, head), "k_norm": (kv_heads, head)}
    return shapes


def _latent(config: AttentionConfig, width: int) -> Shapes:
    latent, heads = config.latent, config.num_heads
    shapes: Shapes = {
        "kv_down": (latent.rank + latent.rotary_dim, width),
        "kv_latent_norm": (latent.rank,),
        "kv_up": (heads, latent.plain_dim + config.value_dim, latent.rank),
    }
    if config.qkv_bias:
        shapes["kv_down_bias"] = (latent.rank + latent.rotary_dim,)
    if latent.query_rank is None:
        return shapes | {"q": (heads, config.head_dim, width)}
    shapes |= {"q_down": (latent.query_rank, width), "q_latent_norm": (latent.query_rank,)}
    if config.qkv_bias:
        shapes["q_down_bias"] = (latent.query_rank,)
    return shapes | {"q_up": (heads, config.head_dim, latent.query_rank)}


def is_kernel(name: str) -> bool:
    """Whether a parameter is one of the kernels, those that may be quantised, by its name.

    >>> is_kernel("moe.up"), is_kernel("moe.router")
    (True, False)
    """
    return name.rsplit(".", 1)[-1] in _KERNELS


def nested(flat: dict[str, Any]) -> Weights:
    """Dotted names to a nested dictionary; "embedding" stays at the top."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
