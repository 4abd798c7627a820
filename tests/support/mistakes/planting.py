"""Three right solutions of a function as source text, and the substitutions that make each usual mistake."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Substitution = tuple[str, ...]  # old, new, old, new, …


@dataclass(frozen=True)
class Variants:
    """Solutions of one function of an exercise; ``mistakes[name]`` has a substitution for each of them."""

    exercise: str
    function: str
    right: tuple[str, ...]
    mistakes: dict[str, tuple[Substitution, ...]]

    def solutions(self) -> list[Callable]:
        return [self._compiled(source, f"solution {i}") for i, source in enumerate(self.right)]

    def wrong(self, mistake: str) -> list[Callable]:
        """The solutions with a mistake planted."""
        pairs = zip(self.right, self.mistakes[mistake], strict=True)
        return [
            self._compiled(self._planted(source, substitution), f"{mistake}, variant {i}")
            for i, (source, substitution) in enumerate(pairs)
        ]

    def _planted(self, source: str, substitution: Substitution) -> str:
        for old, new in zip(substitution[::2], substitution[1::2], strict=True):
            if old not in source:
                raise ValueError(f"{self.function}: {old!r} does not occur in {source}")
            source = source.replace(old, new)
        return source

    def _compiled(self, source: str, name: str) -> Callable:
        namespace = {"np": np, "math": math, "Counter": Counter}
        exec(compile(source, f"<{self.function}: {name}>", "exec"), namespace)
        return namespace[self.function]
