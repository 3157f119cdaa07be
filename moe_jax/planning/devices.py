"""Devices that programs are planned for: what they have, and how to compile for them without having them."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from .cuda import TARGETS


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, as JAX counts them.

    `memory`: bytes that a program may have, None: a part of this machine's. `bandwidth`: of its memory, bytes/s.
    `flops`: of dense bfloat16 products, 1/s. `link`: bytes/s that it can send to its neighbours, all links together,
    one way. `node`: so many devices in a row have such links; the others are reached at `network` bytes/s.
    """

    name: str
    memory: float | None
    bandwidth: float
    flops: float
    link: float
    node: int | None = None
    network: float = 0.0


#: The devices by the first word of a topology. TPUs: memory is what libtpu 0.0.42 says is available when a program
#: needs more; bandwidth, FLOP/s and links are those of https://docs.cloud.google.com/tpu/docs/{v5e,tpu7x}, per chip,
#: links halved, since the pages give both ways together (v5p: 1200 GB/s). A chip of tpu7x is two devices. GPUs: memory
#: is that of XLA's target files (`cuda.py`); the rest is of NVIDIA's data sheets of H100 and H200 SXM, without
#: sparsity; NVLink (900 GB/s both ways) joins eight, beyond there is a 400 Gbit/s network card each, as in DGX systems.
DEVICES = {
    "v5e": Device("TPU v5e", 15.75 * 2**30, 819e9, 197e12, 200e9),
    "v5p": Device("TPU v5p", 95.74 * 2**30, 2765e9, 459e12, 600e9),
    "v6e": Device("TPU v6e", 31.25 * 2**30, 1638e9, 918e12, 400e9),
    "tpu7x": Device("TPU7x core", 94.75 * 2**30, 3690e9, 1153.5e12, 300e9),
    "h100": Device("H100 SXM", 84942979072, 3352e9, 989e12, 450e9, 8, 50e9),
    "h200": Device("H200 SXM", 151397597184, 4800e9, 989e12, 450e9, 8, 50e9),
    # no particular machine: two cores with AVX-512; all devices share one memory, and copy within it
    "cpu": Device("CPU", None, 20e9, 200e9, 20e9),
}
_TPUS = ("v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for. `compiler`: whose programs these are; `note`: what is not as on the devices, "" nothing.

    `device`: what each of `devices` has, with its memory.
    """

    text: str
    device: Device
    devices: tuple[Any, ...]
    compiler: str
    note: str = ""


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """The kind of device and the sizes in "v5p:8x8x4" or "h100:8"; `ValueError` for others.

    >>> parse("v5p:8x8x4"), parse("h100:8")
    (('v5p', (8, 8, 4)), ('h100', (8,)))
    """
    kind, _, sizes = text.partition(":")
    kind = {"v7": "tpu7x", "v7x": "tpu7x"}.get(kind, kind)
    if kind not in DEVICES:
        raise ValueError(f"topology: {text!r}, expected one of {', '.join(DEVICES)} and a size, such as v5p:8x8x4")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or 0 in (shape := tuple(int(n) for n in sizes.split("x"))):
        raise ValueError(f"topology: {text!r}, expected a size behind the colon, such as v5p:8x8x4 or h100:8")
    if kind not in _TPUS and len(shape) > 1:
        raise ValueError(f"topology: {text!r}, {kind} takes a number of devices, such as {kind}:{math.prod(shape)}")
    return kind, shape


def open_topology(text: str) -> Topology:
    """The devices that `text` names, see `parse`; none of them need be there.

    TPUs: those of libtpu's compiler. GPUs: those of JAX's CUDA plugin where it is installed, else emulated CPU devices
    in their place. `cpu:N`: emulated CPU devices, which JAX must not have been started with fewer of.
    Raises `ValueError` for names that there are not, for sizes that do not exist, and without libtpu.
    """
    kind, shape = parse(text)
    device, count = DEVICES[kind], math.prod(shape)
    if kind in _TPUS:
        return Topology(text, device, _tpus(text, kind, shape), f"libtpu {importlib.metadata.version('libtpu')}")
    if kind == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count
        device = dataclasses.replace(device, memory=memory)
        return Topology(text, device, _cpus(text, count), f"XLA for CPUs, jaxlib {jax.lib.__version__}")
    try:
        return Topology(text, device, _gpus(kind, count), f"XLA for CUDA, jaxlib {jax.lib.__version__}")
    except _NO_CUDA as error:
        note = (
            f"temporaries and collectives are those of XLA's CPU compiler, not of a GPU's: JAX's CUDA plugin is "
            f"not usable here ({_first_line(error)}); pip install 'jax[cuda13]' makes it so, no GPU needed"
        )
        return Topology(text, device, _cpus(text, count), f"XLA for CPUs, jaxlib {jax.lib.__version__}", note)


def _tpus(text: str, kind: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology: {text} needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'")
    # it would ask Google's metadata server which TPU this is, and take one that is there for itself
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    sizes = "x".join(map(str, shape))
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{sizes}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"topology: libtpu has no {kind}:{sizes} ({_first_line(error)})") from error
    return tuple(found.devices)


#: What a CUDA plugin that is not there, or does not start, is reported by.
_NO_CUDA = (RuntimeError, ValueError, NotImplementedError, ImportError, KeyError)


def _gpus(kind: str, count: int) -> tuple[Any, ...]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ImportError("it is not installed")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of the driver, which no compiler needs
    per_host = math.gcd(count, DEVICES[kind].node or 1)
    name = f"1x{count // per_host}x{per_host}"  # slices, hosts, devices of a host
    return tuple(topologies.get_topology_desc(platform="cuda", target_config=TARGETS[kind], topology=name).devices)


def _cpus(text: str, count: int) -> tuple[Any, ...]:
    with contextlib.suppress(RuntimeError):  # JAX may be running
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.values["jax_num_cpu_devices"]))
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(f"topology: {text} needs {count} CPU devices, JAX was started with {len(found)}")
    return tuple(found[:count])


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
