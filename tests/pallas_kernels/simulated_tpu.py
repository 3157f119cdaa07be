"""JAX's simulation of a TPU; shared by the tests of the TPU's kernels."""

import contextlib

import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation


@pytest.fixture(autouse=True)
def without_races():
    """In every test that takes this in: no two cores or transfers touch the same memory at once."""
    simulation.races = None
    yield
    assert simulation.races is None or not simulation.races.races_found


@contextlib.contextmanager
def counted_transfers(monkeypatch):
    """Bytes that blocks of operands bring to cores, by operand, as the simulation brings them while this lasts."""
    found, get = {}, simulation.get

    def counting(*args, input_name=None, **options):
        out = get(*args, input_name=input_name, **options)
        if input_name is not None:
            block = out[-1] if isinstance(out, tuple) else out
            found[input_name] = found.get(input_name, 0) + np.asarray(block).nbytes
        return out

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "get", counting)
        yield found
