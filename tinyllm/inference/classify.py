"""Which class does a text belong to? Encoding texts, padding them to batches, and their logits.

Shapes: N texts, B batch, T time, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.data.padded import IGNORED, pad
from tinyllm.errors import Error
from tinyllm.models import SequenceClassifier
from tinyllm.nn import evaluating
from tinyllm.tensor import no_grad
from tinyllm.tokenizers.base import Tokenizer


class EncodedTexts:
    """Texts as token ids, of at most ``max_length`` tokens, and the numbers of their classes.

    A longer text is cut at its end; ``cut`` counts those. Special tokens in a text are encoded as ordinary
    text. If the tokenizer says so, a BOS token precedes it, and ``closing_ids`` follow it, also one that is
    cut. ``lengths`` (N,) are the tokens of each. Raises ``Error`` if ``max_length`` leaves none of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        max_length: int,
        targets: Sequence[int] | None = None,
    ):
        closing = list(tokenizer.closing_ids)
        most = max_length - len(closing)  # of BOS and text
        if most <= len(tokenizer.with_bos([])):
            raise Error(
                f"max_length is {max_length}, and the tokens before and after a text leave none to read: "
                f"choose at least {len(tokenizer.with_bos([])) + len(closing) + 1}"
            )
        whole = [tokenizer.with_bos(tokenizer.encode(text, "text")) for text in texts]
        self.ids = [np.array(ids[:most] + closing, np.int64) for ids in whole]
        self.cut = sum(len(ids) > most for ids in whole)
        self.lengths = np.array([len(ids) for ids in self.ids])
        unknown = [IGNORED] * len(texts)
        self.targets = np.array(unknown if targets is None else targets, np.int64)
        self.fill = padding_id(tokenizer) or 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (B, T), padded on the right to the longest of these texts, lengths (B,) and targets (B,)."""
        ids = pad([self.ids[i] for i in indices], self.fill)
        return ids, self.lengths[indices], self.targets[indices]


def padding_id(tokenizer: Tokenizer) -> int | None:
    """An id that no encoded text ends with, so that ``transformers`` finds a padded text's end; or None."""
    known = (*tokenizer.eos_ids, *tokenizer.special_tokens.values())
    return next((i for i in known if i not in tokenizer.closing_ids), None)


def class_logits(
    model: SequenceClassifier,
    texts: EncodedTexts,
    batch: int,
    indices: np.ndarray | None = None,
    check: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """The logits (n, K) of all texts, or of those with the ``indices`` (n,), in eval mode.

    ``check()`` is called before every batch; an exception that it raises interrupts the computation.
    """
    indices = np.arange(len(texts)) if indices is None else indices
    logits = np.zeros((len(indices), len(model.labels)), np.float64)
    with evaluating(model), no_grad():
        for places in _by_length(texts.lengths[indices], batch):
            check()
            ids, lengths, _ = texts[indices[places]]
            logits[places] = to_device(model(ids, lengths).data, "cpu")
    return logits


def _by_length(lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Positions in batches of similar length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), batch):
        yield order[first : first + batch]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of each row (n, K)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
