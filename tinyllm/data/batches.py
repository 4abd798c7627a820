"""How do token ids become batches of (input, target), in an order that can be resumed?

Text (``corpus.py``) → token ids (a tokenizer, or ``token_file.py`` if they do not fit in memory) →
``Windows`` → ``Batches``. A language model predicts the next token at every position, so the target of a
window is the same window shifted by one token.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tinyllm.checks import check_at_least, check_integers
from tinyllm.errors import Error

GROUPED_BATCHES = 50  # in which examples are sorted by length, as ``group_by_length`` of transformers does


class Windows:
    """The (input, target) windows of a token sequence.

    With ``s = i * stride``, window ``i`` is ``tokens[s : s + context]`` and its target
    ``tokens[s + 1 : s + context + 1]``, for every ``s`` in ``range(0, len(tokens) - context, stride)``:
    all windows that fit completely. ``stride`` defaults to ``context``, so that every token is a target
    exactly once, except the first token and the ``unused_tokens`` at the end. A memory-mapped array stays on
    disk, and only the selected windows are read; any other sequence is copied. ``name`` identifies the tokens
    in the message when they are too few. Raises ``Error`` if the tokens are not a sequence of integers longer
    than ``context``, or if context or stride is below 1.
    """

    def __init__(self, tokens, context: int, stride: int | None = None, name: str = "the text"):
        self.context = check_at_least(context, 1, "context")
        self.stride = self.context if stride is None else check_at_least(stride, 1, "stride")
        tokens = check_integers(tokens, "tokens")
        if tokens.ndim != 1:
            raise Error(f"tokens have shape {tokens.shape}: give one sequence, of shape (n,)")
        if len(tokens) <= self.context:
            raise Error(
                f"{name} has only {len(tokens)} tokens, but a window of context {self.context} and its "
                f"target need {self.context + 1}: use a longer text or a smaller context"
            )
        # Views of all windows: they allocate no memory.
        self.tokens = tokens if isinstance(tokens, np.memmap) else tokens.astype(np.int64)
        self._inputs = sliding_window_view(self.tokens[:-1], self.context)[:: self.stride]
        self._targets = sliding_window_view(self.tokens[1:], self.context)[:: self.stride]

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def unused_tokens(self) -> int:
        """The number of tokens that no window contains, as input or target.

        These are the tokens after the last window and, if ``stride > context + 1``, those between windows.
        """
        span = self.context + 1  # a window and its last target
        used = (len(self) - 1) * min(self.stride, span) + span
        return len(self.tokens) - used

    def __getitem__(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the selected windows, int64, each (n, context); indices as in NumPy."""
        return self._inputs[indices].astype(np.int64), self._targets[indices].astype(np.int64)


class Batches:
    """An endless sequence of shuffled batches with random access to any step.

    An epoch is ``steps_per_epoch = ceil(len(windows) / batch_size)`` steps and contains every window
    exactly once; its last batch may be smaller. The order of an epoch depends only on (seed, epoch), through
    a counter-based generator (Philox), so a run resumed at any step gets the same batches as one that was
    never interrupted. (NumPy does not guarantee that a generator's numbers stay the same between versions,
    but in practice they have.) Raises ``Error`` if batch_size is below 1 or seed is outside 0..2**64-1.

    ``windows`` may be any sequence that takes an array of indices and returns a tuple of arrays, such as
    examples padded to the longest of the batch. Their ``lengths`` then group examples of similar length, so
    that little is padded: of every 50 batches in the shuffled order, the examples are sorted by length before
    they are cut into batches, and the batches of an epoch are shuffled once more.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, lengths=None):
        self.windows, self.lengths = windows, lengths
        self.batch_size = check_at_least(batch_size, 1, "batch_size")
        self.seed = check_at_least(seed, 0, "seed")
        if self.seed >= 2**64:
            raise Error(f"seed is {seed}: choose one below 2**64")
        self.steps_per_epoch = -(-len(windows) // self.batch_size)
        self._epoch, self._batches = -1, []

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step (counted from 0), int64, each (B, context)."""
        epoch, position = divmod(check_at_least(step, 0, "step"), self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self.windows[self._batches[position]]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        """The indices of every batch of an epoch."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
        order = rng.permutation(len(self.windows))
        if self.lengths is None:
            return _cut(order, self.batch_size)
        groups = [
            group[np.argsort(self.lengths[group], kind="stable")]
            for group in _cut(order, GROUPED_BATCHES * self.batch_size)
        ]
        batches = [batch for group in groups for batch in _cut(group, self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[first : first + size] for first in range(0, len(order), size)]
