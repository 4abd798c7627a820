"""Exercise 15: clipping the gradient.

An unusual batch can have a gradient so large that one step ruins the model. So all gradients together are
limited to a norm:

    norm = sqrt(Σ over all elements of all gradients of g²),   g becomes min(1, max_norm / norm) g.

The direction stays the same. If norm is 0, nothing changes.

Pascanu et al., "On the difficulty of training Recurrent Neural Networks" (arXiv 1211.5063), section 3.2.

When you are done, compare with ``tinyllm/optim/clipping.py``, which adds 1e-6 to the norm, as torch does.
Grade it: python -m parity grade examples/exercises/15_clipping.py
"""


def clip_grad_norm(grads, max_norm):
    """(clipped, norm): a list of new arrays, and the norm before clipping, for a list of arrays."""
    raise NotImplementedError
