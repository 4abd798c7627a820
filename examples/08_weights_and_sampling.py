# %% [markdown]
# # OpenAI's GPT-2 and top-k sampling
#
# Which token comes next after a prompt, and how do temperature and top-k change the text?
#
# Loads the published 124M weights from the Hugging Face hub (`pip install huggingface_hub`), or from a
# folder: `python examples/08_weights_and_sampling.py FOLDER`. Offline it continues with random weights: the
# text is then noise, but sampling works in the same way.
#
# Read along with `tinyllm/inference/generate.py` and `tinyllm/inference/sampling.py`.

# %%
import os
import sys

import numpy as np

from tinyllm import GPT2, Error, GPT2Config, generate, load_tokenizer
from tinyllm.backend.device import pick_device, to_device
from tinyllm.tokenizers.base import check_fits

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
device = pick_device("auto")
arguments = [] if "ipykernel" in sys.modules else sys.argv[1:]  # a notebook's arguments are Jupyter's own
if len(arguments) > 1 or "".join(arguments).startswith("-"):
    raise SystemExit("usage: python examples/08_weights_and_sampling.py [FOLDER]")
source = arguments[0] if arguments else "gpt2"

# %%
tokenizer = load_tokenizer("gpt2")
try:
    model = GPT2.from_pretrained(source)
    check_fits(tokenizer, model, padded=True)
except Error as error:
    if source != "gpt2":
        raise SystemExit(f"{error}") from None
    print(f"{error}\nContinuing with random weights.")
    size = dict(n_layer=2, n_head=2, n_embd=64) if SMALL else {}
    model = GPT2(GPT2Config(**size), rng=np.random.default_rng(0)).eval()
model.to(device)
print(f"{model.num_parameters():,} parameters on {device}")  # 124,439,808 parameters on cpu

# %% [markdown]
# ## The most likely next tokens

# %%
prompt = tokenizer.encode("Every effort moves you")
logits = to_device(model([prompt], last_only=True).data[0, 0], "cpu")  # (V,)
p = np.exp(logits - logits.max())
p /= p.sum()
for token in np.argsort(-p)[:5].tolist():
    print(f"{p[token]:7.2%}  {tokenizer.decode([token])!r}")

# %% [markdown]
# ## Top-k and temperature
# Top-k removes the tail of unlikely tokens; temperature flattens (above 1) or sharpens (below 1) the
# distribution of the rest.

# %%
for top_k in (1, 5, 50):
    for temperature in (0.5, 1.0, 1.5):
        rng = np.random.default_rng(123)
        steps = generate(model, [prompt], 25, temperature=temperature, top_k=top_k, rng=rng)
        text = tokenizer.decode([int(tokens[0]) for tokens in steps])
        print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}")
