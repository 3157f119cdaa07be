"""Named implementations of an operation, and the choice between them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .dims import Array


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    `refuse`: takes the arguments of `run` and says why it cannot serve them, None if it can; looks at types, shapes
    and options only. `platform`: the only platform it runs on ("cuda", "tpu"), None for all. `by_choice`: false for
    what runs only when it is named (interpreters, slower alternatives).
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *args: None
    platform: str | None = None
    by_choice: bool = True


class Operation:
    """An operation's implementations by name, best first.

    Named, an implementation runs or an error says why it cannot: `ValueError` while tracing for a call that it does
    not take, and when the program is lowered for a platform that it does not run on. Not named, the first that takes
    the call runs, decided for each platform when the program is lowered for it.

    >>> double = Operation("double", {"plain": Implementation(lambda x: 2 * x)})
    >>> double.run(None, 3), double.chosen("cuda", 3)
    (6, 'plain')
    """

    def __init__(self, name: str, implementations: dict[str, Implementation]):
        self.name = name
        self.implementations = implementations

    def check(self, name: str | None) -> None:
        """`ValueError` for a name that is neither None nor one of the implementations."""
        if name is not None and name not in self.implementations:
            known = ", ".join(self.implementations)
            raise ValueError(f"implementation: {name!r} is no implementation of {self.name}; there are: {known}")

    def chosen(self, platform: str, *args: Any) -> str:
        """Name of what runs on `platform` when none is named."""
        for name, one in self.implementations.items():
            if one.by_choice and one.platform in (None, platform) and one.refuse(*args) is None:
                return name
        reasons = "; ".join(f"{name}: {one.refuse(*args)}" for name, one in self.implementations.items())
        raise ValueError(f"{self.name}: no implementation for {platform} takes this call ({reasons})")

    def run(self, implementation: str | None, *args: Any) -> Any:
        """The operation on `args`, by the implementation of that name, or by the best that takes the call."""
        self.check(implementation)
        if implementation is not None:
            one = self.implementations[implementation]
            if reason := one.refuse(*args):
                raise ValueError(f"implementation: {self.name} cannot run as {implementation!r}: {reason}")
            return one.run(*_only_on(one.platform, f"{self.name} as {implementation!r}", args))
        everywhere = self.chosen("", *args)
        platforms = sorted({one.platform for one in self.implementations.values()} - {None})
        special = tuple(
            (platform, name) for platform in platforms if (name := self.chosen(platform, *args)) != everywhere
        )
        if not special:
            return self.implementations[everywhere].run(*args)
        leaves, structure = jax.tree.flatten(args)
        arrays = [leaf for leaf in leaves if isinstance(leaf, Array)]
        options = tuple(None if isinstance(leaf, Array) else leaf for leaf in leaves)
        return _by_platform(self, everywhere, special, structure, options)(arrays)


@functools.lru_cache(1024)
def _by_platform(operation, everywhere, special, structure, options):
    """The operation as a function of its arrays alone, one for equal options: outside `jit` it compiles once."""

    def run(name, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if option is None else option for option in options]
        return operation.implementations[name].run(*jax.tree.unflatten(structure, leaves))

    branches = {platform: functools.partial(run, name) for platform, name in special}
    default = functools.partial(run, everywhere)
    return jax.jit(lambda arrays: jax.lax.platform_dependent(arrays, default=default, **branches))


def _only_on(platform: str | None, what: str, args: Sequence[Any]) -> Sequence[Any]:
    """`args`, the first (an array) tied to a check that refuses to be lowered for another platform."""
    if platform is None:
        return args
    first, *rest = args
    return _only_on_p.bind(jax.numpy.asarray(first), platform=platform, what=what), *rest


_only_on_p = Primitive("moe_jax_only_on")
_only_on_p.def_impl(lambda x, **params: jax.jit(lambda x: _only_on_p.bind(x, **params))(x))
_only_on_p.def_abstract_eval(lambda x, **params: x)


def _lower_only_on(context, x, *, platform, what):
    targets = context.module_context.platforms
    if any(target != platform for target in targets):
        raise ValueError(f"implementation: {what} runs on {platform}, the program is made for {', '.join(targets)}")
    return [x]


mlir.register_lowering(_only_on_p, _lower_only_on)
ad.deflinear2(_only_on_p, lambda cotangent, x, **params: [cotangent])
batching.defvectorized(_only_on_p)
