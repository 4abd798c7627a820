"""The options of a training run, their defaults, and the presets."""

import math
import re
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self, get_type_hints

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.dtypes import PRECISIONS
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES, full_name
from tinyllm.nn import Module
from tinyllm.optim import OPTIMIZERS

CHOICES = {
    "special": ("refuse", "allow", "text"),
    "arch": ARCHITECTURES,
    "init": ("gpt2", "torch", "zero"),
    "optimizer": OPTIMIZERS,
    "schedule": ("cosine", "linear"),
}

# A resumed run may change these, because it may resume on another device or with less memory. Its numbers
# then differ from there on by rounding, and with ``micro_batch`` the balancing loss of a mixture of experts.
ELSEWHERE = {"device", "dtype", "micro_batch", "processes"}


@dataclass(frozen=True)
class RunOptions:
    """The options that training runs of every task share; each task adds its own in a subclass."""

    out: Path | None = None
    """Folder for the run, new or empty; by default a new folder in runs/."""
    resume: Path | None = None
    """Resume the run in this folder instead of starting one; the defaults are then its own options."""
    batch: int = 32
    """Training examples per step, such as windows of a text."""
    micro_batch: int | None = None
    """Examples per forward and backward pass; gradients are accumulated. By default the whole batch."""
    steps: int = 300
    """Updates of the weights."""
    lr: float = 3e-3
    """Peak learning rate."""
    initial_lr: float = 0.0
    """Learning rate of the first step, from which the warm-up rises."""
    min_lr: float | None = None
    """Learning rate at the end of the decay; by default 1e-4, and at most a tenth of --lr."""
    warmup: int | None = None
    """Steps in which the learning rate rises to its peak; by default a sixth of the steps."""
    weight_decay: float = 0.1
    """Weight decay of the matrices (biases and norms have none)."""
    clip: float = 1.0
    """Upper bound of the L2 norm of the gradient of all parameters."""
    eval_every: int | None = None
    """Steps between evaluations; by default an epoch or a tenth of the run, whichever is shorter."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; if given, an evaluation with the lowest val_loss so far saves one too."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, in addition to those by steps and the last; 0 for none by time."""
    keep: int = 2
    """How many of the newest checkpoints to keep; the one with the lowest val_loss is kept too."""
    skip_nonfinite: int = 0
    """How many consecutive steps with a loss or gradient that is not finite to skip before stopping."""
    log: tuple[str, ...] = ()
    """Where to log the run in addition to its folder: tensorboard, wandb (Weights & Biases), or both."""
    seed: int = 0
    """Seed of the initial weights, the order of the batches, dropout and samples."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto, which uses a GPU if CuPy finds one."""
    dtype: str = "float32"
    """float32 or float64; on a GPU also bfloat16, float16 or tf32 for matrix products, all else float32."""
    gpu_memory: float | None = None
    """Limit on the GPU memory used, in gigabytes (10^9 bytes); by default all of it."""
    processes: int | None = None
    """Processes that share every step, a core each; by default one per core for a small model, else 1."""
    distributed: str | None = None
    """Train with all processes that mpiexec or srun started: mpi (on CPUs) or nccl (a GPU for each)."""
    shard_optimizer: bool = False
    """Divide AdamW's averages among the processes of --distributed (ZeRO-1), which saves memory."""

    task = None  # its name in the run's config.json
    command = "tinyllm train"  # that runs it
    restart = "tinyllm train --from"  # and begins a new run from the weights of this one
    length_option = "--context"  # that bounds the tokens of a row
    optimizer, schedule = "adamw", "cosine"

    # The options that a resumed run may change, because its numbers stay the same.
    free = frozenset(
        "resume eval_every checkpoint_every checkpoint_minutes keep skip_nonfinite log gpu_memory "
        "distributed shard_optimizer".split()
    )

    def __post_init__(self):
        self._require_at_least(1, "steps batch keep eval_every checkpoint_every micro_batch processes")
        self._require_at_least(0, "skip_nonfinite initial_lr min_lr weight_decay checkpoint_minutes")
        for name in ("lr", "clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("initial_lr", "min_lr"):
            rate = getattr(self, name)
            self._require(name, rate is None or rate <= self.lr, f"at most the peak, --lr {self.lr}")
        whole = self.micro_batch is None or self.batch % self.micro_batch == 0
        self._require("micro_batch", whole, f"a divisor of the batch, {self.batch}")
        few = self.processes is None or self.processes <= self.batch
        self._require("processes", few, f"at most the batch, {self.batch}: a process has at least a row")
        self._require("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")
        if self.steps is not None:  # else it follows from the data
            least = f"at least 0 and below the {self.steps} steps of the run"
            self._require("warmup", 0 <= self.warmup_steps < self.steps, least)
        self._require(
            "shard_optimizer", self.distributed or not self.shard_optimizer, "used with --distributed"
        )
        self._require("dtype", self.dtype in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def check_division(self) -> None:
        """Raise ``Error`` unless the batch is the same number of micro-batches for each process."""
        processes, batch = distributed.current().size, self.batch
        if batch % processes != 0:
            near = [n for n in (batch // processes * processes, -(-batch // processes) * processes) if n > 0]
            counts = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
            other = "" if self.resume else f"--batch {' or '.join(map(str, near))}, or "
            raise Error(
                f"--batch {batch} cannot be divided among {processes} processes: choose {other}a number of "
                f"processes among {counts}"
            )
        rows = batch // processes
        sizes = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        least = f"one of {sizes}, the divisors of the {rows} rows of each of {processes} processes"
        self._require("micro_batch", rows % self.at_once == 0, least)

    def _require_at_least(self, least: int, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            self._require(name, value is None or least <= value < math.inf, f"at least {least}")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise Error(f"{flag(name)} is {getattr(self, name)}: it must be {what}")

    @classmethod
    def from_json(cls, options: dict) -> Self:
        """The options from a run's config.json, as ``to_json`` wrote them.

        Raises ``Error`` naming an option that is unknown or whose value has the wrong type.
        """
        kinds = get_type_hints(cls)
        unknown = sorted(options.keys() - kinds.keys())
        if unknown:
            raise Error(f"option {unknown[0]!r} is unknown to this version of tinyllm")
        return cls(**{name: _from_json(name, value, kinds[name]) for name, value in options.items()})

    def to_json(self) -> dict:
        """The options as JSON values."""
        options = asdict(self)
        return {name: str(x) if isinstance(x, Path) else x for name, x in options.items()}

    @property
    def parameter_dtype(self) -> np.dtype:
        """The dtype of the parameters and the optimizer's state, independent of that of the products."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    @property
    def warmup_steps(self) -> int:
        return self.steps // 6 if self.warmup is None else self.warmup

    @property
    def final_lr(self) -> float:
        return min(1e-4, self.lr / 10) if self.min_lr is None else self.min_lr

    @property
    def at_once(self) -> int:
        """Rows in one forward and backward pass of a process."""
        return self.micro_batch or max(1, self.batch // distributed.current().size)

    def resuming(self, folder: Path, begun: Self | None = None) -> str:
        """The command that resumes the run in a folder, on as many processes as this one.

        A resumed run has the options of ``begun``, those it was started with: others are given again.
        """
        options = [f"--resume {shlex.quote(str(folder))}"]
        processes = dict(distributed=None, shard_optimizer=False)  # of a resumed run
        for name in sorted((self.free | ELSEWHERE) - {"resume"}):
            value = getattr(self, name)
            if value != processes.get(name, getattr(begun or self, name)):
                given = value if isinstance(value, tuple) else [] if value is True else [value]
                options.append(" ".join([flag(name), *(shlex.quote(str(each)) for each in given)]))
        launcher = "" if self.distributed is None else f"mpiexec -n {distributed.current().size} "
        return f"{launcher}{self.command} {' '.join(options)}"

    @property
    def smaller_micro_batch(self) -> list[str]:
        """The option for the next smaller micro-batch, if there is one."""
        rows = self.batch // distributed.current().size
        now = min(self.at_once, -(-rows // (self.processes or 1)))
        smaller = max((n for n in range(1, now) if rows % n == 0), default=None)
        return [] if smaller is None else [f"--micro-batch {smaller}"]


@dataclass(frozen=True)
class ModelOptions:
    """The options of the model that is trained."""

    start_from: str | None = None
    """Start from the weights and the tokenizer of a run, a model's folder, a .gguf file or a hub id."""
    arch: str = "gpt2"
    """Architecture: gpt2, llama, or one of Llama's relatives, such as qwen3, gemma3 or mistral."""
    n_layer: int = 3
    """Number of blocks."""
    n_head: int = 4
    """Attention heads per block; must divide --n-embd."""
    n_kv_head: int | None = None
    """Not for GPT-2: key-value heads, each shared by several query heads; by default as many as --n-head."""
    n_embd: int = 256
    """Width of the model: channels of the embeddings and hidden states."""
    context: int = 128
    """The longest sequence the model takes, and the length of a training window, in tokens."""
    dropout: float = 0.1
    """Dropout probability: of a GPT-2's embeddings, attention and residuals, or of another's attention."""
    tie_head: bool = True
    """Use the token embedding as the output layer's weight."""
    qkv_bias: bool = True
    """GPT-2 only: biases in the projection to queries, keys and values (Qwen2 always has them)."""
    head_bias: bool = False
    """GPT-2 only: a bias in the output layer."""
    init: str = "gpt2"
    """Initial weights: gpt2 (N(0, 0.02²)), zero (the same, but blocks add 0 at first), torch (PyTorch's)."""

    def model(self, vocab_size: int, rng: np.random.Generator | None) -> Module:
        """The untrained model; with ``rng=None``, of meta parameters, which use no memory."""
        return ARCHITECTURES[self.arch](self.model_config(vocab_size), rng=rng)

    def model_config(self, vocab_size: int):
        names = "context n_layer n_head n_embd n_kv_head dropout tie_head qkv_bias head_bias".split()
        sizes = {name: getattr(self, name) for name in names}
        return ARCHITECTURES[self.arch].config_class.of_size(vocab_size, **sizes)


@dataclass(frozen=True)
class TextOptions:
    """The options of the text that the model is trained on."""

    text: str = "python-docs"
    """python-docs, the-verdict, a text file, a .jsonl file, or a folder of them; files may be gzipped."""
    second_text: str | None = None
    """A text to evaluate too at the end, without paragraphs of --text; with python-docs python-docstrings."""
    text_field: str | None = None
    """For .jsonl files: the field with the text."""
    pattern: str | None = None
    """For a folder: read the files that match, such as '*.py'; by default .txt and .jsonl files."""
    in_memory: int = 100
    """Largest text, in megabytes, to read into memory; a larger one is tokenised once into a file."""
    tokens: Path | None = None
    """Folder for the token ids of a text larger than --in-memory; by default next to the text."""
    tokenizer: str = "bpe:1024"
    """bpe:VOCAB (learned from the text), gpt2, bytes, char (an id per character), or a folder or file."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (encode as their ids), or text."""
    special_tokens: tuple[str, ...] = ()
    """New special tokens, which get the ids after the tokenizer's last."""
    stride: int | None = None
    """Tokens from the start of a training window to the next; by default a quarter of the context."""
    eval_windows: int = 128
    """Maximum number of windows to evaluate in each text; for losses, at most those of --eval-every steps."""
    prompt: str | None = None
    """Beginning of the sample at each evaluation; by default The, or the text's first word."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalised steps for the hidden matrices, AdamW for the rest, with one --lr."""
    schedule: str = "cosine"
    """How the learning rate falls after its peak: cosine, or linear (a straight line)."""
    token_splits: float = 0.0
    """Probability that a token of training is divided into the two it was merged from, and these again."""
    token_noise: float = 0.0
    """Probability that an input token of training is replaced by a random one; what it predicts stays."""
    profile: bool = False
    """Print the time and memory of each op of a training step instead of training."""


@dataclass(frozen=True)
class TrainConfig(RunOptions, ModelOptions, TextOptions):
    """Train a model on a text; everything the run writes is in one folder."""

    task = "pretrain"

    free = RunOptions.free | {"text", "text_field", "pattern", "tokens", "prompt"}

    def __post_init__(self):
        vars(self).update(arch=full_name(self.arch))
        super().__post_init__()
        self._require_at_least(1, "eval_windows context stride")
        self._require_at_least(0, "in_memory")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name in ("token_splits", "token_noise"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name, known in CHOICES.items():
            self._require(name, getattr(self, name) in known, " or ".join(known))
        whole = self.optimizer == "adamw" or not self.shard_optimizer
        self._require("shard_optimizer", whole, "used with --optimizer adamw: Muon needs whole matrices")
        if self.start_from is None:
            try:
                self.model_config(vocab_size=1)
            except Error as error:
                raise Error(_as_typed(str(error))) from None


def flag(name: str) -> str:
    """An option as it is typed at the command line."""
    return "--from" if name == "start_from" else f"--{name.replace('_', '-')}"


# The names of options in the configs of architectures
CONFIG_NAMES = dict(
    num_attention_heads="n_head",
    num_key_value_heads="n_kv_head",
    num_hidden_layers="n_layer",
    hidden_size="n_embd",
    max_position_embeddings="context",
    n_positions="context",
    resid_pdrop="dropout",
    attention_dropout="dropout",
    tie_word_embeddings="tie_head",
    lm_head_bias="head_bias",
    model_type="arch",
)


def _as_typed(message: str) -> str:
    """An architecture's message with the names of options."""
    names = CONFIG_NAMES | {field.name: field.name for field in fields(ModelOptions)}
    return re.sub(rf"\b({'|'.join(names)})\b", lambda found: flag(names[found[0]]), message)


def _from_json(name: str, value, kind):
    if kind == Path | None and isinstance(value, str):
        return Path(value)
    if kind == tuple[str, ...]:
        holds = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value, kind = tuple(value) if holds else value, tuple
    if kind in (float, float | None):
        kind |= int
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Error(f"option {name!r} is {value!r}, which is not a value of its type")
    return value


def check_continues(begun: RunOptions, asked: RunOptions) -> None:
    """Raise ``Error``, naming the options, if ``asked`` would change the run's results.

    A resumed run is bitwise identical to one that was not interrupted, unless an option in ``ELSEWHERE``
    changes.
    """
    names = [name for name in begun.to_json() if name not in begun.free | ELSEWHERE]
    changed = [name for name in names if getattr(begun, name) != getattr(asked, name)]
    if begun.parameter_dtype != asked.parameter_dtype:
        changed.append("dtype")
    if changed:
        was, wanted = (
            ", ".join(f"{flag(name)} {getattr(options, name)}" for name in changed)
            for options in (begun, asked)
        )
        raise Error(
            f"the run was started with {was}, not {wanted}: omit that, or start a new run from its weights "
            f"with {begun.restart} {begun.out}"
        )


DEFAULT_PRESET = "modern"  # of tinyllm train

PRESETS = {
    "gpt2-small": {},  # the defaults above
    # What paid at equal seconds (README.md of this folder)
    "modern": dict(
        arch="qwen3", context=256, batch=8, steps=510, lr=1e-2, min_lr=0.0, warmup=20, schedule="linear",
        optimizer="muon", weight_decay=1.0, dropout=0.0, token_splits=0.1, token_noise=0.05,
    ),
    "ten-minutes": dict(
        n_head=5, n_embd=320, context=64, batch=64, steps=600, lr=2.5e-3, warmup=50, dropout=0.2
    ),
    # The classic run of Raschka, "Build a Large Language Model (From Scratch)", chapter 5
    "gpt2-verdict": dict(
        text="the-verdict", tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, context=256, stride=256,
        batch=2, steps=135, lr=5e-4, initial_lr=3e-5, min_lr=1e-6, warmup=10, dropout=0.2, tie_head=False,
        qkv_bias=False, head_bias=True, init="torch", prompt="Every effort moves you",
    ),
    # GPT-2 small, for a text of suitable size (--text); the learning rates are those of Brown et al.,
    # arXiv 2005.14165, table 2.1, for 125M parameters
    "gpt2-124m": dict(
        tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, context=1024, stride=1024, batch=32,
        micro_batch=4, steps=10_000, lr=6e-4, min_lr=6e-5, warmup=500, dropout=0.0, eval_every=100,
        eval_windows=64, checkpoint_every=500,
    ),
}  # fmt: skip
