"""Eight emulated devices, checked annotations, and the golden checkpoints, for every test."""

import os
import sys
from pathlib import Path

import jax
import pytest

# Machine code without LLVM's optimisations and, where XLA still has them, by the older emitters: compiling is most of
# the tests' time, and takes a half to a third of it. MOE_JAX_TESTS_OPTIMIZED=1 compiles as users do, which CI does for
# layers, generation and kernels.
if not os.environ.get("MOE_JAX_TESTS_OPTIMIZED"):
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # XLA ends the process if it does not know a flag
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
os.environ["XDG_CACHE_HOME"] = "/nonexistent"  # no test reads or fills the user's cache

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from jaxtyping import install_import_hook  # noqa: E402

# The modules whose functions take arrays; beside them, wrong values are the tests' own business.
_ARRAYS = "attention block cache decoder engine generation linear model moe norm rope sampling".split()
_HOOK = install_import_hook(["pallas_kernels", *(f"moe_jax.{name}" for name in _ARRAYS)], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops compiled programs before the process runs out of memory mappings, of which each takes several."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()


#: Linux allows 65530.
_MAPPINGS = 20000


def golden_cases() -> list[str]:
    """Names of the stored checkpoints that this library supports."""
    unsupported = {"switch_transformers", "jetmoe"}  # test_families checks that they are refused
    return sorted(p.name for p in (GOLDEN / "hf").iterdir() if p.is_dir() and p.name not in unsupported)
