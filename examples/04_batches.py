# %% [markdown]
# # Batches
#
# What exactly does a language model learn from? After this chapter you can say what input and target of a
# training step are, cut a text into windows, and explain why a run that was interrupted continues with the
# very batch it would have seen. 10 minutes; prerequisite: 03 tokens.
#
# Read along: `tinyllm/data/batches.py`. Exercise: `examples/exercises/04_cross_entropy.py`.

# %%
import math

import numpy as np

from tinyllm import GPT2, GPT2Config, load_tokenizer
from tinyllm.data.batches import Batches, Windows
from tinyllm.tools.plot import new_figure, show

tokenizer = load_tokenizer("gpt2")
ids = tokenizer.encode("Every effort moves you closer to the height of your glory.")

# %% [markdown]
# ## One text, many tasks
# The target of each position is the next token. So one sequence of T tokens contains T tasks, and because a
# position sees only what is before it, the model solves all of them in a single pass.

# %%
for end in range(1, 6):
    context, target = tokenizer.decode(ids[:end]), tokenizer.decode([ids[end]])
    print(f"{context!r} -> {target!r}")
# > 'Every' -> ' effort'
# > 'Every effort' -> ' moves'
# > 'Every effort moves' -> ' you'
# > 'Every effort moves you' -> ' closer'
# > 'Every effort moves you closer' -> ' to'

# %% [markdown]
# ## Windows
# A text is longer than the context of a model. It is cut into windows of `context` tokens, and the target of
# a window is the same window shifted by one. With `stride` = `context` every token is a target exactly once;
# a smaller stride lets windows overlap.

# %%
numbers = np.arange(20)  # instead of ids, so that the shift is easy to see
for stride in (4, 2):
    inputs, targets = Windows(numbers, context=4, stride=stride)[:3]
    print(f"stride {stride}: inputs  {inputs.tolist()}")
    print(f"          targets {targets.tolist()}")
# > stride 4: inputs  [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
# >           targets [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
# > stride 2: inputs  [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
# >           targets [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]

# %% [markdown]
# ## Shuffled, but not by chance
# Neighbouring windows are about the same thing, so the windows of an epoch are shuffled. The order is a
# function of the seed and the number of the epoch: `Batches.at(step)` gives the batch of any step without the
# steps before it. A run that is resumed at step 7 sees the batch of step 7.

# %%
batches = Batches(Windows(np.arange(33), context=4), batch_size=3, seed=0)
print("windows in each step:", [(batches.at(step)[0][:, 0] // 4).tolist() for step in range(6)])
print(f"an epoch has {batches.steps_per_epoch} steps; step 7 again:", (batches.at(7)[0][:, 0] // 4).tolist())
# > windows in each step: [[5, 0, 6], [1, 7, 2], [4, 3], [2, 0, 4], [1, 7, 5], [3, 6]]
# > an epoch has 3 steps; step 7 again: [3, 2, 5]

# %% [markdown]
# ## The first loss
# A model with random weights knows nothing: each of the V tokens has about the probability 1/V, and the loss,
# minus the logarithm of the probability of the target, is about ln V. If yours begins elsewhere, something is
# wrong before training has begun.

# %%
rng = np.random.default_rng(0)
config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=500)
model = GPT2(config, rng=rng).eval()
x, y = Windows(rng.integers(0, 500, 400), context=16)[:]
print(f"loss {model.loss(x, y).item():.3f}, ln V = {math.log(500):.3f}")
# > loss 6.236, ln V = 6.215

# %% [markdown]
# ## What is not a target
# A target of -100 is left out of the loss: padding, or the question of a conversation, of which only the
# answer is learned. The mean is over the others.

# %%
half = np.where(np.arange(16) < 8, -100, y)
print(f"second half of each window: {model.loss(x, half).item():.3f}, {int((half != -100).sum())} targets")
# > second half of each window: 6.236, 192 targets

# %% [markdown]
# ## In a picture
# Rows are windows of a batch, columns are positions; a colour is a token (the text repeats a sentence, so two
# windows are equal). The targets are the inputs moved to the left by one, with one new token at the end.

# %%
figure, [[left, right]] = new_figure(8, 2.4, columns=2)
batch = Batches(Windows(np.array(ids * 6), context=10), batch_size=4, seed=0).at(0)
for axes, rows, name in zip((left, right), batch, ("inputs", "targets")):
    axes.imshow(np.searchsorted(sorted(ids), rows), cmap="tab20", vmin=0, vmax=19, aspect="auto")
    axes.grid(False)
    axes.set_xlabel(f"{name}: position")
left.set_ylabel("window")
show("runs/04_batches.png", figure)
# > picture: runs/04_batches.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. With stride = context the first token of a window has no context. Is it
# wasted?</summary>
#
# Every window begins anew, so its first positions predict from little. In training that is harmless, and
# over the epochs nothing is lost. For measuring a model it matters: with a `--stride` of a quarter of the
# context, `tinyllm eval` counts only the last quarter of each window after the first, so that each of these
# targets has at least three quarters of a context before it.
#
# </details>
#
# <details><summary>2. Why is the last batch of an epoch not padded or dropped?</summary>
#
# It may be smaller. The loss is a mean over its own targets, so nothing is weighted wrongly; dropping it
# would leave windows out of every epoch, and padding would compute what nobody needs.
#
# </details>
#
# <details><summary>3. Two windows of a batch never see each other. What would change if you joined them into
# one long row?</summary>
#
# The second would see the first as its context, although it has nothing to do with it. `finetune --pack`
# joins examples in one row, with a mask that keeps each to itself: the loss is the same to 12 digits.
#
# </details>
#
# ## Read on
# `tinyllm/data/token_file.py` has texts that are larger than memory, `tinyllm/data/padded.py` examples of
# different lengths, and `tinyllm/functional/losses.py` the loss with its gradient. Next: 05 attention.
