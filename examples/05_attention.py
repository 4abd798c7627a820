# %% [markdown]
# # Attention
#
# How does a position find what matters to it? After this chapter you can compute causal attention by hand,
# say why the scores are divided by √D, and read a map of attention. 15 minutes; prerequisite: 01 tensors.
#
# Read along: `tinyllm/functional/composed.py`, then `tinyllm/functional/attention.py`. Exercises:
# `examples/exercises/09_causal_attention.py` to `13_kv_cache.py`.

# %%

import numpy as np

from tinyllm import Tensor, no_grad
from tinyllm import functional as F
from tinyllm.functional import composed
from tinyllm.tools.plot import new_figure, show

rng = np.random.default_rng(0)
np.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## A question, keys, values
# Each position asks with a query q. Every position offers a key k, and the product q · k is large if the key
# fits. Softmax turns the scores into weights that sum to 1, and the result is the weighted mean of the
# values. Here the third position asks for what the first one offers:

# %%
keys = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0]])  # what each position is about
values = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])  # what it says
query = np.array([1.0, 0.0])
scores = keys @ query / np.sqrt(2)
weights = np.exp(scores) / np.exp(scores).sum()
print("scores ", scores)
print("weights", weights)
print("result ", weights @ values)
# > scores  [ 2.83  0.   -2.83]
# > weights [0.94 0.06 0.  ]
# > result  [1.06 0.  ]

# %% [markdown]
# ## All positions at once, and never the future
# With T positions the scores are a matrix (T, T): row t belongs to the query t. A model that is to predict
# the next token must not see it, so scores above the diagonal become -inf, whose weight is 0.

# %%
T, D = 5, 8
q, k, v = (Tensor(rng.standard_normal((1, 1, T, D))) for _ in range(3))
print(composed.attention_weights(q, k, is_causal=True).data[0, 0])
# > [[1.   0.   0.   0.   0.  ]
# >  [0.22 0.78 0.   0.   0.  ]
# >  [0.57 0.34 0.09 0.   0.  ]
# >  [0.03 0.72 0.19 0.06 0.  ]
# >  [0.52 0.06 0.1  0.13 0.19]]

# %% [markdown]
# Is it true that nothing of the future is used? Change the last value and key: only the last row changes.

# %%
before = F.scaled_dot_product_attention(q, k, v, is_causal=True).data
k.data[..., -1, :], v.data[..., -1, :] = 100.0, 100.0
after = F.scaled_dot_product_attention(q, k, v, is_causal=True).data
print("rows that changed:", np.flatnonzero(np.abs(after - before).max(axis=-1)[0, 0]).tolist())
# > rows that changed: [4]

# %% [markdown]
# ## Why √D?
# If the D components of q and k are independent with variance 1, the variance of q · k is D. Without the
# division the scores grow with the width of a head, softmax puts nearly all weight on one key, and its
# gradient vanishes. The largest weight of 64 keys, and the mean slope of the weights:

# %%
for D in (4, 64, 1024):
    q, k = rng.standard_normal((200, D)), rng.standard_normal((64, D))
    for name, scale in (("q · k     ", 1.0), ("q · k / √D", D**-0.5)):
        p = F.softmax(Tensor(q @ k.T * scale)).data
        print(
            f"D = {D:4}  {name}  largest weight {p.max(axis=1).mean():.2f}, slope {(p * (1 - p)).mean():.4f}"
        )
# > D =    4  q · k       largest weight 0.27, slope 0.0133
# > D =    4  q · k / √D  largest weight 0.10, slope 0.0150
# > D =   64  q · k       largest weight 0.82, slope 0.0040
# > D =   64  q · k / √D  largest weight 0.11, slope 0.0150
# > D = 1024  q · k       largest weight 0.95, slope 0.0011
# > D = 1024  q · k / √D  largest weight 0.11, slope 0.0150

# %% [markdown]
# ## Several heads
# One head can look in one direction only: a weighted mean of all values is little when several things
# matter. So the channels are divided among H heads, each with queries, keys and values of its own, and the
# results are joined. The cost is the same as of one head of all channels.
#
# ## Distance, by rotation
# The scores do not know where a position is: permute the keys and values, and the result is the same. Rotary
# embeddings turn q and k by an angle proportional to their position. A product of two rotated vectors depends
# on the distance only; here the same q and k at the positions 3 and 1, 13 and 11, and 3 and 2:

# %%
q, k = rng.standard_normal((2, 8))
frequencies = 100.0 ** (-np.arange(0, 8, 2) / 8)


def rotated(x, position):
    angles = position * frequencies[None]
    return F.rope(Tensor(x.reshape(1, 1, 1, 8)), np.cos(angles), np.sin(angles)).data.reshape(8)


for m, n in ((3, 1), (13, 11), (3, 2)):
    print(f"positions {m:2} and {n:2}: {rotated(q, m) @ rotated(k, n):.6f}")
# > positions  3 and  1: 0.526646
# > positions 13 and 11: 0.526646
# > positions  3 and  2: 1.101964

# %% [markdown]
# ## A map
# Attention of two heads on a repeated pattern. The first head's keys are its queries: each position looks at
# earlier ones that are equal to it. The second head knows only positions and looks at the one before.

# %%
pattern = np.tile(np.eye(6)[rng.permutation(6)], (3, 1))  # (18, 6): six symbols, three times
place = np.eye(18)
equal = composed.attention_weights(*(Tensor(6 * x[None, None]) for x in (pattern, pattern)), is_causal=True)
before = np.roll(place, 1, axis=1)  # the key of position s is that of the query s + 1
previous = composed.attention_weights(
    Tensor(9 * place[None, None]), Tensor(9 * before[None, None]), is_causal=True
)
figure, panels = new_figure(7, 3.7, columns=2)
for axes, weights, name in zip(panels[0], (equal, previous), ("equal symbols", "the position before")):
    axes.imshow(weights.data[0, 0], cmap="Blues")
    axes.grid(False)
    axes.set_xlabel(f"key: {name}")
    axes.set_ylabel("query")
print(
    "equal:", np.flatnonzero(equal.data[0, 0, 17] > 0.1).tolist(), "before:", previous.data[0, 0, 17].argmax()
)
show("runs/05_attention.png", figure)
# > equal: [5, 11, 17] before: 16
# > picture: runs/05_attention.png

# %% [markdown]
# ## Never all scores at once
# The plain form keeps the matrix of weights for the backward pass: T² numbers for each head. The fused op
# (`tinyllm/functional/attention.py`) keeps two numbers per query, its largest score and the sum of softmax,
# and computes blocks of scores again. Same result, other memory:

# %%
T, D = 512, 16
q, k, v = (Tensor(rng.standard_normal((1, 2, T, D)), requires_grad=True) for _ in range(3))
with no_grad():
    plain = composed.scaled_dot_product_attention(q, k, v, is_causal=True)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print(f"largest difference below 1e-14: {np.abs(plain.data - fused.data).max() < 1e-14}")
print(f"kept by the plain form: {2 * T * T:,} weights; by the fused op: {2 * 2 * T:,} numbers")
# > largest difference below 1e-14: True
# > kept by the plain form: 524,288 weights; by the fused op: 2,048 numbers

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is the mask applied before the softmax, and not to the weights?</summary>
#
# Zeroing weights afterwards leaves rows that do not sum to 1, and the sum they were divided by contains the
# future: the weights of the past would tell what comes.
#
# </details>
#
# <details><summary>2. The first position can see only itself. What does its attention return?</summary>
#
# Its own value: softmax of a single score is 1, whatever the score.
#
# </details>
#
# <details><summary>3. Twice as long a text: how much more work is attention, and how much more the rest?
# </summary>
#
# Attention four times as much, because every query meets every earlier key; all linear layers twice as much.
# In GPT-2 124M at 1,024 tokens attention is still less than a tenth of the work.
#
# </details>
#
# ## Read on
# `attention_weights` in `tinyllm/functional/composed.py` also has windows and soft caps;
# `tinyllm/models/rope.py` the frequencies of published models. Chapter 15 looks at the heads of one. Next:
# 06 GPT-2 from its parts.
