"""How does text become token ids and back?

GPT-2's vocabulary or one of our own (``bpe.py``) through tiktoken, or one id per character. A tokenizer
travels with a run as ``tinyllm_tokenizer.json`` (Hugging Face's ``tokenizer.json`` is another format).

A special token, such as ``<|endoftext|>`` between documents or ``<|user|>`` in a chat, stands for
something that no text says: it has one id, and no merge makes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.data import check_ids
from tinyllm.errors import Error
from tinyllm.reading import read_json

if TYPE_CHECKING:
    import regex
    import tiktoken

FILE_NAME = "tinyllm_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"

GPT2_VOCABULARY = Path(__file__).with_name("assets") / "vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2 splits a text into these pieces first (contractions, words with the space before them, numbers,
# punctuation, whitespace) and merges only inside a piece. The original ends in ` ?\p{L}+ … \s+(?!\S)|\s+`;
# this makes the same pieces with less backtracking, as in tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

MAX_BYTES = 8 * 2**20  # of all tokens of a BPE together; 50,000 merges of English make 0.3 MB

# GPT-2's vocabulary file is text, so a byte stands there as a visible symbol: itself if it is printable,
# otherwise the next character from U+0100 on (a space is Ġ). Bytes have their ids in this order too.
PRINTABLE = bytes(
    [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
)
BYTE_ORDER = PRINTABLE + bytes(byte for byte in range(256) if byte not in PRINTABLE)


class Tokenizer:
    """What every tokenizer has: text to ids and back, and special tokens.

    ``special_tokens`` holds their ids by name; ``added_tokens`` names those that came with
    ``with_special_tokens``.
    """

    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: tuple[str, ...] = ()
    # What a model's files say of its tokenizer, see ``tokenizer_files.read_tokenizer``
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}: {self.vocab_size:,} ids>"

    def encode(self, text: str, special: str = "refuse") -> list[int]:
        """The token ids of a text.

        ``special`` says what happens to a special token such as ``<|endoftext|>`` inside the text:
        ``"refuse"`` raises ``Error``, ``"allow"`` makes it its id, ``"text"`` encodes it as ordinary text.
        Where two special tokens begin at the same place, the longer one counts.
        """
        return self.encode_array(text, special).tolist()

    def encode_array(self, text: str, special: str = "refuse") -> np.ndarray:
        """The same ids as ``encode``, as an array (n,) of uint32: four bytes each, where a list takes 36."""
        check_text(text, special)
        parts = [text]
        if self.special_tokens and special != "text":
            longest_first = sorted(self.special_tokens, key=len, reverse=True)
            parts = re.split(f"({'|'.join(re.escape(token) for token in longest_first)})", text)
        if special == "refuse" and len(parts) > 1:
            raise Error(
                f"the text contains the special token {parts[1]!r}: set special to 'allow' to encode it "
                "as its id, or to 'text' to encode it as ordinary text"
            )
        arrays, start = [], 0
        for i, part in enumerate(parts):  # ordinary text, a special token, ordinary text …
            if i % 2 == 0:
                arrays.append(self._encode_ordinary(part, start))
            else:
                arrays.append(np.array([self.special_tokens[part]], dtype=np.uint32))
            start += len(part)
        return np.concatenate(arrays)

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        """The ids (n,), uint32, of a text without special tokens, which stands at ``start`` in the whole."""
        raise NotImplementedError

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer of the same kind with these special tokens as well, at new ids after the last one.

        Raises ``Error`` naming a name that is empty, given twice, or a token already. A model has to
        grow with it: ``extend_vocabulary`` does both.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise Error(f"the names of special tokens are {names!r}: give a list of str")
        extended = copy.copy(self)
        extended.special_tokens = dict(self.special_tokens)
        for name in names:
            if not isinstance(name, str) or name == "":
                raise Error(f"special token {name!r} has no name: give a str of at least one character")
            check_text(name)
            if name in extended.special_tokens or self._is_token(name):
                raise Error(f"special token {name!r} is a token already: leave it out, or take another name")
            extended.special_tokens[name] = extended.vocab_size
            extended.vocab_size += 1
        extended.added_tokens = (*self.added_tokens, *names)
        return extended

    def _is_token(self, name: str) -> bool:
        """Whether one of the ordinary ids is this text."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 bytes of the ids (list or 1-D integer array); a token may be half a character.

        Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of the ids (list or 1-D integer array); incomplete UTF-8 becomes U+FFFD, ``�``.

        A token may be half a character, so decode all ids of a text at once, or feed ``decode_bytes``
        to an incremental decoder. Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """What ``load_tokenizer`` needs to build this tokenizer again; ``kind`` says which class."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Write ``tinyllm_tokenizer.json`` into the folder, which is made if it is not there."""
        definition = json.dumps(self.to_json())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(definition + "\n", encoding="utf-8")


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken runs: ids of merged byte sequences, any text can be encoded.

    ``encoding`` is tiktoken's own object, for everything else it can do.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.vocab_size = encoding.n_vocab
        self.encoding = encoding
        ids = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        self.special_tokens = dict(sorted(ids.items(), key=lambda item: item[1]))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            # Not encode_ordinary: what is a ValueError here is a panic there.
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:
            raise Error(
                f"the text cannot be tokenized ({error}): shorten its longest run of whitespace"
            ) from None

    def with_special_tokens(self, names: Sequence[str]) -> TiktokenTokenizer:
        import tiktoken

        extended = super().with_special_tokens(names)
        extended.encoding = tiktoken.Encoding(  # extended as tiktoken's README does it
            self.encoding.name,
            pat_str=self.encoding._pat_str,
            mergeable_ranks=self.encoding._mergeable_ranks,
            special_tokens=extended.special_tokens,
        )
        return extended

    def _is_token(self, name: str) -> bool:
        try:
            self.encoding.encode_single_token(name)
        except KeyError:
            return False
        return True

    def decode_bytes(self, ids) -> bytes:
        checked = check_sequence(ids, self.vocab_size)
        try:
            return self.encoding.decode_bytes(checked)
        except KeyError as error:  # some vocabularies of tiktoken's leave ids out
            raise Error(f"{error.args[0]}: tokenizer {self.name!r} leaves that id out") from None

    def to_json(self) -> dict:
        if self.name != "gpt2":
            raise Error(f"tokenizer {self.name!r} cannot be saved: only 'gpt2' can be rebuilt from its name")
        return {"kind": "gpt2", "added_tokens": list(self.added_tokens)}


class BPETokenizer(TiktokenTokenizer):
    """A byte-level byte-pair encoding of our own, from the merges that ``bpe.train_bpe`` learned.

    Ids 0 to 255 are the bytes in ``BYTE_ORDER``, id 256 + i joins the two ids of ``merges[i]``,
    ``<|endoftext|>`` comes next, and special tokens added later come after it. Merges apply inside the
    pieces that ``pattern`` cuts. Raises ``Error`` naming a merge that is no pair of earlier ids or makes
    a token that is there already, or a pattern that does not work; ``encode`` does for a text of which
    the pattern leaves a part out.
    """

    def __init__(self, merges: list[tuple[int, int]], pattern: str = GPT2_PATTERN):
        import tiktoken

        check_pattern(pattern)
        ranks = _bpe_ranks(merges)
        name = f"bpe:{len(ranks) + 1}"
        try:
            encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
            )
        except ValueError as error:
            raise Error(f"pattern {pattern!r} means nothing to tiktoken: {error}") from None
        super().__init__(name, encoding)
        self.merges = [tuple(pair) for pair in merges]
        self.pattern = pattern

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        ids = super()._encode_ordinary(text, start)
        if self.encoding.decode_bytes(ids) != text.encode("utf-8"):  # tiktoken skips what does not match
            raise Error(
                f"pattern {self.pattern!r} leaves out a part of the text: train with one that matches all "
                "of it"
            )
        return ids

    def to_json(self) -> dict:
        return {
            "kind": "bpe",
            "pattern": self.pattern,
            "merges": [list(pair) for pair in self.merges],
            "added_tokens": list(self.added_tokens),
        }


def _bpe_ranks(merges: list[tuple[int, int]]) -> dict[bytes, int]:
    tokens, num_bytes = [bytes([byte]) for byte in BYTE_ORDER], 0
    ranks = {token: i for i, token in enumerate(tokens)}
    for i, pair in enumerate(merges):
        match pair:
            case (left, right) if type(left) is type(right) is int and all(
                0 <= n < len(tokens) for n in pair
            ):
                token = tokens[left] + tokens[right]
            case _:
                raise Error(f"merges[{i}] is {pair!r}: it must be two ids from 0 to {len(tokens) - 1}")
        if token in ranks:
            raise Error(f"merges[{i}] makes {token!r}, which is id {ranks[token]} already: remove it")
        num_bytes += len(token)
        if num_bytes > MAX_BYTES:  # each merge can double the longest token
            raise Error(f"merges[{i}] makes more than {MAX_BYTES:,} bytes of tokens: leave it out")
        ranks[token] = len(tokens)
        tokens.append(token)
    return ranks


class CharTokenizer(Tokenizer):
    """One id per character, in the order given; there are no special tokens, unless some are added.

    Raises ``Error`` if there are no characters or one comes twice; ``encode`` does for an unseen one.
    """

    name = "char"

    def __init__(self, characters: str):
        check_text(characters)
        if not characters:
            raise Error(
                "a character tokenizer needs at least one character: give it a text that is not empty"
            )
        self._id_of = {character: i for i, character in enumerate(characters)}
        if len(self._id_of) < len(characters):
            twice = next(c for i, c in enumerate(characters) if c in characters[:i])
            raise Error(f"character {twice!r} comes twice: give each once, or use CharTokenizer.from_text")
        self.characters = characters
        self.vocab_size = len(characters)
        self.special_tokens = {}

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of a text's own characters, sorted."""
        return cls("".join(sorted(set(text))))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            return np.array([self._id_of[character] for character in text], dtype=np.uint32)
        except KeyError as error:
            unseen = error.args[0]
            raise Error(
                f"character {unseen!r} (U+{ord(unseen):04X}, at {start + text.index(unseen)}) is not one of "
                f"this tokenizer's {len(self.characters)}: leave it out, or make the tokenizer from a text "
                "that has it"
            ) from None

    def _is_token(self, name: str) -> bool:
        return name in self._id_of

    def decode_bytes(self, ids) -> bytes:
        checked = check_sequence(ids, self.vocab_size)
        tokens = [*self.characters, *self.special_tokens]
        return "".join(tokens[i] for i in checked).encode("utf-8")

    def to_json(self) -> dict:
        return {
            "kind": "char",
            "characters": self.characters,
            "added_tokens": list(self.added_tokens),
        }


def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer, 50,257 ids, from the vocabulary inside this package; nothing is downloaded.

    The ids: 256 single bytes, then one per merge in the order they were learned (a lower id merges
    first), then ``<|endoftext|>``. Radford et al. 2019; the file is OpenAI's.
    """
    import tiktoken

    ranks = _gpt2_ranks()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=50257,
    )
    return TiktokenTokenizer("gpt2", encoding)


def _gpt2_ranks() -> dict[bytes, int]:
    data = GPT2_VOCABULARY.read_bytes()
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
        raise Error(f"{str(GPT2_VOCABULARY)!r} is damaged (its SHA-256 is not GPT-2's): reinstall tinyllm")

    symbols = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
    byte_of = dict(zip(symbols, BYTE_ORDER))
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    for line in data.decode("utf-8").split("\n")[1:-1]:  # after "#version", to the last line's end
        left, right = line.split(" ")
        ranks[bytes(byte_of[symbol] for symbol in left + right)] = len(ranks)
    return ranks


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A tokenizer by name (``"gpt2"``), or the one in a folder or file.

    A run's folder and ``tinyllm_tokenizer.json`` are ours; any other folder or file is read as a published
    model's (``tokenizer_files.py``). The name wins over a folder of that name; write ``./gpt2`` for the
    folder. Raises ``Error`` if there is no tokenizer, or it is damaged or of an unknown kind.
    """
    if spec == "gpt2":
        return gpt2()
    path = Path(spec)
    file = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise Error(
            f"no tokenizer in {str(path)!r}: give 'gpt2', a run's or a model's folder, or a tokenizer file "
            "('char' and 'bpe:VOCAB' are made from a text, by tinyllm train)"
        )
    if not file.exists() or file.name != FILE_NAME:
        from tinyllm.tokenizer_files import read_tokenizer

        return read_tokenizer(path)
    definition = read_json(file)
    try:
        return _from_json(definition)
    except Error as error:
        raise Error(f"{str(file)!r} cannot be loaded: {error}") from None


def _from_json(definition: dict) -> Tokenizer:
    match definition:
        case {"kind": "gpt2"}:
            tokenizer = gpt2()
        case {"kind": "char", "characters": str(characters)}:
            tokenizer = CharTokenizer(characters)
        case {"kind": "bpe", "pattern": str(pattern), "merges": list(merges)}:
            tokenizer = BPETokenizer(merges, pattern)
        case _:
            raise Error(
                "its kind is no tokenizer known here: it must be 'bpe' with a pattern and merges, 'gpt2' or "
                "'char' with characters"
            )
    added = definition.get("added_tokens", [])  # files from before there were any have none
    return tokenizer if added == [] else tokenizer.with_special_tokens(added)


def extend_vocabulary(
    model, tokenizer: Tokenizer, names: Sequence[str], rng: np.random.Generator
) -> Tokenizer:
    """New special tokens for both: the tokenizer with these names, and the model grown in place to match.

    The model's new rows are drawn from ``rng``, see ``GPT2.resize_token_embeddings``; what it computed
    for the old ids stays. Raises ``Error``, before anything changes, if the two do not belong together
    or as ``with_special_tokens`` does.
    """
    check_fits(tokenizer, model)
    extended = tokenizer.with_special_tokens(names)
    model.resize_token_embeddings(extended.vocab_size, rng)
    return extended


def check_fits(tokenizer: Tokenizer, model, padded: bool = False) -> None:
    """``Error`` unless the tokenizer has as many ids as the model.

    With ``padded`` the model may have more: some are padded with rows that no id uses, to a multiple of
    64, say. Never may it have fewer.
    """
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not padded):
        raise Error(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the model {rows}: use the "
            "tokenizer that the model was trained with"
        )


def check_pattern(pattern: str) -> regex.Pattern:
    """The pattern, compiled; ``Error`` if it is no regular expression or matches the empty text."""
    import regex  # unlike re, it knows \p{L} and \p{N}; tiktoken imports it too

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise Error(f"pattern {pattern!r} is no regular expression ({error}): correct it") from None
    if compiled.match(""):  # tiktoken would panic
        raise Error(f"pattern {pattern!r} matches the empty text: make it match one character at least")
    return compiled


def check_text(text: str, special: str = "refuse") -> None:
    """``Error`` if the text is no str or has a lone surrogate, or if ``special`` is no known word."""
    if not isinstance(text, str):
        raise Error(f"the text is a {type(text).__name__}: give a str")
    if special not in ("refuse", "allow", "text"):
        raise Error(f"special is {special!r}: choose 'refuse', 'allow' or 'text'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # tiktoken would put U+FFFD there without a word
        raise Error(
            f"the text has half a character, the lone surrogate {text[error.start]!r}, at {error.start}: "
            "remove it"
        ) from None


def check_sequence(ids, vocab_size: int) -> list[int]:
    """The ids of one sequence as a list of int, checked as ``check_ids`` does; there may be none."""
    if np.asarray(ids, dtype=object).size == 0:
        return []
    checked = check_ids(ids, vocab_size)
    if checked.ndim != 1:
        raise Error(f"ids have shape {checked.shape}: decode one sequence at a time")
    return checked.tolist()
