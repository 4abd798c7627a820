"""How does a model read a text many times without learning it by heart? In every step it reads another one.

Both functions change a batch of token ids at random; the text that is evaluated stays as it is.
"""

import numpy as np


def replace_tokens(ids: np.ndarray, rate: float, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """The ids, each replaced with probability ``rate`` by one of all ids, equally likely.

    A model that cannot rely on every token before learns a text by heart more slowly (Xie et al., arXiv
    1703.02573, section 3). Dropout of embeddings has the same purpose, but noise costs no time and needs
    nothing of the model.
    """
    noisy = rng.random(ids.shape) < rate
    return np.where(noisy, rng.integers(0, vocab_size, ids.shape), ids)


def split_tokens(rows: np.ndarray, pairs: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Rows (B, T) of the same text in other tokens: each is divided with probability ``rate``, and cut to T.

    ``pairs`` (V, 2) has the two ids that were merged to each id, or -1 if there are none. A token is replaced
    by its two, and each of these is divided again with the same probability, so that with a rate of 1 only
    bytes remain. Hence a word has many spellings, whose parts the model learns to know from each other, and
    no sequence of tokens returns often enough to be learned by heart. Provilkov et al., "BPE-Dropout" (arXiv
    1910.13267), omit merges while the text is encoded; undoing them needs the ids only.
    """
    B, T = rows.shape
    ids, row, may_divide = rows.reshape(-1), np.repeat(np.arange(B), T), np.ones(B * T, bool)
    while True:
        divided = may_divide & (pairs[ids, 0] >= 0)
        divided[divided] = rng.random(np.count_nonzero(divided)) < rate
        if not divided.any():
            break
        count = 1 + divided
        first, parts = (np.cumsum(count) - count)[divided], pairs[ids[divided]]
        ids, row, may_divide = (np.repeat(array, count) for array in (ids, row, divided))
        ids[first], ids[first + 1] = parts.T
    starts = np.searchsorted(row, np.arange(B))
    return ids[starts[:, None] + np.arange(T)]
