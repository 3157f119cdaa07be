"""Named implementations of an operation, and the choice between them."""

from collections.abc import Callable, Mapping


class Operation:
    """An operation's implementations by name; the first is the one that is chosen when none is named.

    A named implementation runs or raises; it never falls back to another one.

    >>> Operation("double", {"plain": lambda x: 2 * x}).choose(None)(3)
    6
    """

    def __init__(self, name: str, implementations: Mapping[str, Callable]):
        self.name = name
        self.implementations = dict(implementations)
        self.default = next(iter(self.implementations))

    def choose(self, implementation: str | None) -> Callable:
        """The function behind `implementation`, or the default for None; `ValueError` for an unknown name."""
        name = self.default if implementation is None else implementation
        if name not in self.implementations:
            known = ", ".join(self.implementations)
            raise ValueError(f"implementation: {name!r} is no implementation of {self.name}; there are: {known}")
        return self.implementations[name]
