"""Random DeepSpeed configs: refused by a field's name, traced, or run; see the script."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "random_deepspeed_configs.py"


@pytest.mark.parametrize(("count", "run"), [(24, 4), pytest.param(240, 100, marks=pytest.mark.slow)])
def test_random_configs_are_refused_by_name_or_run(count, run):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outcomes, defects = script.search(count, run, seed=1)
    assert not defects
    assert outcomes["ran"] == run and outcomes["refused"] > count // 4
