"""One step of training as a pure function of `State` and a batch; on one device or over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ..block_config import Architecture
from ..sharding import Sharding
from ..weights import Weights, nested, parameters
from . import forward
from .forward import Computation, Losses
from .settings import Optimizer, Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes: `weights` in float32, the optimizer's state, and `step`s taken."""

    weights: Weights
    optimizer: Any
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What a step did: the `losses` before it, the gradient's norm before clipping, and whether both are finite. If
    they are not, the state is what it was."""

    losses: Losses
    gradient_norm: Float[Array, ""]
    finite: Array


def schedule(settings: Optimizer, steps: int) -> Callable[[Any], Any]:
    """The learning rate of each step of `steps`."""
    peak, end, rest = settings.learning_rate, settings.learning_rate * settings.final, max(1, steps - settings.warmup)
    falls = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, settings.final),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }
    # the first step is not one of rate 0
    rises = optax.linear_schedule(peak / max(1, settings.warmup), peak, max(1, settings.warmup - 1))
    return optax.join_schedules([rises, falls[settings.schedule]()], [settings.warmup])


def optimizer(architecture: Architecture, settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with the settings' schedule, behind the clip; weight decay acts on matrices only."""
    matrices = nested({name: parameter.contracted for name, parameter in parameters(architecture).items()})
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    rate, (b1, b2) = schedule(settings, steps), settings.betas
    adam = optax.adamw(rate, b1, b2, settings.epsilon, weight_decay=settings.weight_decay, mask=matrices)
    return optax.chain(clip, adam)


def computation(settings: Settings, implementation: str | None = None) -> Computation:
    """What of the settings the loss depends on."""
    routing = settings.routing
    return Computation(
        dtype=jnp.dtype(settings.dtype),
        balance=routing.balance,
        z=routing.z,
        capacity_factor=routing.capacity_factor,
        remat=settings.remat,
        unroll=settings.unroll,
        implementation=implementation,
    )


class Training:
    """The compiled `step` and `evaluate` of a model under `settings`, the latter without a `capacity_factor`, as the
    model will be used; `sharding`: where its weights lie.

    Raises `ValueError` for biases to be moved that the model does not have, for a capacity beside the gate's own, and
    for a mesh along which a parameter does not come out even (it would be stored more than once, or padded).
    """

    def __init__(
        self,
        architecture: Architecture,
        settings: Settings,
        sharding: Sharding | None = None,
        implementation: str | None = None,
    ):
        self.architecture, self.settings, self.sharding = architecture, settings, sharding
        router = architecture.block.router
        if settings.routing.bias_rate and not (router and router.selection_bias):
            raise ValueError(f"bias_rate: {settings.routing.bias_rate}, but the model has no selection biases to move")
        if settings.routing.capacity_factor is not None and router is not None and router.rule is not None:
            raise ValueError("capacity_factor: the model's gate has one of its own")
        if sharding is not None:
            table = parameters(architecture)
            odd = [name for name, share in sharding.shares(architecture).items() if not share.plain(table[name].shape)]
            if odd:
                raise ValueError(f"mesh: {dict(sharding.sizes)} does not divide {', '.join(odd)}; training needs it to")
        self.computation = computation(settings, implementation)
        self.optimizer = optimizer(architecture, settings.optimizer, settings.steps)
        lies = self.shardings()
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=None if lies is None else (lies, None))
        dropless = dataclasses.replace(self.computation, capacity_factor=None)  # as the model will be used
        self.evaluate = jax.jit(functools.partial(self._loss, dropless))

    def start(self, weights: Weights) -> State:
        """The state before the first step: `weights` in float32, where they belong."""
        wide = lambda weights: jax.tree.map(lambda w: w.astype(jnp.float32), weights)
        return jax.jit(lambda weights: self._first(wide(weights)), out_shardings=self.shardings())(weights)

    def _first(self, weights):
        return State(weights, self.optimizer.init(weights), jnp.zeros((), jnp.int32))

    def abstract(self) -> State:
        """The state's shapes, dtypes and shardings, for restoring it."""
        table = parameters(self.architecture)
        weights = nested({name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in table.items()})
        shapes, lies = jax.eval_shape(self._first, weights), self.shardings()
        if lies is None:
            one = jax.sharding.SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
            lies = jax.tree.map(lambda _: one, shapes)
        return jax.tree.map(lambda s, lie: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lie), shapes, lies)

    def shardings(self) -> Any:
        """Where each part of a `State` lies on the mesh, moments with their weights; None: no mesh."""
        if self.sharding is None:
            return None
        at: Any = lambda spec: NamedSharding(self.sharding.mesh, spec)
        specs = jax.tree.map(at, self.sharding.specs(self.architecture), is_leaf=lambda s: isinstance(s, PartitionSpec))
        shapes = nested(
            {n: jax.ShapeDtypeStruct(p.shape, jnp.float32) for n, p in parameters(self.architecture).items()}
        )
        moments = jax.eval_shape(self.optimizer.init, shapes)
        everywhere = at(PartitionSpec())
        placed = optax.tree_map_params(
            self.optimizer, lambda _, spec: spec, moments, specs, transform_non_params=lambda _: everywhere
        )
        return State(specs, placed, everywhere)

    def put(self, windows: Any) -> Array:
        """A batch of windows `[B, T + 1]`, on the devices that run them."""
        return jnp.asarray(windows) if self.sharding is None else self.sharding.put(windows, self.sharding.batch)

    def _loss(self, computation, weights, windows, counted=None):
        if self.sharding is None:
            return forward.loss(self.architecture, computation, weights, windows, counted)
        counted = jnp.ones((len(windows), windows.shape[1] - 1), jnp.float32) if counted is None else counted
        local, rows = self.sharding.local(self.architecture), self.sharding.batch
        run = functools.partial(forward.loss, local, computation)
        given = self.sharding.specs(self.architecture), rows, rows
        everywhere = PartitionSpec()
        return self.sharding.map(run, given, everywhere)(weights, windows, counted)

    def gradient(self, weights: Weights, windows: Int[Array, "B T1"]) -> tuple[Weights, Losses]:
        """The gradient of the loss on a batch, the mean of its parts', and the losses."""
        parts = self.settings.optimizer.accumulation
        run = jax.grad(functools.partial(self._loss, self.computation), has_aux=True)
        if parts == 1:
            return run(weights, windows)
        # each part takes its windows from all devices alike
        cut = jnp.swapaxes(windows.reshape(-1, parts, windows.shape[1]), 0, 1)

        def add(total, windows):
            return jax.tree.map(jnp.add, total, run(weights, windows)), None

        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, weights, cut[0]))
        (gradient, losses), _ = jax.lax.scan(add, empty, cut)
        mean = lambda tree: jax.tree.map(lambda x: x / parts if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
        return mean(gradient), mean(losses)

    def _step(self, state: State, windows: Int[Array, "B T1"]) -> tuple[State, Report]:
        gradient, losses = self.gradient(state.weights, windows)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradient)
            updates, moments = self.optimizer.update(gradient, state.optimizer, state.weights)
            weights = optax.apply_updates(state.weights, updates)
            weights = self._moved_biases(weights, state.weights, losses.counts)
            finite = jnp.isfinite(losses.cross_entropy) & jnp.isfinite(norm)
            new = State(weights, moments, state.step + 1)
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return new, Report(losses, norm, finite)

    def _moved_biases(self, weights, before, counts):
        """Selection biases, which no gradient reaches, one step against their experts' loads (arXiv:2408.15664)."""
        rate = self.settings.routing.bias_rate
        if not (self.architecture.block.router and self.architecture.block.router.selection_bias):
            return weights
        mean = counts.mean(1, keepdims=True)
        moved = before["moe"]["selection_bias"] + rate * jnp.sign(mean - counts)
        return weights | {"moe": weights["moe"] | {"selection_bias": moved}}
