"""Which mesh axes the logical axes of a model lie along, and sums over them."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """Mesh axes by logical axis; none: every device holds all of it.

    `batch`: rows of a batch, and of the cache. `experts`: each device holds some experts, whole. `heads`: heads of
    attention, queries, keys and values. `hidden`: hidden widths of all MLPs, experts among them. `vocab`: embedding
    and head. A logical axis over several mesh axes is cut along the first one first.

    Raises `ValueError` for an axis that would cut tokens and what is added up for them over devices, or experts twice.

    >>> RULES.experts, Axes(batch=("data",), heads=("expert", "model")).heads
    (('expert',), ('expert', 'model'))
    """

    batch: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            if not isinstance(names, tuple) or any(not isinstance(name, str) for name in names):
                raise ValueError(f"{field.name}: {names!r} is not a tuple of names of mesh axes")
            if len(set(names)) < len(names):
                raise ValueError(f"{field.name}: {names} names an axis twice")
        for name in ("heads", "hidden", "vocab"):
            if both := set(self.batch) & set(getattr(self, name)):
                raise ValueError(f"{name}: {sorted(both)} cuts the batch already, {self.batch}")
        if both := set(self.experts) & set(self.hidden):
            raise ValueError(f"hidden: {sorted(both)} cuts the experts already, {self.experts}")
        shared = set(self.experts) & set(self.batch)
        if shared and not set(self.experts) <= set(self.batch):
            raise ValueError(f"experts: of {self.experts} all or none may cut the batch, not {sorted(shared)}")

    def names(self) -> set[str]:
        """All mesh axes in use."""
        return {name for field in dataclasses.fields(self) for name in getattr(self, field.name)}

    def within(self, sizes: dict[str, int]) -> "Axes":
        """Without the mesh axes that have one device."""
        long = lambda names: tuple(name for name in names if sizes[name] > 1)
        return Axes(**{field.name: long(getattr(self, field.name)) for field in dataclasses.fields(self)})


#: The table of `moe_jax.make_mesh`'s axes: tokens are spread over the ranks that hold the experts.
RULES = Axes(batch=("data", "expert"), experts=("expert",), heads=("model",), hidden=("model",), vocab=("model",))

#: Tokens lie together on all ranks that hold experts: one sum over them a layer, where `RULES` takes two exchanges, but
#: each rank computes attention for all rows and holds their cache. Faster for steps of few rows (docs/sharding.md).
TOGETHER = dataclasses.replace(RULES, batch=("data",))

#: The tables by name.
NAMED = {"spread": RULES, "together": TOGETHER}


def add_up(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum of all devices' `x` along mesh axes, on each of them; `x` without axes."""
    return jax.lax.psum(x, axes) if axes else x


def gathered(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """All devices' `x`, one behind the other along `axis`, on each of them; `x` without mesh axes."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def own_part(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The device's equal part of `x` along `axis`, the inverse of `gathered`."""
    if not axes:
        return x
    size = x.shape[axis] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis)
