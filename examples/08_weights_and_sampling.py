# %% [markdown]
# # OpenAI's GPT-2, and sampling
#
# Which token comes next, and who decides? After this chapter you can load published weights, say what
# temperature, top-k and top-p do to a distribution, and choose them for a purpose. 10 minutes; prerequisites:
# 03 tokens and 06 GPT-2.
#
# The published weights of GPT-2 124M are downloaded once from the Hugging Face hub (`pip install
# 'tinyllm-numpy[models]'`), or read from a folder: `python examples/08_weights_and_sampling.py FOLDER`.
# Offline, and with `TINYLLM_EXAMPLES=small`, the model has random weights: the text is then noise, but
# sampling works in the same way.
#
# Read along: `tinyllm/inference/sampling.py`, then `tinyllm/inference/generate.py`. Exercises:
# `examples/exercises/18_top_k.py`, `19_top_p.py`.

# %%
import os
import sys

import numpy as np

from tinyllm import GPT2, Error, GPT2Config, generate, load_tokenizer
from tinyllm.backend.device import pick_device, to_device
from tinyllm.inference.sampling import choose_tokens, probabilities
from tinyllm.tokenizers.base import check_fits
from tinyllm.tools.plot import new_figure, show

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
device = pick_device("auto")
arguments = [] if "ipykernel" in sys.modules else sys.argv[1:]  # a notebook's arguments are Jupyter's own
if len(arguments) > 1 or "".join(arguments).startswith("-"):
    raise SystemExit("usage: python examples/08_weights_and_sampling.py [FOLDER]")
source = arguments[0] if arguments else "gpt2"

# %% [markdown]
# ## From logits to a token
# A model returns a logit for every token of the vocabulary. Softmax turns logits into probabilities; divided
# by a temperature first, their differences become smaller (above 1) or larger (below 1). At temperature 0 the
# largest has all the probability. Five tokens are enough to see it:

# %%
logits = np.array([[4.0, 3.0, 2.0, 1.0, 0.0]])
with np.printoptions(precision=2, suppress=True):
    for temperature in (0, 0.5, 1, 2):
        print(f"temperature {temperature:3}", probabilities(logits, temperature)[0])
# > temperature   0 [1. 0. 0. 0. 0.]
# > temperature 0.5 [0.86 0.12 0.02 0.   0.  ]
# > temperature   1 [0.64 0.23 0.09 0.03 0.01]
# > temperature   2 [0.43 0.26 0.16 0.1  0.06]

# %% [markdown]
# Each of thousands of unlikely tokens is a mistake, and together they are likely. Top-k keeps the k most
# likely tokens, whatever they are. Top-p keeps as few as have the probability p together: one where the model
# is sure, and many where it is not. What is left is scaled to sum to 1.

# %%
sure, unsure = np.array([[6.0, 2, 1, 0, 0]]), np.array([[1.0, 0.8, 0.6, 0.4, 0.2]])
for name, each in (("sure", sure), ("unsure", unsure)):
    by_k, by_p = probabilities(each, top_k=3), probabilities(each, top_p=0.9)
    print(f"{name:6}  top-k 3 keeps {(by_k > 0).sum()}, top-p 0.9 keeps {(by_p > 0).sum()}")
# > sure    top-k 3 keeps 3, top-p 0.9 keeps 1
# > unsure  top-k 3 keeps 3, top-p 0.9 keeps 5

# %% [markdown]
# Then a uniform random number chooses: the token at which the sum of the probabilities, the most likely
# first, exceeds it. So the same numbers give the same text.

# %%
uniforms = np.random.default_rng(0).random(10_000)
chosen = choose_tokens(np.repeat(logits, 10_000, axis=0), uniforms)
print("how often each token was chosen:", np.bincount(chosen) / 10_000)
# > how often each token was chosen: [0.633  0.2415 0.0819 0.0311 0.0125]

# %% [markdown]
# ## The published weights
# `from_pretrained` reads the safetensors files that other libraries write; the names of the arrays are those
# of tinyllm's modules.

# %%
tokenizer = load_tokenizer("gpt2")


def published():
    """GPT-2 from the hub or from a folder; None at the small size, and if the hub cannot be reached."""
    if SMALL and source == "gpt2":
        return None
    try:
        model = GPT2.from_pretrained(source)
        check_fits(tokenizer, model, padded=True)
        return model
    except Error as error:
        if source != "gpt2":
            raise SystemExit(f"{error}") from None
        print(error)


# %%
model = published()
if model is None:
    print("Continuing with random weights.")
    model = GPT2(
        GPT2Config(**dict(n_layer=2, n_head=2, n_embd=64) if SMALL else {}), np.random.default_rng(0)
    )
model.to(device).eval()
print(f"{model.num_parameters():,} parameters on {device}")
# > …
# > 124,439,808 parameters on …
# small> Continuing with random weights.
# small> 3,382,080 parameters on …

# %% [markdown]
# ## The most likely next tokens

# %%
prompt = tokenizer.encode("Every effort moves you")
logits = to_device(model([prompt], last_only=True).data[:, 0], "cpu")  # (1, V)
p = probabilities(logits)[0]
top = np.argsort(-p)[:20]
for token in top[:5].tolist():
    print(f"{p[token]:7.2%}  {tokenizer.decode([token])!r}")

# %% [markdown]
# ## In a picture
# The twenty most likely tokens at three temperatures. Random weights know nothing, so their bars are equal.

# %%
figure, [[axes]] = new_figure(8, 3)
for shift, temperature in enumerate((0.5, 1.0, 1.5)):
    axes.bar(
        np.arange(20) + 0.27 * shift,
        probabilities(logits, temperature)[0, top],
        width=0.27,
        label=f"temperature {temperature}",
    )
axes.set_xticks(
    np.arange(20) + 0.27, [ascii(tokenizer.decode([int(t)])) for t in top], rotation=60, ha="right"
)
axes.set_ylabel("probability")
axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)  # above the bars
show("runs/08_temperature.png", figure)
# > picture: runs/08_temperature.png

# %% [markdown]
# ## Top-k and temperature
# Read the nine texts. At temperature 0.5 the model repeats itself, at 1.5 with a large k it loses the thread.

# %%
for top_k in (1, 5, 50):
    for temperature in (0.5, 1.0, 1.5):
        rng = np.random.default_rng(123)
        steps = generate(model, [prompt], 25, temperature=temperature, top_k=top_k, rng=rng)
        text = tokenizer.decode([int(tokens[0]) for tokens in steps])
        print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}")
# > top-k   1  temperature 0.5  …
# > …
# > top-k  50  temperature 1.5  …

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why are the three texts of top-k 1 equal?</summary>
#
# Only the most likely token is left, with probability 1 at every temperature.
#
# </details>
#
# <details><summary>2. You want facts, then a poem. Which temperature for which?</summary>
#
# Low for facts: there is one right answer, and a token that is unlikely is probably wrong. Higher for a poem:
# there are many good continuations, and the most likely one is the least surprising.
#
# </details>
#
# <details><summary>3. Is the most likely text the one that greedy decoding finds?</summary>
#
# No. It takes the most likely token at each step; a less likely token may have better continuations. And the
# most likely text is not the best: people do not write what is most likely, and models that do repeat
# themselves (Holtzman et al., arXiv 1904.09751).
#
# </details>
#
# ## Read on
# `tinyllm generate --show-probabilities` prints the alternatives at every step.
# `tinyllm/weights/safetensors.py` reads weights, and `tinyllm/models/base.py` has `from_pretrained`. Next: 09
# find the mistake.
