"""The task ``instruct`` of ``tinyllm finetune``: a model learns to answer as the examples do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from tinyllm.data.examples import Row
from tinyllm.data.instructions import (
    CHATML,
    Encoded,
    alpaca,
    check_template,
    conversations,
    encode_conversations,
    encode_text,
    prompt_of,
    recognise,
    shorten,
)
from tinyllm.data.padded import PackedExamples, PaddedExamples
from tinyllm.errors import Error
from tinyllm.files import read_text, write_whole
from tinyllm.inference.generate import generate
from tinyllm.models import LanguageModel
from tinyllm.models.packed import Packed
from tinyllm.nn import Module
from tinyllm.tensor import Tensor
from tinyllm.tokenizers.chat_template import render_chats
from tinyllm.tokenizers.configs import CHAT_TEMPLATE
from tinyllm.training.start import hash_tokenizer
from tinyllm.training.step import Check
from tinyllm.training.tasks.finetune import FinetuneOptions, Finetuning, Rows

QUESTIONS, ANSWER_TOKENS = 3, 60  # of a sample


@dataclass(frozen=True, kw_only=True)
class InstructOptions(FinetuneOptions):
    """Teach a model to follow instructions, from examples of instructions with answers.

    Example: tinyllm finetune --task instruct --model smollm2 --data instruction-data --epochs 2
    """

    template: str | None = None
    """Chat template: alpaca, chatml, or a Jinja file; by default the model's own, or else alpaca."""
    train_on_prompt: bool = False
    """Learn the prompts too, not only the answers."""
    pack: bool = False
    """Put several examples into one row of --max-length; each sees itself only."""
    special_tokens: tuple[str, ...] = ()
    """New special tokens, for example of a chat format; embedding and head are then trained whole."""
    questions: tuple[str, ...] = ()
    """Questions to answer at each evaluation; by default the first three of the validation examples."""

    task = "instruct"

    free = FinetuneOptions.free | {"questions"}


class InstructionTuning(Finetuning):
    """The next token of every answer is learned; the prompts before them are only read."""

    config: InstructOptions

    # The data

    def encode(self) -> tuple[Rows, Rows]:
        if self.config.special_tokens and not self.resumed:
            self.tokenizer = self.tokenizer.with_special_tokens(self.config.special_tokens)
            hash_tokenizer(self.tokenizer, self.place)  # raises an error if it cannot be saved
        train, valid = self.examples.train, self.examples.valid
        self.format = recognise([*train, *valid])
        if self.format.messages:
            self._set_template()
        elif self.config.questions:
            raise Error("--questions need a chat template, which texts do not have: omit them")
        every = self._encoded([*train, *valid])
        parts = [
            shorten(found, self.max_length + 1, rows)
            for found, rows in ((every[: len(train)], train), (every[len(train) :], valid))
        ]
        self.notes = [self._describe()]
        for name, part in zip(("training", "validation"), parts):
            self.notes += part.notes(name, self.config.length_option, self.max_length)
        rows = [PaddedExamples(part.examples) for part in parts]
        if self.config.pack:
            rows[0] = PackedExamples(rows[0], self.max_length)
            self.notes.append(f"{len(parts[0].examples):,} examples are packed into {len(rows[0]):,} rows")
        self.questions = self._questions(valid) if self.format.messages else []
        return tuple(rows)

    def _set_template(self) -> None:
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

    def _encoded(self, rows: Sequence[Row]) -> list[Encoded]:
        if self.format.messages is None:
            found = [encode_text(self.tokenizer, row) for row in rows]
        else:
            found = encode_conversations(self.tokenizer, rows, conversations(rows, self.format))
        if self.config.train_on_prompt:
            found = [each._replace(learned=np.ones_like(each.learned)) for each in found]
        return found

    def _describe(self) -> str:
        form, learned = self.format, "every token" if self.config.train_on_prompt else "the answers"
        used = {*form.keys, *form.optional}
        unused = dict.fromkeys(key for row in self.examples.train for key in row.values if key not in used)
        line = f"format {form.name}: {{{', '.join((*form.keys, *form.optional))}}}"
        line += f" ({', '.join(unused)} not used)" if unused else ""
        if form.messages is None:
            return f"{line}; every token is learned"
        return f"{line}; chat template: {self.template_name}; learned: {learned}"

    def _questions(self, valid: Sequence[Row]) -> list[tuple[str, list[int]]]:
        """The questions that a sample answers, and the ids of their prompts."""
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

    def loss(self, model: Module, *rows, num_targets: int) -> Tensor:
        ids, *segments, targets = rows
        cache = Packed(segments[0], model) if segments else None
        return model.loss(ids, targets, num_targets=num_targets, cache=cache)

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

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.format.messages:
            write_whole(folder / CHAT_TEMPLATE, self.tokenizer.chat_template.encode())

    def introduction(self) -> list[str]:
        return [*super().introduction(), *self.notes]

    def describe_batch(self, batch: tuple) -> dict:
        return super().describe_batch(batch) | {"text": [self.tokenizer.decode(row) for row in batch[0]]}

    def next_commands(self, folder: Path) -> list[str]:
        run = shlex.quote(str(folder))
        if self.format.messages:
            return [f"tinyllm chat --run {run}"]
        return [f'tinyllm generate --run {run} --prompt "The"']
