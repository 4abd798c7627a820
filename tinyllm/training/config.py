"""The options of a training run, their defaults, and the presets."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, get_type_hints

import numpy as np

from tinyllm.backend.dtypes import PRECISIONS
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES
from tinyllm.nn import Module

SPECIAL = ("refuse", "allow", "text")

# What a resumed run may be asked otherwise because it goes on where there is another device, or less memory:
# its numbers differ from then on, as they are rounded otherwise.
ELSEWHERE = {"device", "dtype", "micro_batch"}


@dataclass(frozen=True)
class RunOptions:
    """The options of a training run, whatever its task: each task has a class with its own ones besides."""

    out: Path | None = None
    """Folder of the run, which must not hold one yet; a new one in runs/ if not given."""
    resume: Path | None = None
    """Instead of a new run, go on with the one in this folder; its own options are the defaults then."""
    batch: int = 32
    """Rows per step (of `tinyllm train`: windows)."""
    micro_batch: int | None = None
    """Rows at a time: gradients of a step's micro-batches are added up; the whole batch if not given."""
    steps: int = 300
    """Updates."""
    lr: float = 3e-3
    """Learning rate at its peak."""
    initial_lr: float = 0.0
    """Learning rate of the first step, before the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup: int = 50
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """Decay of the matrices (never of biases and norms)."""
    clip: float = 1.0
    """Largest L2 norm of all gradients together."""
    eval_every: int | None = None
    """Steps between evaluations; if not given, one epoch, or a tenth of the run if that is shorter."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; if given, an evaluation with the lowest val_loss so far makes one, too."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, besides those by steps and the one at the end; 0 for none by the clock."""
    keep: int = 2
    """The newest checkpoints that stay; the one with the lowest val_loss stays as well."""
    skip_nonfinite: int = 0
    """Steps in a row without an update, their loss or gradient not finite, before the run stops."""
    log: tuple[str, ...] = ()
    """Where the run is logged besides its folder: tensorboard, wandb (Weights & Biases), or both."""
    seed: int = 0
    """Decides the initial weights, the order of the batches, dropout and samples."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto: a GPU if CuPy sees one; it says which."""
    dtype: str = "float32"
    """float32 or float64; on a GPU also bfloat16, float16 or tf32: matrices are multiplied in that type,
    everything else is float32."""
    gpu_memory: float | None = None
    """Gigabytes (10^9 bytes) of a GPU's memory to take at most; all of it if not given."""

    task = None  # its name, as the run's config.json has it

    # What a resumed run may be asked otherwise than it was begun with: its numbers stay the same.
    free = frozenset(
        "resume eval_every checkpoint_every checkpoint_minutes keep skip_nonfinite log gpu_memory".split()
    )

    def __post_init__(self):
        self._require_at_least(1, "steps batch keep eval_every checkpoint_every micro_batch")
        self._require_at_least(0, "skip_nonfinite initial_lr min_lr weight_decay checkpoint_minutes")
        for name in ("lr", "clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0")
        self._require("micro_batch", self.batch % self.at_once == 0, f"a divisor of the batch, {self.batch}")
        self._require("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")
        self._require("warmup", 0 <= self.warmup < self.steps, f"below the {self.steps} steps of the run")
        self._require("dtype", self.dtype in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def _require_at_least(self, least: int, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            self._require(name, value is None or least <= value < math.inf, f"at least {least}")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise Error(f"{_flag(name)} is {getattr(self, name)}: it must be {what}")

    @classmethod
    def from_json(cls, options: dict) -> Self:
        """The options as a run's config.json holds them, in ``to_json``'s form.

        Raises ``Error`` naming one that is unknown or has a value of another type.
        """
        kinds = get_type_hints(cls)
        unknown = sorted(options.keys() - kinds.keys())
        if unknown:
            raise Error(f"option {unknown[0]!r} is unknown to this version of tinyllm")
        return cls(**{name: _from_json(name, value, kinds[name]) for name, value in options.items()})

    def to_json(self) -> dict:
        """The options as JSON knows them."""
        options = asdict(self)
        return {name: str(x) if isinstance(x, Path) else x for name, x in options.items()}

    @property
    def parameter_dtype(self) -> np.dtype:
        """What the parameters and the optimizer are kept in, whatever they are multiplied in."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    @property
    def at_once(self) -> int:
        """Rows in one forward and backward pass."""
        return self.micro_batch or self.batch

    @property
    def smaller_micro_batch(self) -> list[str]:
        """The option that takes the next smaller micro-batch, if there is one."""
        smaller = max((n for n in range(1, self.at_once) if self.batch % n == 0), default=None)
        return [] if smaller is None else [f"--micro-batch {smaller}"]


@dataclass(frozen=True)
class ModelOptions:
    """The options of a model that is trained from random numbers."""

    arch: str = "gpt2"
    """The architecture: gpt2 or llama."""
    n_layer: int = 3
    """Blocks."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_kv_head: int | None = None
    """Of a Llama: heads of keys and values, shared by the others; if not given, as many as n_head."""
    n_embd: int = 256
    """Channels."""
    context: int = 128
    """Tokens the model sees at once, and the length of a training window."""
    dropout: float = 0.1
    """Dropout probability, at all three places GPT-2 has one, and at the one that Llama has."""
    tie_head: bool = True
    """Use the token embedding as output layer."""
    qkv_bias: bool = True
    """Of a GPT-2: biases in the projection to queries, keys and values (a Llama has none)."""
    head_bias: bool = False
    """Of a GPT-2: a bias in the output layer."""
    init: str = "gpt2"
    """Initial weights: gpt2 (N(0, 0.02)), or torch (PyTorch's defaults, embeddings from N(0, 1))."""

    def model(self, vocab_size: int, rng: np.random.Generator | None) -> Module:
        """The untrained model; with ``rng=None``, of meta parameters, which take no memory."""
        return ARCHITECTURES[self.arch](self.model_config(vocab_size), rng=rng)

    def model_config(self, vocab_size: int):
        names = "context n_layer n_head n_embd n_kv_head dropout tie_head qkv_bias head_bias".split()
        sizes = {name: getattr(self, name) for name in names}
        return ARCHITECTURES[self.arch].config_class.of_size(vocab_size, **sizes)


@dataclass(frozen=True)
class TextOptions:
    """The options of the text that a model is trained on."""

    text: str = "python-docs"
    """python-docs, the-verdict, a text file, a .jsonl file, or a folder of them; each may be gzipped."""
    text_field: str | None = None
    """Of .jsonl files: the field that holds a line's text."""
    in_memory: int = 100
    """Megabytes of text; a larger one is tokenised once, in parallel, into a file and read from there."""
    tokens: Path | None = None
    """Folder of that file; if not given, beside the text."""
    tokenizer: str = "bpe:1024"
    """bpe:VOCAB (learned from the text), gpt2, char (an id per character), or a run folder or file."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (as their ids), or text."""
    special_tokens: tuple[str, ...] = ()
    """New special tokens, with ids after the tokenizer's last one."""
    stride: int | None = None
    """Tokens from the start of a training window to the next; a quarter of the context if not given."""
    eval_windows: int = 128
    """At most this many windows of each part, evenly spread, are evaluated."""
    prompt: str = "The "
    """What the sample at each evaluation begins with."""
    profile: bool = False
    """Instead of training: a table of where a step's time and memory go, op by op."""


@dataclass(frozen=True)
class TrainConfig(RunOptions, ModelOptions, TextOptions):
    """Train a model on a text; everything the run makes goes into one folder."""

    task = "pretrain"

    free = RunOptions.free | {"text", "text_field", "tokens", "eval_windows", "prompt"}

    def __post_init__(self):
        super().__post_init__()
        self._require_at_least(1, "eval_windows context stride")
        self._require_at_least(0, "in_memory")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name, known in (("special", SPECIAL), ("arch", ARCHITECTURES), ("init", ("gpt2", "torch"))):
            self._require(name, getattr(self, name) in known, " or ".join(known))
        self.model_config(vocab_size=1)  # raises Error for what the architecture does not have


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _from_json(name: str, value, kind):
    if kind == Path | None and isinstance(value, str):
        return Path(value)
    if kind == tuple[str, ...]:
        holds = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value, kind = tuple(value) if holds else value, tuple
    if kind in (float, float | None):
        kind |= int
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Error(f"option {name!r} is {value!r}, which it cannot be")
    return value


def check_continues(begun: RunOptions, asked: RunOptions) -> None:
    """``Error``, naming the options, if ``asked`` would be another run.

    It goes on bit for bit, unless what is in ``ELSEWHERE`` changes.
    """
    names = [name for name in begun.to_json() if name not in begun.free | ELSEWHERE]
    changed = [name for name in names if getattr(begun, name) != getattr(asked, name)]
    if begun.parameter_dtype != asked.parameter_dtype:
        changed.append("dtype")
    if changed:
        was, wanted = (
            ", ".join(f"{_flag(name)} {getattr(options, name)}" for name in changed)
            for options in (begun, asked)
        )
        remedy = "a run goes on bit for bit, so omit that, or start a new one"
        raise Error(f"the run was begun with {was}, not {wanted}: {remedy}")


PRESETS = {
    "small": {},
    "ten-minutes": dict(n_head=5, n_embd=320, context=64, batch=64, steps=600, lr=2.5e-3, dropout=0.2),
    # The classic run of Raschka, "Build a Large Language Model (From Scratch)", chapter 5
    "gpt2-verdict": dict(
        text="the-verdict", tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, context=256, stride=256,
        batch=2, steps=135, lr=5e-4, initial_lr=3e-5, min_lr=1e-6, warmup=10, dropout=0.2, tie_head=False,
        qkv_bias=False, head_bias=True, init="torch", prompt="Every effort moves you",
    ),
    # GPT-2 small, for a text of its size (--text); the rates are those of Brown et al., arXiv 2005.14165,
    # table 2.1, for 125M parameters
    "gpt2-124m": dict(
        tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, context=1024, stride=1024, batch=32,
        micro_batch=4, steps=10_000, lr=6e-4, min_lr=6e-5, warmup=500, dropout=0.0, eval_every=100,
        eval_windows=64, checkpoint_every=500,
    ),
}  # fmt: skip
