"""Thoughts and answer of a model that thinks first, for every division of the text into pieces."""

import numpy as np
import pytest

from tinyllm.errors import Error
from tinyllm.inference.thinking import ThoughtFilter, begins_inside, check_can_skip_thinking
from tinyllm.tokenizers import load_tokenizer

CASES = [  # text, begun in the prompt, thoughts, answer
    ("<think>\nOne.\n\nTwo.\n</think>\n\nIt is 2.\n", False, "One.\n\nTwo.", "It is 2.\n"),
    ("\n <think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nAt once.", False, "", "At once."),
    ("a < b</thin</think>c<think>d</think>", True, "a < b</thin", "c<think>d</think>"),
    ("a</think>", True, "a", ""),
    ("<think>cut off\n", False, "cut off\n", ""),
    ("<think>cut off</thi", False, "cut off</thi", ""),
    ("  An <think>answer</think>.", False, "", "  An <think>answer</think>."),
    ("<thinking>no</thinking>", False, "", "<thinking>no</thinking>"),
    ("<thi", False, "", "<thi"),
    ("</think>a", False, "", "</think>a"),
    ("", False, "", ""),
]


def divided(pieces, inside):
    parts = {True: "", False: ""}

    def write(text, is_thought):
        assert text and not (is_thought and parts[False])
        parts[is_thought] += text

    divide = ThoughtFilter(write, inside)
    for piece in pieces:
        divide(piece)
    divide.finish()
    return parts[True], parts[False]


@pytest.mark.parametrize(("text", "inside", "thoughts", "answer"), CASES)
def test_thoughts_are_divided_from_the_answer(text, inside, thoughts, answer):
    assert divided([text], inside) == (thoughts, answer)
    assert divided(list(text), inside) == (thoughts, answer)
    rng = np.random.default_rng(0)
    for _ in range(30):
        ends = np.sort(rng.integers(0, len(text) + 1, 3))
        pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]
        assert divided(pieces, inside) == (thoughts, answer)


def test_text_is_written_as_soon_as_it_is_known_what_it_is():
    written = []
    divide = ThoughtFilter(lambda text, is_thought: written.append((text, is_thought)))
    for piece in ("<think>", "\n", "Let me", " see", ".\n", "</think>", "\n\n", "Yes", "."):
        divide(piece)
    assert written == [("Let me", True), (" see", True), (".", True), ("Yes", False), (".", False)]


def test_thoughts_that_begin_in_the_prompt():
    tokenizer = load_tokenizer("gpt2")
    for prompt, inside in (("Hi\n<think>\n", True), ("Hi", False), ("<think>\n\n</think>\n\n", False)):
        assert begins_inside(tokenizer, tokenizer.encode(prompt)) is inside


def test_a_template_without_the_switch_is_named():
    check_can_skip_thinking("{% if enable_thinking %}", "--model m")
    with pytest.raises(Error, match="--model m cannot switch thinking off: omit --no-think"):
        check_can_skip_thinking("{{ messages }}", "--model m")
