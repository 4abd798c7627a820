"""What does a training run leave behind? All of it lies in one folder:

config.json           what was asked for, the text's hash, the library versions
tinyllm_tokenizer.json
metrics.jsonl         one object per step: step, tokens, train_loss, lr, grad_norm, tokens_per_s; at
                      evaluations also train_eval_loss, val_loss (without dropout), val_bits_per_byte,
                      mean_tokens_per_s and gemm_share (of the run so far), peak_memory (bytes)
samples.txt           what the model wrote at each evaluation
loss.png              the curves
step-000135/          config.json and model.safetensors, as Hugging Face lays them out
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.plot import plot_losses

RUN_CONFIG, METRICS, SAMPLES, PLOT = "config.json", "metrics.jsonl", "samples.txt", "loss.png"


class RunFolder:
    """The folder of a run. Called with the record of a step, it writes it down and prints evaluations.

    Raises ``Error`` if there is something in the folder already.
    """

    def __init__(self, folder: Path, about: dict, vocab_size: int, bytes_per_token: float):
        self.folder, self.history = folder, []
        self.vocab_size, self.bytes_per_token = vocab_size, bytes_per_token
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Error(f"{folder} exists and is not an empty folder: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def __call__(self, record: dict) -> None:
        metrics = {key: value for key, value in record.items() if key not in ("sample", "seconds_left")}
        self.history.append(metrics)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if "sample" in record:
            with open(self.folder / SAMPLES, "a", encoding="utf-8") as file:
                file.write(f"--- step {record['step']}\n{record['sample']}\n")
            plot_losses(self.history, self.folder / PLOT, self.vocab_size, self.bytes_per_token)
            say(_evaluation(record))

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, model: Module, step: int) -> Path:
        """Save the weights after ``step`` steps, unless they have been; returns their folder."""
        if not self.checkpoint(step).exists():
            model.save_pretrained(self.checkpoint(step))
        return self.checkpoint(step)


def _evaluation(record: dict) -> str:
    """An evaluation in two lines: how well it goes, and what the model writes."""
    with np.errstate(over="ignore"):  # a diverging run's perplexity is inf
        perplexity = np.exp(record["val_loss"])
    line = (
        f"step {record['step']:>5}  train {record['train_eval_loss']:.4f}  val {record['val_loss']:.4f}"
        f" = perplexity {perplexity:.1f} = {record['val_bits_per_byte']:.3f} bits/byte"
    )
    if "gemm_share" in record:
        line += f"  {record['mean_tokens_per_s']:,.0f} tokens/s, {record['gemm_share']:.0%} of GEMM rate"
    if "peak_memory" in record:
        line += f", {record['peak_memory'] / 1e9:.2f} GB"
    if record.get("seconds_left"):
        minutes, seconds = divmod(round(record["seconds_left"]), 60)
        line += f", {minutes}:{seconds:02} left"
    return f"{line}\n            {' '.join(record['sample'].split())[:98]}"


def new_folder(text_name: str) -> Path:
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


def say(line: str) -> None:
    """Print a line above the progress bar."""
    from tqdm import tqdm

    try:
        tqdm.write(line)
    except BrokenPipeError:  # nobody reads what we say any more: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
