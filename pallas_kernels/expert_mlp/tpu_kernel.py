"""One TPU kernel for an expert MLP: for each tile of rows its expert's weights pass by once, in blocks of hidden units.

A step brings rows of gate and up and columns of down for a block of hidden units, makes these and adds what they give
to the output's sum, so that hidden vectors are never written. What a step needs comes while the one before runs;
nothing comes twice, nothing for tiles without work. The grid: cores of a device, and steps of a core: its even part of
all tiles' blocks in place, where cores add up parts of one sum, else of the tiles.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..activations import Activation
from ..quantized import is_quantized
from .tpu_tilings import Tiling

NAME = "moe_jax_expert_mlp_tpu"
#: Output columns of one product.
_COLUMNS = 512


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel is made for: `cores` of a device, bytes that each may take, and how to run it."""

    tiling: Tiling
    cores: int
    vmem: int
    interpret: Any = False


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernel's body knows of its operands; `parts`: their names, in order."""

    tiling: Tiling
    width: int
    hidden: int
    activation: Activation
    transposed: bool
    parts: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """Of hidden units."""
        return pl.cdiv(self.hidden, self.tiling.hidden)


def expert_mlp(call: Call, rows, routing, tile_expert, num_tiles, experts, layer, tiles: float):
    """The experts' outputs: for each token their weighted sum in place, else those of each tile's rows.

    `rows [G, D]`, or `[tiles * rows, D]` gathered; `routing`: ids and weights `[G, A]`, in place only; `tile_expert
    [tiles]` and how many of them hold work; `experts` of one layer, or all with the index of a `layer`; `tiles`: about
    how many of them are expected to hold work, which XLA and whoever reads the compiled program are told.
    Returns `[cores, G, D]` in place, parts of a sum in float32 if there are several, else an array like `rows`, where
    rows of tiles without work mean nothing.
    """
    tiling, in_place = call.tiling, call.tiling.in_place
    first = jnp.zeros((), jnp.int32) if layer is None else layer * experts.num_experts
    parts = _operands(experts, layer)
    shape = _Shape(tiling, experts.width, experts.hidden, experts.activation, experts.layout == "out_in", tuple(parts))
    even = lambda n: lax.div(n + (call.cores - 1), jnp.int32(call.cores))
    some = jnp.maximum(num_tiles, 1)
    each = even(some * shape.blocks) if in_place else even(some) * shape.blocks
    scalars = tile_expert.astype(jnp.int32), jnp.stack([num_tiles, first, each]).astype(jnp.int32)
    place = functools.partial(_block_of, shape, len(tile_expert))
    size = (tiling.rows, experts.width)
    arrays, specs = [rows], [pl.BlockSpec(size, place("all" if in_place else "rows"))]
    if in_place:
        arrays += [routing[0], routing[1].astype(jnp.float32)]
        specs += [pl.BlockSpec(routing[0].shape, place("all"))] * 2
    arrays += parts.values()
    specs += [_spec(shape, name, array, place) for name, array in parts.items()]
    out_dtype = jnp.float32 if in_place and call.cores > 1 else rows.dtype
    out = jax.ShapeDtypeStruct((call.cores, *rows.shape) if in_place else rows.shape, out_dtype)
    out_spec = pl.BlockSpec((None, *size) if in_place else size, place("core" if in_place else "rows"))
    return pl.pallas_call(
        functools.partial(moe_jax_expert_mlp_tpu, shape=shape),
        name=NAME,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(call.cores, each),
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(size, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.vmem),
        cost_estimate=_cost(shape, tiles, arrays, out),
        interpret=call.interpret,
    )(*scalars, *arrays)


def _operands(experts, layer):
    """Arrays of weights by name: kernels of all layers, which are addressed, and their layer's scales and biases."""

    def own(array, columns):
        """`[E, 1, columns]` of the layer, in float32; a few rows, which are cut out before they are laid out anew."""
        if layer is not None:
            array = lax.dynamic_index_in_dim(array, layer, keepdims=False)
        return array.reshape(-1, 1, columns).astype(jnp.float32)

    found, flat = {}, experts.flat()
    for name in ("gate", "up", "down"):
        kernel, columns = getattr(flat, name), experts.width if name == "down" else experts.hidden
        if kernel is None:
            continue
        found[name] = kernel.values if is_quantized(kernel) else kernel
        if is_quantized(kernel):
            found[f"{name}_scale"] = own(getattr(experts, name).scales, columns)
        bias = getattr(experts, f"{name}_bias")
        if bias is not None:
            found[f"{name}_bias"] = own(bias, columns)
    return found


def _block_of(shape, tiles, kind):
    """The index map of an operand: which block of it a step needs. Tiles without work need the one before's."""

    def index(core, step, expert_ref, meta_ref):
        count, first = meta_ref[0], meta_ref[1]
        tile, block = _at(core, step, meta_ref, shape)
        if kind == "all":
            return 0, 0
        if kind == "core":
            return core, 0, 0
        if kind == "rows":  # rows of a tile without work are its own, or the last tile's again
            return jnp.minimum(tile, tiles - 1), 0
        expert = expert_ref[jnp.maximum(jnp.minimum(tile, count - 1), 0)]
        block = jnp.where(tile < count, block, shape.blocks - 1)
        return {
            "units as rows": (first + expert, block, 0),
            "units as columns": (first + expert, 0, block),
            "a number each unit": (expert, 0, block),
            "a number each output": (expert, 0, 0),
        }[kind]

    return index


def _at(core, step, meta_ref, shape):
    """The tile and the block of hidden units of a step."""
    at = core * meta_ref[2] + step
    return lax.div(at, jnp.int32(shape.blocks)), lax.rem(at, jnp.int32(shape.blocks))


def _spec(shape, name, array, place):
    """The block of an operand that a step needs."""
    units, down = shape.tiling.hidden, name.startswith("down")
    if name.endswith(("_scale", "_bias")):
        size, kind = (shape.width, "a number each output") if down else (units, "a number each unit")
        return pl.BlockSpec((None, 1, size), place(kind))
    if down != shape.transposed:
        return pl.BlockSpec((None, units, shape.width), place("units as rows"))
    return pl.BlockSpec((None, shape.width, units), place("units as columns"))


def _cost(shape, tiles, arrays, out):
    """What the kernel does for so many tiles: rows once, and of each tile's expert all weights."""
    each = sum(array.dtype.itemsize * array.shape[1] * array.shape[2] for array in arrays if array.ndim == 3)
    rows = tiles * shape.tiling.rows
    moved = [array for array in (*arrays, out) if shape.tiling.in_place and (array.ndim == 2 or array is out)]
    nbytes = sum(array.size * array.dtype.itemsize for array in moved)
    if not shape.tiling.in_place:
        nbytes = rows * shape.width * (arrays[0].dtype.itemsize + out.dtype.itemsize)
    products = sum(name in ("gate", "up", "down") for name in shape.parts) * shape.width * shape.hidden
    return pl.CostEstimate(
        flops=int(2 * rows * products),
        bytes_accessed=int(nbytes + tiles * each),
        transcendentals=int(rows * shape.hidden),
    )


# ---------------------------------------------------------------- inside the kernel


def moe_jax_expert_mlp_tpu(expert_ref, meta_ref, x_ref, *refs, shape):
    """One step: a block of hidden units of a tile, and what they add to the output."""
    in_place = shape.tiling.in_place
    routing, refs = (refs[:2], refs[2:]) if in_place else ((), refs)
    *given, out_ref, sum_ref = refs
    parts = dict(zip(shape.parts, given, strict=True))
    step = pl.program_id(1)
    tile, block = _at(pl.program_id(0), step, meta_ref, shape)
    begin = step == 0 if in_place else block == 0
    end = step == pl.num_programs(1) - 1 if in_place else block == shape.blocks - 1

    @pl.when(begin)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(tile < meta_ref[0])
    def _():
        hidden = _hidden(x_ref[...], parts, block, shape)
        chosen = _chosen(expert_ref[tile], *routing) if in_place else None
        _add_products(sum_ref, hidden, parts, block, chosen, shape)

    @pl.when(end)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _hidden(x, parts, block, shape):
    """The block's hidden units `[rows, units]`, zero beyond the last one."""

    def linear(name):
        y = _times(x, parts[name][...], shape.transposed)
        y = y * parts[f"{name}_scale"][...] if f"{name}_scale" in parts else y
        return y + parts[f"{name}_bias"][...] if f"{name}_bias" in parts else y

    hidden = shape.activation(linear("gate") if "gate" in parts else None, linear("up"))
    return _existing(hidden, 1, block, shape).astype(x.dtype)


def _existing(values, axis, block, shape):
    """`values` with zeros for what stands beyond the last hidden unit, which may be anything."""
    if shape.hidden % shape.tiling.hidden == 0:
        return values
    unit = block * shape.tiling.hidden + lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(unit < shape.hidden, values, jnp.zeros_like(values))


def _chosen(expert, ids_ref, weights_ref):
    """Which rows `[rows, 1]` chose an expert, and with what weight."""
    ids = ids_ref[...]
    hit = ids == expert
    weight = jnp.sum(jnp.where(hit, weights_ref[...], 0), axis=1, keepdims=True)
    return jnp.max(jnp.where(hit, 1, 0), axis=1, keepdims=True) > 0, weight


def _add_products(sum_ref, hidden, parts, block, chosen, shape):
    """Adds what the block's hidden units give, some columns at a time; rows that did not choose are left alone."""
    down = parts["down"]
    for start in range(0, shape.width, _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, shape.width))
        kernel = down[columns, :] if shape.transposed else down[:, columns]
        if jnp.issubdtype(kernel.dtype, jnp.floating):  # zeros times NaN are none, integers are never NaN
            kernel = _existing(kernel, 1 if shape.transposed else 0, block, shape)
        y = _times(hidden, kernel, shape.transposed)
        y = y * parts["down_scale"][:, columns] if "down_scale" in parts else y
        if "down_bias" in parts:
            y = y + jnp.where(block == 0, parts["down_bias"][:, columns], 0)
        if chosen is not None:
            y = jnp.where(chosen[0], y * chosen[1], 0)
        sum_ref[:, columns] += y


def _times(x, kernel, transposed):
    """`x [rows, in]` times a kernel, `[out, in]` if it is `transposed`; added up in float32."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = ((1,), (1 if transposed else 0,)), ((), ())
    return lax.dot_general(x, kernel.astype(x.dtype), dimensions, precision=exact, preferred_element_type=jnp.float32)
