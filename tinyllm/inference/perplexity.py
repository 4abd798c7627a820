"""How well does a model predict a text?

The loss is the mean of -log p(token | preceding tokens), in nats. Perplexity is exp(loss): a model that
guesses uniformly among k tokens has perplexity k. Losses are comparable only between models with the same
tokenizer. Bits per byte, the same sum divided by ln 2 and the number of bytes of the text, are comparable
between all models.

A text is usually longer than a model's context, so a window slides over it. The first target of a window is
predicted from one token, the last from ``context`` tokens. If windows overlap and each scores only the
targets that no earlier window has scored, every token is predicted from more context, at a cost that grows
with the overlap (Baevski and Auli, arXiv 1809.10853; Press et al., "Shortformer", arXiv 2012.15832, 2).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tinyllm.checks import check_at_least, check_ids, check_model, is_integer
from tinyllm.data.corpus import Corpus, end_of_text_id, splits
from tinyllm.data.padded import IGNORED
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.tensor import no_grad
from tinyllm.tokenizers.base import Tokenizer

TOKENS_AT_ONCE = 4096  # the default size of a batch of windows, in tokens


@dataclass(frozen=True)
class TextLoss:
    """The loss of a text: ``nats`` is the sum of -log p over the ``tokens`` that were predicted."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows a float."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    def bits_per_byte(self, num_bytes: int) -> float:
        """nats / ln 2 / num_bytes, where ``num_bytes`` counts the UTF-8 bytes of the predicted tokens."""
        if num_bytes < 1:
            raise Error(f"the predicted tokens have {num_bytes} bytes of text: give a longer text")
        return self.nats / math.log(2) / num_bytes


def evaluate_text(
    model: Module,
    ids,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    progress: bool = False,
    bos_id: int | None = None,
) -> TextLoss:
    """The loss of a text with token ids (n,): Σ -log p(ids[i] | earlier ids in its window), i = 1 … n - 1.

    Every token is predicted exactly once, except the first, which has no context. A window has ``context``
    input tokens (default: the model's context), and its targets are one token later. The next window begins
    ``stride`` tokens later and scores only its new targets, so each of them is predicted from at least
    ``context - stride + 1`` tokens. The default, ``stride = context``, is the fastest; half of it takes twice
    as long and gives a lower loss. The last window ends with the text.

    The method is that of Hugging Face's guide (huggingface.co/docs/transformers/perplexity). Its windows of
    max_length k correspond to ``context = k - 1`` here, because its max_length includes the last target; with
    a stride of k it never predicts the first token of a window.

    For a model that expects a BOS token, pass ``tokenizer.with_bos(ids)``, and ``bos_id``, which then takes
    the place of the first input of every later window, as in llama.cpp's ``perplexity``. Gemma 3 270M needs
    it: its loss rises from 3.7 to 4.9 without.

    ``batch`` windows (default: about 4,096 tokens) go through the model at a time, in eval mode and without
    gradients; ``model.loss`` does not hold all logits at once. ``ids`` may be a memory map. ``progress``
    shows a progress bar if there is a terminal.

    Raises ``Error`` if there are fewer than two ids or one is outside the model's vocabulary, unless
    1 ≤ context ≤ ``model.context`` and 1 ≤ stride ≤ context, and if batch is below 1. Raises
    FloatingPointError if the loss is not finite.
    """
    from tqdm import tqdm

    context, stride, batch = check_windows(model, context, stride, batch)
    ids = ids if isinstance(ids, np.ndarray) else check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise Error(f"ids have shape {ids.shape}: evaluate one sequence, of shape (n,)")
    if len(ids) < 2:
        count = "no tokens" if len(ids) == 0 else "only 1 token"
        raise Error(f"the text has {count}, but predicting a token needs at least 2: give a longer text")
    *whole, last = windows(len(ids), context, stride)
    batches = [whole[first : first + batch] for first in range(0, len(whole), batch)]
    batches.append([last])  # by itself, because it may be shorter
    bar = tqdm(
        total=len(ids) - 1,
        desc="evaluate",
        unit="token",
        unit_scale=True,
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    nats, tokens = 0.0, 0
    with bar, evaluating(model), no_grad(), np.errstate(over="ignore", invalid="ignore"):
        for rows in batches:
            inputs, targets = _inputs_and_targets(ids, rows, model.config.vocab_size, bos_id)
            nats += model.loss(inputs, targets, num_targets=1).item()
            counted = int((targets != IGNORED).sum())
            tokens += counted
            bar.set_postfix_str(f"loss {nats / tokens:.4f}", refresh=False)
            bar.update(counted)
    if not math.isfinite(nats):
        raise FloatingPointError(f"the loss of the text is {nats}: the weights are damaged or too large")
    return TextLoss(nats, tokens)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows over a text of ``length`` tokens, each as (start, scored, stop).

    The inputs of a window are the tokens ``start … stop - 1`` and its targets ``start + 1 … stop``; earlier
    windows have scored the targets up to ``scored``.
    """
    scored = 0
    for start in range(0, length - 1, stride):
        stop = min(start + context, length - 1)
        yield start, scored, stop
        if stop == length - 1:
            break
        scored = stop


def _inputs_and_targets(
    ids: np.ndarray, rows: list[tuple[int, int, int]], vocab_size: int, bos_id: int | None
):
    """Inputs and targets of windows of the same length T: int64, each (B, T)."""
    taken = check_ids(np.stack([ids[start : stop + 1] for start, _, stop in rows]), vocab_size)
    inputs, targets = taken[:, :-1].copy(), taken[:, 1:].copy()
    for given, row, (start, scored, _) in zip(inputs, targets, rows):
        row[: max(scored - start, 0)] = IGNORED
        if start > 0 and bos_id is not None:
            given[0] = bos_id
    return inputs, targets


def check_windows(
    model: Module, context: int | None, stride: int | None, batch: int | None
) -> tuple[int, int, int]:
    """``evaluate_text``'s context, stride and batch with defaults filled in; raises the same errors."""
    check_model(model, "config")
    context = model.context if context is None else context
    if not is_integer(context) or not 1 <= context <= model.context:
        raise Error(f"context is {context!r}: choose a whole number from 1 to the model's {model.context}")
    stride = context if stride is None else stride
    if not is_integer(stride) or not 1 <= stride <= context:
        raise Error(
            f"stride is {stride!r}: choose a whole number from 1 to {context}, the context; a larger stride "
            "would skip tokens"
        )
    batch = max(1, TOKENS_AT_ONCE // context) if batch is None else check_at_least(batch, 1, "batch")
    return context, stride, batch


@contextmanager
def ids_on_disk(corpus: Corpus, tokenizer: Tokenizer, special: str = "refuse") -> Iterator[np.ndarray]:
    """The ids of ``encode_documents(tokenizer, corpus.documents(), special)``, in a temporary file.

    They are preceded by a BOS token if the model expects it (``Tokenizer.with_bos``). A context manager that
    gives a memory-mapped array (n,) of uint32 and deletes the file at the end. Documents are encoded one at a
    time: only one is in memory, and the file takes four bytes per token. Raises the errors of
    ``encode_documents``.
    """
    bos = tokenizer.with_bos([])
    separator = [end_of_text_id(tokenizer)] if corpus.num_documents > 1 or splits(tokenizer, special) else []
    with tempfile.TemporaryFile() as file:
        for number, document in enumerate(corpus.documents(splits(tokenizer, special))):
            ids = tokenizer.encode_array(document, special)
            before = separator if number > 0 else bos
            if number > 0 or ids[:1].tolist() != bos:
                file.write(np.array(before, np.uint32).tobytes())
            file.write(ids.tobytes())
        file.flush()
        # An empty file cannot be memory-mapped.
        yield np.memmap(file, np.uint32, mode="r") if file.tell() else np.zeros(0, np.uint32)
