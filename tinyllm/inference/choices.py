"""Which of several answers does a model find most likely?

A multiple-choice question needs no judge and no sampling. The model is given the question, and the
probability of every choice is measured (Brown et al., arXiv 2005.14165, section 2.4; MMLU, arXiv 2009.03300):

    by letter   the choices are listed as A, B, …, and the letters are compared
    by text     the question stands alone, and the texts of the choices are compared

A text's probability is the product over its tokens, so a longer one is less likely. Its log-probability may
be divided by its length in bytes, which unlike the number of tokens does not depend on the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinyllm.data.padded import IGNORED
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.tensor import no_grad

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """A multiple-choice question; ``answer`` is the position of the correct choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def listed(self) -> str:
        """The question with its choices as A, B, …"""
        return "\n".join([self.question, *(f"{LETTERS[i]}. {text}" for i, text in enumerate(self.choices))])


def parse_question(row: dict, where: str) -> Question:
    """The question in ``{question, choices, answer}``; the answer is a position, a letter, or a choice.

    A position counts from 0. Raises ``Error``, beginning with ``where``, if it is malformed.
    """
    match row:
        case {"question": str(question), "choices": list(choices), "answer": int() | str() as answer}:
            pass
        case _:
            raise Error(
                f"{where} is not a question: give question (text), choices (a list of texts) and answer (a "
                "position from 0, a letter from A, or the text of a choice)"
            )
    texts = [choice for choice in choices if isinstance(choice, str) and choice.strip()]
    if len(texts) < len(choices) or not 2 <= len({*texts}) == len(texts) <= len(LETTERS):
        raise Error(f"{where} has the choices {choices!r}: give 2 to {len(LETTERS)} different texts")
    letters = LETTERS[: len(texts)]
    if answer in texts:
        answer = texts.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        answer = letters.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise Error(
            f"{where} has the answer {answer!r}: give a position from 0 to {len(texts) - 1}, a letter from A "
            f"to {letters[-1]}, or the text of a choice"
        )
    return Question(question, tuple(texts), answer)


def log_prob(model: Module, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """log p(answer | prompt) in nats, of token ids: the sum over the answer's tokens.

    Raises ``Error`` if the prompt or the answer is empty, or both exceed the model's context.
    """
    if not len(prompt) or not len(answer):
        raise Error(f"the prompt has {len(prompt)} tokens and the answer {len(answer)}: both need one")
    ids = np.array([*prompt, *answer])
    if len(ids) - 1 > model.context:
        raise Error(
            f"the prompt and the answer have {len(ids):,} tokens, more than fit the model's context of "
            f"{model.context:,}: shorten them"
        )
    targets = np.where(np.arange(1, len(ids)) < len(prompt), IGNORED, ids[1:])
    with evaluating(model), no_grad():
        return -model.loss(ids[None, :-1], targets[None], num_targets=1).item()


def most_likely(log_probs: Sequence[float], texts: Sequence[str], normalize: bool = False) -> int:
    """The position of the highest log-probability or, with ``normalize``, of the highest per byte of text.

    Of equal ones it is the first.
    """
    lengths = [len(text.encode()) if normalize else 1 for text in texts]
    return int(np.argmax(np.divide(log_probs, lengths)))
