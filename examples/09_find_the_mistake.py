# %% [markdown]
# # Find the mistake
#
# You wrote your own GPT in PyTorch. It runs, its initial loss is that of a uniform guess, and it even learns.
# Is it correct? After this chapter you can find out, and find the first layer whose result differs:
# `parity.compare` runs your model and tinyllm's with the same weights, forward and backward. 10 minutes;
# prerequisites: 06 GPT-2, and PyTorch (`pip install 'tinyllm-numpy[test]'`).
#
# Read along: `tinyllm/models/gpt2.py`, `parity/compare/layers.py`. Exercise: plant a mistake of your own in
# the model below, and ask a friend to find it.

# %%
import importlib.util
import sys

import numpy as np

from tinyllm import GPT2, GPT2Config

if not importlib.util.find_spec("torch"):
    print("This example needs PyTorch: pip install 'tinyllm-numpy[test]'")
    sys.exit()

import torch
from torch import nn

from parity.compare import compare
from tinyllm.tools.plot import new_figure, show

LAYERS, HEADS, CHANNELS, CONTEXT, VOCABULARY = 4, 4, 64, 64, 256

# %% [markdown]
# ## The model
# Its layers have names of their own. One line is wrong.


# %%
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, time, CHANNELS))

    def scores(self, q, k):
        return q @ k.transpose(-1, -2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(CHANNELS)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(CHANNELS)
        self.feed_forward = nn.Sequential(
            nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(approximate="tanh"), nn.Linear(4 * CHANNELS, CHANNELS)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class MyGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, CHANNELS)
        self.position_embedding = nn.Embedding(CONTEXT, CHANNELS)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.final_norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        return self.head(self.final_norm(self.blocks(x)))


# %% [markdown]
# ## Copy the weights
# We compare in float64, where two correct results agree to about fifteen digits, so that a larger difference
# is a mistake. Both models define their parameters in the same order, and a `Linear` weight is (out, in) in
# both.

# %%
config = GPT2Config(
    n_layer=LAYERS,
    n_head=HEADS,
    n_embd=CHANNELS,
    n_positions=CONTEXT,
    vocab_size=VOCABULARY,
    tie_word_embeddings=False,
)
ours = GPT2(config, rng=np.random.default_rng(0)).astype(np.float64)
theirs = MyGPT().double()
with torch.no_grad():
    for parameter, weights in zip(theirs.parameters(), ours.parameters(), strict=True):
        parameter.copy_(torch.from_numpy(weights.data))

ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, CONTEXT))
targets = torch.from_numpy(np.roll(ids, -1, axis=1)).flatten()

# %% [markdown]
# ## Does the loss reveal the mistake?

# %%
our_loss = ours.eval().loss(ids, targets.numpy().reshape(ids.shape)).item()
their_loss = nn.functional.cross_entropy(theirs(torch.from_numpy(ids)).flatten(0, 1), targets).item()
print(f"loss of tinyllm {our_loss:.4f}, of my GPT {their_loss:.4f}")
# > loss of tinyllm 5.5528, of my GPT 5.5529

# %% [markdown]
# That is far too close to raise suspicion.
#
# ## Layer by layer
# Layers are paired by the shapes of their parameters, in the order in which they run. If that fails, pass the
# pairs in `names=`.

# %%
found = compare(ours, theirs, ids)
print(*found.verdict().split(". "), sep=".\n")
# > First diverging layer: h.0.attn.c_proj (output of h.0.attn.c_proj, error 3.2e-02, bound 1.0e-10).
# > The last to agree is the output of h.0.attn.c_attn.

# %% [markdown]
# `print(found)` shows the whole table. `c_attn` agrees and `c_proj` does not, so the mistake is between the
# two, in the attention itself: the scores must be divided by the square root of the head's size.


# %%
def scores(attention, q, k):
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


Attention.scores = scores
fixed = compare(ours, theirs, ids)
print(fixed.verdict())
# > All 134 rows agree. The closest to its bound is the … (error …e-15, bound 1.0e-10).
assert found.first.name == "h.0.attn.c_proj" and fixed.first is None

# %% [markdown]
# ## In a picture
# The error of every row, in the order of computation: outputs from the first layer to the last, then
# gradients from the last to the first. One wrong line reaches all that comes after it, and what comes before
# it agrees to fifteen digits.

# %%
figure, [[axes]] = new_figure(8, 3)
for comparison, label in ((found, "with the mistake"), (fixed, "corrected")):
    errors = [max(row.relative, 1e-17) for row in comparison.rows]
    axes.semilogy(errors, ".", markersize=4, label=label)
axes.axhline(1e-10, color="black", linestyle=":", linewidth=1)
axes.set_xlabel("row of the comparison: outputs, then gradients (dotted: the bound)")
axes.set_ylabel("relative error")
axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.65))
show("runs/09_errors.png", figure)
# > picture: runs/09_errors.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is the initial loss nearly right although attention is wrong?</summary>
#
# At the start the weights are small: all scores are near 0, and the weights near equal with and without 1/√D.
# The model could even learn to compensate, by smaller queries. Losses see the whole; only numbers of the
# parts tell where.
#
# </details>
#
# <details><summary>2. All outputs agree, but a gradient differs. Where do you look?</summary>
#
# In a backward pass written by hand, or in an op that is not differentiated where it should be (`detach`, a
# conversion to NumPy). The forward pass is right, so the names of layers help only up to the first gradient,
# counted from the loss, that differs.
#
# </details>
#
# <details><summary>3. In float32 the largest error would be about 1e-6. Is that a mistake?</summary>
#
# You cannot know, and so both models are compared in float64: rounding is then nine digits smaller, and a
# mistake stays as it is.
#
# </details>
#
# ## Read on
# `parity/README.md` has what is proven in this way, and `python -m parity report` draws the comparison as a
# page. `python -m parity check FILE` compares your own function or model. Next: 10 GPT-2 to Llama.
