"""The choice between named implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.registry import Implementation, Operation


def small_only(x, factor):
    return None if x.size <= 3 else f"{x.size} elements, at most 3"


def scaled(by):
    return lambda x, factor: by * factor * x


def operation():
    """Tells by its result which implementation ran."""
    return Operation(
        "scale",
        {
            "gpu": Implementation(scaled(100.0), small_only, platform="cuda"),
            "small": Implementation(scaled(10.0), small_only),
            "plain": Implementation(scaled(1.0)),
            "slow": Implementation(scaled(-1.0), by_choice=False),
        },
    )


X, LONG = np.ones(3, np.float32), np.ones(4, np.float32)


def test_the_first_that_takes_the_call_runs_where_none_is_named():
    scale = operation()
    assert scale.run(None, X, 2).tolist() == [20.0] * 3
    assert scale.run(None, LONG, 2).tolist() == [2.0] * 4
    assert jax.jit(lambda x: scale.run(None, x, 2))(X).tolist() == [20.0] * 3


def test_a_named_one_runs():
    scale = operation()
    assert scale.run("plain", X, 2).tolist() == [2.0] * 3
    assert scale.run("slow", LONG, 2).tolist() == [-2.0] * 4


@pytest.mark.parametrize("name", ["Plain", "", "triton"])
def test_an_unknown_name_never_falls_back(name):
    message = f"implementation: '{name}' is no implementation of scale; there are: gpu, small, plain, slow"
    for ask in (lambda: operation().run(name, X, 1), lambda: operation().check(name)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_named_one_that_does_not_take_the_call_says_why():
    with pytest.raises(ValueError, match="scale cannot run as 'small': 4 elements, at most 3"):
        operation().run("small", LONG, 1)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_a_named_one_is_refused_when_lowered_for_another_platform(wrap):
    run = wrap(lambda x: operation().run("gpu", x, 1))
    with pytest.raises(ValueError, match="scale as 'gpu' runs on cuda, the program is made for cpu"):
        run(X[None] if wrap is jax.vmap else X)


def test_the_platform_is_judged_when_the_program_is_lowered():
    scale = operation()
    for name, factor, platform in ((None, "100", "cuda"), (None, "10", "cpu"), ("gpu", "100", "cuda")):
        traced = jax.jit(lambda x, name=name: scale.run(name, x, 1)).trace(X)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{factor[0]}.000000e+0{len(factor) - 1}>" in text


def test_what_is_chosen_can_be_asked_for():
    scale = operation()
    chosen = [scale.chosen(platform, x, 1) for platform in ("cuda", "cpu") for x in (X, LONG)]
    assert chosen == ["gpu", "plain", "small", "plain"]
    nothing = Operation("scale", {"small": Implementation(scaled(1.0), small_only)})
    with pytest.raises(ValueError, match=r"scale: no implementation for tpu takes this call \(small: 4 elements"):
        nothing.chosen("tpu", LONG, 1)


def test_the_choice_is_differentiable_and_takes_pytrees():
    tree = Operation(
        "sum",
        {
            "gpu": Implementation(lambda pair, n: 100 * n * pair[0] * pair[1], platform="cuda"),
            "plain": Implementation(lambda pair, n: n * pair[0] * pair[1]),
        },
    )
    first, second = jnp.float32(3), jnp.float32(5)
    assert jax.grad(lambda pair: tree.run(None, pair, 2))((first, second)) == (10.0, 6.0)


def test_outside_of_jit_a_choice_compiles_once():
    traces = []

    def run(x):
        traces.append(1)
        return x + 1

    once = Operation("once", {"gpu": Implementation(run, platform="cuda"), "plain": Implementation(run)})
    for _ in range(3):
        once.run(None, X)
    assert len(traces) == 2  # one for each platform
