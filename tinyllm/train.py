"""How is a language model trained on a text?

Per step: a batch of windows, the loss of predicting every next token, its gradients, clipped, and one
AdamW update with the learning rate of that step. All of a run lies in its folder:

    config.json           what was asked for, the text's hash, the library versions
    tinyllm_tokenizer.json
    metrics.jsonl         one object per step: step, tokens, train_loss, lr, grad_norm, tokens_per_s;
                          at evaluations also val_loss, val_bits_per_byte, and train_eval_loss (measured as
                          val_loss, without dropout, on the training text)
    samples.txt           what the model wrote at each evaluation
    loss.png              the two curves
    step-000135/          config.json and model.safetensors, as Hugging Face lays them out
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import tinyllm
from tinyllm.bpe import parse_bpe, train_bpe
from tinyllm.data import Batches, Text, Windows, load_text, train_validation_split
from tinyllm.device import keep_memory, manual_seed, pick_device
from tinyllm.errors import Error
from tinyllm.generate import generate
from tinyllm.models import GPT2, GPT2Config
from tinyllm.nn import evaluating, initialize_as_torch
from tinyllm.optim import AdamW, clip_grad_norm, warmup_cosine
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

SPECIAL = ("refuse", "allow", "text")
RUN_CONFIG, METRICS, SAMPLES, PLOT = "config.json", "metrics.jsonl", "samples.txt", "loss.png"


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a text; everything the run makes goes into one folder."""

    out: Path | None = None
    """Folder of the run, which must not hold one yet; a new one in runs/ if not given."""
    text: str = "python-docs"
    """A UTF-8 text file, or python-docs, or the-verdict."""
    tokenizer: str = "bpe:1024"
    """bpe:VOCAB (learned from the text), gpt2, char (an id per character), or a run folder or file."""
    arch: str = "gpt2"
    """The architecture: gpt2."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (as their ids), or text."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 192
    """Channels."""
    context: int = 256
    """Tokens the model sees at once, and the length of a training window."""
    stride: int | None = None
    """Tokens between the starts of two windows; the context if not given."""
    batch: int = 8
    """Windows per step."""
    steps: int = 600
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
    dropout: float = 0.1
    """Dropout probability, at all three places GPT-2 has one."""
    tie_head: bool = True
    """Use the token embedding as output layer."""
    qkv_bias: bool = True
    """Biases in the projection to queries, keys and values."""
    head_bias: bool = False
    """A bias in the output layer."""
    init: str = "gpt2"
    """Initial weights: gpt2 (N(0, 0.02)), or torch (PyTorch's defaults, embeddings from N(0, 1))."""
    eval_every: int | None = None
    """Steps between evaluations; if not given, one epoch, or a tenth of the run if that is shorter."""
    eval_windows: int = 64
    """At most this many windows of each part, evenly spread, are evaluated."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; if not given, only one at the end."""
    prompt: str = "The "
    """What the sample at each evaluation begins with."""
    seed: int = 0
    """Decides the initial weights, the order of the batches, dropout and samples."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto."""
    dtype: str = "float32"
    """float32 or float64."""

    def __post_init__(self):
        for name in ("steps", "eval_windows", "batch", "context"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_every", "checkpoint_every", "stride"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("initial_lr", "min_lr", "weight_decay"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")
        for name in ("lr", "clip"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2**64 - 1")
        _require(
            0 <= self.warmup < self.steps, "warmup", self.warmup, f"below the {self.steps} steps of the run"
        )
        _require(self.dtype in ("float32", "float64"), "dtype", self.dtype, "float32 or float64")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        _require(self.special in SPECIAL, "special", self.special, " or ".join(SPECIAL))
        _require(self.arch == "gpt2", "arch", self.arch, "gpt2")
        _require(self.init in ("gpt2", "torch"), "init", self.init, "gpt2 or torch")

    def model_config(self, vocab_size: int) -> GPT2Config:
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.context,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            resid_pdrop=self.dropout,
            tie_word_embeddings=self.tie_head,
            qkv_bias=self.qkv_bias,
            lm_head_bias=self.head_bias,
        )


def _require(holds: bool, name: str, value, what: str) -> None:
    if not holds:
        raise Error(f"--{name.replace('_', '-')} is {value}: it must be {what}")


# The classic run of Raschka, "Build a Large Language Model (From Scratch)", chapter 5
PRESETS = {
    "small": {},
    "gpt2-verdict": dict(
        text="the-verdict",
        tokenizer="gpt2",
        n_layer=12,
        n_head=12,
        n_embd=768,
        context=256,
        batch=2,
        steps=135,
        lr=5e-4,
        initial_lr=3e-5,
        min_lr=1e-6,
        warmup=10,
        dropout=0.2,
        tie_head=False,
        qkv_bias=False,
        head_bias=True,
        init="torch",
        prompt="Every effort moves you",
    ),
}


@dataclass(frozen=True)
class Data:
    """What a run reads: the text, its tokenizer, and the windows of both parts."""

    text: Text
    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    bytes_per_token: float  # of the validation text: losses per byte compare across tokenizers


def load_data(config: TrainConfig) -> Data:
    """Read, split by characters (90/10), tokenise, cut into windows."""
    text = load_text(config.text)
    train_text, validation_text = train_validation_split(text.text)
    if config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text(text.text)
    elif config.tokenizer.startswith("bpe:"):
        # Learned from the training part only: the validation text stays unseen.
        tokenizer = BPETokenizer(train_bpe(train_text, parse_bpe(config.tokenizer)))
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    parts = [np.array(tokenizer.encode(part, config.special)) for part in (train_text, validation_text)]
    windows = [Windows(ids, config.context, stride) for ids, stride in zip(parts, (config.stride, None))]
    return Data(text, tokenizer, *windows, len(validation_text.encode("utf-8")) / len(parts[1]))


def evaluate(model, windows: Windows, most: int, batch: int) -> float:
    """Mean loss per token over at most ``most`` windows, spread evenly; in eval mode."""
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    total, count = 0.0, 0
    with evaluating(model), no_grad():
        for start in range(0, len(chosen), batch):
            ids, targets = windows[chosen[start : start + batch]]
            total += model.loss(ids, targets, divisor=1).item()
            count += targets.size
    return total / count


def train(config: TrainConfig, progress: bool = True) -> GPT2:
    """Run the training that ``config`` describes; returns the trained model.

    SIGINT and SIGTERM let the step finish; then the weights are saved and KeyboardInterrupt is raised
    with the signal's number as its argument. A loss or gradient norm that is not finite raises
    FloatingPointError before it reaches the weights; the weights before that step are saved.
    """
    device = pick_device(config.device)
    data = load_data(config)
    rng = np.random.default_rng(config.seed)
    model = GPT2(config.model_config(data.tokenizer.vocab_size), rng=rng)
    if config.init == "torch":
        initialize_as_torch(model, rng)
    model.astype(np.dtype(config.dtype)).to(device).train()
    try:
        prompt = data.tokenizer.encode(config.prompt)
    except Error as error:
        raise Error(f"--prompt: {error}") from None
    if not 0 < len(prompt) <= model.context:
        raise Error(f"--prompt is {len(prompt)} tokens long: it must have 1 to {model.context} (the context)")
    batches = Batches(data.train, config.batch, config.seed)
    run = _Run(config, data, model, batches.steps_per_epoch, device)
    keep_memory()

    optimizer = AdamW(model, config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    lr_at = warmup_cosine(config.lr, config.initial_lr, config.min_lr, config.warmup, config.steps)
    eval_every = config.eval_every or min(batches.steps_per_epoch, math.ceil(config.steps / 10))
    # A run that diverges ends with one sentence, not with NumPy's warnings before it.
    with _signals_wait() as arrived, np.errstate(over="ignore", invalid="ignore"):
        run.evaluate(0)
        for step in _progress_bar(config.steps, progress):
            started = time.perf_counter()
            ids, targets = batches.at(step)
            manual_seed(config.seed, step)
            loss = model.loss(ids, targets)
            loss.backward()
            grad_norm = clip_grad_norm(model, config.clip)
            if not (math.isfinite(loss.item()) and math.isfinite(grad_norm)):
                run.save(step)
                raise FloatingPointError(
                    f"step {step + 1}: the loss is {loss.item()} and the gradient norm {grad_norm} at "
                    f"learning rate {lr_at(step):.3g}: start again with a smaller --lr or --clip "
                    f"(the weights before this step are in {run.checkpoint(step)})"
                )
            optimizer.lr = lr_at(step)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            run.log(
                step=done,
                tokens=run.tokens + ids.size,
                train_loss=loss.item(),
                lr=optimizer.lr,
                grad_norm=grad_norm,
                tokens_per_s=round(ids.size / (time.perf_counter() - started), 1),
            )
            if done % eval_every == 0 or done == config.steps:
                run.evaluate(done)
            if done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                run.save(done)
            if arrived:
                run.evaluate(done)
                run.save(done)
                where = run.checkpoint(done)
                raise KeyboardInterrupt(arrived[0], f"stopped after step {done}; the weights are in {where}")
    return model


class _Run:
    """The folder of a run, and what is written into it as the run goes on."""

    def __init__(self, config: TrainConfig, data: Data, model, steps_per_epoch: int, device: str):
        self.config, self.data, self.model = config, data, model
        self.folder, self.tokens, self.record = config.out or _new_folder(data.text.name), 0, {}
        self.evaluated: int | None = None  # the step of the last evaluation
        self.history: list[dict] = []
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise Error(f"{self.folder} exists and is not an empty folder: choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(self.folder)
        about = {
            "train": asdict(config) | {"out": str(self.folder)},
            "text": {"name": data.text.name, "sha256": data.text.sha256, "characters": len(data.text.text)},
            "parameters": model.num_parameters(),
            "steps_per_epoch": steps_per_epoch,
            "versions": {
                "tinyllm": tinyllm.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        (self.folder / RUN_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        _say(
            f"{data.text.name}: {len(data.text.text):,} characters; {data.tokenizer.name} tokenizer, "
            f"{data.tokenizer.vocab_size:,} ids; "
            f"{len(data.train.tokens):,} + {len(data.validation.tokens):,} tokens"
        )
        _say(
            f"{len(data.train):,} + {len(data.validation):,} windows of {config.context} tokens "
            f"({data.train.unused_tokens} + {data.validation.unused_tokens} tokens at the ends fit none)"
        )
        _say(
            f"{type(model).__name__}, {model.num_parameters():,} parameters, on {device}; "
            f"{config.steps:,} steps of {config.batch} windows, {steps_per_epoch:,} an epoch; "
            f"into {self.folder}"
        )

    def log(self, **values) -> None:
        """The record of a step; an evaluation after it may add to it before it is written."""
        self.flush()
        self.record, self.tokens = values, values["tokens"]

    def flush(self) -> None:
        if self.record:
            self.history.append(self.record)
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.record) + "\n")
            self.record = {}

    def evaluate(self, step: int) -> None:
        """Both losses, a sample, and the plot so far. At step 0, before training, too."""
        if step == self.evaluated:
            return
        self.evaluated = step
        config, model = self.config, self.model
        self.record = self.record or {"step": step, "tokens": self.tokens}
        for key, windows in (("train_eval_loss", self.data.train), ("val_loss", self.data.validation)):
            loss = evaluate(model, windows, config.eval_windows, config.batch)
            if not math.isfinite(loss):
                self.save(step)
                raise FloatingPointError(
                    f"after step {step} the {key} is {loss}: start again with a smaller --lr or "
                    f"--clip (the weights are in {self.checkpoint(step)})"
                )
            self.record[key] = loss
        bits_per_byte = self.record["val_loss"] / math.log(2) / self.data.bytes_per_token
        self.record["val_bits_per_byte"] = bits_per_byte
        sample = self.sample(step)
        with open(self.folder / SAMPLES, "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{sample}\n")
        _say(
            f"step {step:>5}  train {self.record['train_eval_loss']:.4f}  val {self.record['val_loss']:.4f} "
            f"({bits_per_byte:.3f} bits/byte)  {' '.join(sample.split())[:80]}"
        )
        self.flush()
        plot_losses(self.history, self.folder / PLOT)

    def sample(self, step: int, tokens: int = 50) -> str:
        ids = self.data.tokenizer.encode(self.config.prompt)
        rng = np.random.default_rng([self.config.seed, step])
        drawn = generate(self.model, [ids], tokens, temperature=0.8, top_k=40, rng=rng)
        return self.data.tokenizer.decode(ids + [int(token[0]) for token in drawn])

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, step: int) -> None:
        self.flush()
        if not self.checkpoint(step).exists():
            self.model.save_pretrained(self.checkpoint(step))


def _new_folder(text_name: str) -> Path:
    """runs/NAME-N with the first number that is free."""
    stem = Path(text_name).stem
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{stem}-{n}").exists())


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint folder of a run."""
    checkpoints = sorted(Path(run).glob("step-*/model.safetensors"))
    if not checkpoints:
        raise Error(
            f"{run} holds no checkpoint (step-…/model.safetensors): give the --out of a run that saved one"
        )
    return checkpoints[-1].parent


def plot_losses(history: list[dict], path: str | Path) -> None:
    """Draw training and validation loss over the steps; without matplotlib, do nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("train_loss", "training batch (with dropout, if any)", dict(color="C0", alpha=0.35, linewidth=1)),
        ("train_eval_loss", "training text", dict(color="C0", marker="o", markersize=3)),
        ("val_loss", "validation text", dict(color="C1", marker="o", markersize=3)),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _say(line: str) -> None:
    from tqdm import tqdm

    try:
        tqdm.write(line)
    except BrokenPipeError:  # nobody reads what we say any more: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _progress_bar(steps: int, shown: bool):
    from tqdm import tqdm

    return tqdm(range(steps), unit="step", disable=None if shown else True, dynamic_ncols=True)


@contextmanager
def _signals_wait():
    """Collect SIGINT and SIGTERM in the list this yields, instead of breaking off in the middle of a step.

    Handlers belong to the main thread; elsewhere signals are none of our business.
    """
    arrived: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda received, _: arrived.append(received))
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
