"""One suite over every implementation of `linear`, against float64 NumPy; what is chosen and refused; lowering."""

import functools

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error

from pallas_kernels.linear import LayerNorm, RMSNorm, linear
from pallas_kernels.linear.api import OPERATION
from pallas_kernels.quantized import QuantizedArray, quantize, quantize_runs

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16 = ml_dtypes.bfloat16
ANYWHERE = [name for name, one in OPERATION.implementations.items() if not one.platform]
LAYERS, EPSILON = 3, 1e-2

# rows, K, N of each kernel and what there is beside: who has a bias, `store` of int8 ("row" or a group size).
CASES = {
    "one row": (1, 64, [40], dict()),
    "q, k and v": (1, 160, [130, 24, 10], dict(norm=True, biases=(1, 0, 1), stacked=True)),
    "a router": (1, 96, [61], dict(norm=True, biases=(1,), normed=True, stacked=True, out=np.float32)),
    "an output": (1, 200, [97], dict(biases=(1,), residual=True, dtype=np.float16)),
    "more than is read at once": (1, 2880, [20], dict(norm=True, normed=True, dtype=np.float16, stacked=True)),
    "int8": (1, 160, [35, 1], dict(norm=True, biases=(1, 1), store="row", stacked=True)),
    "int8 in groups": (1, 96, [35], dict(store=32, residual=True)),
    "int8 in groups of a stack": (1, 1536, [19], dict(store=128, norm=True, stacked=True, dtype=np.float16)),
    "int8 in a group": (1, 64, [33], dict(store=64, stacked=True)),
    "two rows": (2, 160, [50, 24, 10], dict(norm=True, biases=(1, 0, 1), normed=True, stacked=True)),
    "five rows": (5, 96, [61], dict(norm=True, biases=(1,), stacked=True, out=np.float32)),
    "33 rows": (33, 2880, [37], dict(biases=(1,), residual=True, stacked=True, dtype=np.float16)),
    "64 rows": (64, 64, [16, 3], dict()),
    "int8, five rows": (5, 160, [70, 1], dict(norm=True, store="row", stacked=True, biases=(0, 1))),
    "int8 in groups, 33 rows": (33, 96, [35], dict(store=32, residual=True, stacked=True)),
    "layer norm": (1, 160, [50, 24, 10], dict(norm="layer", biases=(1, 0, 1), normed=True, stacked=True)),
    "layer norm of more than is read at once": (1, 2880, [20], dict(norm="layer", normed=True, dtype=np.float16)),
    "layer norm, int8": (1, 96, [35], dict(norm="layer", store=32, stacked=True)),
    "layer norm, five rows": (5, 96, [61], dict(norm="layer", normed=True, stacked=True, out=np.float32)),
    "int8 in groups of 128, two rows": (2, 640, [35, 18], dict(store=128, dtype=np.float16, out=np.float32)),
}


def make(rows, width, sizes, options, seed=3):
    """Operands of `run`; what other layers of a stack hold is NaN."""
    rng = np.random.default_rng(seed)
    dtype, store, stacked = options.get("dtype", BFLOAT16), options.get("store"), options.get("stacked")

    def draw(*shape, kind=dtype):
        found = rng.standard_normal(shape).astype(kind)
        if not stacked:
            return found
        return np.stack([np.full_like(found, np.nan) if i != 1 else found for i in range(LAYERS)])

    def int8(size):
        values = rng.integers(-127, 128, (*[LAYERS] * bool(stacked), size, width)).astype(np.int8)
        group = None if store == "row" else store
        scales = np.abs(draw(size, 1 if group is None else -(-width // group), kind=np.float32)) / 64
        return QuantizedArray(values, scales, np.dtype(dtype), group)

    kernels = [int8(size) if store else draw(size, width) for size in sizes]
    layer = np.array(1, np.int32) if stacked else None
    centred, norm, have = options.get("norm") == "layer", None, options.get("biases")
    if options.get("norm"):
        norm = LayerNorm(draw(width), draw(width), EPSILON, layer) if centred else RMSNorm(draw(width), EPSILON, layer)
    return dict(
        x=(rng.standard_normal((rows, width)) * np.linspace(0.3, 2, rows)[:, None] + 2 * centred).astype(dtype),
        kernels=kernels,
        layer=layer,
        norm=norm,
        biases=None if have is None else [draw(n) if b else None for n, b in zip(sizes, have, strict=True)],
        residual=rng.standard_normal((rows, sizes[0])).astype(dtype) if options.get("residual") else None,
        dtype=options.get("out"),
        normed=options.get("normed", False),
    )


@functools.partial(jax.jit, static_argnames=("dtype", "normed", "implementation"))
def run(x, kernels, **given):
    return linear(x, kernels, **given)


def oracle(x, kernels, layer, norm, biases, residual, dtype, normed, narrow=None):
    """In float64; or in float32, `narrow` the dtype that the normed rows, kernels and each sum are rounded to."""
    wide = np.float64 if narrow is None else np.float32
    rounded = lambda a, kind=narrow: a if narrow is None else a.astype(kind).astype(wide)
    own = lambda a: np.asarray(a if layer is None else a[layer]).astype(wide)

    def matrix(kernel):
        if not isinstance(kernel, QuantizedArray):
            return own(kernel)
        values, scales = own(kernel.values), own(kernel.scales)
        return rounded(values * np.repeat(scales, -(-values.shape[1] // scales.shape[1]), axis=1)[:, : values.shape[1]])

    x = np.asarray(x).astype(wide)
    if norm is not None:
        centred = isinstance(norm, LayerNorm)
        x = x - np.mean(x, axis=1, keepdims=True) if centred else x
        share = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + wide(norm.epsilon))
        x = rounded(x * share * own(norm.scale) + (own(norm.bias) if centred else wide(0)))
    found = []
    for i, kernel in enumerate(kernels):
        y = rounded(x @ matrix(kernel).T, dtype or narrow)
        if biases is not None and biases[i] is not None:
            y = rounded(y + own(biases[i]), dtype or narrow)
        found.append(y if residual is None else rounded(y + np.asarray(residual).astype(wide), dtype or narrow))
    return found + [x] * normed


def assert_standard(got, call):
    """The project's standard: 1.2 times the error of plain float32 accumulation with rounding in between."""
    narrow, want = call["x"].dtype, oracle(**call)
    plain = oracle(**call, narrow=narrow)
    kinds = [call["dtype"] or narrow] * len(call["kernels"]) + [narrow] * call["normed"]
    for one, exact, rough, kind in zip(got, want, plain, kinds, strict=True):
        assert one.dtype == kind and one.shape == exact.shape
        least = 2.0**-23 * np.sqrt(call["x"].shape[1]) * np.abs(exact).max()  # float32's own, where nothing is rounded
        assert error(one, exact) <= max(1.2 * error(rough, exact), least)


def takes(name, call):
    """Whether an implementation serves a call."""
    order = "x kernels layer norm biases residual dtype normed".split()
    return OPERATION.implementations[name].refuse(*(call[key] for key in order)) is None


SLOW = """one row; int8; int8 in groups; int8 in a group; two rows; 64 rows; int8 in groups, 33 rows;
    int8 in groups of 128, two rows""".split(";")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in map(str.strip, SLOW) else ()) for name in CASES]
)
def test_values(name):
    call = make(*CASES[name])
    served = [implementation for implementation in ANYWHERE if takes(implementation, call)]
    rows = CASES[name][0]
    assert served == ["xla", *["triton_row_interpreted"] * (rows == 1), "triton_rows_interpreted"]
    for implementation in served:
        assert_standard(run(**call, implementation=implementation), call)


def test_in_float32():
    """XLA's; the error of float32 is far below that of anything narrower."""
    call = make(5, 160, [40, 7], dict(norm=True, biases=(1, 1), normed=True, stacked=True, dtype=np.float32))
    for got, want in zip(run(**call, implementation="xla"), oracle(**call), strict=True):
        assert got.dtype == np.float32 and np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_a_stack_is_its_layer_and_the_layer_may_be_static(implementation):
    """With kernels of both kinds side by side."""
    call = make(1, 96, [24, 7], dict(norm=True, biases=(1, 1), stacked=True))
    call["kernels"][1] = make(1, 96, [7], dict(store=32, stacked=True))["kernels"][0]
    one = jax.tree.map(lambda a: a[1], {name: call[name] for name in ("kernels", "biases")})
    flat = {**call, **one, "layer": None, "norm": RMSNorm(call["norm"].scale[1], EPSILON)}

    def every(layer):
        norm = RMSNorm(call["norm"].scale, EPSILON, layer)
        calls = {**call, "layer": 1}, flat, {**call, "layer": layer, "norm": norm}
        return [linear(**one, implementation=implementation) for one in calls]

    static, alone, traced = jax.jit(every)(call["layer"])
    for got, other, want in zip(static, alone, traced, strict=True):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(other, want)


@pytest.mark.parametrize("implementation", ["xla", "triton_rows_interpreted"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_row_stays_alone(implementation, poison):
    call = make(5, 160, [24], dict(norm=True, residual=True, stacked=True, normed=True))
    clean = run(**call, implementation=implementation)
    x, residual = call["x"].copy(), call["residual"].copy()
    x[2, 7], residual[4, 3] = poison, np.nan
    got = run(**{**call, "x": x, "residual": residual}, implementation=implementation)
    for one, other in zip(got, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[[0, 1, 3]], np.asarray(other)[[0, 1, 3]])
    first = np.asarray(got[0]).astype(np.float32)
    assert np.isnan(first[2]).all() and np.isnan(first[4]).tolist() == [n == 3 for n in range(24)]


@pytest.mark.parametrize("implementation", ["xla", "triton_row_interpreted", "triton_rows_interpreted"])
def test_a_poisoned_output_stays_alone(implementation):
    """NaN in a kernel's row or bias reaches that output only, a NaN of x all."""
    call = make(1, 96, [24, 7], dict(biases=(1, 1), dtype=np.float16))
    clean = run(**call, implementation=implementation)
    call["kernels"][0][5, 3] = call["biases"][1][2] = np.nan
    got = run(**call, implementation=implementation)
    for one, other, bad in zip(got, clean, (5, 2), strict=True):
        one, others = np.asarray(one)[0], np.arange(other.shape[1]) != bad
        assert np.isnan(one[bad])
        np.testing.assert_array_equal(one[others], np.asarray(other)[0, others])
    call["x"][0, 95] = np.nan
    assert all(np.isnan(np.asarray(y)).all() for y in run(**call, implementation=implementation))


def test_no_rows_and_64_bit_types():
    call = make(0, 64, [40, 3], dict(norm=True, normed=True))
    assert [y.shape for y in run(**call, implementation=None)] == [(0, 40), (0, 3), (0, 64)]
    with jax.enable_x64(True):
        call = make(*CASES["int8 in groups"])
        for implementation in ANYWHERE:
            assert_standard(run(**call, implementation=implementation), call)


ROWS = ("triton_row", "triton_rows")
REFUSED = {
    "x in float32": (1, dict(dtype=np.float32), ROWS, "x of float32, only bfloat16 and float16"),
    "two rows": (2, {}, ROWS[:1], "2 rows of x, only one"),
    "no rows": (0, {}, ROWS, "0 rows of x"),
    "1025 rows": (1025, {}, ROWS, "1025 rows of x"),
    "kernels in float32": (1, dict(kernel=lambda k: k.astype(np.float32)), ROWS, "kernels of "),
    "kernels of another type": (1, dict(kernel=lambda k: k.astype(np.float16)), ROWS, "another dtype than x's"),
    "groups of 8": (2, dict(kernel=lambda k: quantize(k, 8)), ROWS[1:], "products of 8 inputs at once, at least 16"),
    "groups of 48": (1, dict(kernel=lambda k: quantize(k, 48)), ROWS, "groups of 48 of 96 inputs"),
    "groups of 64 of 96": (1, dict(kernel=lambda k: quantize(k, 64)), ROWS, "groups of 64 of 96 inputs"),
    "runs": (1, dict(kernel=lambda k: quantize_runs(k, 4)), ROWS, "scales over runs of a flattened matrix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    rows, options, names, reason = REFUSED[name]
    call = make(rows, 96, [24], options)
    call["kernels"] = [options.get("kernel", lambda k: k)(k) for k in call["kernels"]]
    for implementation in (*names, *(f"{one}_interpreted" for one in names)):
        with pytest.raises(ValueError, match=f"linear cannot run as '{implementation}': .*{reason}"):
            linear(**call, implementation=implementation)
    y = linear(**call)[0]  # not named, it runs
    assert y.shape == (rows, 24) and y.dtype == call["x"].dtype


@pytest.mark.parametrize("size", [2**31 + 2**20, 2**32])
def test_bytes_that_triton_cannot_reach_are_refused(size):
    shape = 2**10, size // 2**20, 2**10
    kernel = QuantizedArray(jax.ShapeDtypeStruct(shape, np.int8), jax.ShapeDtypeStruct((*shape[:2], 1), np.float32))
    x, layer = jax.ShapeDtypeStruct((1, 2**10), BFLOAT16), jax.ShapeDtypeStruct((), np.int32)
    assert OPERATION.chosen("cuda", x, [kernel], layer, None, None, None, None, False) == "xla"


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(kernels=[np.ones((8, 64), BFLOAT16), np.ones((8, 32), BFLOAT16)]), r"the one at 1 has shape \(8, 32\)"),
        (dict(x=np.ones((1, 3, 64), BFLOAT16)), r"x: shape \(1, 3, 64\), expected \[G, K\]"),
        (dict(kernels=[np.ones((2, 8, 64), BFLOAT16)], layer=-1), "layer: -1 of 2 layers"),
        (dict(kernels=[np.ones((2, 8, 64), BFLOAT16)], layer=2), "layer: 2 of 2 layers"),
        (dict(norm=RMSNorm(np.ones((2, 64)), 0.0, 2)), "layer: 2 of 2 layers"),
        (dict(biases=[]), "biases: 0 for 1 kernels"),
        (dict(layer=0), r"the one at 0 has shape \(8, 64\), expected \[L, N, 64\] for x of \(3, 64\)"),
        (dict(kernels=[np.ones((2, 8, 64), BFLOAT16)]), r"has shape \(2, 8, 64\), expected \[N, 64\]"),
        (dict(biases=[np.ones(7, BFLOAT16)]), r"biases: shape \(7,\), expected \(8,\)"),
        (dict(norm=RMSNorm(np.ones(32), 0.0)), r"norm: scale of shape \(32,\) for x of \(3, 64\)"),
        (dict(norm=RMSNorm(np.ones((2, 64)), 0.0)), r"norm: scale of shape \(2, 64\)"),
        (dict(norm=RMSNorm(np.ones(64), 0.0, 1)), r"norm: scale of shape \(64,\) for x of \(3, 64\), layer 1"),
        (dict(norm=LayerNorm(np.ones(64), np.ones(32), 0.0)), r"norm: bias of shape \(32,\) for x of \(3, 64\)"),
        (dict(norm=LayerNorm(np.ones((2, 64)), np.ones((3, 64)), 0.0, 1)), r"norm: bias of shape \(3, 64\)"),
        (dict(norm=LayerNorm(np.ones((2, 64)), np.ones((2, 64)), 0.0, 2)), "layer: 2 of 2 layers"),
        (dict(residual=np.ones((3, 64), BFLOAT16)), r"residual: shape \(3, 64\) beside kernels \[\(8, 64\)\]"),
        (dict(kernels=[np.ones((8, 64), BFLOAT16)] * 2, residual=np.ones((3, 8), BFLOAT16)), r"residual: .* \(8, 64\)"),
        (dict(implementation="triton"), "'triton' is no implementation of linear; there are: triton_row, triton_rows"),
        (dict(implementation="triton_rows"), "linear as 'triton_rows' runs on cuda, the program is made for cpu"),
    ],
)
def test_errors(monkeypatch, changed, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would refuse some first
    with pytest.raises(ValueError, match=message):
        linear(**{**dict(x=np.ones((3, 64), BFLOAT16), kernels=[np.ones((8, 64), BFLOAT16)]), **changed})
