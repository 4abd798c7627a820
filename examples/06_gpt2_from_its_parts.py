# %% [markdown]
# # GPT-2 from its parts
#
# What is inside a language model? After this chapter you can build GPT-2 from the ops of the chapters before,
# count its parameters in your head, and say what its residual stream is. 15 minutes; prerequisites: 01 to 05.
#
# Read along: `tinyllm/models/gpt2.py`. Exercises: `examples/exercises/05_layer_norm.py`, `07_gelu.py`,
# `10_heads.py`.

# %%

import numpy as np

from tinyllm import GPT2, GPT2Config, nn, no_grad
from tinyllm import functional as F
from tinyllm.tools.plot import new_figure, show

config = GPT2Config(n_layer=4, n_head=4, n_embd=64, n_positions=32, vocab_size=100)
model = GPT2(config, rng=np.random.default_rng(0)).eval()
weights = dict(model.named_parameters())
ids = np.random.default_rng(1).integers(0, 100, (2, 10))  # (B, T)

# %% [markdown]
# ## Embeddings
# A token id selects a row of `wte`, its position a row of `wpe`. Their sum is the beginning of the residual
# stream: a vector of C channels for each position, to which every layer only adds.


# %%
def embed(ids):
    return F.embedding(ids, weights["wte.weight"]) + weights["wpe.weight"][: ids.shape[1]]  # (B, T, C)


x = embed(ids)
print(x.shape)
# > (2, 10, 64)

# %% [markdown]
# ## Attention moves information between positions
# One projection computes queries, keys and values of all heads. After attention the heads are joined and
# projected back to C channels.


# %%
def linear(name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(name, x):
    return F.layer_norm(x, (64,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def attention(block, x):
    qkv = linear(f"{block}.attn.c_attn", x).rearrange("b t (n h d) -> n b h t d", n=3, h=4)
    y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)  # (B, H, T, D)
    return linear(f"{block}.attn.c_proj", y.rearrange("b h t d -> b t (h d)"))


# %% [markdown]
# ## The feed-forward network works on each position alone
# It expands to four times as many channels, applies GELU, and projects back. Two thirds of a block's
# parameters are here.


# %%
def feed_forward(block, x):
    return linear(f"{block}.mlp.c_proj", F.gelu(linear(f"{block}.mlp.c_fc", x), approximate="tanh"))


# %% [markdown]
# ## A block, four times, and the head
# Each part reads the normalized stream and adds its result to the stream itself, so that gradients reach the
# first layer undiminished. The head is the embedding once more: the logit of a token is the product of the
# last state with that token's row.


# %%
def gpt2(ids):
    x = embed(ids)
    for i in range(4):
        x = x + attention(f"h.{i}", norm(f"h.{i}.ln_1", x))
        x = x + feed_forward(f"h.{i}", norm(f"h.{i}.ln_2", x))
    return F.linear(norm("ln_f", x), weights["wte.weight"])  # (B, T, V)


with no_grad():
    difference = np.abs(gpt2(ids).data - model(ids).data).max()
print(f"our lines against the model: equal within 1e-6: {difference < 1e-6}")
# > our lines against the model: equal within 1e-6: True

# %% [markdown]
# ## Where the parameters are
# A block has 12 C² parameters and a few more: 4 C² in attention (queries, keys, values, and the projection
# back), 8 C² in the feed-forward network. In GPT-2 124M with C = 768 that is 7.1 million for each of twelve
# blocks, and 38.6 million in the embedding.

# %%
for part in ("wte", "wpe", "h.0.attn", "h.0.mlp", "h.0.ln"):
    count = sum(parameter.size for name, parameter in weights.items() if name.startswith(part))
    print(f"{part:<9} {count:6,}  {count / 64**2:.2f} C²")
full = sum(np.prod(shape) for shape in ((50257, 768), (1024, 768))) + 12 * 12 * 768**2
print(f"GPT-2 124M by this rule: {full / 1e6:.1f} million; exactly: 124.4")
# > wte        6,400  1.56 C²
# > wpe        2,048  0.50 C²
# > h.0.attn  16,640  4.06 C²
# > h.0.mlp   33,088  8.08 C²
# > h.0.ln       256  0.06 C²
# > GPT-2 124M by this rule: 124.3 million; exactly: 124.4

# %% [markdown]
# ## The residual stream, layer by layer
# At the beginning of training each block adds little, because the weights of its last projections begin
# smaller by 1/√(2 · layers): the sum of all contributions then has about the size of one.

# %%
norms = [float(np.sqrt((embed(ids).data ** 2).mean()))]


def watch(seen):
    if seen.name.startswith("h.") and seen.name.count(".") == 1:  # a whole block
        norms.append(float(np.sqrt((seen.output.data**2).mean())))


with no_grad(), nn.observe(watch, model):
    model(ids)
print("root mean square after each block:", [f"{value:.3f}" for value in norms])
figure, [[axes]] = new_figure(6, 2.6)
axes.bar(["embedding", "block 1", "block 2", "block 3", "block 4"], norms, color="tab:blue")
axes.set_ylabel("root mean square")
show("runs/06_residual_stream.png", figure)
# > root mean square after each block: ['0.029', '0.031', '0.032', '0.034', '0.036']
# > picture: runs/06_residual_stream.png

# %% [markdown]
# ## Change it
# Every part is a module with the name that published weights use, and can be replaced: here every GELU by
# ReLU², without touching the model's code.


# %%
class Squared(nn.Module):
    """The same feed-forward network with ReLU²."""

    def __init__(self, mlp):
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x):
        r = F.relu(self.c_fc(x))
        return self.c_proj(r * r)


print(nn.replace(model, "h.*.mlp", lambda name, mlp: Squared(mlp)))
print(
    f"loss of the changed model: {model.loss(ids[:, :-1], ids[:, 1:]).item():.2f}, ln V = {np.log(100):.2f}"
)
# > ['h.0.mlp', 'h.1.mlp', 'h.2.mlp', 'h.3.mlp']
# > loss of the changed model: 4.64, ln V = 4.61

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why are embedding and head the same matrix?</summary>
#
# Both say which tokens are alike: a state that should be followed by a token should be like that token's
# row. Sharing saves 38.6 of 163 million parameters in GPT-2 124M, and every update of one improves the
# other (Press and Wolf, arXiv 1608.05859).
#
# </details>
#
# <details><summary>2. Without the residual stream, y = f(f(f(x))), what would go wrong?</summary>
#
# Each layer would have to pass on what it does not change, and its gradient would be multiplied by the slope
# of every layer on the way: a product of many numbers below 1 vanishes.
#
# </details>
#
# <details><summary>3. Where does the model know the order of the words?</summary>
#
# From `wpe` and the causal mask only. Attention and the feed-forward network treat all positions alike.
#
# </details>
#
# ## Read on
# `tinyllm/models/base.py` has what is not GPT-2's own: the loss, the cache, loading and saving.
# `tinyllm/nn/init.py` has the initial weights, `tinyllm/nn/surgery.py` the `replace` of the last section.
# Next: 07 train on The Verdict.
