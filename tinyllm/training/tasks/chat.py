"""Fine-tuning on conversations for any task: the chat template, new special tokens, and sample answers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from tinyllm.data.conversations import Format, conversations, prompt_of
from tinyllm.data.examples import Row
from tinyllm.data.instructions import CHATML, alpaca, check_template
from tinyllm.files import read_text
from tinyllm.inference.generate import generate
from tinyllm.models import LanguageModel
from tinyllm.nn import Module
from tinyllm.tokenizers.chat_template import render_chats
from tinyllm.training.start import hash_tokenizer
from tinyllm.training.step import Check
from tinyllm.training.tasks.finetune import FinetuneOptions, Finetuning

QUESTIONS, ANSWER_TOKENS = 3, 60  # of a sample


@dataclass(frozen=True, kw_only=True)
class ChatOptions(FinetuneOptions):
    """The options of the tasks that learn from conversations."""

    template: str | None = None
    """Chat template: alpaca, chatml, or a Jinja file; by default the model's own, or else alpaca."""
    special_tokens: tuple[str, ...] = ()
    """New special tokens, for example of a chat format; embedding and head are then trained whole."""
    questions: tuple[str, ...] = ()
    """Questions to answer at each evaluation; by default the first three of the validation examples."""

    free = FinetuneOptions.free | {"questions"}


class ChatTuning(Finetuning):
    """Base class of the tasks: a task's ``encode`` sets ``format``, ``notes`` and ``questions``."""

    config: ChatOptions
    format: Format  # of the rows
    notes: list[str]  # lines about the data for the introduction
    questions: list[tuple[str, list[int]]]  # that a sample answers, and the ids of their prompts

    # The data

    def add_special_tokens(self) -> None:
        """Give the tokenizer those asked for; a resumed run has them in its folder."""
        if self.config.special_tokens and not self.resumed:
            self.tokenizer = self.tokenizer.with_special_tokens(self.config.special_tokens)
            hash_tokenizer(self.tokenizer, self.place)  # raises an error if it cannot be saved

    def set_template(self) -> None:
        """Give the tokenizer the template asked for; a resumed run has it in its folder."""
        chosen = self.config.template
        if chosen is None and self.tokenizer.chat_template is None:
            chosen = "alpaca"
        self.template_name = chosen or "that of the model"
        if chosen is not None and not self.resumed:
            templates = {"alpaca": alpaca, "chatml": lambda _: CHATML}
            read = templates.get(chosen, lambda _: read_text(chosen))
            self.tokenizer.chat_template = read(self.tokenizer)
        self.stop_ids = check_template(self.tokenizer)

    def questions_from(self, valid: Sequence[Row]) -> list[tuple[str, list[int]]]:
        """The questions asked for, or those of validation examples, and the ids of their prompts."""
        if self.config.questions:
            chats = [[{"role": "user", "content": question}] for question in self.config.questions]
        else:
            chats = [prompt_of(chat) for chat in conversations(valid[:QUESTIONS], self.format)]
        tokenizer = self.tokenizer
        rendered = render_chats(tokenizer, tokenizer.chat_template, [(chat, True) for chat in chats])
        prompts = [tokenizer.with_bos(each.encode(tokenizer)) for each in rendered]
        return [(chat[-1]["content"], ids) for chat, ids in zip(chats, prompts)]

    # The model

    def prepare(self, model: LanguageModel, rng: np.random.Generator) -> None:
        if self.tokenizer.vocab_size > model.config.vocab_size:
            model.resize_token_embeddings(self.tokenizer.vocab_size, rng)

    def trained_whole(self, model: LanguageModel) -> list[str]:
        return [model.token_embedding, "lm_head"] if self.config.special_tokens else []

    def sample(self, model: Module, step: int, check: Check, final: bool) -> str | None:
        """The model's most likely answers to fixed questions."""
        if not self.questions:
            return None
        answers = (self._answer(model, ids, check) for _, ids in self.questions)
        return "\n".join(f"Q: {text}\nA: {answer}" for (text, _), answer in zip(self.questions, answers))

    def _answer(self, model: Module, ids: list[int], check: Check) -> str:
        if len(ids) >= model.context:
            return "(the question fills the context)"
        unused, answer = self.tokenizer.unused_ids(model.config.vocab_size), []
        options = dict(temperature=0.0, stop_ids=self.stop_ids, suppress_ids=unused)
        for token in generate(model, [ids], ANSWER_TOKENS, **options):
            check()
            answer.append(int(token[0]))
        return self.tokenizer.decode([i for i in answer if i not in self.stop_ids])

    # Records and messages

    def data(self) -> dict[str, dict]:
        found = super().data() | {"format": {"name": self.format.name}}
        if self.format.messages:
            template = self.tokenizer.chat_template.encode()
            found["template"] = {"sha256": sha256(template).hexdigest()}
        return found

    def introduction(self) -> list[str]:
        return [*super().introduction(), *self.notes]

    def describe_batch(self, batch: tuple) -> dict:
        rows = batch[0].reshape(-1, batch[0].shape[-1])
        return super().describe_batch(batch) | {"text": [self.tokenizer.decode(row) for row in rows]}

    def next_commands(self, folder: Path) -> list[str]:
        run = shlex.quote(str(folder))
        if self.format.messages:
            return [f"tinyllm chat --run {run}"]
        return [f'tinyllm generate --run {run} --prompt "The"']
