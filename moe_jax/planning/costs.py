"""What a stage has to move, to compute and to send, by formula; and the time that a device takes for it at best."""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..benchmarks.work import _seen
from ..block_config import Architecture, AttentionConfig
from ..cache import entry_shapes
from ..sharding import Sharding
from ..weights import Weights, parameters
from .collectives import Collective
from .devices import Device
from .programs import Job, Stage, weight_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device: bytes that it has to read and write of its memory, and floating-point operations."""

    nbytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a stage takes at least, by each of its limits by itself.

    >>> Roofline(memory=2.0, compute=1.0, wire=0.5).limit
    'memory'
    """

    memory: float
    compute: float
    wire: float

    @property
    def limit(self) -> str:
        """The one that holds it back."""
        return max(dataclasses.asdict(self).items(), key=lambda pair: pair[1])[0]

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self.memory, self.compute, self.wire)

    @property
    def apart(self) -> float:
        """Seconds where nothing is sent while the device computes."""
        return max(self.memory, self.compute) + self.wire


def roofline(work: Work, sent: Iterable[Collective], device: Device) -> Roofline:
    """The least time for `work` and what a program sends; what stands in a branch does not count."""
    wire = sum(one.sent / _speed(one, device) for one in sent if not one.branch)
    return Roofline(work.nbytes / device.bandwidth, work.flops / device.flops, wire)


def _speed(one: Collective, device: Device) -> float:
    """Bytes per second that each device of a group can send: to others of its node, or beyond."""
    nodes = {number // device.node for number in one.devices} if device.node else {0}
    return device.link if len(nodes) == 1 else device.network


@dataclasses.dataclass(frozen=True)
class Passes:
    """How a stage runs on a device: `count` times through all layers, each time `rows` rows of `columns` tokens."""

    rows: int
    columns: int
    count: int

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return self.rows * self.columns


def passes(job: Job, sharding: Sharding, stage: Stage) -> Passes:
    """Those of the prefill's pieces, or of a decode step."""
    rows = job.rows(sharding)
    if stage == "decode":
        return Passes(rows, 1, 1)
    width, sizes = job.sizes(sharding)
    return Passes(sizes.rows, sizes.columns, -(-rows // sizes.rows) * (width // sizes.columns))


def work(job: Job, sharding: Sharding, stage: Stage, weights: Weights) -> Work:
    """What a device has to move and compute for the prefill, or for a row's last decode step.

    Weights are read once in each pass: all that is neither an expert nor a table of which rows are taken, and of the
    experts those that uniform routing is expected to hit. The cache is read as far as tokens see it, by the prefill
    written once. Operations are two for each weight that a token meets, and attention's products with what it sees;
    latent attention's in its absorbed form, the one that runs. Rows of the batch that are none count like others.
    """
    local, run = sharding.local(job.config.architecture), passes(job, sharding, stage)
    seen, rows = _columns(job, stage), job.rows(sharding)
    columns = seen if stage == "decode" else len(local.layers) * (job.context - job.new)
    nbytes = run.count * _weights_read(job, sharding, run, weights) + rows * columns * column_bytes(job, local)
    products, head = _products(job, sharding)
    flops = 2.0 * (run.count * run.tokens * products + rows * head) + rows * seen * _attention(local.block.attention)
    return Work(nbytes, flops)


def _weights_read(job: Job, sharding: Sharding, run: Passes, weights: Weights) -> float:
    """Bytes of weights that a pass reads."""
    architecture = job.config.architecture
    table, stored = parameters(architecture), weight_bytes(weights)
    experts = sum(size for name, size in stored.items() if table[name].experts)
    rows = sum(stored.get(name, 0) for name in ("positions", *(() if architecture.tied else ("embedding",))))
    return sum(stored.values()) - experts - rows + _hit(architecture, sharding, run) * experts


def _hit(architecture: Architecture, sharding: Sharding, run: Passes) -> float:
    """The share of its experts that a device is expected to run, if each token's are drawn evenly."""
    if not architecture.moe_layers:
        return 0.0
    mean = sum(architecture.expert_counts) / len(architecture.expert_counts)
    tokens = run.tokens * ranks_of_tokens(sharding)
    return 1 - (1 - min(1.0, architecture.block.router.top_k / mean)) ** tokens


def ranks_of_tokens(sharding: Sharding) -> int:
    """Over how many ranks of experts tokens are spread: all of them, or one where they lie together on all."""
    return math.prod(sharding.sizes[name] for name in sharding.axes.experts if name in sharding.axes.batch)


def _products(job: Job, sharding: Sharding) -> tuple[float, int]:
    """Weights on a device that a token of each row multiplies in the layers, and those of the head.

    Of the experts as many as even routing brings to each device.
    """
    architecture, router = job.config.architecture, job.config.architecture.block.router
    table, shares = parameters(architecture), sharding.shares(architecture)
    sizes = {}
    for name, parameter in table.items():
        whole = shares[name].stored_shape(parameter.shape)
        sizes[name] = math.prod(NamedSharding(sharding.mesh, shares[name].spec).shard_shape(whole))
    head = sizes["embedding" if architecture.tied else "head.kernel"]
    kernels = {name: size for name, size in sizes.items() if table[name].contracted}
    for name in ("embedding", "positions", "head.kernel"):
        kernels.pop(name, None)
    experts = float(sum(size for name, size in kernels.items() if table[name].experts))
    plain = sum(kernels.values()) - experts
    if experts:
        tokens = ranks_of_tokens(sharding)
        experts *= router.top_k * tokens * len(architecture.moe_layers) / sum(architecture.expert_counts)
    return plain + experts, head


def _columns(job: Job, stage: Stage) -> int:
    """Columns of the cache that a row's tokens see, all layers and tokens together."""
    positions = np.arange(job.context - job.new) if stage == "prefill" else np.array([job.context - 1])
    return sum(int(_seen(layer, positions).sum()) for layer in job.config.architecture.layers)


def _attention(config: AttentionConfig) -> int:
    """Operations for a token and a column that it sees, in one layer."""
    if config.latent is None:
        return 2 * config.num_heads * (config.head_dim + config.value_dim)
    return 2 * config.num_heads * (2 * config.latent.rank + config.latent.rotary_dim)


def column_bytes(job: Job, local: Architecture) -> int:
    """Bytes of one token's entries in one layer of a device's cache."""
    entries = entry_shapes(local.block.attention).values()
    if job.cache == "int8":  # with a float32 scale for each head
        return sum(math.prod(shape) + 4 * math.prod(shape[:-1]) for shape in entries)
    return sum(map(math.prod, entries)) * jnp.dtype(job.dtype).itemsize


def cache_bytes(job: Job, sharding: Sharding) -> int:
    """Bytes of a device's cache at its full length, and of the rows' lengths that go with it."""
    local, (_, sizes) = sharding.local(job.config.architecture), job.sizes(sharding)
    return job.rows(sharding) * (len(local.layers) * sizes.capacity * column_bytes(job, local) + 4)
