"""The expert MLP operation: signatures, checks and choice of implementation."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dims import Array as AnyArray
from ..dims import check_layer
from ..experts import Experts
from ..plan import Plan
from ..registry import Implementation, Operation
from ..routing import route_tokens
from . import mosaic_gpu, tpu, triton_row, xla_capacity, xla_ragged, xla_tiles


def _adapted(run, *, adds=False, expects=False):
    """`run` with what it does not do by itself: XLA adds the residual, and the number of rows to expect is ignored."""

    def call(*args):
        *args, residual, expected = args
        y = run(*args, *[residual] * adds, *[expected] * expects)
        return y if adds or residual is None else residual + y

    return call


OPERATION = Operation(
    "routed_mlp",
    {
        "triton_row": Implementation(_adapted(triton_row.routed_mlp, adds=True), triton_row.refuse, platform="cuda"),
        "mosaic_gpu": Implementation(_adapted(mosaic_gpu.routed_mlp), mosaic_gpu.refuse, platform="cuda"),
        "tpu": Implementation(_adapted(tpu.routed_mlp, expects=True), tpu.refuse, platform="tpu"),
        "xla_tiles": Implementation(_adapted(xla_tiles.routed_mlp)),
        "xla_ragged": Implementation(_adapted(xla_ragged.routed_mlp), by_choice=False),
        "mosaic_gpu_interpreted": Implementation(
            _adapted(mosaic_gpu.interpreted), mosaic_gpu.refuse_interpreted, by_choice=False
        ),
        "triton_row_interpreted": Implementation(
            _adapted(triton_row.interpreted, adds=True), triton_row.refuse, by_choice=False
        ),
        "tpu_interpreted": Implementation(_adapted(tpu.interpreted, expects=True), tpu.refuse, by_choice=False),
    },
)


def routed_mlp(
    x: Float[AnyArray, "G D"],
    ids: Int[AnyArray, "G A"],
    weights: Float[AnyArray, "G A"],
    experts: Experts,
    *,
    plan: Plan | None = None,
    layer: int | Int[AnyArray, ""] | None = None,
    residual: Float[AnyArray, "G D"] | None = None,
    expected: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "G D"]:
    """`y[g] = sum over a of weights[g, a] * expert[ids[g, a]](x[g])`, without dropping.

    Args: `x` `[G, D]`, `ids` int `[G, A]` (an id outside `[0, E)` takes no time and adds nothing, whatever its weight),
    `weights` `[G, A]` (summed up in float32), `experts` one layer's, or a stack `[L, E, ...]` addressed by the integer
    `layer`, which may be traced (the stack is never sliced by layer). `plan`: the plan of these ids, if the caller has
    one. `residual` `[G, D]` is added to the result. `expected`: about how many ids are inside, where others are another
    device's; `tpu` makes room for as many rows, and takes further passes for more. `implementation`: `triton_row`
    (CUDA, one token, kernels with the contraction last, in bfloat16, float16 or int8; chosen there), `mosaic_gpu`
    (kernels for Hopper GPUs, bfloat16 or float16, D and F multiples of 64; chosen there), `tpu` (one kernel, bfloat16,
    float32 or int8 with a scale for each output; chosen on TPUs), `xla_tiles` (a loop over the tiles of the plan;
    chosen elsewhere) or `xla_ragged` (`jax.lax.ragged_dot`). All are differentiable.
    Returns `[G, D]` in x's dtype. Raises `ValueError` for shapes that do not fit each other, for a `layer` that there
    is not, unless it is traced, and for a named implementation that does not take the call or, when the program is
    lowered, the platform.

    >>> import jax.numpy as jnp
    >>> eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    >>> doubling = Experts(up=eye, down=2 * eye, activation="relu")
    >>> routed_mlp(jnp.ones((1, 4)), jnp.array([[0, 7]]), jnp.array([[0.5, 0.5]]), doubling).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    x, ids, weights = _check(x, ids, weights, experts, plan)
    if experts.stacked != (layer is not None):
        need = "needs" if experts.stacked else "takes no"
        raise ValueError(f"layer: experts of shape {experts.up.shape} {need} layer index, got {layer}")
    check_layer(layer, experts.up.shape[0])
    OPERATION.check(implementation)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: shape {residual.shape}, expected that of x, {x.shape}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual: dtype {residual.dtype}, expected that of x, {x.dtype}")
    if expected is not None and expected < 0:
        raise ValueError(f"expected: {expected} ids")
    if ids.size == 0:
        return jnp.zeros_like(x) if residual is None else jnp.asarray(residual)
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    with jax.named_scope("expert_mlp"):
        return OPERATION.run(implementation, x, ids, weights, experts, plan, layer, residual, expected)


def moe_block(
    x: Float[AnyArray, "G D"],
    router_weight: Float[AnyArray, "D E"],
    experts: Experts,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    implementation: str | None = None,
) -> Float[Array, "G D"]:
    """Router product, routing, experts and combine in one call.

    Args: `x` `[G, D]`, `router_weight` `[D, E]` (logits accumulate in float32), `experts` one layer's; `k`, `score`,
    `renormalize` as in `route`, `implementation` (of the experts) as in `routed_mlp`. Returns `[G, D]` in x's dtype.

    >>> import jax.numpy as jnp
    >>> eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    >>> moe_block(jnp.ones((1, 4)), jnp.zeros((4, 2)), Experts(up=eye, down=eye, activation="relu"), 2).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    if router_weight.shape != (x.shape[1], experts.num_experts):
        raise ValueError(f"router_weight: shape {router_weight.shape}, expected {(x.shape[1], experts.num_experts)}")
    ids, weights, _ = route_tokens(x, router_weight, k, score, renormalize)
    return routed_mlp(x, ids, weights, experts, implementation=implementation)


def capacity_mlp(
    x: Float[AnyArray, "G D"],
    ids: Int[AnyArray, "G A"],
    weights: Float[AnyArray, "G A"],
    position: Int[AnyArray, "G A"],
    experts: Experts,
    *,
    capacity: int,
) -> Float[Array, "G D"]:
    """`routed_mlp` through `capacity` slots per expert: static shapes, one batched product over all experts.

    `position` `[G, A]` is each choice's slot in its expert; a choice at or beyond `capacity` (or with an id outside
    `[0, E)`) is dropped: it adds nothing. Rows move by gather and scatter, so that a NaN row stays alone. Costs
    `E * capacity` rows whatever the routing. Method: GShard (arXiv:2006.16668), without its one-hot products.

    >>> import jax.numpy as jnp
    >>> eye = jnp.broadcast_to(jnp.eye(2), (1, 2, 2))
    >>> experts = Experts(up=eye, down=eye, activation="relu")
    >>> one = jnp.zeros((2, 1), int)
    >>> capacity_mlp(jnp.ones((2, 2)), one, one + 1.0, jnp.array([[0], [1]]), experts, capacity=1).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    x, ids, weights = _check(x, ids, weights, experts, None)
    if experts.stacked or capacity < 1 or position.shape != ids.shape:
        raise ValueError(
            f"capacity_mlp takes one layer's experts, capacity >= 1 and a position per choice; got experts "
            f"{experts.up.shape}, capacity {capacity}, position {position.shape} for ids {ids.shape}"
        )
    if ids.size == 0:
        return jnp.zeros_like(x)
    with jax.named_scope("expert_mlp"):
        return xla_capacity.capacity_mlp(x, ids, weights, jnp.asarray(position), experts, capacity)


def prepare(experts: Experts, implementation: str | None = None) -> Experts:
    """The same experts in the storage that `implementation` prefers; made once, when weights are made or loaded.

    `xla_tiles` reads kernels with the contraction last, the layout of checkpoints; `xla_ragged` the plain one;
    `mosaic_gpu` and `tpu` either.
    Experts that are in that storage are returned as they are, and so are quantised ones, which have one storage.
    """
    OPERATION.check(implementation)
    layout = {"xla_ragged": "in_out", "mosaic_gpu": experts.layout, "tpu": experts.layout}.get(implementation, "out_in")
    if experts.layout == layout or experts.quantized:
        return experts
    swapped = {n: getattr(experts, n) for n in ("gate", "up", "down")}
    swapped = {n: None if w is None else jnp.swapaxes(w, -1, -2) for n, w in swapped.items()}
    return dataclasses.replace(experts, **swapped, layout=layout)


def _check(x, ids, weights, experts, plan):
    """The operands as JAX arrays, if they fit each other."""
    x, ids, weights = jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)
    for name, array, kind in (("x", x, jnp.floating), ("ids", ids, jnp.integer), ("weights", weights, jnp.floating)):
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name}: dtype {array.dtype}, expected {kind.__name__}")
    if x.ndim != 2 or x.shape[1] != experts.width:
        raise ValueError(f"x: shape {x.shape}, expected [G, {experts.width}] for experts of shape {experts.up.shape}")
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or weights.shape != ids.shape:
        raise ValueError(f"ids and weights: shapes {ids.shape} and {weights.shape}, expected [{x.shape[0]}, A] both")
    if plan is not None and plan.slot.shape != ids.shape:
        raise ValueError(f"plan: made for ids of shape {plan.slot.shape}, got {ids.shape}")
    return x, ids.astype(jnp.int32), weights
