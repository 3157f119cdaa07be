"""Corpora by name and by path, and that held-out text is kept apart."""

import sys

import pytest
from r_writer import deb

from moe_jax.train import corpora
from moe_jax.train.corpora import load_corpus


def paragraphs(texts):
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n")]


def test_topics_are_held_out_whole():
    from pydoc_data.topics import topics

    corpus = load_corpus("pydoc_topics")
    assert len(corpus.train) > 20 and len(corpus.held_out) > 15
    assert set(corpus.train) | set(corpus.held_out) <= set(topics.values())
    both = corpus.train + corpus.held_out
    assert len(both) == len(set(both))
    share = sum(map(len, corpus.held_out)) / sum(map(len, both))
    assert 0.08 < share <= 0.1
    assert load_corpus("pydoc_topics") == corpus
    assert load_corpus("pydoc_topics", 0.0).held_out == []


def test_topics_do_not_leak():
    """Python's topics contain one another; what is held out must not stand in what is trained on."""
    from pydoc_data.topics import topics

    known = set(paragraphs(topics[name] for name in topics if name not in ("if", "else")))
    assert any(part in known for part in paragraphs([topics["if"]]) if len(part) > 100)  # "compound" has it
    corpus = load_corpus("pydoc_topics", 0.2)
    trained = set(paragraphs(corpus.train))
    seen = sum(len(part) for part in paragraphs(corpus.held_out) if part in trained)
    assert seen < 0.01 * sum(map(len, corpus.held_out))


def test_repeated_documents_are_left_out():
    long, short = "a b\n\nc d\n\ne", "c  d\n\nx"
    assert corpora._distinct([short, long, "new"]) == [long, "new"]
    assert corpora._distinct(["new\n\nother", long, long]) == ["new\n\nother", long]


def test_files_are_cut_at_a_paragraph(tmp_path):
    text = "".join(f"paragraph {i}\nof two lines\r\n\r\n" for i in range(20))
    (tmp_path / "b.txt").write_bytes(text.encode())
    (tmp_path / "a.txt").write_text("x" * 100, encoding="utf-8")
    (tmp_path / "c.md").write_text("not read", encoding="utf-8")
    corpus = load_corpus(str(tmp_path), 0.25)
    assert corpus.train[0] == "x" * 75 and corpus.held_out[0] == "x" * 25
    assert corpus.held_out[1].startswith("paragraph 1") and corpus.train[1].endswith("lines\n\n")
    text = text.replace("\r\n", "\n")
    assert corpus.train[1] + corpus.held_out[1] == text
    assert 0.2 < len(corpus.held_out[1]) / len(text) <= 0.25
    alone = load_corpus(str(tmp_path / "b.txt"), 0.25)
    assert (alone.train, alone.held_out) == (corpus.train[1:], corpus.held_out[1:])
    assert load_corpus(str(tmp_path), 0.0).held_out == []


def test_a_package_by_its_path(tmp_path):
    (tmp_path / "books.deb").write_bytes(deb({"z": ["last", "line"] * 50, "a": ["first\r"] * 50}))
    corpus = load_corpus(str(tmp_path / "books.deb"))
    assert corpus.train[0] == "first\n" * 45 and corpus.train[1].startswith("last\nline")


def test_refusals(tmp_path, monkeypatch):
    for held_out in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"held_out: {held_out}"):
            load_corpus("pydoc_topics", held_out)
    for source in ("no_such_corpus", str(tmp_path)):
        with pytest.raises(OSError, match=f"{source}: no .txt file.*pydoc_topics, austen or botchan"):
            load_corpus(source)
    with pytest.raises(OSError, match=r"none\.txt"):
        load_corpus(str(tmp_path / "none.txt"))
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OSError, match="not UTF-8"):
        load_corpus(str(tmp_path / "odd.txt"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(OSError, match="no pydoc_data.topics; give"):
        load_corpus("pydoc_topics")
