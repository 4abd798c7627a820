"""How is a layer of a finished model exchanged for another?"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from tinyllm.errors import Error
from tinyllm.nn.module import Module


def replace(model: Module, pattern: str, make: Callable[[str, Module], Module]) -> list[str]:
    """Put ``make(name, layer)`` in the place of every layer whose name matches; returns the names.

    ``pattern`` is a glob: ``*`` stands for any characters, ``?`` for one, ``[ab]`` for one of them. So
    ``"h.*.attn.c_attn"`` names one layer of every block of GPT-2. A new layer gets the mode (train or eval)
    of the old one, and may hold it. All are made before the first is put in place: if one cannot be made,
    the model stays as it was.

    Raises ``Error`` if no name matches, if the model itself would (it has no name), and if ``make`` returns
    something else than a Module.
    """
    if not callable(make):
        raise Error(f"make is a {type(make).__name__}: give a function of a name and a layer")
    modules = dict(model.named_modules())
    names = [name for name in modules if fnmatchcase(name, pattern)]
    if "" in names:
        raise Error(f"the pattern {pattern!r} matches the model itself: name the layers inside it")
    if not names:
        raise Error(f"no module matches {pattern!r}; there are {', '.join(filter(None, modules))}")
    made = {}  # by the old layer: one that stands in two places is replaced by one that does
    for name in names:
        layer = modules[name]
        if id(layer) not in made:
            made[id(layer)] = new = make(name, layer)
            if not isinstance(new, Module):
                raise Error(f"make() returned a {type(new).__name__} for {name}: return a tinyllm.nn.Module")
            new.train(layer.training)
    for name in reversed(names):  # the inner ones first, while their owners are in place
        _put(model, name, made[id(modules[name])])
    return names


def _put(model: Module, name: str, new: Module) -> None:
    *path, last = name.split(".")
    owner = model
    for part in path:
        owner = _get(owner, part)
    if isinstance(owner, list):
        owner[int(last)] = new
    elif isinstance(owner, dict):
        owner[last] = new
    else:
        setattr(owner, last, new)


def _get(owner, part: str):
    if isinstance(owner, list):
        return owner[int(part)]
    return owner[part] if isinstance(owner, dict) else getattr(owner, part)
