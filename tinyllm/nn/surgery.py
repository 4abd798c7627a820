"""How is a layer of an existing model replaced?"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from tinyllm.errors import Error
from tinyllm.nn.module import Module


def replace(model: Module, pattern: str, make: Callable[[str, Module], Module]) -> list[str]:
    """Replace every layer whose name matches ``pattern`` by ``make(name, layer)``; returns the names.

    ``pattern`` is a glob: ``*`` matches any characters, ``?`` one character, ``[ab]`` either a or b. So
    ``"h.*.attn.c_attn"`` matches one layer in every block of GPT-2. A new layer may contain the old one and
    is put into the same mode, train or eval. All new layers are made before any is inserted: if ``make``
    fails, the model is unchanged.

    Raises ``Error`` if no layer matches, if the model itself does (its name is empty), and if ``make`` does
    not return a Module.
    """
    if isinstance(make, Module) or not callable(make):
        raise Error(
            f"make is a {type(make).__name__}: pass a function, such as lambda name, layer: MyLayer(layer)"
        )
    modules = dict(model.named_modules())
    names = [name for name in modules if fnmatchcase(name, pattern)]
    if "" in names:
        raise Error(f"the pattern {pattern!r} matches the model itself: use one that matches its layers only")
    if not names:
        raise Error(f"no layer matches {pattern!r}; the layers are {', '.join(filter(None, modules))}")
    made = {}  # keyed by the old layer: a layer shared by two places has one shared replacement
    for name in names:
        layer = modules[name]
        if id(layer) not in made:
            made[id(layer)] = new = make(name, layer)
            if not isinstance(new, Module):
                raise Error(f"make() returned a {type(new).__name__} for {name}: return a tinyllm.nn.Module")
            new.train(layer.training)
    for name in reversed(names):  # inner layers first, while their owners are still in place
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
