"""Text to train on that needs no hub: by name, or from .txt files; part of it held out."""

import dataclasses
import importlib
import re
from pathlib import Path

from .fetch import fetch_texts
from .r_data import deb_texts


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others, or other parts of them, that are never trained on."""

    train: list[str]
    held_out: list[str]


def load_corpus(source: str, held_out: float = 0.1) -> Corpus:
    """The texts that `source` names, with a share `held_out` of them kept apart; always the same ones.

    - "pydoc_topics": Python's own topics (`help("for")`), some 0.4 MB of English and code, without those that repeat a
      longer one. They differ a little between Python's versions. Whole topics are held out: in alphabetical order,
      each one that fits into the share by then.
    - "austen" and "botchan": novels, see `fetch_texts`; the `.deb` file of the former; a `.txt` file or a folder of
      them, a document each, in the order of their names. The end of each one, from a paragraph on, is held out.

    Texts are as they come, but for Windows line ends and what Project Gutenberg writes around Botchan. Raises
    `ValueError` for a share outside `[0, 1)`, and `OSError` for what is not there.

    >>> corpus = load_corpus("pydoc_topics")
    >>> corpus.train[0].splitlines()[0]
    'The "assert" statement'
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: {held_out!r}, expected a share in [0, 1)")
    if source == "pydoc_topics":
        return _whole(_distinct(_pydoc_topics()), held_out)
    if source == "austen":
        texts = fetch_texts(source)
    elif source == "botchan":
        texts = {name: _story(text) for name, text in fetch_texts(source).items()}
    elif source.endswith(".deb"):
        texts = deb_texts(source)
    else:
        texts = _texts(Path(source))
    return _tails([texts[name].replace("\r\n", "\n") for name in sorted(texts)], held_out)


def _story(text: str) -> str:
    """What stands between the lines that Project Gutenberg ends its preface and begins its licence with."""
    found = re.search(r"\*\*\* START OF [^\n]*\n(.*?)\n[^\n]*\n\*\*\* END OF ", text.replace("\r\n", "\n"), re.DOTALL)
    if found is None:
        raise OSError("botchan: the text is not as Project Gutenberg has it")
    return found[1].strip() + "\n"


def _pydoc_topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise OSError("pydoc_topics: this Python has no pydoc_data.topics; give a .txt file or a folder") from error
    return [topics[name] for name in sorted(topics)]


def _distinct(documents: list[str]) -> list[str]:
    """Documents in order, without those half of whose text stands in longer ones (paragraphs, spaces aside)."""
    seen: set[str] = set()
    kept = []
    for i in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i)):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", documents[i])]
        if 2 * sum(len(p) for p in paragraphs if p in seen) < sum(map(len, paragraphs)):
            kept.append(i)
            seen.update(paragraphs)
    return [documents[i] for i in sorted(kept)]


def _whole(documents: list[str], share: float) -> Corpus:
    """Holds out whole documents, each one that fits into the share of the text so far."""
    corpus, due = Corpus([], []), 0.0
    for text in documents:
        due += share * len(text)
        if len(text) <= due:
            corpus.held_out.append(text)
            due -= len(text)
        else:
            corpus.train.append(text)
    return corpus


def _tails(documents: list[str], share: float) -> Corpus:
    """Holds out the end of each document, from the paragraph (else the place) where the share begins."""
    corpus = Corpus([], [])
    for text in documents:
        cut = len(text) - int(share * len(text))
        cut = text.find("\n\n", cut) + 2 if "\n\n" in text[cut:-2] else cut
        corpus.train.append(text[:cut])
        if cut < len(text):
            corpus.held_out.append(text[cut:])
    return corpus


def _texts(path: Path) -> dict[str, str]:
    """The text of a .txt file, or of all of a folder, by name."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
    if not files:
        raise OSError(f"{path}: no .txt file or folder of them, no .deb file, and not pydoc_topics, austen or botchan")
    try:
        return {file.name: file.read_bytes().decode() for file in files}
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: not UTF-8 text: {error}") from error
