"""Docstrings of the standard library that share no paragraph with its documentation."""

import sysconfig

import pytest

from tinyllm.data.corpus import open_corpus
from tinyllm.data.documents import python_docs
from tinyllm.data.unseen import paragraphs, python_docstrings, without_paragraphs_of
from tinyllm.errors import Error

NAMES = "python-docs", "python-docstrings", "python-docstrings-test"


def test_paragraphs_are_compared_by_their_words_and_kept_once():
    known = ["the first\nparagraph\n\nand another", "a third"]
    text = "A new one.\n \nand\n   another\n\nthe first paragraph, longer\n\n\n\na third\n\nA new\none.\n\n"
    text += "last\n"
    kept = "A new one.\n\nthe first paragraph, longer\n\nlast\n"
    assert [*without_paragraphs_of([text], known)] == [kept]
    assert [*without_paragraphs_of(["a third"], [])] == ["a third"]


def test_emptied_documents_are_omitted_and_repeated_ones_kept_once():
    documents = ["known\n", "new", "", "another\n\nnew", "new\n"]
    assert [*without_paragraphs_of(iter(documents), iter(["known"]))] == ["new", "another"]


def test_the_known_paragraphs_are_collected_once(monkeypatch):
    """Not once for each document, which would take time in proportion to the product of both texts."""
    split, texts = paragraphs, []
    monkeypatch.setattr("tinyllm.data.unseen.paragraphs", lambda text: texts.append(text) or split(text))
    assert [*without_paragraphs_of(["a", "b", "c"], ["known", "too"])] == ["a", "b", "c"]
    assert texts == ["known", "too", "a", "b", "c"]


def test_the_documentation_and_both_halves_of_the_docstrings_share_no_paragraph():
    texts = {name: "".join(open_corpus(name).documents()) for name in NAMES}
    words = {name: {" ".join(part.split()) for part in paragraphs(text)} for name, text in texts.items()}
    assert words["python-docs"].isdisjoint(words["python-docstrings"] | words["python-docstrings-test"])
    assert len(words["python-docstrings"] & words["python-docstrings-test"]) < 5  # such as "Internal."
    for name in NAMES[1:]:
        assert len(texts[name]) == 45_000
        assert len(words[name]) > 300


def test_shared_paragraphs_are_found(monkeypatch):
    """The same with documentation that contains the beginning of the docstrings."""
    first, *rest = paragraphs(python_docstrings(0))
    monkeypatch.setattr("tinyllm.data.unseen.python_docs", lambda: f"{python_docs()}\n\n{first}")
    assert paragraphs(python_docstrings(0))[:9] == rest[:9]


def test_a_library_without_source_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Error, match="no source of its standard library"):
        python_docstrings(0)
