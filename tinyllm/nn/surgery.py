"""How is a layer of an existing model found by its name, and replaced?"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase

from tinyllm.checks import check_model
from tinyllm.errors import Error
from tinyllm.nn.module import Module


def replace(
    model: Module, pattern: str | Collection[str], make: Callable[[str, Module], Module]
) -> list[str]:
    """Replace every layer whose name matches ``pattern`` by ``make(name, layer)``; returns the names.

    ``pattern`` is a glob, or several: ``*`` matches any characters, ``?`` one character, ``[ab]`` either a or
    b. So ``"h.*.attn.c_attn"`` matches one layer in every block of GPT-2. A new layer may contain the old one
    and is put into the same mode, train or eval. All new layers are made before any is inserted: if ``make``
    fails, the model is unchanged.

    Raises ``Error`` if a pattern matches no layer, if one matches the model itself (its name is empty), and
    if ``make`` does not return a Module.
    """
    check_model(model, "named_modules")
    if isinstance(make, Module) or not callable(make):
        raise Error(
            f"make is a {type(make).__name__}: pass a function, such as lambda name, layer: MyLayer(layer)"
        )
    modules = dict(model.named_modules())
    chosen = set()
    for glob in [pattern] if isinstance(pattern, str) else check_names(pattern, "pattern"):
        found = {name for name in modules if fnmatchcase(name, glob)}
        if "" in found:
            raise Error(
                f"the pattern {glob!r} matches the model itself: use one that matches its layers only"
            )
        if not found:
            raise Error(f"no layer matches {glob!r}; the layers are {', '.join(filter(None, modules))}")
        chosen |= found
    names = [name for name in modules if name in chosen]  # in order of definition
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


def check_names(names: Collection[str], what: str) -> Collection[str]:
    """The names. Raises ``Error``, naming ``what`` they are, unless they are a collection of str."""
    several = isinstance(names, Collection) and not isinstance(names, str)
    if not several or not all(isinstance(name, str) for name in names):
        raise Error(f"{what} is {names!r}: give a list of str, such as ['lm_head']")
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


def matches(targets: str | Collection[str], name: str) -> bool:
    """Whether a layer's name equals one of ``targets`` or ends in "." and it; a str is a regular expression.

    The expression must match the whole name. These are PEFT's rules.
    """
    if isinstance(targets, str):
        return _compiled(targets).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def first_match(patterns: Mapping | None, name: str, default):
    """The value of the first pattern that matches the end of a name, from its start or from a dot on."""
    found = (
        value for key, value in (patterns or {}).items() if _compiled(rf"(.*\.)?({key})").fullmatch(name)
    )
    return next(found, default)


def _compiled(expression: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise Error(f"{expression!r} is not a regular expression ({error}): correct it") from None
