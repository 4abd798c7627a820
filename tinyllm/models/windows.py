"""Which layers attend within a window? The kinds of layers, as ``transformers`` names them."""

from __future__ import annotations

from tinyllm.errors import Error

SLIDING, FULL = "sliding_attention", "full_attention"


def checked_layer_types(given: list | None, usual: list[str], window: int | None) -> list[str]:
    """The kind of every layer: those ``given`` in a config, or else the ``usual`` ones.

    Raises ``Error`` unless there is one of the two kinds for each layer, and a ``window`` if one is sliding.
    """
    kinds = usual if given is None else list(given)
    if len(kinds) != len(usual) or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise Error(f"layer_types must have {SLIDING} or {FULL} for each of {len(usual)} layers, not {kinds}")
    if SLIDING in kinds and window is None:
        raise Error(f"sliding_window is missing, and layer_types has {SLIDING}: give a whole number")
    return kinds
