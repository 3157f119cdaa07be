"""What the tests of the core share: golden checkpoints loaded once, and which cases are quick."""

import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN

import moe_jax
from moe_jax import Model
from moe_jax.checkpoint.safetensors import TensorFile


def folder(case: str) -> Path:
    return GOLDEN / "hf" / case


@functools.cache
def golden_model(case: str, dtype: str = "float32") -> Model:
    return moe_jax.load_pretrained(folder(case), dtype=dtype)


@functools.cache
def golden_arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(folder(case) / "expected.npz") as arrays:
        return dict(arrays)


def one_in(step: int, cases) -> list:
    """Parameters of a test: every `step`-th case is quick, the others are marked slow (CI runs them too)."""
    return [pytest.param(case, marks=() if i % step == 0 else pytest.mark.slow) for i, case in enumerate(cases)]


def only(quick, cases) -> list:
    """Parameters of a test: the cases named in `quick` are quick, the others slow."""
    assert set(quick) <= set(cases)
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    file = TensorFile(path)
    found = {name: file.read(name) for name in file.entries}
    file.close()
    return found
