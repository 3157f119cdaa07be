"""Texts from package archives, fetched through the package managers and so through their mirrors, once."""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..demo import cache_folder
from .r_data import deb_texts

TIMEOUT = 600  # seconds for a package manager; 4 MB at 7 kB/s
_DEB = "r-cran-janeaustenr"
_SDIST = "sentencepiece==0.2.3"

# Before pip hands over a source archive it asks the archive's build system for its metadata. This stands in for that
# system: nothing out of the archive is run, and nothing is compiled.
_BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    made = pathlib.Path(folder, "{0}-{1}.dist-info")
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: {0}\\nVersion: {1}\\n")
    return made.name
""".format(*_SDIST.split("=="))

_log = logging.getLogger(__name__)


def fetch_texts(name: str) -> dict[str, str]:
    """The texts of "austen" or "botchan" by title, which are fetched unless they are in the cache folder.

    "austen": Jane Austen's six novels (4.0 MB) out of Debian's package r-cran-janeaustenr, through apt-get. "botchan":
    Natsume Soseki's Botchan in English (0.3 MB) out of sentencepiece's source archive, through pip. The texts' sha256
    is checked by every call, the cached file's too. Raises `OSError` where the package manager or the network is
    missing, and for other texts than these.

    >>> from unittest import mock
    >>> of_nothing = mock.patch.dict(_SOURCES, botchan=(_botchan, hashlib.sha256(b"{}").hexdigest(), _TXT))
    >>> with tempfile.TemporaryDirectory() as folder, of_nothing, mock.patch.dict(os.environ, MOE_JAX_CACHE=folder):
    ...     Path(folder, "corpora").mkdir()
    ...     _ = Path(folder, "corpora", "botchan.json").write_text("{}")  # as if fetched before
    ...     fetch_texts("botchan")
    {}
    """
    get, expected, instead = _SOURCES[name]
    target = cache_folder() / "corpora" / f"{name}.json"
    if target.is_file():
        raw = target.read_bytes()
        if hashlib.sha256(raw).hexdigest() == expected:
            return json.loads(raw)  # type: ignore[no-any-return]
        _log.warning("%s is not what it was: fetching it anew", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
        try:
            texts = get(Path(temporary))
        except OSError as error:
            raise OSError(f"{name} cannot be fetched: {error}. {instead}") from error
        raw = json.dumps(texts, sort_keys=True).encode()
        if (found := hashlib.sha256(raw).hexdigest()) != expected:
            raise OSError(f"{name}: the texts fetched have sha256 {found}, expected {expected}. {instead}")
        new = Path(temporary) / target.name
        new.write_bytes(raw)
        os.replace(new, target)
    return texts


def _austen(folder: Path) -> dict[str, str]:
    if shutil.which("apt-get") is None:
        raise OSError("there is no apt-get here")
    _run(["apt-get", "download", _DEB], folder)
    return deb_texts(_only(folder, "*.deb"))


def _botchan(folder: Path) -> dict[str, str]:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise OSError("this Python has no pip (python -m ensurepip adds it)")
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:none:", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--no-input", "--dest", str(folder), _SDIST]
    _run(command, folder, PYTHONPATH=str(backend.parent))
    path = _only(folder, "*.tar.gz")
    try:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{_SDIST.replace('==', '-')}/test/botchan.txt")
            return {"botchan": member.read().decode()}
    except (KeyError, tarfile.TarError, EOFError, ValueError) as error:
        raise OSError(f"{path.name} holds no test/botchan.txt: {error}") from error


def _run(command: list[str], folder: Path, **variables: str) -> None:
    """Run a package manager in a folder; `OSError` with its last words where it fails."""
    _log.info("fetching: %s", " ".join(command))
    environment, closed = os.environ | variables, subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=closed, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took over {TIMEOUT} seconds") from error
    if done.returncode:
        words = " / ".join(done.stderr.strip().splitlines()[-2:]) or "it said nothing"
        raise OSError(f"offline? {command[0]} ended with status {done.returncode}: {words}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise OSError(f"{len(found)} files {pattern} were left, expected 1")
    return found[0]


_TXT = "Give a .txt file or a folder of them instead"
_SOURCES: dict[str, tuple[Callable[[Path], dict[str, str]], str, str]] = {
    "austen": (
        _austen,
        "226bdc211473c3a87d28dc4582974adaebbcd3e508356ca10fd33d0403b55001",
        f"{_TXT}, or the .deb file of {_DEB}",
    ),
    "botchan": (_botchan, "e50afa8789a746877e6419b7d29720ad99da49ba5e3c5fb0bd9edb65ba6b4206", _TXT),
}
