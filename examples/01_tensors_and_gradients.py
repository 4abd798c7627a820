# %% [markdown]
# # Tensors and gradients
#
# How does a program know which way is down? After this chapter you can compute a gradient by hand, let
# `backward()` compute it, test it, and train a network of two matrices. 10 minutes; prerequisites: NumPy and
# the chain rule.
#
# Read along: `tinyllm/tensor.py`, the whole engine in one file. Exercises: `examples/exercises/01_linear.py`
# and `14_adamw.py`; `python -m parity grade` grades them.

# %%
import numpy as np

from tinyllm import Tensor, no_grad, optim
from tinyllm import functional as F
from tinyllm.functional import composed
from tinyllm.tools.plot import new_figure, show

# %% [markdown]
# ## A gradient by hand
# A `Tensor` is a NumPy array together with the graph of the ops that computed it. `backward()` walks that
# graph from the loss to the leaves and stores dL/dx in the `.grad` of each leaf x. A language model needs no
# other machinery to train.
#
# For y = Σ_i (x_i w_i)² the chain rule gives dy/dx_i = 2 (x_i w_i) w_i = 2 x_i w_i².

# %%
x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
w = Tensor(np.array([0.5, -1.0, 2.0]), requires_grad=True)
y = ((x * w) ** 2).sum()
y.backward()
print("y      ", y.item())
print("dy/dx  ", x.grad)
print("by hand", 2 * x.data * w.data**2)
# > y       40.25
# > dy/dx   [ 0.5  4.  24. ]
# > by hand [ 0.5  4.  24. ]

# %% [markdown]
# ## Is the gradient correct?
# Move the input a little along a random direction v: the central difference (f(x + εv) - f(x - εv)) / 2ε must
# equal ⟨df/dx, v⟩, the derivative along v. The tests check every op in this way.

# %%
rng = np.random.default_rng(0)
x = Tensor(rng.standard_normal((4, 8)), requires_grad=True)
v = rng.standard_normal((4, 8))


def f(x):
    return (F.gelu(x, approximate="tanh") * F.softmax(x)).sum()


f(x).backward()
with no_grad():
    eps = 1e-5
    difference = (f(Tensor(x.data + eps * v)).item() - f(Tensor(x.data - eps * v)).item()) / (2 * eps)
print(f"derivative along v {(x.grad * v).sum():.9f}, central difference {difference:.9f}")
# > derivative along v 0.979066825, central difference 0.979066825

# %% [markdown]
# ## The same op twice: plain and fused
# `tinyllm.functional.composed` has every op as the papers write it, and the engine derives the gradient.
# `tinyllm.functional` has the fast form with a gradient derived by hand. They agree up to rounding.

# %%
q, k, v = (Tensor(rng.standard_normal((1, 2, 6, 4)), requires_grad=True) for _ in range(3))
plain = composed.scaled_dot_product_attention(q, k, v, is_causal=True)
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print("equal up to rounding:", np.abs(plain.data - fused.data).max() < 1e-15)
print("attention weights of the first head:")
print(composed.attention_weights(q, k, is_causal=True).data[0, 0].round(2))
# > equal up to rounding: True
# > attention weights of the first head:
# > [[1.   0.   0.   0.   0.   0.  ]
# >  [0.36 0.64 0.   0.   0.   0.  ]
# >  [0.37 0.21 0.41 0.   0.   0.  ]
# >  [0.12 0.63 0.06 0.2  0.   0.  ]
# >  [0.2  0.07 0.28 0.23 0.22 0.  ]
# >  [0.13 0.21 0.05 0.1  0.14 0.36]]

# %% [markdown]
# Every row sums to 1, and all weights above the diagonal are 0: no position attends to a later one. Chapter
# 05 says what these weights are.

# %% [markdown]
# ## A first training loop
# Forward, backward, optimizer step: the loop that fits a sine with two small matrices here also trains GPT-2.

# %%
angle = np.linspace(-np.pi, np.pi, 256)[:, None]  # (256, 1)
inputs, targets = Tensor(angle), Tensor(np.sin(angle))
hidden, out = (Tensor(0.5 * rng.standard_normal(shape), requires_grad=True) for shape in ((32, 1), (1, 32)))
bias = Tensor(rng.standard_normal(32), requires_grad=True)
named = [("hidden", hidden), ("bias", bias), ("out", out)]
optimizer = optim.AdamW(named, lr=0.02, weight_decay=0.0)
curves = {}
for step in range(301):
    outputs = F.linear(F.linear(inputs, hidden, bias).tanh(), out)
    error = outputs - targets
    loss = (error * error).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        curves[step] = outputs.data
        print(f"step {step:3}  mean squared error {loss.item():.5f}")
# > step   0  mean squared error 3.15232
# > step 100  mean squared error 0.00383
# > step 200  mean squared error 0.00054
# > step 300  mean squared error 0.00031

# %% [markdown]
# ## In a picture
# What the network computes before training, and after one, two and three hundred steps: it comes ever closer
# to the sine.

# %%
figure, [[axes]] = new_figure(6, 3)
for step, curve in curves.items():
    axes.plot(angle, curve, label=f"step {step}", linewidth=1)
axes.plot(angle, np.sin(angle), "k:", label="sin x")
axes.set_xlabel("x")
axes.set_ylabel("output")
axes.legend(frameon=False, fontsize="small")
show("runs/01_sine.png", figure)
# > picture: runs/01_sine.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. `x` is used twice in y = x · x. Why is dy/dx = 2x, and not x, although each use has the
# slope x?</summary>
#
# The chain rule adds over all paths from x to y: x + x. `backward()` adds to a gradient that is there
# already, within one pass and between two: that is why the loop calls `zero_grad()`.
#
# </details>
#
# <details><summary>2. Why backward, from the loss to the inputs, and not forward?</summary>
#
# One pass backward gives the derivative of one number, the loss, in all directions at once. One pass forward
# would give the derivative in one direction: GPT-2 would need 124 million of them for a step.
#
# </details>
#
# <details><summary>3. What does training cost in memory that computing the output does not?</summary>
#
# What the backward pass needs is kept until it has run: here x and w of each product. `no_grad()` keeps
# nothing, and generating text runs in it.
#
# </details>
#
# ## Read on
# `backward` in `tinyllm/tensor.py` is a loop over the nodes, the newest first; `tinyllm/optim/adamw.py` has
# AdamW. Next: 02 an op and its proof.
