# %% [markdown]
# # OpenAI's GPT-2 and top-k sampling
#
# Loads the published 124M weights from the Hugging Face hub (`pip install huggingface_hub`), or from a
# folder: `python examples/08_weights_and_sampling.py FOLDER`. Offline it says so and goes on with a
# random model, whose text is noise: the sampling is the same.
#
# Read beside this: `tinyllm/inference/generate.py`.

# %%
import os
import sys

import numpy as np

from tinyllm import GPT2, Error, GPT2Config, generate, load_tokenizer
from tinyllm.backend.device import pick_device, to_device

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
device = pick_device("auto")
source = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "gpt2"

# %%
try:
    model = GPT2.from_pretrained(source)
except Error as error:
    if source != "gpt2":
        raise SystemExit(f"{error}") from None
    print(f"{error}\nGoing on with random weights.")
    size = dict(n_layer=2, n_head=2, n_embd=64) if SMALL else {}
    model = GPT2(GPT2Config(**size), rng=np.random.default_rng(0)).eval()
model.to(device)
print(f"{model.num_parameters():,} parameters on {device}")  # 124,439,808 parameters on cpu

# %% [markdown]
# ## The likeliest next tokens

# %%
tokenizer = load_tokenizer("gpt2")
prompt = tokenizer.encode("Every effort moves you")
logits = to_device(model([prompt], last_only=True).data[0, 0], "cpu")  # (V,)
p = np.exp(logits - logits.max())
p /= p.sum()
for token in np.argsort(-p)[:5].tolist():
    print(f"{p[token]:7.2%}  {tokenizer.decode([token])!r}")

# %% [markdown]
# ## Top-k against temperature
# Top-k cuts off the tail of unlikely tokens; temperature flattens (above 1) or sharpens (below 1) the rest.

# %%
for top_k in (1, 5, 50):
    for temperature in (0.5, 1.0, 1.5):
        rng = np.random.default_rng(123)
        drawn = generate(model, [prompt], 25, temperature=temperature, top_k=top_k, rng=rng)
        words = tokenizer.decode([int(token[0]) for token in drawn])
        print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(words.split())}")
