# %% [markdown]
# # Tensors and gradients
#
# A `Tensor` is a NumPy array that remembers where it came from. `backward()` walks back along that
# memory and leaves dL/dx in `.grad`. Everything a language model needs is built on these two lines.
#
# Read beside this: `tinyllm/tensor.py`, the whole engine in one file.

# %%
import numpy as np

from tinyllm import Tensor, no_grad, optim
from tinyllm import functional as F
from tinyllm.functional import composed

# %% [markdown]
# ## One product, by hand
# For y = Σ (x w)², the chain rule gives dy/dx = 2 x w².

# %%
x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
w = Tensor(np.array([0.5, -1.0, 2.0]), requires_grad=True)
y = ((x * w) ** 2).sum()
y.backward()
print("y     =", y.item())  # y     = 40.25
print("dy/dx =", x.grad)  # dy/dx = [ 0.5  4.  24. ]
print("by hand ", 2 * x.data * w.data**2)  # by hand  [ 0.5  4.  24. ]

# %% [markdown]
# ## Is the gradient true?
# Nudge the input along a random direction v and watch the output move: (f(x + εv) - f(x - εv)) / 2ε
# must equal the gradient's component along v. The test suite does this to every op.

# %%
rng = np.random.default_rng(0)
x = Tensor(rng.standard_normal((4, 8)), requires_grad=True)
v = rng.standard_normal((4, 8))


def f(x):
    return (F.gelu(x, approximate="tanh") * F.softmax(x)).sum()


f(x).backward()
with no_grad():
    eps = 1e-5
    nudged = (f(Tensor(x.data + eps * v)).item() - f(Tensor(x.data - eps * v)).item()) / (2 * eps)
print(f"gradient along v {(x.grad * v).sum():.9f}, by nudging {nudged:.9f}")
# gradient along v 0.979066825, by nudging 0.979066825

# %% [markdown]
# ## The same op twice: plain and fused
# `tinyllm.functional.composed` writes every op as the paper does and lets the tape find the gradient;
# `tinyllm.functional` is the fast form with a gradient derived by hand. They agree to rounding.

# %%
q, k, v = (Tensor(rng.standard_normal((1, 2, 6, 4)), requires_grad=True) for _ in range(3))
plain = composed.scaled_dot_product_attention(q, k, v, is_causal=True)
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print("largest difference:", np.abs(plain.data - fused.data).max())  # about 2e-16
print("who looks at whom (first head):")
print(composed.attention_weights(q, k, is_causal=True).data[0, 0].round(2))
# every row sums to 1, and nothing lies above the diagonal: no position sees the future

# %% [markdown]
# ## A first training loop
# Forward, backward, step: what trains two small matrices here trains GPT-2 in the next example.

# %%
angle = np.linspace(-np.pi, np.pi, 256)[:, None]  # (256, 1)
inputs, wanted = Tensor(angle), Tensor(np.sin(angle))
hidden, out = (Tensor(0.5 * rng.standard_normal(shape), requires_grad=True) for shape in ((32, 1), (1, 32)))
bias = Tensor(rng.standard_normal(32), requires_grad=True)
named = [("hidden", hidden), ("bias", bias), ("out", out)]
optimizer = optim.AdamW(named, lr=0.02, weight_decay=0.0)
for step in range(301):
    error = F.linear(F.linear(inputs, hidden, bias).tanh(), out) - wanted
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
