"""Fetching texts with package managers that are faked."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from r_writer import deb

from moe_jax.train import fetch
from moe_jax.train.corpora import load_corpus

BOOKS = {"emma": ["EMMA", "by"], "persuasion": ["PERSUASION"]}
BOTCHAN = """\ufeffA preface.
*** START OF THIS PROJECT GUTENBERG EBOOK BOTCHAN ***

A story.

Its end.

Project Gutenberg's Botchan
*** END OF THIS PROJECT GUTENBERG EBOOK BOTCHAN ***
A licence.
""".replace("\n", "\r\n")


def sdist():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, raw in {"setup.py": b"raise SystemExit", "test/botchan.txt": BOTCHAN.encode()}.items():
            entry = tarfile.TarInfo(f"sentencepiece-0.2.3/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return sink.getvalue()


class Manager:
    """Stands for subprocess.run: leaves `files` in the working folder, or fails with `words`."""

    def __init__(self, files, words=""):
        self.files, self.words, self.commands = files, words, []

    def __call__(self, command, *, cwd, env, stdin, timeout, **options):
        self.commands.append(command)
        assert stdin == subprocess.DEVNULL and timeout == fetch.TIMEOUT and env["HOME"] == os.environ["HOME"]
        for name, raw in self.files.items():
            (cwd / name).write_bytes(raw)
        return subprocess.CompletedProcess(command, 100 if self.words else 0, "", self.words)


@pytest.fixture
def manager(monkeypatch, tmp_path):
    """Both package managers, cache and hashes that fit what they deliver."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    texts = {
        "austen": {name: "\n".join(lines) + "\n" for name, lines in BOOKS.items()},
        "botchan": {"botchan": BOTCHAN},
    }
    for name, (get, _, instead) in fetch._SOURCES.items():
        sha = hashlib.sha256(json.dumps(texts[name], sort_keys=True).encode()).hexdigest()
        monkeypatch.setitem(fetch._SOURCES, name, (get, sha, instead))
    made = Manager({"r-cran-janeaustenr_1.0.0-1_all.deb": deb(BOOKS), "sentencepiece-0.2.3.tar.gz": sdist()})
    monkeypatch.setattr(fetch.subprocess, "run", made)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


def test_fetches_once(manager, tmp_path, caplog):
    corpus = load_corpus("austen", 0.0)
    assert corpus.train == ["EMMA\nby\n", "PERSUASION\n"]
    assert load_corpus("austen", 0.0) == corpus and manager.commands == [["apt-get", "download", "r-cran-janeaustenr"]]
    assert load_corpus("botchan", 0.0).train == ["A story.\n\nIts end.\n"]
    command = manager.commands[1]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "sentencepiece==0.2.3"
    folder = tmp_path / "cache" / "corpora"
    assert sorted(item.name for item in folder.iterdir()) == ["austen.json", "botchan.json"]
    (folder / "austen.json").write_text("{}")
    assert load_corpus("austen", 0.0) == corpus and len(manager.commands) == 3
    assert "fetching it anew" in caplog.text


def test_nothing_of_the_source_archive_is_run(manager, tmp_path, monkeypatch):
    """What pip would ask the archive's build system, it asks this one."""
    scope = {}
    exec(fetch._BACKEND, scope)
    name = scope["prepare_metadata_for_build_wheel"](tmp_path)
    assert "Name: sentencepiece\nVersion: 0.2.3\n" in (tmp_path / name / "METADATA").read_text()
    found = []

    def run(command, *, cwd, env, **options):
        found.append((cwd / "backend" / "setuptools" / "build_meta.py").read_text() == fetch._BACKEND)
        assert env["PYTHONPATH"] == str(cwd / "backend") and "--no-build-isolation" in command
        return manager(command, cwd=cwd, env=env, **options)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    fetch.fetch_texts("botchan")
    assert found == [True]


def test_failures_say_what_to_do(manager, monkeypatch):
    instead = "Give a .txt file or a folder of them instead"
    manager.words = "E: first\nE: Unable to locate package\n"
    with pytest.raises(OSError, match=f"austen cannot be fetched: .*status 100: E: first / E: Unable.*{instead}.*deb"):
        fetch.fetch_texts("austen")
    manager.words, files, manager.files = "", manager.files, {}
    with pytest.raises(OSError, match=r"botchan cannot be fetched: 0 files \*.tar.gz were left, expected 1"):
        fetch.fetch_texts("botchan")
    manager.files = files | {"sentencepiece-0.2.3.tar.gz": b"no archive"}
    with pytest.raises(OSError, match="holds no test/botchan.txt"):
        fetch.fetch_texts("botchan")
    manager.files = files | {"r-cran-janeaustenr_1.0.0-1_all.deb": deb({"other": ["book"]})}
    with pytest.raises(OSError, match=f"austen: the texts fetched have sha256 .*, expected .*{instead}"):
        fetch.fetch_texts("austen")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="no apt-get here"):
        fetch.fetch_texts("austen")
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="no pip"):
        fetch.fetch_texts("botchan")


def test_a_slow_manager_is_given_up(manager, monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(OSError, match=f"took over {fetch.TIMEOUT} seconds"):
        fetch.fetch_texts("austen")
