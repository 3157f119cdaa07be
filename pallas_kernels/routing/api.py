"""The routing operation: signature, checks and choice of implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..registry import Implementation, Operation
from . import router_triton, tpu, triton, xla

SCORES = ("softmax", "sigmoid", "sparsemixer")
OPERATION = Operation(
    "route",
    {
        "triton": Implementation(triton.route, triton.refuse, platform="cuda"),
        "tpu": Implementation(tpu.route, tpu.refuse, platform="tpu"),
        "xla": Implementation(xla.route),
        "triton_interpreted": Implementation(triton.interpreted, triton.refuse, by_choice=False),
        "tpu_interpreted": Implementation(tpu.interpreted, tpu.refuse, by_choice=False),
    },
)


def _multiply_and_route(x, router_weight, k, score, renormalize, bias, groups, top_groups, scale):
    logits = jnp.matmul(x, router_weight, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return OPERATION.run(None, logits, k, score, renormalize, bias, groups, top_groups, scale, 0.01, None)


TOKENS_OPERATION = Operation(
    "route_tokens",
    {
        "triton": Implementation(router_triton.route_tokens, router_triton.refuse, platform="cuda"),
        "xla": Implementation(_multiply_and_route),
        "triton_interpreted": Implementation(router_triton.interpreted, router_triton.refuse, by_choice=False),
    },
)


def route(
    logits: Float[AnyArray, "G E"],
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Float[AnyArray, " E"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    jitter: float = 0.01,
    forced: Int[AnyArray, "G A"] | None = None,
    implementation: str | None = None,
) -> tuple[Int[Array, "G A"], Float[Array, "G A"], Int[Array, " E"]]:
    """Choose `k` experts per token and weigh them, for every gate rule of the supported families.

    Scores `s` are `softmax(logits)` or `sigmoid(logits)`. Experts are ranked by `s + bias` (DeepSeek-V3's correction
    bias steers the choice and never enters the weights), within the best `top_groups` of `groups` groups (a group is
    ranked by its best expert for softmax, DeepSeek-V2; by the sum of its best two for sigmoid, DeepSeek-V3). Weights
    are the chosen `s`, divided by their sum if `renormalize`, times `scale`. `score="sparsemixer"` is Phi-MoE's rule
    at inference (arXiv:2409.12136): k = 2, each weight a softmax over the experts within `2 * jitter` of the best.

    Args: `logits` float `[G, E]` (computed in float32), `bias` `[E]`; `forced` int `[G, k]` replaces the choice where
    it is not negative, weighed by this call's scores (replayed routing).
    Returns: `ids` int32 `[G, k]`, best first; `weights` float32 `[G, k]`; `counts` int32 `[E]`, choices per expert.
    Raises `ValueError` for k outside `[1, E]`, groups that do not divide E, top_groups that leave fewer than k, and
    forced ids of E or more (their weights are NaN where `forced` is traced and cannot be looked at).

    >>> import jax.numpy as jnp
    >>> ids, weights, counts = route(jnp.array([[0.0, 2.0, 1.0, -1.0]]), 2)
    >>> ids.tolist(), [f"{w:.3f}" for w in weights[0]], counts.tolist()
    ([[1, 2]], ['0.731', '0.269'], [0, 1, 1, 0])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape [G, E], got {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits: dtype {logits.dtype}, expected floating")
    experts = logits.shape[1]
    _check(experts, k, score, bias, groups, top_groups)
    if forced is not None and forced.shape != (logits.shape[0], k):
        raise ValueError(f"forced: shape {forced.shape}, expected {(logits.shape[0], k)}")
    if forced is not None and not isinstance(forced, jax.core.Tracer) and (forced >= experts).any():
        raise ValueError(f"forced: id {forced.max()} of {experts} experts")
    return OPERATION.run(implementation, logits, k, score, renormalize, bias, groups, top_groups, scale, jitter, forced)


def route_tokens(
    x: Float[AnyArray, "G D"],
    router_weight: Float[AnyArray, "D E"],
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Float[AnyArray, " E"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Int[Array, "G A"], Float[Array, "G A"], Int[Array, " E"]]:
    """`route(x @ router_weight, ...)`, the product included: one operation where tokens are few.

    Arguments, results and errors as in `route`; logits accumulate in float32. `implementation`: `triton` (CUDA, up to
    64 tokens in bfloat16 or float16) or `xla`.

    >>> import jax.numpy as jnp
    >>> route_tokens(jnp.eye(2), jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]), 1)[0].tolist()
    [[1], [0]]
    """
    if x.ndim != 2 or router_weight.ndim != 2 or x.shape[1] != router_weight.shape[0]:
        raise ValueError(f"router_weight: shape {router_weight.shape}, expected [D, E] for x of shape {x.shape}")
    _check(router_weight.shape[1], k, score, bias, groups, top_groups)
    args = x, router_weight, k, score, renormalize, bias, groups, top_groups, scale
    return TOKENS_OPERATION.run(implementation, *args)


def _check(experts, k, score, bias, groups, top_groups):
    if not 1 <= k <= experts:
        raise ValueError(f"k: {k} experts per token out of {experts}")
    if score not in SCORES:
        raise ValueError(f"score: {score!r} is not one of {', '.join(SCORES)}")
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"groups: {top_groups} of {groups} groups do not fit {experts} experts")
    if top_groups * (experts // groups) < k:
        raise ValueError(f"top_groups: {top_groups} groups of {experts // groups} experts hold fewer than k={k}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias: shape {bias.shape}, expected {(experts,)}")
    if score == "sparsemixer" and (k != 2 or bias is not None or groups != 1):
        raise ValueError(f"score: sparsemixer chooses 2 experts without bias or groups, got k={k}, groups={groups}")
    if score == "sigmoid" and groups > 1 and experts // groups < 2:
        raise ValueError(f"groups: {groups} groups of one expert have no best two to be ranked by")
