"""Gradients of a whole MoE block, both losses among them, against a dense float64 block: its derivatives by JAX, and
finite differences of its values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_models import only

from moe_jax.attention import Varying
from moe_jax.block import Place, RoutingRequest, moe
from moe_jax.block_config import AttentionConfig, BlockConfig, MLPConfig, NormConfig, RouterConfig
from moe_jax.router import balance_of
from moe_jax.routing import GateRule
from pallas_kernels import Activation

TOKENS, WIDTH, HIDDEN, EXPERTS = 24, 12, 20, 6
BALANCE, Z = 0.7, 0.3
RULES = {
    "softmax": dict(top_k=2),
    "softmax, plain weights": dict(top_k=3, renormalize=False, logit_bias=True),
    "softmax, groups": dict(top_k=2, groups=3, top_groups=2, scale=1.5),
    "sigmoid, bias, groups": dict(top_k=2, score="sigmoid", groups=2, top_groups=1, scale=2.5, selection_bias=True),
    "sigmoid on the input": dict(top_k=1, score="sigmoid", renormalize=False, scale_input=True),
    "sparsemixer": dict(top_k=2, score="sparsemixer", jitter=0.2),
    "top1": dict(top_k=1, rule=GateRule.top1(0.7, 1)),
    "top2": dict(top_k=2, rule=GateRule.top2(0.6, 1)),
    "topk, probs": dict(top_k=3, rule=GateRule.topk(3, 0.6, 1)),
    "topk, position": dict(top_k=3, rule=GateRule.topk(3, 0.6, 1, drop_policy="position")),
    "topk, dropless": dict(top_k=3, rule=GateRule.topk(3, 0.6, 1, drop_tokens=False)),
}
CAPACITIES = {"softmax": 0.6, "sigmoid, bias, groups": 0.7}
CASES = [(name, None) for name in RULES] + list(CAPACITIES.items())


def problem(router):
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
    weights = {
        "router": 3 * draw(1, EXPERTS, WIDTH),
        "gate": draw(1, EXPERTS, HIDDEN, WIDTH),
        "up": draw(1, EXPERTS, HIDDEN, WIDTH),
        "down": draw(1, EXPERTS, WIDTH, HIDDEN),
    }
    if router.logit_bias:
        weights["router_bias"] = draw(1, EXPERTS)
    if router.selection_bias:
        weights["selection_bias"] = draw(1, EXPERTS)
    x = rng.standard_normal((2, TOKENS // 2, WIDTH)).astype(np.float32)
    return weights, x, rng.standard_normal(x.shape).astype(np.float32)


def block_of(router):
    mlp = MLPConfig(hidden=HIDDEN, activation=Activation("swiglu"))
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2, value_dim=2, scale=1.0, rope=None)
    return BlockConfig(width=WIDTH, norm=NormConfig(), attention=attention, router=router, experts=mlp)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ours(router, capacity, weights, x, cotangent):
    """The loss's gradients, and what was chosen."""

    def loss(weights, x):
        place = Place(0, 0, True, Varying())
        y, choice = moe(block_of(router), {"moe": weights}, x, place, RoutingRequest(None, None, None, capacity))
        bias = weights.get("selection_bias")
        balance = balance_of(router, choice.logits, bias=None if bias is None else bias[0])
        return (y * cotangent).sum() + BALANCE * balance.aux_loss + Z * balance.z_loss, (choice.ids, balance.counts)

    return jax.grad(loss, (0, 1), has_aux=True)(weights, x)


def frozen(router, weights, x, chosen):
    """What does not move with the weights: `chosen [G, A]` one-hot, all that was chosen before drops `[G, E]`, and for
    Phi's rule which experts share each choice's softmax `[A, G, E]`."""
    one_hot = chosen[:, :, None] == np.arange(EXPERTS)
    logits = x.reshape(-1, WIDTH) @ weights["router"][0].T
    near = []
    if router.score == "sparsemixer":
        left = np.ones(logits.shape, bool)
        for turn in range(2):
            best = np.where(left, logits, -np.inf).max(-1, keepdims=True)
            near.append(left & ((best - logits) / np.maximum(np.abs(logits), best) <= 2 * router.jitter))
            left = left & ~one_hot[:, turn]
    scores = 1 / (1 + np.exp(-logits)) if router.score == "sigmoid" else np.exp(logits)
    ranked = scores + (weights["selection_bias"][0] if router.selection_bias else 0)
    grouped = ranked.reshape(len(ranked), router.groups, -1)
    best = np.sort(grouped)[..., -2:].sum(-1) if router.score == "sigmoid" else grouped.max(-1)
    kept = best >= np.sort(best)[:, -router.top_groups][:, None]
    ranked = np.where(np.repeat(kept, EXPERTS // router.groups, axis=1), ranked, -np.inf)
    return one_hot, ranked >= np.sort(ranked)[:, -router.top_k][:, None], near


def dense(router, masks, share, cotangent, weights, x):
    """The loss with every expert on every token, as a smooth function: `masks` of `frozen`, `share [E]` of choices."""
    one_hot, everything, near = masks
    rows = x.reshape(-1, WIDTH)
    logits = rows @ weights["router"][0].T + (weights["router_bias"][0] if router.logit_bias else 0)
    scores = 1 / (1 + jnp.exp(-logits)) if router.score == "sigmoid" else jnp.exp(logits)
    scores = scores if router.score == "sigmoid" else scores / scores.sum(-1, keepdims=True)
    if router.score == "sparsemixer":
        powers = [jnp.where(mask, jnp.exp(logits), 0) for mask in near]
        gates = sum(one_hot[:, i] * power / power.sum(-1, keepdims=True) for i, power in enumerate(powers))
    else:
        gates = one_hot.any(1) * scores
        # DeepSpeed's gates divide by what is kept; a capacity beside another gate leaves weights as they were
        divisor = (gates if router.rule is not None else everything * scores).sum(-1, keepdims=True)
        renormalize = router.renormalize if router.rule is None else router.rule.renormalize
        gates = gates / jnp.where(divisor > 0, divisor, 1) if renormalize else gates
    gates = gates * router.scale
    taken = jnp.broadcast_to(rows[:, None], (len(rows), EXPERTS, WIDTH))
    taken = taken * gates[..., None] if router.scale_input else taken
    gate, up = (jnp.einsum("gei,eoi->geo", taken, weights[name][0]) for name in ("gate", "up"))
    out = jnp.einsum("gei,eoi->geo", gate / (1 + jnp.exp(-gate)) * up, weights["down"][0])
    y = (out * (one_hot.any(1) if router.scale_input else gates)[..., None]).sum(1)
    balance = EXPERTS * (share * (scores / scores.sum(-1, keepdims=True)).mean(0)).sum()
    z = (jnp.log(jnp.exp(logits).sum(-1)) ** 2).mean()
    return (y.reshape(x.shape) * cotangent).sum() + BALANCE * balance + Z * z


@pytest.mark.parametrize("case", only([("softmax", 0.6), ("top2", None), ("topk, probs", None)], CASES))
def test_gradients_of_the_block(case):
    name, capacity = case
    router = RouterConfig(num_experts=EXPERTS, **RULES[name])
    weights, x, cotangent = problem(router)
    (d_weights, d_x), (chosen, counts) = jax.tree.map(np.asarray, ours(router, capacity, weights, x, cotangent))
    drops = capacity is not None or router.drops
    assert (chosen >= 0).any() and (chosen < 0).any() == drops
    got = {name: d for name, d in d_weights.items() if name != "selection_bias"} | {"x": d_x}
    if router.selection_bias:
        assert not d_weights["selection_bias"].any()
    if name == "top2":  # whose balance loss counts first choices
        counts = np.bincount(np.argmax(x.reshape(-1, WIDTH) @ weights["router"][0].T, -1), minlength=EXPERTS)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), weights | {"x": x})
        masks = frozen(router, wide, wide["x"], chosen)
        loss = jax.jit(lambda w: dense(router, masks, counts / counts.sum(), cotangent, w, w["x"]))
        exact = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(wide))
        rng = np.random.default_rng(9)
        for part, value in got.items():
            assert np.abs(value - exact[part]).max() <= 1e-4 * np.abs(exact[part]).max(), part
            direction = rng.standard_normal(value.shape) + np.sign(value)
            ahead, behind = (float(loss(wide | {part: wide[part] + h * direction})) for h in (1e-6, -1e-6))
            assert abs((value * direction).sum() - (ahead - behind) / 2e-6) <= 1e-4 * np.abs(value * direction).sum(), (
                part
            )
