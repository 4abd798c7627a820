"""The notation of einsum: one letter per axis."""

import string

import numpy as np

from tinyllm.errors import Error


def explicit_subscripts(subscripts: str, shapes):
    """The terms and the output of an einsum, with one letter per axis.

    "..." becomes unused letters, aligned at its last axis. A missing output is "..." and then, in
    alphabetical order, the letters that occur once.
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    axes = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes)]  # of each "..."
    unused = "".join(c for c in string.ascii_letters if c not in subscripts)[: max(axes, default=0)]
    once = sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1)
    output = output if arrow else "".join(["...", *once])
    expanded = [term.replace("...", unused[len(unused) - n :]) for term, n in zip(terms, axes)]
    if len(terms) != len(shapes) or any(len(t) != len(shape) for t, shape in zip(expanded, shapes)):
        raise Error(f"einsum {subscripts!r} needs one term per tensor, with one letter per axis of {shapes}")
    return expanded, output.replace("...", unused)


def diagonal(tensor, term: str):
    """The elements of ``tensor`` where axes of one letter of ``term`` have one index: an axis per letter."""
    sizes = dict(zip(term, tensor.shape))
    if len(sizes) == len(term):
        return tensor
    if any(sizes[c] != n for c, n in zip(term, tensor.shape)):
        raise Error(f"einsum: a letter that {term!r} repeats has two sizes in shape {tensor.shape}")
    index = {
        c: np.arange(sizes[c], like=tensor.data).reshape([-1 if d == c else 1 for d in sizes]) for c in sizes
    }
    return tensor[tuple(index[c] for c in term)]
