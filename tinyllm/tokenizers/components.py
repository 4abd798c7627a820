"""The parts of a ``tokenizer.json`` that may be run: those of published tokenizers, with harmless options.

The file combines normalizers, pre-tokenizers and post-processors of the library tokenizers. Some combinations
crash the library, take minutes for a line, or turn a letter into gigabytes. So a component must be in a list,
a regular expression must be one that never backtracks far, and a text must not grow much.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinyllm.errors import Error

NORMALIZERS = (
    "NFC NFD NFKC NFKD Lowercase StripAccents Strip Nmt BertNormalizer ByteLevel Prepend Replace".split()
)
PRE_TOKENIZERS = (
    "BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation Split UnicodeScripts "
    "Whitespace WhitespaceSplit".split()
)
POST_PROCESSORS = "ByteLevel TemplateProcessing BertProcessing RobertaProcessing".split()
KINDS = (  # key of the file, key of a Sequence's parts, types
    ("normalizer", "normalizers", NORMALIZERS),
    ("pre_tokenizer", "pretokenizers", PRE_TOKENIZERS),
    ("post_processor", "processors", POST_PROCESSORS),
)

MAX_COMPONENTS, MAX_PATTERN = 32, 10_000
MAX_GROWTH = 64  # how often a text may become longer, by all normalizers and pre-tokenizers together
MAX_CHOICES = 100  # ways to match a part of a pattern in front of one that may fail

# The tokens of a regular expression: one character, and a group of alternatives without repetitions
_ESCAPE = r"\\(?:[pP]\{\^?\w+\}|[sSdDwWrntvf]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s]| )"
_SET = rf"\[\^?(?:{_ESCAPE}|[^\\\[\]])+\]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|{_SET}|[^\\\[\]])+\]"
_ONE = rf"(?:{_ESCAPE}|{_CLASS}|[^\\\[\](){{}}*+?|^$])"
TOKEN = re.compile(
    rf"(?P<or>\|)|(?P<last>\\s\+\(\?!\\S\))|(?P<lines>\\s\*\[\\r\\n/?\]\+?)"
    rf"|(?P<case>(?P<upper>{_CLASS})\*(?P<lower>{_CLASS})\+)"
    rf"|(?:(?P<group>\((?:\?i?:)?(?:{_ONE}|\|)+\))|{_ONE})(?P<times>[*+?]\+?|\{{\d{{1,2}}(?:,\d{{0,2}})?\}})?"
)

EMPTY = re.compile(r"^\((\?i?:)?\||\|\||\|\)$")  # an alternative of a group


def check_components(source: Path, definition: dict) -> None:
    """Raise ``Error`` if a component of the tokenizer in the file ``source`` is not one that may be run."""
    growth, number = 1.0, 0
    for key, parts, known in KINDS:
        for component in flatten(definition.get(key), parts):
            number += 1
            problem = _problem(component, known)
            growth *= 1 if problem or known is POST_PROCESSORS else _growth(component)
            if problem or growth > MAX_GROWTH or number > MAX_COMPONENTS:
                problem = problem or "makes a text too long, together with those before it"
                shown = str(component)
                shown = shown if len(shown) < 300 else shown[:300] + "…"
                raise Error(f"{source} has a {key} that {problem}, {shown}: choose a published tokenizer")
    match definition.get("model"):
        case {"continuing_subword_prefix": str(prefix)} if prefix:
            raise Error(f"{source} has the continuing_subword_prefix {prefix!r}: choose a BPE without one")
        case {"dropout": float(p) | int(p)} if p:
            raise Error(f"{source} has the dropout {p}: set it to null, or a text's ids are random")


def flatten(component, parts: str) -> list:
    """A component, or the components of a Sequence and of those in it."""
    found, waiting = [], [] if component is None else [component]
    while waiting:
        match waiting.pop():
            case {"type": "Sequence", **rest} if isinstance(rest.get(parts), list):
                waiting += rest[parts][::-1]
            case other:
                found.append(other)
    return found


def _problem(component, known: list[str]) -> str | None:
    match component:
        case {"type": "Prepend", "prepend": str(text)} if known is NORMALIZERS:
            return None if 0 < len(text) <= 16 else "prepends nothing or too much"
        case {"type": "Replace", "pattern": pattern, "content": str()} if known is NORMALIZERS:
            return None if _is_harmless(pattern) else "has an unsupported pattern"
        case {"type": "Split", "pattern": pattern} if known is PRE_TOKENIZERS:
            return None if _is_harmless(pattern) else "has an unsupported pattern"
        case {"type": "TemplateProcessing", "single": list(single)} if known is POST_PROCESSORS:
            texts = [piece for piece in single if not isinstance(piece, dict) or "SpecialToken" not in piece]
            match texts:
                case [{"Sequence": {"id": "A"}}]:
                    return None
            return "does not contain the text once"
        case {"type": str(kind)} if kind in known and kind not in ("Prepend", "Replace", "Split"):
            return None
    return "is not supported"


def _growth(component: dict) -> float:
    match component:
        case {"type": "Replace", "pattern": pattern, "content": content}:
            return max(1, len(content) / len(pattern.get("String", "x")))
        case {"type": "Prepend" | "ByteLevel" | "Metaspace"}:
            return 2
    return 1


def _is_harmless(pattern) -> bool:
    match pattern:
        case {"String": str(text)}:
            return text != ""
        case {"Regex": str(text)}:
            return is_linear(text)
    return False


def is_linear(pattern: str) -> bool:
    """Whether a search with this pattern takes time in proportion to the text, and no match is empty.

    In every alternative, nothing that may fail follows a repetition without limit. Three idioms of published
    patterns are exceptions: ``\\s+(?!\\S)``, which fails at most once, and ``\\s*[\\r\\n]+`` and
    ``[upper]*[lower]+`` if another alternative matches where they fail, so that no text is searched twice.
    """
    position, required, endless, choices = 0, False, False, 1
    while position < len(pattern) <= MAX_PATTERN:
        token = TOKEN.match(pattern, position)
        if token is None:
            return False
        position, times = token.end(), token["times"] or ""
        if token["or"]:
            if not required:
                return False
            required, endless, choices = False, False, 1
            continue
        idiom = token["last"] or token["lines"] or token["case"]
        optional = times.startswith(("?", "*")) or (times.startswith("{") and _limits(times)[0] == 0)
        if (endless or choices > MAX_CHOICES) and not optional:
            return False
        if token["lines"] and not pattern.endswith(("|\\s+", "|\\s")):
            return False
        if token["case"] and f"{token['upper']}+{token['lower']}*" not in pattern:
            return False
        repeated = times.startswith(("*", "+")) or times.endswith(",}")
        if token["group"] and (repeated or EMPTY.search(token["group"])):
            return False
        required |= not optional
        endless |= bool(idiom) or repeated
        choices *= _choices(token["group"], times)
    return required  # nothing was read of a pattern that is too long


def _choices(group: str | None, times: str) -> int:
    """The number of ways to match a token that is repeated a limited number of times."""
    ways = 1 + (group or "").count("|")
    if not times.startswith("{"):
        return ways + times.startswith("?")
    low, high = _limits(times)
    return ways**high * (abs(high - low) + 1)


def _limits(times: str) -> tuple[int, int]:
    """The numbers in ``{2,5}``, ``{2}`` or ``{2,}``."""
    low, _, high = times.strip("{}").partition(",")
    return int(low), int(high or low)
