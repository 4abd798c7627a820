"""``tinyllm eval``: what a text costs under a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, ModelOptions, move
from tinyllm.data.corpus import open_corpus
from tinyllm.inference.perplexity import check_windows, evaluate_text, ids_on_disk


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DeviceOptions, ModelOptions):
    """Loss, perplexity and bits per byte of a text under a model."""

    smaller: ClassVar = ["a smaller --batch", "a shorter --context"]

    text: str
    """python-docs, the-verdict, a text file, a .jsonl file, or a folder of them; each may be gzipped."""
    text_field: str | None = None
    """Of .jsonl files: the field that holds a line's text."""
    context: int | None = None
    """Tokens the model sees at once; if not given, as many as it takes."""
    stride: int | None = None
    """Tokens from the start of a window to the next. The context if not given, the fastest; with a smaller
    one every token has more before it to be predicted from."""
    batch: int | None = None
    """Windows at a time; if not given, about 4,096 tokens of them."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (as their ids), or text."""


def run(config: EvalConfig) -> None:
    """Evaluate the model on the text and print what was scored, how, and what it costs.

    The text is one stream of tokens, with ``<|endoftext|>`` between documents, as in training. It is
    predicted too, for it takes information to say where a document ends, and stands for no byte. The
    bytes are those of the text in UTF-8, less those of its first token, which nothing predicts.
    """
    device = config.open_device()
    model, tokenizer = config.load(config.weights_dtype)
    context, stride, batch = check_windows(model, config.context, config.stride, config.batch)
    corpus = open_corpus(config.text, config.text_field)
    if corpus.left_out:
        print(f"{corpus.name}: {len(corpus.left_out)} files are neither .txt nor .jsonl and were left out")
    move(model, device)
    with ids_on_disk(corpus, tokenizer, config.special) as ids, autocast(config.dtype):
        found = evaluate_text(model, ids, context, stride, batch, progress=True)
        num_bytes = corpus.num_bytes - len(tokenizer.decode_bytes(ids[:1]))
    print(
        f"{corpus.name}: {corpus.num_bytes:,} bytes, {found.tokens + 1:,} tokens; predicted are all but the "
        f"first: {num_bytes:,} bytes, {found.tokens:,} tokens"
    )
    shape = f"windows of {context:,} tokens, {stride:,} apart"
    if found.tokens <= context:
        shape = f"one window of {found.tokens:,} tokens"
    print(f"{shape}; {config.dtype}")
    print(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte(num_bytes):.4f} bits per byte"
    )
