"""Baselines: how well a text can be predicted without a neural network.

Two classical methods, in bits per byte of an unseen text, for which a uniform guess is 8. The n-gram model
counts which byte follows the last few; xz copies passages that occurred before. A language model that is not
better than the n-gram model has learned little more than spelling; one that is worse than xz is evaluated on
a text that repeats itself.
"""

import numpy as np

from tinyllm.errors import Error

LARGEST = 20_000_000  # bytes of text; xz then takes half a minute, and the n-gram model 0.8 GB


def ngram_bits_per_byte(train: bytes, validation: bytes, order: int = 5) -> float:
    """Bits per byte of ``validation`` under a byte n-gram model counted in ``train``.

    A model of order n predicts a byte w from its context h, the n - 1 bytes before it. Let h' be the context
    without its first byte, c(h, w) the number of times that w followed h, c(h) the number of times that any
    byte did, and T(h) the number of different bytes that did:

        P(w | h) = (c(h, w) + T(h) P(w | h')) / (c(h) + T(h))          P(w | no context left) = 1 / 256

    The more different bytes followed h, the larger the weight of the shorter context; after an unseen h it is
    1. The first bytes of ``validation`` have a shorter context.

    Witten and Bell, "The Zero-Frequency Problem", IEEE Transactions on Information Theory 37, 1991 (their
    method C); in this recursive form Chen and Goodman, "An Empirical Study of Smoothing Techniques for
    Language Modeling", Harvard TR-10-98, section 2.5.

    Memory: about 40 bytes per byte of ordinary ``train`` (130 if it is random), and 90 per byte of
    ``validation``. Raises ``Error`` if order is not 1 to 8 (a context and its byte are one 64-bit number
    here), or if a text is empty or not bytes.
    """
    if type(order) is not int or not 1 <= order <= 8:
        raise Error(f"order is {order!r}: choose a whole number from 1 to 8")
    _check_texts(train, validation)
    seen = np.frombuffer(train, np.uint8).astype(np.uint64)
    asked = np.frombuffer(validation, np.uint8).astype(np.uint64)
    grams, queries = seen, asked  # each byte and the k bytes before it, as one number
    p = np.full(len(asked), 1 / 256)
    for k in range(min(order, len(seen), len(asked))):
        if k > 0:
            grams = grams[:-1] << 8 | seen[k:]
            queries = queries[:-1] << 8 | asked[k:]
        pairs, pair_counts = np.unique(grams, return_counts=True)
        contexts, first, distinct = np.unique(pairs >> 8, return_index=True, return_counts=True)
        context_counts = np.add.reduceat(pair_counts, first)  # pairs are sorted by context

        c_hw = _look_up(queries, pairs, pair_counts)
        c_h = _look_up(queries >> 8, contexts, context_counts)
        t_h = _look_up(queries >> 8, contexts, distinct)
        known = c_h > 0
        p_shorter = p[k:][known]
        p[k:][known] = (c_hw[known] + t_h[known] * p_shorter) / (c_h[known] + t_h[known])
    return float(-np.log2(p).mean())


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, or 0 if it is missing; ``keys`` are sorted."""
    at = np.searchsorted(keys, wanted)
    at[at == len(keys)] = 0
    return np.where(keys[at] == wanted, values[at], 0)


def xz_bits_per_byte(train: bytes, validation: bytes) -> float:
    """Bits per byte of ``validation`` compressed by ``xz -9`` after ``train``.

        (size of xz(train + validation) - size of xz(train)) * 8 / len(validation)

    xz is LZ77 (Ziv and Lempel, 1977), "copy n bytes from d bytes back", followed by an arithmetic coder;
    preset 9 searches the last 64 MiB. It needs up to 0.7 GB of memory. Raises ``Error`` if a text is empty or
    not bytes, or if this Python was built without lzma.
    """
    _check_texts(train, validation)
    try:
        import lzma
    except ImportError:
        raise Error("this Python was built without lzma: install one with it to compare with xz") from None
    sizes = [len(lzma.compress(data, preset=9)) for data in (train, train + validation)]
    return (sizes[1] - sizes[0]) * 8 / len(validation)


def _check_texts(train: bytes, validation: bytes) -> None:
    for name, data in (("train", train), ("validation", validation)):
        if not isinstance(data, bytes):
            raise Error(f'{name} is a {type(data).__name__}: give bytes, such as text.encode("utf-8")')
        if not data:
            raise Error(f"{name} is empty: give at least one byte")


def describe(train: bytes, measured: dict[str, tuple[float, bytes]]) -> str:
    """A table of the bits per byte of texts: those given, the n-gram's and xz's.

    ``measured`` maps the name of each text to a model's bits per byte of it and the text. For more than 20 MB
    of text the baselines are omitted, and the table says so. Raises ``Error`` as they do, except that
    without lzma only xz is omitted.
    """
    ours, texts = zip(*measured.values())
    for text in texts:
        _check_texts(train, text)
    rows = [
        ("bits per byte (a uniform guess is 8)", measured),
        ("  bytes of text", [f"{len(text):,}" for text in texts]),
        ("  this model", [f"{bits:.2f}" for bits in ours]),
    ]
    notes = []
    for name, measure in (
        ("byte 5-gram, counted in the training text", ngram_bits_per_byte),
        ("xz -9, after the training text", xz_bits_per_byte),
    ):
        try:
            if len(train) + sum(map(len, texts)) > LARGEST:
                raise Error(f"too slow or too large for more than {LARGEST // 10**6} MB of text")
            figures = [f"{measure(train, text):.2f}" for text in texts]
        except Error as error:
            figures = ["–"] * len(texts)
            notes.append(f"  {name.partition(',')[0]} is omitted: {error}")
        rows.append((f"  {name}", figures))
    lines = [f"{name:<44}" + "".join(f"  {cell:>18}" for cell in cells) for name, cells in rows]
    return "\n".join([*lines, *notes])
