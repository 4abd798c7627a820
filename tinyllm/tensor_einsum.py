"""Sums of products: einsum, with its notation of one letter per axis, and the products of vectors."""

import string

import numpy as np

from tinyllm.backend.dtypes import is_half
from tinyllm.errors import Error, names_shapes
from tinyllm.tensor_ops import check_tensors


def vector_matmul(a, b):
    """``a @ b`` where a, b or both are vectors: a row on the left, a column on the right.

    (K,) @ (K,) -> (), (K,) @ (..., K, N) -> (..., N) and (..., M, K) @ (K,) -> (..., M). The gradient is that
    of the ops it is composed of: for c = a · b, da = dc b and db = dc a; otherwise that of a matrix product.
    """
    if a.shape[-1] != b.shape[-2:][0]:
        raise Error(f"@ needs rows on the left as long as columns on the right, not {a.shape} and {b.shape}")
    if a.ndim == b.ndim == 1:
        return (a * b).sum()
    if a.ndim == 1:
        out = a.reshape(1, -1) @ b
        return out.reshape(out.shape[:-2] + out.shape[-1:])
    out = a @ b.reshape(-1, 1)
    return out.reshape(out.shape[:-1])


@names_shapes
def einsum(subscripts: str, *tensors):
    """Products summed over every letter that the output lacks; as in ``torch.einsum``, "..." and a missing
    output are completed, and a letter that an operand repeats takes its diagonal.

    The gradient of an operand is an einsum of the result's gradient and the other operands, whose output has
    the operand's letters: for "ij,jk->ik", dA = einsum("ik,jk->ij", dC, B). As in NumPy, axes of length 1
    broadcast; the engine sums the gradient over them.
    """
    check_tensors(tensors)
    if tensors and is_half(tensors[0].dtype):  # see Tensor.__matmul__
        in_float32 = einsum(subscripts, *(tensor.astype(np.float32) for tensor in tensors))
        return in_float32.astype(tensors[0].dtype)
    terms, output = explicit_subscripts(subscripts, [t.shape for t in tensors])
    tensors = [diagonal(tensor, term) for tensor, term in zip(tensors, terms)]
    terms = ["".join(dict.fromkeys(term)) for term in terms]
    arrays, needed = [t.data for t in tensors], [t.requires_grad for t in tensors]

    def gradient_of(k, grad):
        other_terms = terms[:k] + terms[k + 1 :]
        reachable = "".join(c for c in terms[k] if any(c in term for term in [output, *other_terms]))
        result = np.einsum(
            ",".join([output, *other_terms]) + "->" + reachable,
            *[grad, *arrays[:k], *arrays[k + 1 :]],
            optimize=True,
        )
        # A letter of this operand alone was summed over: the gradient is constant along its axis.
        sizes = dict(zip(reachable, result.shape))
        result = result.reshape([sizes.get(c, 1) for c in terms[k]])
        return np.broadcast_to(result, np.broadcast_shapes(result.shape, arrays[k].shape))

    return tensors[0].from_op(
        np.einsum(f"{','.join(terms)}->{output}", *arrays, optimize=True),
        tuple(tensors),
        lambda grad: [gradient_of(k, grad) if needed[k] else None for k in range(len(arrays))],
    )


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
