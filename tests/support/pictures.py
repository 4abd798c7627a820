"""Run folders with the files that plots read, and the contents of a figure."""

import json
import math

import pytest

BYTES_PER_TOKEN = 2.5
OPTIONS = {"text": "rhyme.txt", "tokenizer": "char", "dropout": 0.1, "lr": 0.001, "stride": None}


def metrics(val_losses=(5.0, 3.0, 2.0, 2.5), every=10, tokens_per_s=100.0):
    """A run's records, evaluated at step 0 and every ten steps; the last but one is the best."""
    records = []
    for step in range((len(val_losses) - 1) * every + 1):
        record = {"step": step, "tokens": 50 * step}
        if step > 0:
            record |= {
                "train_loss": 5 - step / 10,
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_s": tokens_per_s,
            }
        if step % every == 0:
            val_loss = val_losses[step // every]
            record |= {"train_eval_loss": val_loss - 0.5, "val_loss": val_loss}
            record["val_bits_per_byte"] = val_loss / math.log(2) / BYTES_PER_TOKEN
        records.append(record)
    return records


def write_run(folder, records=None, end="", tokenizer="abc", sha256="1234567890", task="pretrain", **options):
    folder.mkdir(parents=True)
    about = {
        "task": task,
        "train": OPTIONS | {"out": str(folder)} | options,
        "text": {"name": "rhyme.txt", "sha256": sha256, "bytes": 9},
        "tokenizer": {"name": "char", "sha256": "0"},
    }
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    saved = json.dumps({"kind": "char", "characters": tokenizer})
    (folder / "tinyllm_tokenizer.json").write_text(saved, encoding="utf-8")
    lines = [json.dumps(record) + "\n" for record in (metrics() if records is None else records)]
    (folder / "metrics.jsonl").write_text("".join(lines) + end, encoding="utf-8")
    return folder


def saved_figures(monkeypatch) -> list:
    """A list of the figures that are saved from now on."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", keep)
    return figures


def points(line):
    return list(zip(*(array.tolist() for array in line.get_data())))


def close(found, expected):
    assert len(found) == len(expected)
    assert [x for point in found for x in point] == pytest.approx([x for point in expected for x in point])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")
