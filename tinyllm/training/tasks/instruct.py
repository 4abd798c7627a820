"""The task ``instruct`` of ``tinyllm finetune``: a model learns to answer as the examples do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyllm.data.conversations import conversations, not_used, recognise, unused_keys
from tinyllm.data.examples import Row
from tinyllm.data.instructions import Encoded, encode_conversations, encode_text, shorten
from tinyllm.data.padded import PackedExamples, PaddedExamples
from tinyllm.errors import Error
from tinyllm.models import empty_model
from tinyllm.models.packed import Packed
from tinyllm.models.rope import changes_with_length
from tinyllm.nn import Module
from tinyllm.tensor import Tensor
from tinyllm.training.tasks.chat import ChatOptions, ChatTuning
from tinyllm.training.tasks.finetune import Rows


@dataclass(frozen=True, kw_only=True)
class InstructOptions(ChatOptions):
    """Teach a model to follow instructions, from examples of instructions with answers.

    Example: tinyllm finetune --task instruct --model smollm2 --data instruction-data --epochs 2
    """

    train_on_prompt: bool = False
    """Learn the prompts too, not only the answers; an answer of weight 0 is not learned in either case."""
    pack: bool = False
    """Put several examples into one row of --max-length; each sees itself only."""

    task = "instruct"


class InstructionTuning(ChatTuning):
    """The next token of every answer is learned; the prompts before them are only read."""

    config: InstructOptions

    # The data

    def encode(self) -> tuple[Rows, Rows]:
        self.add_special_tokens()
        train, valid = self.examples.train, self.examples.valid
        self.format = recognise([*train, *valid])
        if self.format.messages:
            self.set_template()
        elif given := [name for name in ("questions", "template") if getattr(self.config, name)]:
            raise Error(f"--{given[0]} is for conversations, and the rows are texts without roles: omit it")
        every = self._encoded([*train, *valid])
        parts = [
            shorten(found, self.max_length + 1, rows)
            for found, rows in ((every[: len(train)], train), (every[len(train) :], valid))
        ]
        self.notes = [self._describe()]
        for name, part in zip(("training", "validation"), parts):
            self.notes += part.notes(name, self.config.length_option, self.max_length)
        padded = rows = [PaddedExamples(part.examples) for part in parts]
        limits = [length for length, _ in changes_with_length(empty_model(self.base).config)]
        if limits:  # rows of one example, which say how long it is
            rows = [PackedExamples(part, 0) for part in padded]
        if self.config.pack:
            if limits and padded[0].lengths.max() > min(limits):
                raise Error(
                    f"--pack: an example has {padded[0].lengths.max():,} tokens, and from {min(limits):,} on "
                    f"the model's RoPE needs a row for each: omit --pack, or add --max-length {min(limits)}"
                )
            rows = [PackedExamples(padded[0], self.max_length), *rows[1:]]
            self.rows = "packed rows"  # of several examples each
            self.notes.append(f"{len(parts[0].examples):,} examples are packed into {len(rows[0]):,} rows")
        self.questions = self.questions_from(valid) if self.format.messages else []
        return tuple(rows)

    def _encoded(self, rows: Sequence[Row]) -> list[Encoded]:
        if self.format.messages is None:
            return [encode_text(self.tokenizer, row) for row in rows]
        chats = conversations(rows, self.format)
        return encode_conversations(self.tokenizer, rows, chats, self.config.train_on_prompt)

    def _describe(self) -> str:
        form, learned = self.format, "every token" if self.config.train_on_prompt else "the answers"
        unused = unused_keys([*self.examples.train, *self.examples.valid], form)
        line = f"format {form.name}: {{{', '.join((*form.keys, *form.optional))}}}{not_used(unused)}"
        if form.messages is None:
            return f"{line}; every token is learned"
        return f"{line}; chat template: {self.template_name}; learned: {learned}"

    # The model

    def loss(self, model: Module, *rows, num_targets: int) -> Tensor:
        ids, *segments, targets = rows
        cache = Packed(segments[0], model) if segments else None
        return model.loss(ids, targets, num_targets=num_targets, cache=cache)
