"""`shard`: a model over a mesh of devices; `gather`: back onto one."""

from jax.sharding import Mesh

from .axes import RULES, Axes
from .model import Model
from .placement import Placement
from .sharding import Sharding
from .sharding.place import placed, unit_of, whole
from .weights import flattened, nested, parameters


def shard(model: Model, mesh: Mesh, rules: Axes = RULES, placement: Placement | None = None) -> Model:
    """The same model over the devices of `mesh`: each with its share of the weights and of the work.

    `rules`: the mesh axes that each logical axis is cut along. What does not come out even is filled up: heads, hidden
    units, experts and words with zeros, heads of keys and values by repetition (docs/sharding.md). `placement`: which
    experts each rank holds (`moe_jax.balance`); None: as many as the others, in order. Weights are moved parameter by
    parameter; `model` keeps its own. Raises `ValueError` for axes that the mesh does not have, for experts
    of a pyramid that do not divide, and for quantised kernels that would be cut inside a block.

    >>> from moe_jax.model import Model, tiny_config
    >>> from moe_jax.sharding import make_mesh
    >>> shard(Model.initialize(tiny_config()), make_mesh())([[1, 2, 3]]).shape
    (1, 3, 96)
    """
    model = gather(model)
    flat, table = flattened(model.arrays()), parameters(model.architecture)
    sharding = Sharding(mesh, rules, model.exchange, unit_of(flat), placement)
    shares = sharding.shares(model.architecture)
    moved = {name: placed(name, array, shares[name], table[name].shape, sharding) for name, array in flat.items()}
    return Model(model.config, nested(moved | sharding.tables()), model.generation, model.named, sharding)


def gather(model: Model) -> Model:
    """A sharded model on the default device, as it was before. One that is not sharded is returned as it is.

    >>> from moe_jax.model import Model, tiny_config
    >>> from moe_jax.sharding import make_mesh
    >>> gather(shard(Model.initialize(tiny_config()), make_mesh())).sharding is None
    True
    """
    sharding = model.sharding
    if sharding is None:
        return model
    flat, table, shares = flattened(model.arrays()), parameters(model.architecture), sharding.shares(model.architecture)
    found = {name: whole(name, flat[name], shares[name], table[name].shape, sharding) for name in table}
    return Model(model.config, nested(found), model.generation, model.named)
