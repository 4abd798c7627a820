"""How well does a model predict a text?

Its loss is the mean of -log p(token | tokens before it), in nats: exp(loss), the perplexity, is that
of a guess among so many equally likely tokens. Losses compare only where the tokens are the same; bits per
byte, the same sum spread over the bytes of the text, compare between all models.

A text is longer than a model's context, so a window slides over it. The first token of a window is
predicted from one token, the last from all of them: windows that overlap, and score only the tokens that no
window before has scored, give every token more to be predicted from, and cost as many times more as they
overlap (Baevski and Auli, arXiv 1809.10853; Press et al., "Shortformer", arXiv 2012.15832, section 2).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tinyllm.checks import check_ids, is_integer
from tinyllm.data.corpus import Corpus, end_of_text_id
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.tensor import no_grad
from tinyllm.tokenizers.base import Tokenizer

IGNORED = -100  # the target that a loss leaves out

TOKENS_AT_ONCE = 4096  # in a batch of windows, unless its size is given


@dataclass(frozen=True)
class TextLoss:
    """What a text costs: ``nats``, the sum of -log p, over the ``tokens`` that were predicted."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    def bits_per_byte(self, num_bytes: int) -> float:
        """nats / ln 2 / num_bytes, of the UTF-8 bytes that the predicted tokens stand for."""
        if num_bytes < 1:
            raise Error(f"the predicted tokens stand for {num_bytes} bytes of text: give a longer text")
        return self.nats / math.log(2) / num_bytes


def evaluate_text(
    model: Module,
    ids,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> TextLoss:
    """The loss of a text's token ids (n,): Σ -log p(ids[i] | those before it in its window), i = 1 … n - 1.

    Every token is predicted exactly once, except the first, before which nothing stands (none is added).
    A window is ``context`` tokens (default: as many as the model takes) and the targets one later; the next
    one begins ``stride`` tokens on and scores the targets that are new, so each of them has ``context -
    stride + 1`` tokens before it at least. The default is ``stride = context``, the cheapest: half of
    it takes twice as long, and gives a lower loss. The last window ends with the text.

    The method is that of Hugging Face's guide (huggingface.co/docs/transformers/perplexity), whose windows
    of max_length k are those of ``context = k - 1`` here, because they count the last target too: with a
    stride of k the first token of every window is never predicted there.

    ``batch`` windows go through the model at a time (default: about 4,096 tokens), in eval mode and without
    a tape; no more logits are held than ``linear_cross_entropy`` does. ``ids`` may lie on disk (a memory
    map). ``progress`` shows a bar if there is a terminal.

    Raises ``Error`` if there are fewer than two ids, one is not the model's, context is not from 1 to
    ``model.context``, stride not from 1 to context, or batch below 1; FloatingPointError if the loss is not
    finite.
    """
    from tqdm import tqdm

    context, stride, batch = check_windows(model, context, stride, batch)
    ids = ids if isinstance(ids, np.ndarray) else check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise Error(f"ids have shape {ids.shape}: evaluate one sequence, of shape (n,)")
    if len(ids) < 2:
        raise Error(f"a text of {len(ids)} tokens has none to predict from another: give at least two")
    *whole, last = windows(len(ids), context, stride)
    batches = [whole[first : first + batch] for first in range(0, len(whole), batch)]
    batches.append([last])  # alone: it may be shorter
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
            inputs, targets = _inputs_and_targets(ids, rows, model.config.vocab_size)
            nats += model.loss(inputs, targets, num_targets=1).item()
            counted = int((targets != IGNORED).sum())
            tokens += counted
            bar.set_postfix_str(f"loss {nats / tokens:.4f}", refresh=False)
            bar.update(counted)
    if not math.isfinite(nats):
        raise FloatingPointError(f"the loss of the text is {nats}: the weights are damaged, or too large")
    return TextLoss(nats, tokens)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows over a text of ``length`` tokens, each as (start, scored, stop).

    Its inputs are the tokens ``start … stop - 1`` and its targets ``start + 1 … stop``, of which those up to
    ``scored`` had their turn in a window before.
    """
    scored = 0
    for start in range(0, length - 1, stride):
        stop = min(start + context, length - 1)
        yield start, scored, stop
        if stop == length - 1:
            break
        scored = stop


def _inputs_and_targets(ids: np.ndarray, rows: list[tuple[int, int, int]], vocab_size: int):
    """Of windows of one length T: inputs and targets, int64, each (B, T)."""
    taken = check_ids(np.stack([ids[start : stop + 1] for start, _, stop in rows]), vocab_size)
    inputs, targets = taken[:, :-1], taken[:, 1:].copy()
    for row, (start, scored, _) in zip(targets, rows):
        row[: max(scored - start, 0)] = IGNORED
    return inputs, targets


def check_windows(
    model: Module, context: int | None, stride: int | None, batch: int | None
) -> tuple[int, int, int]:
    """``evaluate_text``'s context, stride and batch, the defaults filled in; ``Error`` as there."""
    context = model.context if context is None else context
    if not is_integer(context) or not 1 <= context <= model.context:
        raise Error(f"context is {context!r}: choose a whole number from 1 to the model's {model.context}")
    stride = context if stride is None else stride
    if not is_integer(stride) or not 1 <= stride <= context:
        raise Error(
            f"stride is {stride!r}: choose a whole number from 1 to {context}, the context; a larger one "
            "would pass over tokens"
        )
    batch = max(1, TOKENS_AT_ONCE // context) if batch is None else batch
    if not is_integer(batch) or batch < 1:
        raise Error(f"batch is {batch!r}: choose a whole number of at least 1")
    return context, stride, batch


@contextmanager
def ids_on_disk(corpus: Corpus, tokenizer: Tokenizer, special: str = "refuse") -> Iterator[np.ndarray]:
    """The ids of ``encode_documents(tokenizer, corpus.documents(), special)``, in a temporary file.

    An array (n,) of uint32, mapped into memory; afterwards the file is gone. The documents are encoded in
    turn, each of them whole: memory holds the longest, the disk four bytes a token. ``Error`` as there.
    """
    between = np.zeros(0, np.uint32)
    if corpus.num_documents > 1:
        between = np.array([end_of_text_id(tokenizer)], np.uint32)
    with tempfile.TemporaryFile() as file:
        for number, document in enumerate(corpus.documents()):
            if number > 0:
                file.write(between.tobytes())
            file.write(tokenizer.encode_array(document, special).tobytes())
        file.flush()
        # An empty file cannot be mapped
        yield np.memmap(file, np.uint32, mode="r") if file.tell() else np.zeros(0, np.uint32)
