"""Weight files: models that others trained, and our own, as named NumPy arrays."""

from collections.abc import Iterator, Mapping

import numpy as np


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors on disk by name, read-only; each is read when it is asked for.

    ``shapes`` (name to tuple) and ``dtypes`` (name to the format's own code) are known from the start.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
