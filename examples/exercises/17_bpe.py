"""Exercise 17: byte-pair encoding.

A tokenizer is learned by merging, again and again, the most frequent pair of neighbouring ids into a new id.
The text is cut into pieces (roughly words) first, and no pair spans two of them. In a piece a b c the pairs
are (a, b) and (b, c); in a run a a a the pair (a, a) is counted twice, although only one of the two can be
merged. Of equally frequent pairs the one with the smaller ids (compared as tuples) is merged.

Merging replaces every occurrence of the pair in a piece by the new id, from left to right: a a a becomes X a.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (arXiv 1508.07909), section
3.2.

When you are done, compare with ``tinyllm/tokenizers/bpe.py``.
Grade it: python -m parity grade examples/exercises/17_bpe.py
"""


def most_frequent_pair(pieces):
    """The pair to merge, a tuple of two ids, for a list of lists of ids; None if there is no pair."""
    raise NotImplementedError


def merge(piece, pair, new_id):
    """The piece, a new list of ids, with every occurrence of the pair merged."""
    raise NotImplementedError
