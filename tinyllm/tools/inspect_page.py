"""One self-contained HTML page to move around in an inspection.

The page (``inspect.html``, written by hand) gets all numbers as data: it loads nothing, and its content
security policy allows no script but its own. A text is only ever inserted as text, so a token ``<script>``
is shown and not run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.files import write_whole
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.inspect import Inspection
from tinyllm.tools.inspect_text import bits, summary, token_label, visible, whole_characters

TEMPLATE = Path(__file__).with_name("inspect.html")

LARGEST = 50_000_000  # attention weights in a page, of a byte each, before compression


def write_page(
    found: Inspection, tokenizer: Tokenizer, path: str | Path, name: str = "", layer: int | None = None
) -> None:
    """Write the page of an inspection, with the attention of one ``layer`` or of all.

    ``name``, such as the model's, is its title. Raises ``Error`` as ``check_size`` does, without a lens at
    all positions, and if the file cannot be written.
    """
    T = len(found.ids)
    if not np.array_equal(found.positions, np.arange(T)):
        raise Error("the page needs the lens at all positions: inspect the text with positions=None")
    layers = list(range(len(found.blocks))) if layer is None else [layer]
    found.block_name(layers[0])
    check_size(T, sum(found.heads[i] for i in layers))
    page = render(_data(found, tokenizer, name, layers))
    try:
        write_whole(Path(path), page.encode())
    except OSError as error:
        raise Error(f"{path} cannot be written ({error.strerror or error}): choose another path") from None


def check_size(tokens: int, heads: int) -> None:
    """Raise ``Error`` if a page with so many maps would be too large for a browser."""
    size = heads * tokens * (tokens + 1) // 2
    if size > LARGEST:
        raise Error(
            f"a page with {heads:,} maps of {tokens:,} tokens would be too large ({size / 1e6:,.0f} million "
            f"weights, at most {LARGEST // 10**6}): shorten the text, or choose one layer"
        )


def render(data: dict) -> str:
    """The page as text. In the data, ``<`` and ``&`` are escaped, so that no text ends its element."""
    page = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    parts = {
        "hash": f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        "title": html.escape(data["title"]),
        "data": json.dumps(data).replace("<", "\\u003c").replace("&", "\\u0026"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def _data(found: Inspection, tokenizer: Tokenizer, name: str, layers: list[int]) -> dict:
    """What the page shows. Arrays are in base64: lens ids, lens probabilities, attention weights."""
    predicts = found.probability is not None  # ids, not classes
    ids = found.lens.ids
    unique, index = np.unique(np.concatenate([ids.ravel(), found.ids]), return_inverse=True)
    of_lens, of_text = index[: ids.size], index[ids.size :]
    arrays = [of_lens.astype("<u4"), np.rint(found.lens.probabilities * 65535).astype("<u2")]
    below = np.tri(len(found.ids), dtype=bool)
    for layer in layers:
        for weights in found.attention(layer) if found.heads[layer] else ():
            arrays.append(np.rint(255 * np.sqrt(weights[below])).astype(np.uint8))
    packed = gzip.compress(b"".join(array.tobytes() for array in arrays), 6, mtime=0)
    return {
        "title": name or "inspection",
        "facts": summary(found) if predicts else f"{len(found.ids):,} tokens",
        "predicts": predicts,
        "tokens": _tokens(found, tokenizer),
        "layers": layers,
        "heads": [found.heads[layer] for layer in layers],
        "head": 0,
        "top": ids.shape[2],
        "words": [token_label(tokenizer, int(i)) if predicts else f"class {i}" for i in unique],
        "wordOf": of_text.tolist(),
        "norms": [[float(f"{x:.4g}") for x in row] for row in found.norms],
        "arrays": base64.b64encode(packed).decode(),
    }


def _tokens(found: Inspection, tokenizer: Tokenizer) -> list[dict]:
    """Every token: its id, label and text; a character's tokens but the last are ``⋯``."""
    tokens = []
    for positions, text in whole_characters(tokenizer, found.ids):
        for t in positions:
            part = t != positions[-1]
            label = token_label(tokenizer, int(found.ids[t]))
            shown = {"id": int(found.ids[t]), "label": label, "text": "⋯" if part else visible(text)}
            shown |= {"part": part, "line": not part and text.endswith("\n")}
            tokens.append(shown | _numbers(found, tokenizer, t))
    return tokens


def _numbers(found: Inspection, tokenizer: Tokenizer, t: int) -> dict:
    if found.probability is None or t == 0:
        return {"p": None, "bits": 0}
    amount = float(bits(found.probability[t]))
    return {
        "p": float(found.probability[t]),
        "rank": int(found.rank[t]),
        "bits": round(amount, 2) if math.isfinite(amount) else 999,
        "expected": token_label(tokenizer, int(found.expected[t])),
        "best": float(found.expected_probability[t]),
    }
