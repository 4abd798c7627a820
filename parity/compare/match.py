"""Pairing of the layers of two models.

Layers are paired by a given name map; otherwise by equal names if one model has all names of the other, and
else by the shapes of their parameters in the order in which they run. A *layer* is a module that owns
parameters. Containers are paired by their contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher

from parity.compare.capture import OUTPUT, Capture
from tinyllm.errors import Error


def match(ours: Capture, theirs: Capture, names: Mapping[str, str | None] | None) -> tuple[dict, dict]:
    """(modules, parameters) to compare, each as our name -> their name.

    ``names`` maps our modules or parameters to theirs, or to None if there is no counterpart. Raises Error if
    it misses one of our layers or contains a name that does not exist, and if no layers can be paired.
    """
    if names is None:
        modules, parameters = _guess_layers(ours, theirs), {}
        if ours.layers and not modules:
            raise Error("no layers have parameters of the same shapes in both models: pass names=")
    else:
        _check(names, ours, theirs)
        given = {name: other for name, other in names.items() if other is not None}
        modules = {name: other for name, other in given.items() if name in ours.modules}
        parameters = {name: other for name, other in given.items() if name in ours.shapes}
    _add_containers(modules, names or {}, ours, theirs)
    for name, other in list(modules.items()):
        _add_parameters(parameters, ours.layers.get(name, {}), theirs.layers.get(other, {}), ours, theirs)
    if names is not None:
        parameters = {name: other for name, other in parameters.items() if names.get(name, other) == other}
    return modules, parameters


def _check(names: Mapping[str, str | None], ours: Capture, theirs: Capture) -> None:
    """Check that the map has each of our layers, or all its parameters, and that every name exists."""
    missed = [
        layer
        for layer, own in ours.layers.items()
        if layer not in names and not all(parameter in names for parameter in own.values())
    ]
    unknown = [name for name in names if name not in ours.modules and name not in ours.shapes]
    others = [other for other in names.values() if other is not None]
    unknown += [other for other in others if other not in theirs.modules and other not in theirs.shapes]
    twice = sorted({other for other in others if others.count(other) > 1})
    kinds = {
        "layers missing from it": missed,
        "names that no module or parameter has": unknown,
        "names given twice": twice,
    }
    problems = [f"{kind} ({len(found)}): {', '.join(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise Error(f"names= must map every layer (to None if it has no counterpart); {'; '.join(problems)}")


def _guess_layers(ours: Capture, theirs: Capture) -> dict[str, str]:
    if ours.layers.keys() <= theirs.layers.keys() or theirs.layers.keys() <= ours.layers.keys():
        return {name: name for name in ours.layers if name in theirs.layers}
    a, b = _as_they_ran(ours), _as_they_ran(theirs)
    blocks = SequenceMatcher(
        None, [_signature(ours, n) for n in a], [_signature(theirs, n) for n in b], autojunk=False
    )
    return {
        a[block.a + i]: b[block.b + i] for block in blocks.get_matching_blocks() for i in range(block.size)
    }


def _as_they_ran(run: Capture) -> list[str]:
    """The layers in the order of their first call, then those that were not called."""
    return list(dict.fromkeys([*(name for name in run.outputs if name in run.layers), *run.layers]))


def _signature(run: Capture, layer: str) -> tuple:
    return tuple(run.shapes[parameter] for parameter in run.layers[layer].values())


def _add_containers(modules: dict[str, str], names: Mapping, ours: Capture, theirs: Capture) -> None:
    """Pair containers of equal layer pairs, innermost first; then equal leaf names in paired parents."""
    mine = {name: name for name in modules}  # each side's name of a pair -> our name of it
    others = {other: name for name, other in modules.items()}
    groups = [_by_content(ours, mine), _by_content(theirs, others)]
    for inside, containers in groups[0].items():
        for name, other in zip(containers, groups[1].get(inside, [])):
            if name not in names:
                modules[name] = other
    parents = {(name.rpartition(".")[0], other.rpartition(".")[0]) for name, other in modules.items()}
    taken = set(modules.values())
    for name in (name for name in ours.outputs if name not in modules and name not in names):
        parent, _, leaf = name.rpartition(".")
        for other in (f"{p}.{leaf}".lstrip(".") for mine, p in sorted(parents) if mine == parent):
            if name != OUTPUT and other in theirs.outputs and other not in taken:
                modules[name] = other
                taken.add(other)
                break


def _by_content(run: Capture, pairs: dict[str, str]) -> dict[frozenset, list[str]]:
    """Set of layer pairs -> the unpaired containers of exactly these, in the order they ran."""
    groups: dict[frozenset, list[str]] = {}
    for name in (name for name in run.outputs if name in run.modules and name not in pairs):
        inside = frozenset(pair for inner, pair in pairs.items() if inner.startswith(f"{name}."))
        if inside:
            groups.setdefault(inside, []).append(name)
    return groups


def _add_parameters(parameters: dict, mine: dict, other: dict, ours: Capture, theirs: Capture) -> None:
    """Pair the parameters of two layers by equal leaf names, then by shape in the order of definition."""
    taken = set(parameters.values())
    pairs = [(mine[leaf], other[leaf]) for leaf in mine if leaf in other]
    rest = [name for leaf, name in mine.items() if leaf not in other]
    for candidate in (name for leaf, name in other.items() if leaf not in mine):
        same = next((name for name in rest if ours.shapes[name] == theirs.shapes[candidate]), None)
        if same is not None:
            rest.remove(same)
            pairs.append((same, candidate))
    for name, candidate in pairs:
        if name not in parameters and candidate not in taken:
            parameters[name] = candidate
            taken.add(candidate)
