# %% [markdown]
# # Train GPT-2 on a short story
#
# The classic first run: GPT-2 with 162 million parameters memorises "The Verdict" (Edith Wharton, 1908), and
# shows what overfitting looks like. It takes ten to fifteen minutes on two cores; with
# `TINYLLM_EXAMPLES=small` in the environment, a few seconds with a toy model.
#
# Read with it `tinyllm/models/gpt2.py`, and `tinyllm/training/step.py`, which has this loop's body.

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
from tinyllm.training.loggers import plot_losses
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
print(f"{len(text):,} characters, {len(tokenizer.encode(text)):,} tokens")  # 20,479 characters, 5,145 tokens
print(f"{len(train)} + {len(validation)} windows, {batches.steps_per_epoch} steps an epoch")

# %% [markdown]
# ## The model
# GPT-2 small with a context of 256, an untied head with a bias, and no biases for Q, K and V. The published
# curve starts from PyTorch's default initial weights, whose embeddings are 50 times as large as GPT-2's. With
# GPT-2's, the training loss after 135 steps is above 3 instead of near 1.

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
print(f"{model.num_parameters():,} parameters on {device}")  # 162,469,969 parameters on cpu

# %% [markdown]
# ## The loop
# The untrained model guesses among 50,257 tokens: its loss is near ln 50257 = 10.82. The training loss falls
# towards 1, while the validation loss stops near 6.2 and rises again: the model memorises the story, and
# 4,612 tokens are too few to learn English from.

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

# %% [markdown]
# ## The curve

# %%
plot = Path("runs") / "the-verdict.png"
plot.parent.mkdir(exist_ok=True)
plot_losses(history, plot)
print("loss curve:", plot)

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
