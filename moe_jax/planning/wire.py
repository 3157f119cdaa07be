"""What the programs send between devices, by formula: for meshes that are not worth compiling for."""

import jax.numpy as jnp

from ..exchange import all_to_all, chosen
from ..sharding import Sharding
from ..weights import parameters
from .collectives import Collective, mesh_group
from .costs import Passes, passes, ranks_of_tokens
from .programs import Job, Stage


def expected(job: Job, sharding: Sharding, stage: Stage) -> list[Collective]:
    """What a stage sends, without what may not run and what norms over all heads add up."""
    architecture, run, axes = job.config.architecture, passes(job, sharding, stage), sharding.axes
    stream = run.tokens * architecture.block.width * jnp.dtype(job.dtype).itemsize
    table, name = parameters(architecture), "embedding" if architecture.tied else "head.kernel"
    words = sharding.shares(architecture)[name].stored_shape(table[name].shape)[0]
    layers = run.count * len(architecture.layers)
    found = [
        _along(sharding, axes.vocab, "all-reduce", stream, run.count),  # the embedding's rows
        _along(sharding, axes.heads, "all-reduce", stream, layers),
        _along(sharding, axes.hidden, "all-reduce", stream, layers),
        _along(sharding, axes.vocab, "all-gather", job.rows(sharding) * words * 4, 1),  # float32 logits
    ]
    for kind, nbytes, times in _exchange(job, sharding, run) if architecture.moe_layers else []:
        times *= run.count * len(architecture.moe_layers)
        found.append(_along(sharding, axes.experts, kind, nbytes, times))
    if architecture.moe_layers and architecture.block.router.rule is not None:  # which looks at all logits
        every = run.tokens * len(mesh_group(sharding.sizes, axes.batch))
        sizes = [4 * every * experts for experts in architecture.expert_counts] + [every]  # once, which tokens are real
        found += [_along(sharding, axes.batch, "all-gather", size, run.count) for size in sizes]
    return [one for one in found if len(one.devices) > 1]


def _along(sharding: Sharding, axes: tuple[str, ...], kind: str, nbytes: int, times: int) -> Collective:
    return Collective(kind, nbytes, mesh_group(sharding.sizes, axes), times)


def _exchange(job: Job, sharding: Sharding, run: Passes) -> list[tuple[str, int, int]]:
    """Kind, bytes that arrive, and number of what one layer's exchange between experts sends."""
    block, ranks = job.config.architecture.block, len(mesh_group(sharding.sizes, sharding.axes.experts))
    spread = ranks_of_tokens(sharding) == ranks
    tokens = run.tokens if spread else -(-run.tokens // ranks)
    row = block.width * jnp.dtype(job.dtype).itemsize
    name = job.exchange or chosen(tokens, block.router.top_k, ranks)
    if spread:
        last = sharding.axes.batch[-len(sharding.axes.experts) :]
        known = block.router.rule is not None and last == sharding.axes.experts
        return _between(name, tokens, row, block.router.top_k, ranks, known)
    if name == "replicated":  # tokens are there already
        return [("all-reduce", run.tokens * row, 1)]
    return [*_between(name, tokens, row, block.router.top_k, ranks), ("all-gather", ranks * tokens * row, 1)]


def _between(
    name: str, tokens: int, row: int, choices: int, ranks: int, known: bool = False
) -> list[tuple[str, int, int]]:
    """What an exchange sends of `tokens` on each rank, `row` bytes each; `known`: everyone's ids and weights are."""
    both = 2 * choices * 4
    if name == "replicated":
        ids = [] if known else [("all-gather", ranks * tokens * both, 1)]
        return [("all-gather", ranks * tokens * row, 1), *ids, ("reduce-scatter", tokens * row, 1)]
    if name == "ring":
        return [("collective-permute", tokens * row, 2 * ranks), ("collective-permute", tokens * both, ranks)]
    if name == "ragged_all_to_all":
        most = min(ranks, choices) * tokens
        counts = ("all-gather", ranks * ranks * 4, 1)
        return [counts, ("ragged-all-to-all", most * row, 2), ("ragged-all-to-all", most * both, 1)]
    size = all_to_all.room(tokens, choices, ranks)
    overflow = [] if size >= tokens else [("all-reduce", 4, 1)]
    return [("all-to-all", ranks * size * row, 2), ("all-to-all", ranks * size * both, 1), *overflow]
