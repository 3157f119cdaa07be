"""How far the routing of two models lies apart."""

import dataclasses

import numpy as np

from pallas_kernels.dims import Float, Int

from .usage import Usage, entropy


@dataclasses.dataclass(frozen=True, eq=False)
class Drift:
    """Distances between two models' routing of the same text, float64 `[Lm]` from 0 (the same) to 1.

    `total_variation`: half the sum of the differences of `share`, the part of the choices that would have to move.
    `jensen_shannon`: the distance of `share`, the root of the divergence in bits (Endres and Schindelin, 2003,
    doi:10.1109/TIT.2003.813506). `agreement`: of the kept tokens' choices, the part that both models made (Dice's
    coefficient: twice the common ones over all); here 1 is the same.
    """

    total_variation: Float[np.ndarray, " Lm"]
    jensen_shannon: Float[np.ndarray, " Lm"]
    agreement: Float[np.ndarray, " Lm"]


def drift(a: Usage, b: Usage) -> Drift:
    """How far `b`'s routing lies from `a`'s, layer by layer; both are of one text.

    Raises `ValueError` for models that differ in their MoE layers or numbers of experts, and for different texts.

    >>> from moe_jax.inspect.usage import example, usage
    >>> from moe_jax.model import Model, tiny_config
    >>> one, two = (usage(Model.initialize(tiny_config(), seed=seed), range(40)) for seed in (0, 1))
    >>> drift(one, one).agreement.tolist(), bool((drift(one, two).agreement < 1).all())
    ([1.0, 1.0], True)
    >>> drift(example(counts=[[4, 0]]), example(counts=[[0, 4]])).total_variation.tolist()
    [1.0]
    """
    experts = [tuple(map(len, each.counts)) for each in (a, b)]
    if experts[0] != experts[1]:
        raise ValueError(f"drift: models with experts {experts[0]} and {experts[1]} in their MoE layers")
    if a.tokens != b.tokens or not np.array_equal(a.ids, b.ids):
        raise ValueError(f"drift: different texts, of {a.tokens} and {b.tokens} tokens")
    shares = list(zip(a.share, b.share, strict=True))
    return Drift(
        np.array([abs(p - q).sum() / 2 for p, q in shares]),
        np.array([_jensen_shannon(p, q) for p, q in shares]),
        np.array([_dice(p, q) for p, q in zip(a.expert_ids, b.expert_ids, strict=True)]),
    )


def _jensen_shannon(p: Float[np.ndarray, " E"], q: Float[np.ndarray, " E"]) -> float:
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return float(np.sqrt(max(divergence, 0.0) / np.log(2)))


def _dice(p: Int[np.ndarray, "kept A"], q: Int[np.ndarray, "kept A"]) -> float:
    common = ((p[:, :, None] == q[:, None, :]) & (p >= 0)[:, :, None]).sum()
    made = (p >= 0).sum() + (q >= 0).sum()
    return float(2 * common / made) if made else 1.0
