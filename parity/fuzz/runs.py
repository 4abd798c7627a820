"""Broken files of our own formats: token files, unfinished token files, and runs; and broken texts."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from parity.fuzz.mutations import (
    Mutation,
    byte_mutations,
    file_mutations,
    json_mutations,
    mutations_of_bytes,
    mutations_of_json,
    mutations_of_lines,
    number_mutations,
    write_json,
)
from tinyllm.data.corpus import open_corpus
from tinyllm.data.token_file import INDEX, PART, PROGRESS, TOKENS, TokenFile, tokenize_corpus
from tinyllm.errors import Error
from tinyllm.tokenizers.base import FILE_NAME
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tools import plot
from tinyllm.training.metrics import METRICS, read_run
from tinyllm.weights.safetensors import CONFIG

# ---------------------------------------------------------------------------- token files

CORPUS, TOKENS_FOLDER = "corpus.txt", "tokens"

SENTENCE = "ab cab abba " * 20

TOKENIZER = BPETokenizer([(64, 65)])  # a and b


def make_tokens(folder: Path) -> None:
    """A complete token file in three chunks."""
    ids, about = _begin_tokens(folder)
    (folder / TOKENS_FOLDER / TOKENS).write_bytes(ids.tobytes())
    index = about | {"count": len(ids), "chunks": _thirds(len(ids))}
    write_json(folder / TOKENS_FOLDER / INDEX, index)


def make_unfinished_tokens(folder: Path) -> None:
    """A token file that was interrupted while writing the third of three chunks."""
    ids, about = _begin_tokens(folder)
    (folder / TOKENS_FOLDER / PART).write_bytes(ids.tobytes())
    lines = [about, *_thirds(len(ids))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / TOKENS_FOLDER / PROGRESS).write_bytes(text.encode("ascii") + b"[1")


def _begin_tokens(folder: Path) -> tuple[np.ndarray, dict]:
    (folder / CORPUS).write_text(SENTENCE, encoding="utf-8")
    (folder / TOKENS_FOLDER).mkdir()
    corpus = open_corpus(folder / CORPUS)
    definition = TOKENIZER.to_json()
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode("utf-8")).hexdigest()
    return TOKENIZER.encode_array(SENTENCE).astype("<u2"), {
        "format": 1,
        "dtype": "<u2",
        "tokenizer": definition,
        "tokenizer_sha256": digest,
        "corpus": {"name": CORPUS, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
        "special": "refuse",
    }


def _thirds(count: int) -> list[list[int]]:
    """[ids, bytes] of three chunks; the text has 240 bytes."""
    return [[count // 3, 80], [count // 3, 80], [count - 2 * (count // 3), 80]]


def load_tokens(folder: Path) -> None:
    check_tokens(TokenFile.open(folder / TOKENS_FOLDER, open_corpus(folder / CORPUS), TOKENIZER, "refuse"))


def load_unfinished_tokens(folder: Path) -> None:
    corpus = open_corpus(folder / CORPUS)
    check_tokens(tokenize_corpus(corpus, TOKENIZER, "refuse", folder / TOKENS_FOLDER, progress=False))


def check_tokens(file: TokenFile) -> None:
    """Check that ids are in range, that counts agree with the index, and that a split covers all tokens."""
    assert file.tokens.dtype == np.dtype("<u2") and len(file.tokens) == file.index["count"]
    assert file.tokens.max() < TOKENIZER.vocab_size
    counts, num_bytes = zip(*file.index["chunks"])
    assert sum(counts) == len(file.tokens) and sum(num_bytes) == len(SENTENCE)
    assert min(*counts, *num_bytes) >= 0
    try:
        train, validation, num_bytes = file.split(0.3)
    except Error:
        return  # too few chunks to split
    assert len(train) + len(validation) == len(file.tokens)
    assert 0 < num_bytes < len(SENTENCE) and type(num_bytes) is int


def tokens_mutations(folder: Path) -> list[Mutation]:
    tokens, index = f"{TOKENS_FOLDER}/{TOKENS}", f"{TOKENS_FOLDER}/{INDEX}"
    return [
        *mutations_of_json(folder, index),
        *byte_mutations((folder / tokens).read_bytes(), tokens),
        *number_mutations(tokens, {"the first id": (0, 2)}),
        *file_mutations(tokens),
    ]


def unfinished_mutations(folder: Path) -> list[Mutation]:
    part, progress = f"{TOKENS_FOLDER}/{PART}", f"{TOKENS_FOLDER}/{PROGRESS}"
    lines = (folder / progress).read_bytes()
    return [
        *_line_as_json(progress, lines, 0),
        *_line_as_json(progress, lines, 2),
        *mutations_of_lines(folder, progress),
        *mutations_of_bytes(folder, part),
    ]


def _line_as_json(file: str, data: bytes, number: int) -> list[Mutation]:
    def put(data: bytes, text: str) -> bytes:
        lines = data.split(b"\n")
        lines[number] = text.encode("utf-8", "surrogatepass")
        return b"\n".join(lines)

    return json_mutations(file, json.loads(data.split(b"\n")[number]), put)


# ---------------------------------------------------------------------------- runs and texts

RECORD = dict(step=1, tokens=64, train_loss=4.5, lr=1e-3, grad_norm=1.0, tokens_per_s=1000.0)

EVALUATION = dict(train_eval_loss=4.0, val_loss=4.25, val_bits_per_byte=2.5)


def make_run(folder: Path) -> None:
    about = {
        "train": {"out": "x", "text": "python-docs", "steps": 4, "lr": 0.001, "special_tokens": []},
        "text": {"name": "python-docs", "sha256": "0" * 64},
        "versions": {"numpy": "2.0"},
    }
    write_json(folder / CONFIG, about)
    TOKENIZER.save(folder)
    records = [
        RECORD | {"step": n, "tokens": 64 * n} | (EVALUATION if n % 2 == 0 else {}) for n in range(1, 5)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / METRICS).write_text(lines, encoding="utf-8", newline="")


def load_run(folder: Path) -> None:
    """Check that the run's curves are finite and that its row of the table can be printed."""
    run = read_run(folder)
    for key in ("train_eval_loss", "val_loss"):
        for x in plot.X_AXES:
            at, losses = run.curve(key, x, "loss")
            assert len(at) == len(losses) and np.isfinite(at).all() and np.isfinite(losses).all()
    try:
        bits = run.curve("val_loss", "step", "bits-per-byte")[1]
    except Error:
        pass  # the run may not have measured them
    else:
        assert np.isfinite(bits).all()
    assert run.name in plot.summary([folder])


def run_mutations(folder: Path) -> list[Mutation]:
    return [
        *_line_as_json(METRICS, (folder / METRICS).read_bytes(), 1),
        *mutations_of_lines(folder, METRICS),
        *mutations_of_json(folder, CONFIG),
        *mutations_of_json(folder, FILE_NAME),
    ]


JSONL, COMPRESSED = "a.jsonl", "b.jsonl.gz"


def make_corpus(folder: Path) -> None:
    documents = [SENTENCE[:n] + "é漢\u2028" for n in (1, 40, 100)]
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents).encode("ascii")
    (folder / JSONL).write_bytes(lines)
    (folder / COMPRESSED).write_bytes(gzip.compress(lines, mtime=0))


def load_corpus(folder: Path) -> None:
    corpus = open_corpus(folder, field="text")
    documents = list(corpus.documents())
    assert len(documents) == corpus.num_documents
    assert sum(len(document) for document in documents) == corpus.num_characters
    assert sum(len(document.encode("utf-8")) for document in documents) == corpus.num_bytes


def corpus_mutations(folder: Path) -> list[Mutation]:
    packed = (folder / COMPRESSED).read_bytes()
    return [
        *_line_as_json(JSONL, (folder / JSONL).read_bytes(), 1),
        *mutations_of_lines(folder, JSONL),
        *byte_mutations(packed, COMPRESSED, [2, 3, 4, 8, 10]),
        *number_mutations(COMPRESSED, {"the length at the end": (len(packed) - 4, 4)}),
        *file_mutations(COMPRESSED),
    ]
