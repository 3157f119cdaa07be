"""The programs of generation for weights that do not exist, compiled for devices that need not be there."""

import contextlib
import dataclasses
import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.mxfp4 import GROUP
from pallas_kernels.quantized import is_quantized

from .. import engine
from ..axes import NAMED
from ..config import ModelConfig
from ..exchange import check
from ..generation import _sizes, bucket  # the one rule for what is compiled
from ..model import Model
from ..random_weights import draw, stored_forms
from ..sampling import make_sampler
from ..sharding import Sharding, leaf_specs
from ..sharding.place import placed
from ..weights import Weights, flattened, nested, parameters

Stage = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run: `batch` rows of up to `context` tokens, the last `new` of them generated.

    `dtype` of weights and cache; `quantize` None, "int8" (with one scale for `group_size` inputs, None: a row) or
    "mxfp4", as in `Model.initialize`; `cache`: None or "int8"; `exchange`: by name, None to choose; `rules`: a table
    of `axes.NAMED`.
    Raises `ValueError` for values out of range and more tokens than the model's context.
    """

    name: str
    config: ModelConfig
    batch: int
    context: int
    new: int = 128
    dtype: str = "bfloat16"
    quantize: str | None = None
    group_size: int | None = None
    cache: Literal["int8"] | None = None
    exchange: str | None = None
    rules: str = "spread"

    def __post_init__(self):
        for name in ("batch", "context", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")
        if self.new >= self.context:
            raise ValueError(f"context: {self.context} tokens, of which {self.new} are new, leave none for the prompt")
        if self.context > (most := self.config.architecture.context):
            raise ValueError(f"context: {self.context} tokens exceed the model's {most}")
        check(self.exchange)
        if self.rules not in NAMED:
            raise ValueError(f"rules: {self.rules!r} is no table; there are: {', '.join(NAMED)}")
        stored_forms(parameters(self.config.architecture), self.quantize, self.group_size)

    @property
    def unit(self) -> int:
        """Inputs that are stored together, see `Sharding`."""
        return self.group_size or (GROUP if self.quantize == "mxfp4" else 1)

    def sharding(self, mesh: jax.sharding.Mesh) -> Sharding:
        """The model's over a mesh of `make_mesh`."""
        return Sharding(mesh, NAMED[self.rules], self.exchange, self.unit)

    def rows(self, sharding: Sharding) -> int:
        """Rows on each device; the last ones may be none."""
        return -(-self.batch // sharding.rows)

    def sizes(self, sharding: Sharding) -> tuple[int, engine.Sizes]:
        """Columns of the prompt and what is compiled, as `generate` chooses both; the cache as long as it will be."""
        like = Model(self.config, {"embedding": jax.ShapeDtypeStruct((), self.dtype)})
        room = bucket(self.new)
        width, sizes, full = _sizes(like, self.rows(sharding), self.context - self.new, room)
        return width, dataclasses.replace(sizes, capacity=full, cache=self.cache)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled program takes on each device, by its own `memory_analysis()`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All that is held while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its memory and its text; or, if its compiler found no room, what it said. In `seconds`."""

    memory: Memory | None
    text: str
    refusal: str
    seconds: float


def abstract_weights(job: Job, sharding: Sharding) -> Weights:
    """The weights that `Model.initialize` would put on the mesh, as shapes with shardings."""
    architecture = job.config.architecture
    table, shares = parameters(architecture), sharding.shares(architecture)
    forms = stored_forms(table, job.quantize, job.group_size)

    def make(name, key):
        one = draw(key, name, table[name], jnp.dtype(job.dtype), forms.get(name), job.group_size)
        return placed(name, one, shares[name], table[name].shape, sharding)

    made = {name: jax.eval_shape(functools.partial(make, name), jax.random.key(0)) for name in table}
    weights = nested(made)
    specs = leaf_specs(weights, sharding.specs(architecture))
    return jax.tree.map(functools.partial(_lying, sharding), weights, specs)


def abstract_state(job: Job, sharding: Sharding, weights: Weights) -> engine.State:
    """What the prefill hands to the steps, with the cache at its full length."""
    arguments, _ = _prefill_arguments(job, sharding, weights)
    static, rest = arguments[:3], arguments[3:]
    state, _ = jax.eval_shape(lambda *given: engine.prefill(*static, *given, sharding=sharding), *rest)
    parts, specs = engine._parts(state), engine._specs(job.config.architecture, sharding)
    entries = {name: jax.tree.map(lambda a, s=specs["entries"][name]: _lying(sharding, a, s), entry)
               for name, entry in parts.pop("entries").items()}  # fmt: skip
    others = {name: None if a is None else _lying(sharding, a, specs[name]) for name, a in parts.items()}
    return engine._joined(others | {"entries": entries})


def device_bytes(tree: Any) -> int:
    """Bytes of the parts that each device holds of abstract arrays."""
    sizes = ((a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(tree))
    return sum(int(np.prod(shape, dtype=np.int64)) * size for shape, size in sizes)


def weight_bytes(weights: Weights) -> dict[str, int]:
    """`device_bytes` of each parameter."""
    return {name: device_bytes(array) for name, array in flattened(weights).items()}


def lower(job: Job, sharding: Sharding, stage: Stage, weights: Weights) -> Any:
    """`engine.prefill` or `engine.step` for the mesh's devices, lowered."""
    with _traced_for(sharding):
        if stage == "prefill":
            arguments, _ = _prefill_arguments(job, sharding, weights)
            return engine.prefill.lower(*arguments, sharding=sharding)
        state, (_, request) = abstract_state(job, sharding, weights), _prefill_arguments(job, sharding, weights)
        return engine.step.lower(job.config.architecture, weights, state, request, sharding=sharding)


def compile_stage(job: Job, sharding: Sharding, stage: Stage, weights: Weights) -> Compiled:
    """The program of a stage, compiled; a compiler that finds too little memory is no error."""
    begin = time.perf_counter()
    try:
        made = lower(job, sharding, stage, weights).compile()
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(None, "", str(error).strip().splitlines()[0], time.perf_counter() - begin)
    m = made.memory_analysis()
    memory = Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
    )
    return Compiled(memory, made.as_text(), "", time.perf_counter() - begin)


def _prefill_arguments(job: Job, sharding: Sharding, weights: Weights) -> tuple[tuple[Any, ...], engine.Request]:
    """What `generate` calls `engine.prefill` with, greedy, and the request among it."""
    width, sizes = job.sizes(sharding)
    rows = job.rows(sharding) * sharding.rows
    request = engine.Request(
        sampler=make_sampler(),
        key=None,
        eos=np.zeros(1, np.int32),
        pad=0,
        total=job.context,
        forced=None,
        implementation=None,
    )
    ids = _lying(sharding, jax.ShapeDtypeStruct((rows, width), jnp.int32), sharding.batch)
    lengths = _lying(sharding, jax.ShapeDtypeStruct((rows,), jnp.int32), sharding.batch)
    return (job.config.architecture, sizes, False, weights, ids, lengths, None, request), request


def _lying(sharding: Sharding, array: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    assert not is_quantized(array)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(sharding.mesh, spec))


def _traced_for(sharding: Sharding) -> contextlib.AbstractContextManager:
    """Kernels are cut for the device that is traced for, which a mesh of absent ones must tell."""
    if sharding.mesh.devices.flat[0].platform == "cpu":
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
