# %% [markdown]
# # Tensors and gradients
#
# A `Tensor` is a NumPy array together with the graph of the ops that computed it. `backward()` walks that
# graph from the loss to the leaves and stores dL/dx in the `.grad` of each leaf x. A language model needs no
# other machinery to train.
#
# Read alongside: `tinyllm/tensor.py`, the whole engine in one file.

# %%
import numpy as np

from tinyllm import Tensor, no_grad, optim
from tinyllm import functional as F
from tinyllm.functional import composed

# %% [markdown]
# ## A gradient by hand
# For y = Σ_i (x_i w_i)² the chain rule gives dy/dx_i = 2 (x_i w_i) w_i = 2 x_i w_i².

# %%
x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
w = Tensor(np.array([0.5, -1.0, 2.0]), requires_grad=True)
y = ((x * w) ** 2).sum()
y.backward()
print("y     =", y.item())  # y     = 40.25
print("dy/dx =", x.grad)  # dy/dx = [ 0.5  4.  24. ]
print("by hand ", 2 * x.data * w.data**2)  # by hand  [ 0.5  4.  24. ]

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
# derivative along v 0.979066825, central difference 0.979066825

# %% [markdown]
# ## The same op twice: plain and fused
# `tinyllm.functional.composed` has every op as the papers write it, and the engine derives the gradient.
# `tinyllm.functional` has the fast form with a gradient derived by hand. They agree up to rounding.

# %%
q, k, v = (Tensor(rng.standard_normal((1, 2, 6, 4)), requires_grad=True) for _ in range(3))
plain = composed.scaled_dot_product_attention(q, k, v, is_causal=True)
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print("largest difference:", np.abs(plain.data - fused.data).max())  # about 2e-16
print("attention weights of the first head:")
print(composed.attention_weights(q, k, is_causal=True).data[0, 0].round(2))
# every row sums to 1, and all weights above the diagonal are 0: no position attends to a later one

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
for step in range(301):
    error = F.linear(F.linear(inputs, hidden, bias).tanh(), out) - targets
    loss = (error * error).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step:3}  mean squared error {loss.item():.5f}")
# step   0  mean squared error 3.15232
# step 100  mean squared error 0.00383
# step 200  mean squared error 0.00054
# step 300  mean squared error 0.00031
