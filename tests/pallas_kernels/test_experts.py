"""`Experts`: validation, layouts, and its life as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import make_experts

from pallas_kernels import Activation, Experts

E, D, F, L = 3, 4, 6, 2
FIELDS = ("up", "down", "gate", "gate_bias", "up_bias", "down_bias")


def shapes(layout="in_out", lead=(E,)):
    """Every field's shape."""
    kernel = lambda inner, outer: (*lead, inner, outer) if layout == "in_out" else (*lead, outer, inner)
    return {
        "gate": kernel(D, F),
        "up": kernel(D, F),
        "down": kernel(F, D),
        "gate_bias": (*lead, F),
        "up_bias": (*lead, F),
        "down_bias": (*lead, D),
    }


def build(changed=(), layout="in_out", lead=(E,), **more):
    """Experts of those shapes, some of them changed or None."""
    wanted = {**shapes(layout, lead), **dict(changed)}
    arrays = {n: None if s is None else np.zeros(s, np.float32) for n, s in wanted.items()}
    return Experts(**arrays, layout=layout, **more)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("lead", [(E,), (L, E)])
def test_the_dimensions_are_read_off(layout, lead):
    experts = build(layout=layout, lead=lead)
    assert (experts.num_experts, experts.width, experts.stacked) == (E, D, len(lead) == 2)
    flat = experts.flat()
    assert flat.up.shape[0] == np.prod(lead) and flat.down_bias.shape == (np.prod(lead), D)
    assert (flat is experts) == (len(lead) == 1)
    assert not flat.stacked and flat.layout == layout


def test_the_stack_is_folded_layer_by_layer():
    stack = make_experts(E, D, F, layers=(L,), biases=True)
    flat = stack.flat()
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(flat, name)[1 * E + 2], getattr(stack, name)[1, 2])


def test_building_neither_copies_nor_converts():
    arrays = {n: np.zeros(s, np.float32) for n, s in shapes().items()}
    experts = Experts(**arrays)
    assert all(getattr(experts, n) is a for n, a in arrays.items())


def test_the_activation_may_be_a_name_or_an_activation():
    assert build(activation="geglu").activation == Activation("geglu")
    clamped = Activation("swiglu_clamped", limit=3.0)
    assert build(activation=clamped).activation is clamped
    with pytest.raises(ValueError, match="activation: 'swish'"):
        build(activation="swish")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"gate": (E, F, D)}, r"gate: shape \(3, 6, 4\), expected \(3, 4, 6\) beside up \(3, 4, 6\)"),
        ({"gate": (L, E, D, F)}, r"gate: shape \(2, 3, 4, 6\), expected \(3, 4, 6\)"),
        ({"down": (E, D, F)}, r"down: shape \(3, 4, 6\), expected \(3, 6, 4\)"),
        ({"down": (E - 1, F, D)}, r"down: shape \(2, 6, 4\), expected \(3, 6, 4\)"),
        ({"gate_bias": (E, D)}, r"gate_bias: shape \(3, 4\), expected \(3, 6\)"),
        ({"up_bias": (F,)}, r"up_bias: shape \(6,\), expected \(3, 6\)"),
        ({"down_bias": (E, F)}, r"down_bias: shape \(3, 6\), expected \(3, 4\)"),
        ({"up": (D, F)}, r"up: shape \(4, 6\) is neither \[E, D, F\] nor \[L, E, D, F\]"),
        ({"gate": None}, "gate: activation 'swiglu' needs gate weights"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        build(changed)


def test_other_refusals():
    with pytest.raises(ValueError, match="gate: activation 'relu' takes no gate weights"):
        build(activation="relu")
    with pytest.raises(ValueError, match="gate_bias: given without gate"):
        build({"gate": None}, activation="relu")
    with pytest.raises(ValueError, match="layout: 'io' is neither in_out nor out_in"):
        Experts(up=np.zeros((E, D, F)), down=np.zeros((E, F, D)), activation="relu", layout="io")
    with pytest.raises(ValueError, match=r"up: shape \(0, 4, 6\) holds no expert"):
        build(lead=(0,))
    with pytest.raises(ValueError, match=r"down: shape \(3, 6, 4\), expected \(3, 4, 6\)"):
        build({"down": (E, F, D)}, layout="out_in")


def test_a_pytree_of_its_arrays_with_static_activation_and_layout():
    experts = make_experts(E, D, F, activation="swiglu_clamped", layout="out_in", biases=True)
    leaves, treedef = jax.tree.flatten(experts)
    assert len(leaves) == len(FIELDS)
    again = jax.tree.unflatten(treedef, leaves)
    assert all(getattr(again, n) is getattr(experts, n) for n in FIELDS)
    assert (again.activation, again.layout) == (experts.activation, "out_in")

    without = make_experts(E, D, F, activation="relu")
    assert len(jax.tree.leaves(without)) == 2
    assert jax.tree.structure(without) != jax.tree.structure(make_experts(E, D, F, activation="silu"))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(without)]
    assert len(set(names)) == 2


def test_transformations_may_put_anything_in_the_leaves():
    experts = build()
    assert jax.tree.map(lambda _: None, experts).up is None
    assert jax.tree.map(lambda w: w.shape, experts, is_leaf=lambda w: hasattr(w, "shape")).up == (E, D, F)
    shape = jax.eval_shape(lambda e: e, experts)
    assert isinstance(shape, Experts) and shape.num_experts == E
    assert jax.vmap(lambda e: e.up.sum())(make_experts(E, D, F)).shape == (E,)


def test_it_can_be_built_from_tracers_and_abstract_arrays():
    @jax.jit
    def halved(up, down):
        return Experts(up=up / 2, down=down, activation="relu")

    up, down = jnp.ones((E, D, F)), jnp.ones((E, F, D))
    assert (halved(up, down).up == 0.5).all()
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes("out_in", (L, E)).items()}
    assert Experts(**abstract, layout="out_in").width == D


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        build().up = None
