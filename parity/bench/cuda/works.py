"""The works that are measured on a GPU: a model, and a task to do with it.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PRECISIONS = ("float32", "tf32", "bfloat16")

STEPS_COMPARED = 3  # training steps, or tokens after the prompt, whose losses or logits are compared


@dataclass(frozen=True)
class Work:
    """A model and a task to do with it."""

    task: str  # train: a step; forward: logits of every position; decode: prefill, then new tokens
    arch: str  # gpt2 or llama
    size: str  # name of a preset of the config
    batch: int
    context: int  # tokens of every sequence, or of the prompt
    new: int = 0  # tokens to decode after the prompt
    changes: dict = field(default_factory=dict)  # fields of the config that differ from the preset

    def config(self):
        """The model's config."""
        from tinyllm.models import ARCHITECTURES

        return ARCHITECTURES[self.arch].config_class.preset(self.size, **self.changes)

    @property
    def tokens(self) -> int:
        """The number of tokens that are trained on, prefilled or decoded in one repetition."""
        return self.batch * (self.new or self.context)

    def flops_per_token(self) -> float:
        """Model FLOPs per token as papers count them: every score once (``tools.info.Flops.textbook``).

        A decoded token attends to the prompt and, on average, to half of the new tokens.
        """
        from tinyllm.models import ARCHITECTURES
        from tinyllm.tools.info import flops_per_token

        model = ARCHITECTURES[self.arch](self.config(), rng=None)
        flops = flops_per_token(model, self.context + self.new // 2).textbook
        return flops if self.task == "train" else flops / 3

    def __str__(self) -> str:
        sizes = f"{self.batch} x {self.context} tokens"
        done = f"{sizes}, then {self.new} one by one" if self.new else sizes
        changed = "".join(f", {name} {value}" for name, value in self.changes.items())
        return f"{self.arch} {self.size}{changed}: {self.task}, {done}"


NO_DROPOUT = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

WORKS = {
    "train": Work("train", "gpt2", "124M", batch=16, context=1024, changes=NO_DROPOUT),
    "forward": Work("forward", "llama", "Llama-3.2-1B", batch=4, context=1024),
    "decode": Work("decode", "llama", "Llama-3.2-1B", batch=1, context=64, new=128),
}

SMALL_GPT2 = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32)

SMALL_LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)

SMALL_WORKS = {  # the same tasks on models that fit any machine
    "train": Work("train", "gpt2", "124M", batch=2, context=16, changes=NO_DROPOUT | SMALL_GPT2),
    "forward": Work("forward", "llama", "toy", batch=2, context=16, changes=SMALL_LLAMA),
    "decode": Work("decode", "llama", "toy", batch=1, context=8, new=6, changes=SMALL_LLAMA),
}


def random_ids(work: Work, sequences: int = 1):
    """Random token ids (sequences, B, T), int64, the same in every process."""
    import numpy as np

    shape = (sequences, work.batch, work.context)
    return np.random.default_rng(1).integers(0, work.config().vocab_size, shape)


def positions_compared(context: int) -> slice:
    """The positions whose logits are compared: about sixteen, including the last."""
    step = max(1, context // 16)
    return slice(step - 1, None, step)


def write_weights(work: Work, folder) -> None:
    """Write the work's model with random float32 weights into a folder, for every variant to load."""
    import numpy as np

    from tinyllm.models import ARCHITECTURES

    ARCHITECTURES[work.arch](work.config(), rng=np.random.default_rng(0)).save_pretrained(folder)
