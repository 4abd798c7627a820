"""How is a language model trained on a text?

Per step: a batch of windows, the loss of predicting every next token, its gradients, clipped, and one
AdamW update with the learning rate of that step. What can be asked for is in ``config.py``, what a run
leaves behind in ``run.py``.
"""

from __future__ import annotations

import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tinyllm
from tinyllm.backend.device import describe_device, open_device
from tinyllm.backend.dtypes import dtype_of
from tinyllm.backend.memory import keep_memory, out_of_memory, peak_memory
from tinyllm.backend.random import manual_seed
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import Corpus, encode_documents, open_corpus, train_validation_split
from tinyllm.data.token_file import tokenize_corpus, tokenizer_sha256
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.models import load_model
from tinyllm.nn import Module, evaluating, initialize_as_torch
from tinyllm.optim import AdamW, LossScale, clip_grad_norm, warmup_cosine
from tinyllm.tensor import no_grad
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer
from tinyllm.tokenizers.bpe import BPETokenizer, parse_bpe, train_bpe
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tools.info import flops_per_token, gemm_rate
from tinyllm.tools.profile import Profile, profile
from tinyllm.training import baselines
from tinyllm.training.checkpoint import checkpoints
from tinyllm.training.config import TrainConfig
from tinyllm.training.loggers import check_logs, open_logs
from tinyllm.training.run_folder import RunFolder, last_checkpoint, say

SAMPLE_TOKENS = 50

BPE_CHARACTERS = 10_000_000  # of a text that is too large to learn a vocabulary from all of it


@dataclass(frozen=True)
class Data:
    """What a run reads: the text, its tokenizer, and the windows of both parts."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    bytes_per_token: float  # of the validation text: losses per byte compare across tokenizers
    texts: tuple[bytes, bytes] | None  # both parts, unless they were too large to read at once


def load_data(
    config: TrainConfig, tokenizer: Tokenizer | None = None, text_sha256: str | None = None
) -> Data:
    """Read the text, learn or load a tokenizer, tokenise, cut into windows: 90% for training.

    A text of at most ``config.in_memory`` MB is split by characters. A larger one goes through a file of
    tokens on disk, which is split between two of its chunks. A resumed run brings its ``tokenizer`` and the
    hash of its text; raises ``Error`` if the text is another one now.
    """
    corpus = open_corpus(config.text, config.text_field)
    if text_sha256 not in (None, corpus.sha256):
        raise Error(
            f"the text {corpus.name} is not the one that the run was begun with (its SHA-256 is "
            f"{corpus.sha256[:8]}…, not {text_sha256[:8]}…): give that with --text, or start a new run"
        )
    if corpus.left_out:
        say(f"{corpus.name}: {len(corpus.left_out)} files are neither .txt nor .jsonl and were left out")
    if corpus.num_bytes > config.in_memory * 10**6:
        return _from_token_file(config, corpus, tokenizer)
    train, validation = parts = train_validation_split(corpus.documents())
    if tokenizer is None and config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text("".join(train + validation))
        if corpus.num_documents > 1:
            tokenizer = tokenizer.with_special_tokens([END_OF_TEXT])  # to stand between them
        tokenizer = tokenizer.with_special_tokens(config.special_tokens)
    elif tokenizer is None:
        tokenizer = _tokenizer(config, train)
    ids = [encode_documents(tokenizer, part, config.special) for part in parts]
    texts = tuple("".join(part).encode("utf-8") for part in parts)
    return _windows(config, corpus, tokenizer, *ids, len(texts[1]), texts)


def _from_token_file(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> Data:
    if config.tokenizer == "char":
        raise Error(
            f"{corpus.name} has {corpus.num_bytes / 10**6:,.0f} MB, too much for a character tokenizer: "
            "choose bpe:VOCAB or gpt2, or a larger --in-memory"
        )
    tokenizer = tokenizer or _tokenizer(config, corpus.sample(BPE_CHARACTERS))
    beside_the_text = f"{corpus.name.rstrip('/')}.{tokenizer.name.replace(':', '-')}.tokens"
    tokens = tokenize_corpus(corpus, tokenizer, config.special, config.tokens or Path(beside_the_text))
    *ids, validation_bytes = tokens.split(0.1)
    return _windows(config, corpus, tokenizer, *ids, validation_bytes, None)


def _tokenizer(config: TrainConfig, train_documents: Sequence[str]) -> Tokenizer:
    if config.tokenizer.startswith("bpe:"):
        # Learned from the training part only: the validation text stays unseen.
        tokenizer = BPETokenizer(train_bpe(train_documents, parse_bpe(config.tokenizer)))
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    return tokenizer.with_special_tokens(config.special_tokens)


def _windows(config, corpus, tokenizer, train, validation, validation_bytes, texts) -> Data:
    return Data(
        corpus,
        tokenizer,
        Windows(train, config.context, config.stride or max(1, config.context // 4)),
        Windows(validation, config.context),
        validation_bytes / len(validation),
        texts,
    )


def _go_on() -> None:
    """A check that never stops anything."""


def evaluate(
    model: Module, windows: Windows, most: int, batch: int, check: Callable[[], None] = _go_on
) -> float:
    """Mean loss per token over at most ``most`` windows, spread evenly; in eval mode.

    ``check()`` is called before every batch; what it raises ends the evaluation.
    """
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    total, count = 0.0, 0
    with evaluating(model), no_grad():
        for start in range(0, len(chosen), batch):
            check()
            ids, targets = windows[chosen[start : start + batch]]
            total += model.loss(ids, targets, num_targets=1).item()
            count += targets.size
    return total / count


def gradients(
    model: Module,
    ids,
    targets,
    micro_batch: int,
    seed: int,
    step: int,
    check: Callable[[], None] = _go_on,
    scale: LossScale | None = None,
) -> float:
    """Add dL/dθ of a step to every parameter's ``.grad``, ``micro_batch`` rows at a time; returns L.

    L = Σ cross-entropy / N with N the targets of the whole step that count (are not -100). Every
    micro-batch divides by N, not by its own number, so the sum is exactly the whole batch's gradient.
    ``check()`` is called before each of them; what it raises ends the step. On the way back the gradients
    are ``scale`` times as large, if there is one.
    """
    counted = int((targets != -100).sum())
    losses = []
    for number, first in enumerate(range(0, len(ids), micro_batch)):
        check()
        rows = slice(first, first + micro_batch)
        manual_seed(seed, step, number)
        loss = model.loss(ids[rows], targets[rows], num_targets=counted)
        loss.backward(None if scale is None else scale.seed(loss))
        losses.append(loss)
    if scale is not None:
        scale.unscale(model)
    total = 0.0
    for loss in losses:  # not before: a GPU still computes while we prepare the next one, until it is asked
        total += loss.item()
    return total


def train(
    config: TrainConfig, progress: bool = True, callback: Callable[[dict], None] | None = None
) -> Module:
    """Run the training that ``config`` describes, or the rest of it; returns the trained model.

    With ``config.profile`` nothing is written: a few steps are taken apart, and the table printed. With
    ``config.resume`` a run that was stopped, however, goes on from its newest checkpoint as if it had never
    been: on the same machine all numbers are the same, bit for bit.

    All logging goes through one place: the record of every step, as it is written to metrics.jsonl and
    at evaluations with the ``sample``, goes to the run's folder (``run.py``), to the logs that are asked for
    (``logs.py``) and to ``callback``.

    SIGINT and SIGTERM break off the step or the evaluation; then a checkpoint of the last whole step is
    written and KeyboardInterrupt is raised with the signal's number as its argument. A loss or gradient norm
    that is not finite never reaches the weights: more than ``config.skip_nonfinite`` in a row raise
    FloatingPointError, after a checkpoint of what was before. A checkpoint that cannot be written raises
    OSError; the one before it is whole. MemoryError, of this machine or of its GPU, comes after a checkpoint
    of the last whole step, if that can be written, and says what to try.

    In float16 a gradient that is not finite is the loss scale's fault (``LossScale``) as long as that is
    above 1: the step is left out and the run goes on.
    """
    check_logs(config.log)
    with RunFolder(config) as run:
        try:
            return _train(config, run, progress, callback)
        except MemoryError as error:
            raise MemoryError(_what_to_try(config, run, error)) from None


def _train(
    config: TrainConfig, run: RunFolder, progress: bool, callback: Callable[[dict], None] | None
) -> Module:
    if config.resume is not None:
        run.reopen()
        if run.is_finished():
            say(f"{run.folder} is finished: its {config.steps:,} steps are done")
            return load_model(last_checkpoint(run.folder), config.parameter_dtype)
    device = open_device(config.device, config.dtype, config.gpu_memory)
    data = load_data(config, run.tokenizer, run.text_sha256)
    model = _model(config, data).to(device)
    prompt = _prompt(config, data, model)
    batches = Batches(data.train, config.batch, config.seed)
    optimizer = AdamW(model, config.lr, weight_decay=config.weight_decay)
    keep_memory()
    if config.profile:
        print(_profile(config, model, batches, optimizer))
        return model
    scale = run.loss_scale = LossScale() if config.dtype == "float16" else None
    done, tokens, whole = 0, 0, True
    if config.resume is None:
        _begin(config, run, data, model, batches.steps_per_epoch, device)
    else:
        done, tokens = run.restore(model, optimizer)
    optimizer.reserve()
    run.bytes_per_token = data.bytes_per_token
    lr_at = warmup_cosine(config.lr, config.initial_lr, config.min_lr, config.warmup, config.steps)
    eval_every = config.eval_every or min(batches.steps_per_epoch, math.ceil(config.steps / 10))

    def is_evaluated(step: int) -> bool:
        return step % eval_every == 0 or step == config.steps

    def log(record: dict) -> None:
        try:
            if is_evaluated(record["step"]):
                record |= _evaluation(config, data, model, prompt, record["step"], check)
        finally:  # what the step itself found is written down even if its evaluation fails
            run(record)
            logs(record)
            if callback is not None:
                callback(record)

    speed = _Speed(config, model, device)
    # A run that diverges ends with one sentence, not with NumPy's warnings before it.
    quiet = np.errstate(over="ignore", invalid="ignore")
    with open_logs(config.log, run.folder, run.about) as logs, _signals_wait() as check, quiet:
        try:
            if is_evaluated(done) and not run.was_evaluated(done):
                log(run.take_back(done))
            for step in _progress_bar(done, config.steps, progress):
                started = time.perf_counter()
                ids, targets = batches.at(step)
                optimizer.lr = lr_at(step)
                loss = gradients(model, ids, targets, config.at_once, config.seed, step, check, scale)
                grad_norm = clip_grad_norm(model, config.clip)
                check()
                whole = False
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    optimizer.step()
                    found = {"train_loss": loss, "lr": optimizer.lr, "grad_norm": grad_norm}
                elif math.isfinite(loss) and scale is not None and scale.scale > 1:
                    found = {"train_loss": loss, "lr": optimizer.lr, "overflow": _overflow(step + 1, scale)}
                else:
                    why = run.not_finite(step + 1, ids, targets, loss, grad_norm, optimizer.lr)
                    found = {"skipped": why, "lr": optimizer.lr}
                if scale is not None:
                    found["loss_scale"] = scale.scale
                    scale.update("grad_norm" in found)
                optimizer.zero_grad()
                done, tokens, whole = step + 1, tokens + ids.size, True
                record = {"step": done, "tokens": tokens} | found
                record |= speed.of_step(ids.size, time.perf_counter() - started)
                if is_evaluated(done):
                    record |= speed.on_the_whole(config.steps - done)
                log(record)
                run.save_if_due(model, optimizer, done)
                check()
        except _Stopped as stop:
            where = run.save(model, optimizer, done)
            said = f"stopped after step {done}; tinyllm train --resume {run.folder} goes on from {where}"
            raise KeyboardInterrupt(stop.args[0], said) from None
        except FloatingPointError as error:
            where = run.save(model, optimizer, done)
            raise FloatingPointError(f"{error} (the weights after step {done} are in {where})") from None
        except MemoryError as error:
            error.__traceback__ = None  # it holds the step's arrays, and to save takes some room
            optimizer.zero_grad()
            if whole:  # the memory did not run out in the middle of an update
                with suppress(OSError):
                    run.save(model, optimizer, done)
            raise
    if data.texts:
        say(baselines.describe(run.history[-1]["val_bits_per_byte"], *data.texts))
    return model


def _overflow(step: int, scale: LossScale) -> str:
    """Say that a step's gradients, times the loss scale, are too large for float16."""
    what = f"the gradients overflow float16 at loss scale {scale.scale:,.0f}: no update, and half of it now"
    say(f"step {step}: {what}")
    return what


def _what_to_try(config: TrainConfig, run: RunFolder, error: MemoryError) -> str:
    """The sentence about memory that ran out, with where the run stands and the command that goes on."""
    smaller = max((n for n in range(1, config.at_once) if config.batch % n == 0), default=None)
    options = [] if smaller is None else [f"--micro-batch {smaller}"]
    said = out_of_memory(error, config.dtype, [*options, "a new run with a shorter --context"])
    if not run.about:  # there is no run yet
        return said
    command = " ".join([f"tinyllm train --resume {run.folder}", *options])
    saved = checkpoints(run.folder)
    if not saved:
        return f"{said}; {command} begins again"
    return f"{said}; the checkpoint {saved[-1]} is whole, and {command} goes on from it"


def _profile(config: TrainConfig, model: Module, batches: Batches, optimizer: AdamW) -> Profile:
    """A step of this run, always on the first batch, taken apart."""
    ids, targets = batches.at(0)
    parts = {
        "gradients": lambda: gradients(model, ids, targets, config.at_once, config.seed, 0),
        "clip_grad_norm": lambda: clip_grad_norm(model, config.clip),
        "AdamW": optimizer.step,
        "zero_grad": optimizer.zero_grad,
    }
    return profile(model, parts)


def _model(config: TrainConfig, data: Data) -> Module:
    rng = np.random.default_rng(config.seed)
    model = config.model(data.tokenizer.vocab_size, rng)
    if config.init == "torch":
        initialize_as_torch(model, rng)
    model = model.astype(config.parameter_dtype).train()
    return model.multiply_in(dtype_of(config.dtype)) if config.dtype in ("bfloat16", "float16") else model


def _prompt(config: TrainConfig, data: Data, model: Module) -> list[int]:
    try:
        prompt = data.tokenizer.encode(config.prompt)
    except Error as error:
        raise Error(f"--prompt: {error}") from None
    if not 0 < len(prompt) <= model.context:
        raise Error(f"--prompt is {len(prompt)} tokens long: it must have 1 to {model.context} (the context)")
    return prompt


def _begin(
    config: TrainConfig, run: RunFolder, data: Data, model: Module, steps_per_epoch: int, device: str
) -> None:
    """The run's new folder, and what everything starts from, said in three lines."""
    corpus, tokenizer = data.corpus, data.tokenizer
    about = {
        "train": config.to_json() | {"out": str(run.folder)},
        "text": {"name": corpus.name, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer_sha256(tokenizer)},
        "parameters": model.num_parameters(),
        "steps_per_epoch": steps_per_epoch,
        "versions": {
            "tinyllm": tinyllm.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    run.begin(about, tokenizer, model)
    say(
        f"{corpus.name}: {corpus.num_bytes:,} bytes; {tokenizer.name} tokenizer, {tokenizer.vocab_size:,} ids"
        f"; {len(data.train.tokens):,} + {len(data.validation.tokens):,} tokens"
    )
    say(
        f"{len(data.train):,} + {len(data.validation):,} windows of {config.context} tokens, "
        f"{data.train.stride} and {data.validation.stride} apart "
        f"({data.train.unused_tokens} + {data.validation.unused_tokens} tokens at the ends fit none)"
    )
    say(
        f"{type(model).__name__}, {model.num_parameters():,} parameters, on {describe_device(device)}; "
        f"{config.steps:,} steps of {config.batch} windows, {steps_per_epoch:,} an epoch; into {run.folder}"
    )


def _evaluation(
    config: TrainConfig,
    data: Data,
    model: Module,
    prompt: list[int],
    step: int,
    check: Callable[[], None],
) -> dict:
    """Both losses, on a fixed set of windows, and a sample; ``check`` may break it off."""
    found = {}
    for key, windows in (("train_eval_loss", data.train), ("val_loss", data.validation)):
        found[key] = evaluate(model, windows, config.eval_windows, config.at_once, check)
        if not math.isfinite(found[key]):
            raise FloatingPointError(
                f"after step {step} the {key} is {found[key]}: start again with a smaller --lr or --clip"
            )
    found["val_bits_per_byte"] = found["val_loss"] / math.log(2) / data.bytes_per_token
    rng = np.random.default_rng([config.seed, step])
    sample = list(prompt)
    for token in generate(model, [prompt], SAMPLE_TOKENS, temperature=0.8, top_k=40, rng=rng):
        check()
        sample.append(int(token[0]))
    found["sample"] = data.tokenizer.decode(sample)
    return found


class _Speed:
    """How fast a run goes and, on a CPU, what share of its matrix products' rate on this machine that is."""

    def __init__(self, config: TrainConfig, model: Module, device: str):
        self.flops, self.dtype = flops_per_token(model, config.context).training, config.dtype
        self.device = device
        self.tokens, self.seconds, self.begun, self.steps = 0, 0.0, time.perf_counter(), 0

    def of_step(self, tokens: int, seconds: float) -> dict:
        self.tokens, self.seconds, self.steps = self.tokens + tokens, self.seconds + seconds, self.steps + 1
        return {"tokens_per_s": round(tokens / seconds, 1)}

    def on_the_whole(self, steps_left: int) -> dict:
        rate = self.tokens / self.seconds
        left = (time.perf_counter() - self.begun) / self.steps * steps_left
        found = {"mean_tokens_per_s": round(rate, 1)}
        if self.device == "cpu":  # whose rate is what ``gemm_rate`` measures
            found["gemm_share"] = rate * self.flops / _best_gemm_rate(self.dtype)
        return found | {"peak_memory": peak_memory(self.device), "seconds_left": left}


_gemm_rates: dict[str, float] = {}


def _best_gemm_rate(dtype: str) -> float:
    """The best this process has seen: other programs may be using the machine at any one moment."""
    _gemm_rates[dtype] = max(gemm_rate(dtype, seconds=0.1), _gemm_rates.get(dtype, 0.0))
    return _gemm_rates[dtype]


def _progress_bar(done: int, steps: int, shown: bool):
    from tqdm import tqdm

    disable = None if shown else True
    return tqdm(
        range(done, steps), initial=done, total=steps, unit="step", disable=disable, dynamic_ncols=True
    )


class _Stopped(Exception):
    """A signal arrived; its number is the argument."""


@contextmanager
def _signals_wait():
    """SIGINT and SIGTERM wait until the function that this yields is called: it raises ``_Stopped`` then.

    So nothing is broken off in the middle of an update or of a checkpoint. Handlers belong to the main
    thread; elsewhere signals are none of our business.
    """
    arrived: list[int] = []
    before = {}

    def check() -> None:
        if arrived:
            raise _Stopped(arrived[0])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda received, _: arrived.append(received))
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
