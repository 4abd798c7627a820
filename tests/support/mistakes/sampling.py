"""Mistakes in top-k, top-p and byte-pair encoding."""

from support.mistakes.planting import Variants

TOP_K = Variants(
    "top_k",
    "top_k_probabilities",
    (
        """
def top_k_probabilities(logits, k, temperature):
    scores = logits / temperature
    keep = np.argsort(-logits, kind="stable")[:k]
    masked = np.full(len(logits), -np.inf)
    masked[keep] = scores[keep]
    e = np.exp(masked - masked.max())
    return e / e.sum()
""",
        """
def top_k_probabilities(logits, k, temperature):
    kept = sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:k]
    powers = [math.exp(logits[id] / temperature) for id in kept]
    p = np.zeros(len(logits))
    for id, power in zip(kept, powers):
        p[id] = power / sum(powers)
    return p
""",
        """
def top_k_probabilities(logits, k, temperature):
    ids = np.arange(len(logits))
    ahead = (logits > logits[:, None]) | ((logits == logits[:, None]) & (ids < ids[:, None]))
    keep = ahead.sum(1) < k
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    p = p * keep
    return p / p.sum()
""",
    ),
    {
        "ties kept": (
            ('keep = np.argsort(-logits, kind="stable")[:k]', "keep = logits >= np.sort(logits)[-k]"),
            ("sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:k]",
             "[id for id, x in enumerate(logits) if x >= sorted(logits, reverse=True)[k - 1]]"),
            (" | ((logits == logits[:, None]) & (ids < ids[:, None]))", ""),
        ),
        "the last of equal logits": (
            ('np.argsort(-logits, kind="stable")[:k]', 'np.argsort(logits, kind="stable")[-k:]'),
            ("(-logits[id], id))[:k]", "(logits[id], id), reverse=True)[:k]"),
            ("ids < ids[:, None]", "ids > ids[:, None]"),
        ),
        "not renormalised": (
            ("return e / e.sum()", "return e / np.exp(scores - masked.max()).sum()"),
            ("power / sum(powers)", "power / sum(math.exp(x / temperature) for x in logits)"),
            ("    return p / p.sum()", "    return p"),
        ),
        "multiplied by the temperature": (
            ("logits / temperature", "logits * temperature"),
            ("logits[id] / temperature", "logits[id] * temperature"),
            (") / temperature)", ") * temperature)"),
        ),
        "no temperature": (
            ("logits / temperature", "logits"),
            ("logits[id] / temperature", "logits[id]"),
            (") / temperature)", "))"),
        ),
        "the k smallest": (
            ("np.argsort(-logits", "np.argsort(logits"),
            ("(-logits[id], id)", "(logits[id], id)"),
            ("(logits > logits[:, None])", "(logits < logits[:, None])"),
        ),
    },
)  # fmt: skip

TOP_P = Variants(
    "top_p",
    "top_p_probabilities",
    (
        """
def top_p_probabilities(logits, top_p):
    p = np.exp(logits - logits.max())
    p = p / p.sum()
    order = np.argsort(p)[::-1]
    total = np.cumsum(p[order])
    remove = np.roll(total >= top_p, 1)
    remove[0] = False
    p[order[remove]] = 0
    return p / p.sum()
""",
        """
def top_p_probabilities(logits, top_p):
    powers = [math.exp(x) for x in logits]
    p = [power / sum(powers) for power in powers]
    out, total = np.zeros(len(p)), 0.0
    for id in sorted(range(len(p)), key=lambda id: p[id], reverse=True):
        if total >= top_p:
            break
        out[id] = p[id]
        total += p[id]
    return out / out.sum()
""",
        """
def top_p_probabilities(logits, top_p):
    p = np.exp(logits) / np.exp(logits).sum()
    ranked = -np.sort(-p)
    count = 1 + np.sum(np.cumsum(ranked)[:-1] < top_p)
    kept = np.where(p >= ranked[count - 1], p, 0)
    return kept / kept.sum()
""",
    ),
    {
        "the token that crosses top_p is dropped": (
            ("    remove = np.roll(total >= top_p, 1)\n    remove[0] = False\n",
             "    remove = total > top_p\n"),
            ("total >= top_p:", "total + p[id] > top_p:"),
            ("count = 1 + np.sum(np.cumsum(ranked)[:-1] < top_p)",
             "count = np.sum(np.cumsum(ranked) <= top_p)",
             "p >= ranked[count - 1]", "p > np.append(ranked, 0)[count]"),
        ),
        "not renormalised": (
            ("return p / p.sum()", "return p"),
            ("out / out.sum()", "out"),
            ("kept / kept.sum()", "kept"),
        ),
        "the least likely first": (
            ("np.argsort(p)[::-1]", "np.argsort(p)"),
            (", reverse=True", ""),
            ("-np.sort(-p)", "np.sort(p)", "p >= ranked", "p <= ranked"),
        ),
        "not sorted": (
            ("np.argsort(p)[::-1]", "np.arange(len(p))"),
            ("sorted(range(len(p)), key=lambda id: p[id], reverse=True)", "range(len(p))"),
            ("-np.sort(-p)", "p", "p >= ranked[count - 1]", "np.arange(len(p)) < count"),
        ),
        "a bound for each probability": (
            ("    p[order[remove]] = 0\n", "    p[p < top_p] = 0\n"),
            ("        if total >= top_p:\n            break\n",
             "        if p[id] < top_p:\n            continue\n"),
            ("p >= ranked[count - 1]", "p >= top_p"),
        ),
    },
)  # fmt: skip

MOST_FREQUENT_PAIR = Variants(
    "bpe",
    "most_frequent_pair",
    (
        """
def most_frequent_pair(pieces):
    counts = {}
    for piece in pieces:
        for pair in zip(piece, piece[1:]):
            counts[pair] = counts.get(pair, 0) + 1
    if not counts:
        return None
    return min(counts, key=lambda pair: (-counts[pair], pair))
""",
        """
def most_frequent_pair(pieces):
    pairs = []
    for piece in pieces:
        for i in range(len(piece) - 1):
            pairs.append((piece[i], piece[i + 1]))
    best, most = None, 0
    for pair in sorted(pairs):
        if pairs.count(pair) > most:
            best, most = pair, pairs.count(pair)
    return best
""",
        """
def most_frequent_pair(pieces):
    counts = Counter()
    for piece in pieces:
        counts.update((a, b) for a, b in zip(piece[:-1], piece[1:]))
    ranked = sorted(counts.items(), key=lambda item: item[0])
    ranked = sorted(ranked, key=lambda item: item[1], reverse=True)
    return ranked[0][0] if ranked else None
""",
    ),
    {
        "pairs across pieces": (
            ("    counts = {}\n", "    counts = {}\n    pieces = [sum(pieces, [])]\n"),
            ("    pairs = []\n",
             "    pairs = [(a[-1], b[0]) for a, b in zip(pieces, pieces[1:])]\n"),
            ("    for piece in pieces:\n        counts.update((a, b) for a, b in zip(piece[:-1], piece[1:]))",
             "    text = [id for piece in pieces for id in piece]\n    counts.update(zip(text, text[1:]))"),
        ),
        "the largest of equally frequent pairs": (
            ("min(counts, key=lambda pair: (-counts[pair], pair))",
             "max(counts, key=lambda pair: (counts[pair], pair))"),
            ("> most", ">= most"),
            ("item: item[0])", "item: item[0], reverse=True)"),
        ),
        "the first of equally frequent pairs": (
            ("min(counts, key=lambda pair: (-counts[pair], pair))", "max(counts, key=counts.get)"),
            ("sorted(pairs)", "pairs"),
            ("ranked = sorted(counts.items(), key=lambda item: item[0])", "ranked = counts.most_common()"),
        ),
        "every second pair": (
            ("zip(piece, piece[1:])", "zip(piece[::2], piece[1::2])"),
            ("range(len(piece) - 1)", "range(0, len(piece) - 1, 2)"),
            ("zip(piece[:-1], piece[1:])", "zip(*[iter(piece)] * 2)"),
        ),
    },
)  # fmt: skip

MERGE = Variants(
    "bpe",
    "merge",
    (
        """
def merge(piece, pair, new_id):
    out = []
    i = 0
    while i < len(piece):
        if i + 1 < len(piece) and piece[i] == pair[0] and piece[i + 1] == pair[1]:
            out.append(new_id)
            i += 2
        else:
            out.append(piece[i])
            i += 1
    return out
""",
        """
def merge(piece, pair, new_id):
    out = list(piece)
    i = 0
    while i < len(out) - 1:
        if (out[i], out[i + 1]) == pair:
            out[i : i + 2] = [new_id]
        i += 1
    return out
""",
        """
def merge(piece, pair, new_id):
    out, open_ = [], False  # open_: the last element may begin a pair
    for id in piece:
        if open_ and (out[-1], id) == pair:
            out[-1] = new_id
            open_ = False
        else:
            out.append(id)
            open_ = True
    return out
""",
    ),
    {
        "only the first occurrence": (
            ("            i += 2\n", "            return out + piece[i + 2 :]\n"),
            ("[new_id]\n", "[new_id]\n            break\n"),
            ("open_ and (out", "open_ and new_id not in out and (out"),
        ),
        "from the right": (
            ("    out = []\n", "    piece, pair, out = piece[::-1], pair[::-1], []\n",
             "return out", "return out[::-1]"),
            ("i = 0", "i = len(out) - 2", "while i < len(out) - 1", "while i >= 0", "i += 1", "i -= 1",
             "out[i : i + 2] = [new_id]\n", "out[i : i + 2] = [new_id]\n            i -= 1\n",
             "(out[i], out[i + 1])", "tuple(out[i : i + 2])"),
            ("in piece:", "in reversed(piece):", "(out[-1], id) == pair", "(id, out[-1]) == pair",
             "return out", "return list(reversed(out))"),
        ),
        "overlapping occurrences": (
            ("            i += 2\n",
             "            i += 1 if tuple(piece[i + 1 : i + 3]) == pair else 2\n"),
            ("    out = list(piece)\n    i = 0\n    while i < len(out) - 1:\n"
             "        if (out[i], out[i + 1]) == pair:\n            out[i : i + 2] = [new_id]\n"
             "        i += 1\n",
             "    hits = [i for i in range(len(piece)) if tuple(piece[i : i + 2]) == pair]\n"
             "    out = []\n    for i, id in enumerate(piece):\n        if i in hits:\n"
             "            out.append(new_id)\n        elif i - 1 not in hits:\n"
             "            out.append(id)\n"),
            ("    for id in piece:\n        if open_ and (out[-1], id) == pair:\n",
             "    for before, id in zip([None, *piece], piece):\n        if (before, id) == pair:\n",
             "            out[-1] = new_id\n",
             "            if open_:\n                out.pop()\n            out.append(new_id)\n"),
        ),
    },
)  # fmt: skip

VARIANTS = [TOP_K, TOP_P, MOST_FREQUENT_PAIR, MERGE]
