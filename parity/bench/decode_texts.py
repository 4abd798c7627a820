"""Three prompts on which speculative decoding is measured: a summary, an edit of code, a poem.

An edit repeats most of its prompt, a summary repeats names and phrases of it, and a poem repeats nothing. A
small model decodes greedily in loops, which are easy to predict, so the poem is sampled at temperature 1.
"""

from pathlib import Path

from tinyllm.inference.chat import Conversation, load_model_and_tokenizer

SUMMARY = (
    "Summarize this text.\n\n"
    "The lighthouse at Cape Orford was built in 1862 by Thomas Hale, a shipwright from Bristol. Its light, "
    "first fed with whale oil and later with paraffin, could be seen from twenty miles at sea. For forty "
    "years the keeper, Anna Marsh, climbed its 168 steps every evening. In the storm of January 1901 the "
    "lamp went out, and Anna Marsh rang the bell by hand for eleven hours, until the last of nine fishing "
    "boats had reached the harbour. The lighthouse was electrified in 1934 and has been a museum since 1987."
)

EDIT = """Rename the function mean to average in this code. Print all of the code and change nothing else.

```python
def mean(values):
    total = 0.0
    for value in values:
        total = total + value
    return total / len(values)


def variance(values):
    average = mean(values)
    total = 0.0
    for value in values:
        total = total + (value - average) ** 2
    return total / len(values)


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
```"""

# How the answer begins: a model of 135M parameters would otherwise answer with other code.
EDITED = """Here is the code with the function renamed:

```python
def average(values):
    total = 0.0
"""

POEM = "Write a poem about the sea in winter."

# name -> (message, beginning of the answer, temperature)
TEXTS = {"edit of code": (EDIT, EDITED, 0), "summary": (SUMMARY, "", 0), "poem": (POEM, "", 1)}


def prompts(model: Path) -> dict[str, dict]:
    """The arguments of ``generate`` for each text: ids, temperature, seed of the sampling, and stop ids.

    Messages are in the model's chat format if it has one. Raises ``Error`` if it has no tokenizer.
    """
    conversation = Conversation(*load_model_and_tokenizer(str(model)))
    tokenizer, found = conversation.tokenizer, {}
    for name, (message, beginning, temperature) in TEXTS.items():
        ids = conversation.prompt(message) if tokenizer.chat_template else tokenizer.encode(f"{message}\n\n")
        found[name] = {
            "ids": [[*ids, *tokenizer.encode(beginning)]],
            "temperature": temperature,
            "rng": 0,
            "stop_ids": list(conversation.stop_ids),
        }
    return found
