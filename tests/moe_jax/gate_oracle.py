"""The gates once more: float64, loops and dense tensors, slow and unlike the library's code."""

import numpy as np


def softmax(row):
    powers = np.exp(np.asarray(row, np.float64) - np.max(row))
    return powers / powers.sum()


def oracle(logits, k, capacity, policy, used=None):
    """Combine weights `[G, E, C]`, counts `[E]`, auxiliary loss; top-1 if k is 1, top-2 for the policy `choice`."""
    tokens, experts = logits.shape
    used = [True] * tokens if used is None else [bool(u) for u in used]
    chances = [softmax(row) for row in logits]
    picks = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:k] for row in logits]
    claims = [(t, turn, e) for t in range(tokens) if used[t] for turn, e in enumerate(picks[t])]
    if policy == "choice":
        claims.sort(key=lambda claim: claim[1])
    counts = np.bincount([e for _, _, e in claims], minlength=experts)
    room = int(counts.max(initial=0)) if capacity is None else capacity
    weights = np.zeros((tokens, experts, room))
    for e in range(experts):
        mine = [claim for claim in claims if claim[2] == e]
        kept = set(_kept(mine, e, policy, room, logits, chances))
        for slot, (t, _, _) in enumerate(claim for claim in mine if claim in kept):
            weights[t, e, slot] = chances[t][e]
    if k > 1:
        weights /= np.maximum(weights.sum((1, 2), keepdims=True), np.finfo(np.float32).eps)
    firsts = [claim for claim in claims if claim[1] == 0] if policy == "choice" else claims
    share = np.bincount([e for _, _, e in firsts], minlength=experts) / max(tokens, 1)
    aux = experts * (share * np.mean(chances, axis=0)).sum() / (1 if policy == "choice" else k)
    return weights, counts, aux


def _kept(mine, e, policy, room, logits, chances):
    if policy in ("position", "choice"):
        return mine[:room]
    if policy == "gate":
        return sorted(mine, key=lambda claim: -chances[claim[0]][e])[:room]
    if policy == "probs":
        return sorted(mine, key=lambda claim: -logits[claim[0], e])[:room]
    choosers = {claim[0]: claim for claim in mine}
    rivals = [(-(logits[t, e] if t in choosers else 0.0), t not in choosers, t) for t in range(len(logits))]
    return [choosers[t] for _, other, t in sorted(rivals)[:room] if not other]


def densify(routing):
    """A `Routing` as combine weights and dispatch mask `[G, E, C]`, written out choice by choice."""
    ids, keep, position, weights = (
        np.asarray(a) for a in (routing.ids, routing.keep, routing.position, routing.weights)
    )
    experts = len(routing.counts)
    room = int(np.max(routing.counts, initial=0)) if routing.capacity is None else routing.capacity
    dense, mask = np.zeros((len(ids), experts, room), np.float32), np.zeros((len(ids), experts, room), bool)
    for t, a in np.argwhere(keep):
        place = t, ids[t, a], position[t, a]
        assert not mask[:, ids[t, a], position[t, a]].any(), "a slot is taken twice"
        dense[place], mask[place] = weights[t, a], True
    return dense, mask
