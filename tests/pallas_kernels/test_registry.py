"""The choice between named implementations."""

import pytest

from pallas_kernels.registry import Operation


def plain(x):
    return x


def fast(x):
    return -x


def test_the_first_is_chosen_when_none_is_named_and_a_named_one_when_named():
    operation = Operation("negate", {"plain": plain, "fast": fast})
    assert operation.default == "plain" and operation.name == "negate"
    assert operation.choose(None) is operation.choose("plain") is plain
    assert operation.choose("fast") is fast


def test_an_unknown_name_never_falls_back():
    operation = Operation("negate", {"plain": plain, "fast": fast})
    for name in ("Fast", "", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' is no implementation of negate; there are: plain, fast"):
            operation.choose(name)


def test_the_table_is_the_operations_own():
    table = {"plain": plain}
    operation = Operation("negate", table)
    table["fast"] = fast
    assert list(operation.implementations) == ["plain"]
