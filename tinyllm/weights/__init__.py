"""Weight files: published models, and models saved by tinyllm, as named NumPy arrays."""

from collections.abc import Iterator, Mapping

import numpy as np


class StoredTensors(Mapping[str, np.ndarray]):
    """A read-only mapping from names to the tensors of a file; ``weights[name]`` reads one from disk.

    ``shapes`` (name to tuple) and ``dtypes`` (name to the format's own code) come from the header.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
