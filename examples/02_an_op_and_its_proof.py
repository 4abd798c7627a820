# %% [markdown]
# # An op and its proof
#
# How do you know that a gradient is right? After this chapter you can derive a gradient, write it as an op,
# and test it in three independent ways. 15 minutes; prerequisite: 01 tensors and gradients.
#
# Read along: `tinyllm/functional/README.md`, `parity/ops/cases.py`. Exercises:
# `examples/exercises/01_linear.py` to `08_swiglu.py`; they are graded by `python -m parity grade`.

# %%
import importlib.util

import numpy as np

from tinyllm import Tensor, where
from tinyllm.tools.plot import new_figure, show

rng = np.random.default_rng(0)

# %% [markdown]
# ## The formula
# ReLU² is an activation found by a search over programs (So et al., "Primer", arXiv 2109.08668):
#
#     y = r² with r = max(x, 0).
#
# ## The plain form
# Written with methods of `Tensor`, it has a gradient already: the engine knows that of every method.


# %%
def plain(x):
    return where(x > 0, x, 0.0) ** 2


x = Tensor(np.array([-1.0, 0.5, 2.0]), requires_grad=True)
y = plain(x)
y.backward(np.ones(3))
print("y    ", y.data)
print("dy/dx", x.grad)
# > y     [0.   0.25 4.  ]
# > dy/dx [0. 1. 4.]

# %% [markdown]
# ## The gradient by hand
# The plain form records two ops and keeps what both need. By hand it is one: y_i depends on x_i alone, and
# dy/dx = 2 r dr/dx, where dr/dx is 1 for x > 0 and r is 0 for x < 0. So dy/dx = 2 r in both cases, and with
# g = dL/dy the vector-Jacobian product is dx = g · 2 r.


# %%
def relu2(x):
    r = np.maximum(x.data, 0)
    return Tensor.from_op(r * r, (x,), lambda grad: (grad * (2 * r),))


# %% [markdown]
# ## First proof: the plain form
# Both must give the same. But if the derivation and the plain form share a misunderstanding, this does not
# show it.


# %%
def gradient(op, data, grad):
    x = Tensor(data, requires_grad=True)
    op(x).backward(grad)
    return x.grad


data, grad = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
same = np.abs(gradient(relu2, data, grad) - gradient(plain, data, grad)).max()
print(f"largest difference: {same:.1e}")
# > largest difference: 0.0e+00

# %% [markdown]
# ## Second proof: the definition of the derivative
# Move the input along a random direction v by h in both directions. The difference quotient needs no
# derivation at all. Its error falls with h², until rounding, which grows as 1/h, takes over: in between there
# is a best h.


# %%
def along(op, data, v, h):
    return (op(Tensor(data + h * v)).data - op(Tensor(data - h * v)).data) / (2 * h)


def cubed(x):  # its third derivative is not 0, so that the error of the quotient is visible
    return x**3


v = rng.standard_normal((4, 6))
exact = (gradient(cubed, data, grad) * v).sum()
steps = [10.0**-k for k in range(1, 12)]
errors = [abs((along(cubed, data, v, h) * grad).sum() - exact) / abs(exact) for h in steps]
for h, error in zip(steps[::3], errors[::3]):
    print(f"h = {h:.0e}: error about 1e{round(np.log10(error)):+}")
figure, [[axes]] = new_figure(6, 3)
axes.loglog(steps, errors, marker="o", markersize=3)
axes.set_xlabel("step h")
axes.set_ylabel("relative error")
show("runs/02_difference.png", figure)
# > h = 1e-01: error about 1e-2
# > h = 1e-04: error about 1e-8
# > h = 1e-07: error about 1e-10
# > h = 1e-10: error about 1e-6
# > picture: runs/02_difference.png

# %% [markdown]
# Now our op, with h = 1e-5. The kink at 0 must be avoided: a step must not cross it.

# %%
data = np.where(np.abs(data) < 0.1, 0.5, data)
expected = (along(relu2, data, v, 1e-5) * grad).sum()
ours = (gradient(relu2, data, grad) * v).sum()
print(f"by hand {ours:.8f}, quotient {expected:.8f}")
# > by hand 10.14591596, quotient 10.14591596

# %% [markdown]
# ## Third proof: somebody else's code
# PyTorch was written by other people. In float64 the two may differ by rounding only: the bound is 1e-10.

# %%
if importlib.util.find_spec("torch"):
    import torch

    t = torch.tensor(data, requires_grad=True)
    (torch.relu(t) ** 2).backward(torch.tensor(grad))
    agrees = np.abs(t.grad.numpy() - gradient(relu2, data, grad)).max() < 1e-10
    print("equal to PyTorch's:", agrees)
else:
    print("PyTorch is not installed: pip install 'tinyllm-numpy[test]'")
# > equal to PyTorch's: True

# %% [markdown]
# ## A proof that cannot fail proves nothing
# Plant a mistake and see whether each of the three notices it.


# %%
def wrong(x):
    r = np.maximum(x.data, 0)
    return Tensor.from_op(r * r, (x,), lambda grad: (grad * r,))  # the 2 is missing


print("plain form:", not np.allclose(gradient(wrong, data, grad), gradient(plain, data, grad)))
print("quotient:  ", abs((gradient(wrong, data, grad) * v).sum() - expected) > 1e-6)
# > plain form: True
# > quotient:   True

# %% [markdown]
# The tests of tinyllm do all this for every op, with shapes, memory layouts and options that Hypothesis
# draws: `tinyllm/functional/README.md` adds this op to the package in five steps. For your own code, write
# `implementation`, `reference` and `inputs` into a file and run `python -m parity check FILE`.
#
# ## Questions
#
# <details><summary>1. Why are gradients checked in float64?</summary>
#
# A wrong term can be small. In float32 rounding is 1e-7 of each number and more of a sum, so a mistake of
# 1e-5 could be rounding; in float64 what is left after rounding is 1e-15, and 1e-10 is surely a mistake.
#
# </details>
#
# <details><summary>2. The quotient checks one direction v. What if the mistake is in another?</summary>
#
# A random direction has a part along every axis, so a mistake hides only if it is at a right angle to v,
# which a random v is with probability 0. One product checks all elements at once; the elements one by one
# would need a quotient for each.
#
# </details>
#
# <details><summary>3. Why does the op not keep x for its backward pass?</summary>
#
# It needs r only. What a closure refers to stays in memory until the backward pass, so an op keeps as few
# arrays as it can.
#
# </details>
#
# ## Read on
# `tinyllm/functional/activations.py` has GELU and SwiGLU, derived and written as here; `check_composed`,
# `check_direction` and `check_torch` in `parity/ops/cases.py` are these three proofs, for every op. Next: 03
# tokens.
