"""``tinyllm eval``: the loss of a text under a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, SpecialOptions, TextModelOptions, move, option
from tinyllm.data.corpus import count_bytes, open_corpus
from tinyllm.inference.perplexity import check_windows, evaluate_text, ids_on_disk
from tinyllm.training.tasks.text import naming_options


@dataclass(frozen=True, kw_only=True)
class _Text:
    text: Annotated[str, option("TEXT")]
    """python-docs, python-docstrings, the-verdict, a file of text or .jsonl, gzipped or not, or a folder."""
    text_field: Annotated[str | None, option("NAME", "")] = None
    """Of .jsonl files: the field that contains a document's text."""
    pattern: Annotated[str | None, option("GLOB", "")] = None
    """Of a folder: read the files that match, such as '*.py'; by default .txt and .jsonl files."""
    context: Annotated[int | None, option("N", "the model's context")] = None
    """Tokens in a window."""
    stride: Annotated[int | None, option("N", "the context")] = None
    """Tokens between the starts of two windows; smaller is slower and gives each token more context."""
    batch: Annotated[int | None, option("N", "about 4,096 tokens")] = None
    """Windows in a batch."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DeviceOptions, SpecialOptions, _Text, TextModelOptions):
    """Measure a model's loss, perplexity and bits per byte of a text.

    Example: tinyllm eval --model smollm2 --text the-verdict --context 512
    """

    smaller: ClassVar = ["a smaller --batch", "a shorter --context"]


def run(config: EvalConfig) -> None:
    """Evaluate the model on the text and print the loss, and how it was measured.

    The text is one stream of tokens, with ``<|endoftext|>`` between documents, as in training. This and other
    special tokens are predicted and count for the loss, but stand for no byte. The bytes are those of the
    text in UTF-8, without those of its first token, which is predicted only from a BOS token.
    """
    config.check_least(context=1, stride=1, batch=1)  # before the model is loaded, which may be large
    config.find()
    device = config.open_device()
    with naming_options():
        corpus = open_corpus(config.text, config.text_field, config.pattern)
    model, tokenizer = config.load(config.weights_dtype)
    context, stride, batch = check_windows(model, config.context, config.stride, config.batch)
    if corpus.left_out:
        print(f"{corpus.name}: {len(corpus.left_out):,} other files and links to folders were not read")
    move(model, device)
    with ids_on_disk(corpus, tokenizer, config.special) as ids, autocast(config.dtype):
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        found = evaluate_text(model, ids, context, stride, batch, progress=True, bos_id=bos_id)
        bos = ids[:1].tolist() == tokenizer.with_bos([])
        marker = ids[0] in tokenizer.special_tokens.values()
        num_bytes = count_bytes(tokenizer, corpus.documents(), config.special)
        num_bytes -= 0 if marker else len(tokenizer.decode_bytes(ids[:1]))
    print(f"{corpus.name}: {corpus.num_bytes:,} bytes, {found.tokens + (not bos):,} tokens")
    given = "the first from BOS" if bos else "all but the first"
    windows = f"windows of {context:,} tokens, stride {stride:,}" + ", each from BOS" * bos
    if found.tokens <= context:
        windows = f"one window of {found.tokens:,} tokens"
    print(
        f"predicted: {num_bytes:,} bytes, {found.tokens:,} tokens ({given})\n"
        f"{windows}, {config.dtype}\n"
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte(num_bytes):.4f} bits per byte"
    )
