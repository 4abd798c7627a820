"""Exercise 2: an embedding.

A token id selects a row of a table, y_n = weight[ids_n]. Nothing else happens in the forward pass. The
gradient of a row of the table is the sum over all positions at which it was selected:

    dweight_v = Σ over the n with ids_n = v of grad_n,   0 if v does not occur.

When you are done, compare with ``tinyllm/functional/linear.py``.
Grade it: python -m parity grade examples/exercises/02_embedding.py
"""


def embedding(ids, weight):
    """y (N, C) for integer ids (N,) and weight (vocabulary, C)."""
    raise NotImplementedError


def embedding_gradient(grad, ids, weight):
    """dweight for grad = dL/dy (N, C)."""
    raise NotImplementedError
