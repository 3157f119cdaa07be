"""Counting what the routers do with a text, window by window."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.dims import Float, Int

from ..model import Model, Record, is_integer
from .examples import Examples, find


@dataclasses.dataclass(frozen=True, eq=False)
class Usage:
    """How a model's routers used its experts over a text of `tokens` tokens.

    One entry per MoE layer, in order, which `layers` names by their numbers in the model; E may differ between
    layers. `counts [E]` int64: choices that the expert served, without padding and without what a gate dropped.
    `weights [E]`: the sum of their router weights. `probability [E]`: the mean over tokens of the router's scores,
    divided by their sum. `pairs [E, E]` int64: see `co_activation`. `router_entropy [Lm]`: the mean over tokens of
    the entropy of these scores, over `log(E)`: 0 is decided, 1 undecided. All floats are float64.

    Of the first tokens the choices themselves are kept: `ids [kept]`, `expert_ids [Lm, kept, A]` (the largest weight
    first; -1: dropped) and `expert_weights [Lm, kept, A]` float32.
    """

    layers: tuple[int, ...]
    tokens: int
    counts: tuple[Int[np.ndarray, " _"], ...]
    weights: tuple[Float[np.ndarray, " _"], ...]
    probability: tuple[Float[np.ndarray, " _"], ...]
    pairs: tuple[Int[np.ndarray, "_ _"], ...]
    router_entropy: Float[np.ndarray, " Lm"]
    ids: Int[np.ndarray, " kept"]
    expert_ids: Int[np.ndarray, "Lm kept A"]
    expert_weights: Float[np.ndarray, "Lm kept A"]

    @property
    def share(self) -> tuple[Float[np.ndarray, " _"], ...]:
        """Each expert's part of a layer's choices, which sum to 1."""
        return tuple(count / max(count.sum(), 1) for count in self.counts)

    @property
    def entropy(self) -> Float[np.ndarray, " Lm"]:
        """Entropy of `share` over `log(E)`: 1 is perfectly even, 0 is one expert for all tokens.

        >>> np.round(example(counts=[[2, 2, 2, 2], [8, 0, 0, 0]]).entropy, 3).tolist()
        [1.0, 0.0]
        """
        return np.array([entropy(share) / np.log(max(share.size, 2)) for share in self.share])

    @property
    def imbalance(self) -> Float[np.ndarray, " Lm"]:
        """The busiest expert's choices over the mean; 1 is perfectly even, E the worst.

        >>> example(counts=[[3, 1, 1, 3]]).imbalance.tolist()
        [1.5]
        """
        return np.array([share.max() * share.size for share in self.share])

    @property
    def least_share(self) -> Float[np.ndarray, " Lm"]:
        """The least used expert's choices over the mean, a fair share; 0: nothing came to it.

        >>> example(counts=[[3, 1, 1, 3]]).least_share.tolist()
        [0.5]
        """
        return np.array([share.min() * share.size for share in self.share])

    def co_activation(self, layer: int) -> Int[np.ndarray, "E E"]:
        """How many tokens two experts of a layer served together; the diagonal is `counts`.

        `layer`: index among the MoE layers, as everywhere here. Raises `ValueError` for one that there is not.

        >>> from moe_jax.model import tiny_config
        >>> found = usage(Model.initialize(tiny_config()), [1, 2, 3, 4]).co_activation(0)
        >>> found.shape, int(found.trace()), bool((found == found.T).all())
        ((4, 4), 8, True)
        """
        return self.pairs[self._known("layer", layer, len(self.pairs))]

    def examples(self, layer: int, expert: int, n: int = 8, context: int = 8) -> Examples:
        """What an expert gets, among the kept tokens.

        `frequent`: the `n` tokens that it served most. `typical`: those whose `count * log(lift)` is largest, the
        terms of the divergence between the expert's tokens and the text's (Kullback and Leibler, 1951,
        doi:10.1214/aoms/1177729694). `contexts`: the places with the largest router weights, one for each token, with
        up to `context` ids on either side. Raises `ValueError` for a layer or an expert that there is not, and for
        numbers below 0.

        >>> from moe_jax.model import tiny_config
        >>> found = usage(Model.initialize(tiny_config()), [7, 7, 7, 5])
        >>> first = found.examples(0, int(found.expert_ids[0, 0, 0])).frequent[0]
        >>> first.token, first.count
        (7, 3)
        """
        layer = self._known("layer", layer, len(self.counts))
        expert = self._known("expert", expert, len(self.counts[layer]))
        for name, value in (("n", n), ("context", context)):
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
        return find(self.ids, self.expert_ids[layer], self.expert_weights[layer], expert, n, context)

    @staticmethod
    def _known(name: str, value: Any, count: int) -> int:
        if not is_integer(value) or not 0 <= value < count:
            raise ValueError(f"{name}: {value!r} of {count}")
        return int(value)


def usage(model: Model, ids: Sequence[int] | AnyArray, window: int = 512, batch: int = 4, keep: int = 65536) -> Usage:
    """Run a text through a model and count what its routers do.

    `ids [tokens]`: token ids. They are read once, in windows of `window` tokens (at most the model's context) that do
    not overlap, `batch` at a time; a gate with a capacity sees such a batch at once. The choices of the first `keep`
    tokens are kept; the rest of a `Usage` does not grow with the text. Raises `ValueError` for a model without MoE
    layers, ids that are no vector of token ids, numbers below 1 and router scores that are not finite.

    >>> from moe_jax.model import tiny_config
    >>> found = usage(Model.initialize(tiny_config()), range(50), window=16)
    >>> found.tokens, [int(count.sum()) for count in found.counts], found.expert_ids.shape
    (50, [100, 100], (2, 50, 2))
    """
    architecture, ids = model.architecture, np.asarray(ids)
    if not architecture.moe_layers:
        raise ValueError(f"usage: {model.config.model_type} model has no MoE layers")
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"ids: expected integers [tokens], got {ids.dtype} {list(ids.shape)}")
    for name, value in (("window", window), ("batch", batch), ("keep", keep)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    window = min(window, architecture.context, 1 << (len(ids) - 1).bit_length())
    sums, choices = None, []
    for first in range(0, len(ids), batch * window):
        rows, mask = _windows(ids[first : first + batch * window], window)
        record: Any = model(rows, mask, return_record=True, logits_to_keep=1)
        routed = zip(record.router_logits, record.expert_ids, record.expert_weights, strict=True)
        found = [_sums(*layer, mask, sigmoid=architecture.block.router.score == "sigmoid") for layer in routed]
        found = jax.tree.map(lambda part: np.asarray(part, np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        if first < keep:
            choices.append(_by_weight(record, mask))
    counts, weights, probability, pairs, uncertainty = zip(*sums, strict=True)
    if not np.isfinite(uncertainty).all():
        layer = architecture.moe_layers[int(np.argmin(np.isfinite(uncertainty)))]
        raise ValueError(f"usage: the router scores of layer {layer} are not finite")
    expert_ids, expert_weights = (np.concatenate(part, axis=1)[:, :keep] for part in zip(*choices, strict=True))
    return Usage(
        layers=architecture.moe_layers,
        tokens=len(ids),
        counts=tuple(count.astype(np.int64) for count in counts),
        weights=weights,
        probability=tuple(total / len(ids) for total in probability),
        pairs=tuple(pair.astype(np.int64) for pair in pairs),
        router_entropy=np.array(uncertainty) / len(ids) / np.log([max(len(count), 2) for count in counts]),
        ids=ids[:keep].astype(np.int32),
        expert_ids=expert_ids,
        expert_weights=expert_weights,
    )


def entropy(share: Float[np.ndarray, " E"]) -> float:
    """Shannon's entropy of probabilities, in nats."""
    share = share[share > 0]
    return float((share * np.log(1 / share)).sum())


def example(counts: Sequence[Sequence[int]]) -> Usage:
    """A `Usage` that has nothing but counts, for examples."""
    layers = tuple(np.array(count, np.int64) for count in counts)
    zeros, pairs = tuple(count * 0.0 for count in layers), tuple(np.diag(count) for count in layers)
    nothing = np.zeros((len(layers), 0, 1))
    kept = np.zeros(0, np.int32), nothing.astype(np.int8), nothing.astype(np.float32)
    indices = tuple(range(len(layers)))
    return Usage(indices, int(layers[0].sum()), layers, zeros, zeros, pairs, np.zeros(len(layers)), *kept)


def _windows(ids: Int[np.ndarray, " n"], window: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Ids in rows of `window`, the last one padded, and their mask."""
    rows = np.zeros((-(-len(ids) // window), window), ids.dtype)
    mask = np.zeros(rows.shape, np.int32)
    rows.reshape(-1)[: len(ids)], mask.reshape(-1)[: len(ids)] = ids, 1
    return rows, mask


@functools.partial(jax.jit, static_argnames="sigmoid")
def _sums(
    logits: Float[Array, "B T E"], ids: Int[Array, "B T A"], weights: Float[Array, "B T A"], mask: Any, *, sigmoid: bool
) -> tuple[Array, ...]:
    """One layer's sums over the tokens of a batch: counts, weights, probabilities `[E]`, pairs `[E, E]`, entropy."""
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    scores = scores / scores.sum(-1, keepdims=True)
    chosen = jax.nn.one_hot(ids, logits.shape[-1])  # of -1: zeros
    served = chosen.sum(-2)
    pairs = jnp.einsum("bte,btf->ef", served, served)  # ones and zeros are exact in any precision
    real = mask.astype(bool)[..., None]
    probability = jnp.where(real, scores, 0).sum((0, 1))
    uncertainty = -jnp.where(real, jax.scipy.special.xlogy(scores, scores), 0).sum()
    return served.sum((0, 1)), (chosen * weights[..., None]).sum((0, 1, 2)), probability, pairs, uncertainty


def _by_weight(record: Record, mask: Int[np.ndarray, "B T"]) -> tuple[np.ndarray, np.ndarray]:
    """Real tokens' expert ids and weights `[Lm, tokens, A]`, the largest weight first."""
    real = mask.astype(bool)
    ids = np.stack([np.asarray(layer)[real] for layer in record.expert_ids])
    weights = np.stack([np.asarray(layer)[real] for layer in record.expert_weights])
    order = np.argsort(-weights, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(weights, order, axis=-1)
