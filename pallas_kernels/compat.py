"""What differs between JAX versions, and what JAX says of the device that a program is made for."""

import importlib.util
import inspect
import re
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

# required in 0.10, deprecated in 0.11, gone in 0.12
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_TAKES_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty


#: Whether JAX's interpreter runs our Mosaic GPU kernels; that of 0.10 knows no `layout_cast` and deadlocks.
INTERPRETS_GPU = hasattr(plgpu, "InterpretGPUParams")


def interpret_gpu() -> Any:
    """The `interpret=` of a Mosaic GPU kernel that runs in JAX's interpreter."""
    module: Any = plgpu  # jax 0.10's has no such name
    return module.InterpretGPUParams()


def interpret_tpu(cores: int = 1) -> Any:
    """The `interpret=` of a TPU kernel in JAX's simulation: races are looked for, memory that is not written is NaN."""
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


def load_registers(ref: Any, layout: Any) -> jax.Array:
    """Inside a Mosaic GPU kernel: a slice of global memory in registers of the given layout."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def in_order(x: jax.Array) -> jax.Array:
    """`x` in the layout that it has outside of a program, on TPUs: XLA would else lay out a loop's whole array anew for
    the sake of a product with a part of it.

    >>> in_order(jax.numpy.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    straight = Layout(major_to_minor=tuple(range(x.ndim)))
    told = lambda x: with_layout_constraint(x, straight)
    return jax.lax.platform_dependent(x, tpu=told, default=lambda x: x)


def num_sms() -> int:
    """Multiprocessors of the GPU that is traced for; an H100's where it is not known.

    >>> num_sms()
    132
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    cores = described.num_cores if described is not None else getattr(_default_device(), "core_count", None)
    return cores or 132


def num_tpu_cores() -> int:
    """Cores that a TPU device has by itself, of the TPU that is traced for; 1 where it is not known.

    >>> num_tpu_cores()
    1
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    cores = described.num_cores if described is not None else getattr(_default_device(), "num_cores", None)
    return cores or 1


def device_kind() -> str:
    """Kind of the device that is traced for: of the mesh in force, else of the default device; "" if there is none.

    >>> isinstance(device_kind(), str)
    True
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return _default_device().device_kind


def launches_early() -> bool:
    """Whether the device that is traced for starts a kernel before the one ahead of it ends (Hopper and later).

    >>> launches_early()
    False
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return re.search(r"\b(G?H[128]00|H20|G?B[123]00)\b", described.device_kind) is not None
    capability = re.match(r"(\d+)\.", str(getattr(_default_device(), "compute_capability", "")))
    return capability is not None and int(capability[1]) >= 9


def no_cudnn() -> str | None:
    """Why JAX could not trace a call of cuDNN here; None if it can.

    >>> no_cudnn()
    "JAX's CUDA plugin is not installed..."
    """
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return None
    return "JAX's CUDA plugin is not installed where the program is made"


def _default_device() -> jax.Device:
    config: Any = jax.config
    default = config.jax_default_device
    return jax.local_devices(backend=default)[0] if default is None or isinstance(default, str) else default
