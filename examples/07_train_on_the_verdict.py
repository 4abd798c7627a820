# %% [markdown]
# # Train GPT-2 on a short story
#
# What does a training run look like, and when is it over? After this chapter you can write a training loop,
# read its loss curve, and say what overfitting is: GPT-2 with 162 million parameters memorises "The Verdict"
# (Edith Wharton, 1908). 10 minutes, and the training takes ten to fifteen on two cores; with
# `TINYLLM_EXAMPLES=small` in the environment, a few seconds with a toy model. Prerequisites: 04 batches and
# 06 GPT-2.
#
# Read along: `tinyllm/training/step.py`, which has this loop's body. Exercises:
# `examples/exercises/14_adamw.py` to `16_schedule.py`.

# %%
import os
import time
from pathlib import Path

import numpy as np

from tinyllm import GPT2, GPT2Config, generate, load_tokenizer, manual_seed, nn, optim
from tinyllm.backend.device import pick_device
from tinyllm.backend.memory import keep_memory
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import load_text, train_validation_split
from tinyllm.tools.plot import show
from tinyllm.training.picture import plot_losses
from tinyllm.training.tasks.pretrain import mean_loss

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
device = pick_device("auto")
keep_memory()

# %% [markdown]
# ## The text
# 20,479 characters are 5,145 tokens. The first 90 % are for training: 18 windows of 256 tokens, so an epoch
# is 9 steps of 2 windows.

# %%
text = load_text("the-verdict").text
tokenizer = load_tokenizer("gpt2")
context = 32 if SMALL else 256
train_text, validation_text = train_validation_split(text)
train = Windows(tokenizer.encode(train_text), context)
validation = Windows(tokenizer.encode(validation_text), context)
batches = Batches(train, batch_size=2, seed=123)
print(f"{len(text):,} characters, {len(tokenizer.encode(text)):,} tokens")
print(f"{len(train)} + {len(validation)} windows, {batches.steps_per_epoch} steps an epoch")
# > 20,479 characters, 5,145 tokens
# > 18 + 2 windows, 9 steps an epoch
# small> 20,479 characters, 5,145 tokens
# small> 144 + 16 windows, 72 steps an epoch

# %% [markdown]
# ## The model
# GPT-2 small with a context of 256, an untied head with a bias, and no biases for Q, K and V. The published
# curve starts from PyTorch's default initial weights, whose embeddings are 50 times as large as GPT-2's. With
# GPT-2's, the training loss after 135 steps is above 3 instead of 0.4.

# %%
size = dict(n_layer=2, n_head=2, n_embd=32) if SMALL else dict(n_layer=12, n_head=12, n_embd=768)
config = GPT2Config(
    **size,
    n_positions=context,
    embd_pdrop=0.2,
    attn_pdrop=0.2,
    resid_pdrop=0.2,
    tie_word_embeddings=False,
    qkv_bias=False,
    lm_head_bias=True,
)
rng = np.random.default_rng(123)
model = GPT2(config, rng=rng)
nn.initialize_as_torch(model, rng)
model.to(device).train()
print(f"{model.num_parameters():,} parameters on {device}")
# > 162,469,969 parameters on …
# small> 3,293,009 parameters on …

# %% [markdown]
# ## The loop
# A step is: the loss of a batch, its gradient, clipping (which bounds the effect of an unusual batch), and an
# update by AdamW, whose learning rate rises for ten steps and then falls along a cosine.
#
# The untrained model guesses among 50,257 tokens: its loss is near ln 50257 = 10.82. The training loss falls
# below 1, while the validation loss stops near 6.3 and rises again: the model memorises the story, and 4,612
# tokens are too few to learn English from. The numbers of every epoch are in `tinyllm/training/README.md`.

# %%
epochs = 1 if SMALL else 15
steps = epochs * batches.steps_per_epoch
lr_at = optim.warmup_cosine(peak_lr=5e-4, initial_lr=3e-5, min_lr=1e-6, warmup=10, steps=steps)
optimizer = optim.AdamW(model, lr=5e-4, weight_decay=0.1)
history, started = [], time.perf_counter()
for step in range(steps):
    ids, targets = batches.at(step)  # (B, T) each
    manual_seed(123, step)  # of this step's dropout masks
    loss = model.loss(ids, targets)
    loss.backward()
    optim.clip_grad_norm(model, 1.0)
    optimizer.lr = lr_at(step)
    optimizer.step()
    optimizer.zero_grad()
    history.append({"step": step + 1, "train_loss": loss.item()})
    if (step + 1) % batches.steps_per_epoch == 0:
        losses = [mean_loss(model, part, most=18, batch=2) for part in (train, validation)]
        history[-1] |= dict(zip(("train_eval_loss", "val_loss"), losses))
        prompt = tokenizer.encode("Every effort moves you")
        sample = [int(token[0]) for token in generate(model, [prompt], 30, temperature=0)]
        print(
            f"epoch {(step + 1) // batches.steps_per_epoch:2}  {time.perf_counter() - started:4.0f} s  "
            f"train {losses[0]:.2f}  validation {losses[1]:.2f}  {tokenizer.decode(prompt + sample)!r}",
            flush=True,
        )
# > epoch  1 … s  train …  validation …  'Every effort moves you…
# > …
# > epoch 15 … s  train …  validation …  'Every effort moves you…
# small> epoch  1 … s  train 10.…  validation 10.…  'Every effort moves you…

# %% [markdown]
# ## The curve
# Faint: each batch, with dropout. With dots: both parts of the text, without dropout, after every epoch. The
# ring marks the lowest validation loss: from there on the model learns the story and not its language.
# `images/the-verdict.png` is the picture of a full run.

# %%
picture = Path("runs/07_the_verdict.png")
picture.parent.mkdir(exist_ok=True)
plot_losses(history, picture)
show(picture)
# > picture: runs/07_the_verdict.png

# %% [markdown]
# ## The sampling grid
# The same weights generate very different texts. Temperature 0 takes the most likely token; a small k stays
# close to the story; a large k with a high temperature departs from it.

# %%
for top_k in (1, 3, 5, 10, 100):
    for temperature in (0.0, 0.5, 1.0, 1.5, 2.0):
        rng = np.random.default_rng(123)
        sampled = generate(model, [prompt], 30, temperature=temperature, top_k=top_k, rng=rng)
        words = tokenizer.decode([int(token[0]) for token in sampled])
        print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(words.split())}")
# > top-k   1  temperature 0.0  …
# > …
# > top-k 100  temperature 2.0  …

# %% [markdown]
# ## Questions
#
# <details><summary>1. From which epoch on does this model overfit, and which weights would you
# keep?</summary>
#
# From where the validation loss begins to rise, although the training loss still falls. The best weights are
# those at the ring, not the last ones: a run keeps a checkpoint of the lowest validation loss if you let it.
#
# </details>
#
# <details><summary>2. What would help more here: a larger model, a smaller one, or more text?</summary>
#
# More text. 162 million parameters can store 4,612 tokens many times over. A smaller model or more dropout
# only memorises more slowly.
#
# </details>
#
# <details><summary>3. Why is the loss of the first step not 10.82, but a little larger?</summary>
#
# ln V is the loss of equal probabilities. Random logits are not equal: the model is confident by chance, and
# mostly wrong. The larger the initial weights, the more it costs, and here they are PyTorch's.
#
# </details>
#
# ## Read on
# `tinyllm/training/README.md` has curves of runs that went wrong, and `tinyllm train --preset gpt2-verdict`
# makes this run with checkpoints that survive a crash; `tinyllm/optim/adamw.py` derives AdamW. Next: 08
# weights and sampling.
