"""Conversations for fine-tuning, and their ids and masks written down independently of the library."""

import json

import numpy as np
from support.chat_model import BYTE_ID, END, START, write_model

from tinyllm.tokenizers import chat_template, load_tokenizer
from tinyllm.training.tasks.instruct import InstructOptions


def turns(*texts):
    """Turns of user and assistant, alternately."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}

CHATS = [
    turns("2+2?", "4"),
    turns("Hi", "Hello!", "Who are you?", "A model.", "Bye", "See you"),
    [SYSTEM, *turns("Say <|im_end|>", "<|im_end|> is how I end")],  # of the user's words: ordinary text
    turns("a" * 30, "b" * 9),
    turns("Größe?", "1 m 80 ü"),
    turns("no answer", ""),
    turns("spaces", "  two at first, one at the end "),
    turns("line\nbreak", "\nfirst"),
    turns("last", "learned", "and a question without an answer"),
    turns("x", "y", "z", "w"),
]


def reference(messages):
    """The ids of a ChatML conversation by hand, and which of them are learned: answers and their ends."""
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    ids, learned = [], []

    def write(new, learn):
        ids.extend(new)
        learned.extend([learn] * len(new))

    for message in messages:
        answer = message["role"] == "assistant"
        write([START, *of_bytes(message["role"] + "\n")], False)
        write([*of_bytes(message["content"]), END], answer)
        write(of_bytes("\n"), False)
    return np.array(ids), np.array(learned)


def of_bytes(text):
    return [BYTE_ID[byte] for byte in text.encode("utf-8")]


def write_chats(path, chats=CHATS):
    """JSON lines of {"messages": …}."""
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parts(folder):
    """A folder whose training part is all but the last three chats."""
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "train.jsonl", CHATS[:-3])
    write_chats(folder / "valid.jsonl", CHATS[-3:])
    return folder


def chat_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return load_tokenizer(write_model(folder))


def options(model, data, out, **changes):
    """A short run in float64 without dropout."""
    given = dict(
        model=str(model), data=str(data), out=out, batch=4, micro_batch=2, steps=5, lr=1e-2, warmup=1,
        eval_every=2, dtype="float64", questions=("Hi",),
    )  # fmt: skip
    if changes.get("train", "lora") == "lora":
        given |= dict(rank=2, alpha=4.0)
    return InstructOptions(**given | changes)


def render_in_process(patched):
    """Render templates in this process, to save 0.1 s for each; ``patched`` is a monkeypatch."""

    def render(template, conversations, variables):
        compiled = chat_template._environment().from_string(template)
        return [compiled.render(**conversation, **variables) for conversation in conversations]

    patched.setattr(chat_template, "_render", render)
