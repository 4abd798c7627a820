"""How does a text become batches of (input, target), in an order that can be resumed?

``load_text`` → ``train_validation_split`` → token ids (``tokenizer.py``) → ``Windows`` → ``Batches``.
A language model predicts the next token at every position, so the target of a window is the same
window one token later.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.errors import Error

KNOWN_TEXTS = ("python-docs", "the-verdict")

# Edith Wharton, 1908, public domain: the text of the classic run.
VERDICT_FILE = "the-verdict.txt"
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``sha256`` is the hex digest of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


def load_text(name_or_path: str | Path) -> Text:
    """The text of a known name or of a UTF-8 file, every byte of it as it stands.

    Known names: ``python-docs`` (the topics that ship with CPython, about 465,000 characters; the text
    differs between Python releases, and so does its hash) and ``the-verdict`` (20,479 characters: from
    the folder in ``TINYLLM_DATA`` if it is there, otherwise downloaded once and cached). A known name
    wins over a file of that name; a path with a separator (``./python-docs``) or a ``Path`` is always
    a file. Raises ``Error`` if there is no such file, or if it is unreadable, not UTF-8, or blank.
    """
    if name_or_path == "python-docs":
        data = _python_docs()
    elif name_or_path == "the-verdict":
        data = _the_verdict()
    else:
        data = _read_file(Path(name_or_path))
    try:
        text = data.decode("utf-8")  # bytes, decoded: text mode would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise Error(
            f"text {str(name_or_path)!r} is not UTF-8 at byte offset {error.start} "
            f"({data[error.start]:#04x}): save it as UTF-8 first"
        ) from None
    if not text.strip():
        raise Error(f"text {str(name_or_path)!r} is empty or only whitespace: give a text with words in it")
    return Text(str(name_or_path), text, _sha256(data))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _python_docs() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics)).encode("utf-8")


def _the_verdict() -> bytes:
    folder = os.environ.get("TINYLLM_DATA")
    if folder and (Path(folder) / VERDICT_FILE).exists():
        path = Path(folder) / VERDICT_FILE
        data = _read_file(path)
        if _sha256(data) != VERDICT_SHA256:
            raise Error(
                f"{str(path)!r} is not the expected text (SHA-256 {_sha256(data)}, not {VERDICT_SHA256}): "
                f"replace it with {VERDICT_URL}, or remove it"
            )
        return data
    import pooch

    try:
        path = pooch.retrieve(
            VERDICT_URL, "sha256:" + VERDICT_SHA256, VERDICT_FILE, pooch.os_cache("tinyllm")
        )
    except (OSError, ValueError) as error:  # no network, a refused download, or a wrong hash
        reason = " ".join(str(error).split())
        raise Error(
            f"the-verdict could not be downloaded: put {VERDICT_URL} into a folder as {VERDICT_FILE!r} "
            f"and set TINYLLM_DATA to that folder ({reason})"
        ) from None
    return _read_file(Path(path))


def _read_file(path: Path) -> bytes:
    if os.path.isdir(path):
        raise Error(f"text {str(path)!r} is a folder: give the path of a UTF-8 text file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(KNOWN_TEXTS)
        raise Error(f"no text {str(path)!r}: give the path of a UTF-8 text file or one of {known}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise Error(f"text {str(path)!r} cannot be read ({error}): check the path") from None


def train_validation_split(text: str, validation_fraction: float = 0.1) -> tuple[str, str]:
    """The text's first ``int(len(text) * (1 - validation_fraction))`` characters, and the rest.

    Raises ``Error`` unless 0 < validation_fraction < 1 and both parts get at least one character.
    """
    if not 0 < validation_fraction < 1:
        raise Error(f"validation_fraction is {validation_fraction}: choose one between 0 and 1, such as 0.1")
    cut = int(len(text) * (1 - validation_fraction))
    if cut == 0 or cut == len(text):
        raise Error(
            f"a text of {len(text)} characters leaves nothing on one side of a split with "
            f"validation_fraction {validation_fraction}: use a longer text"
        )
    return text[:cut], text[cut:]


def check_ids(ids, vocab_size: int, name: str = "ids") -> np.ndarray:
    """Token ids of any shape as an int64 array, checked, on the host (a GPU wraps a wrong index silently).

    Raises ``Error`` naming the first value that is no integer (floats and bools are not) or lies
    outside 0..vocab_size-1, with its position; also if there are no ids at all.
    """
    array = _check_integers(ids, name)
    if array.size == 0:
        raise Error(f"{name} is empty: give at least one token id")
    outside = np.asarray((array < 0) | (array >= vocab_size))
    if outside.any():
        where, value = _first(array, outside, name)
        raise Error(
            f"{where} is {value}, but token ids run from 0 to {vocab_size - 1}: "
            "encode the text with the model's own tokenizer"
        )
    return array.astype(np.int64)


def _check_integers(values, name: str) -> np.ndarray:
    # As objects, what is not an array keeps its values as they were: [1, True, 2.0] would become floats.
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind == "O":
        wrong = np.array([not is_integer(value) for value in array.flat], dtype=bool).reshape(array.shape)
    else:
        wrong = np.full(array.shape, array.dtype.kind not in "iu")
    if wrong.any():
        where, value = _first(array, wrong, name)
        raise Error(f"{where} is {value!r}, not an integer: give token ids as whole numbers")
    return array


def is_integer(value) -> bool:
    """Whether a value is a whole number, Python's or NumPy's; True and 2.0 are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _first(array: np.ndarray, wrong: np.ndarray, name: str) -> tuple[str, object]:
    position = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
    value = array[position]
    where = f"{name}[{', '.join(str(i) for i in position)}]" if position else name
    return where, value.item() if isinstance(value, np.generic) else value


def _check_at_least(value: int, minimum: int, name: str) -> int:
    if not is_integer(value) or value < minimum:
        raise Error(f"{name} is {value!r}: choose a whole number of at least {minimum}")
    return int(value)


class Windows:
    """The (input, target) windows of a token sequence.

    With ``s = i * stride``, window ``i`` is ``tokens[s : s + context]`` and its target
    ``tokens[s + 1 : s + context + 1]``, for every ``s`` in ``range(0, len(tokens) - context, stride)``:
    all windows that fit whole. ``stride`` defaults to ``context``, so that every token is a target once,
    except the first and the ``unused_tokens`` at the end. Raises ``Error`` if the tokens are not a
    sequence of integers longer than ``context``, or if context or stride is below 1.
    """

    def __init__(self, tokens, context: int, stride: int | None = None):
        self.context = _check_at_least(context, 1, "context")
        self.stride = self.context if stride is None else _check_at_least(stride, 1, "stride")
        tokens = _check_integers(tokens, "tokens")
        if tokens.ndim != 1:
            raise Error(f"tokens have shape {tokens.shape}: give one sequence, of shape (n,)")
        if len(tokens) <= self.context:
            raise Error(
                f"a text of {len(tokens)} tokens is too short for a window of {self.context} and its target, "
                f"which need {self.context + 1}: use a longer text or a smaller context"
            )
        self.tokens = tokens.astype(np.int64)
        self._starts = np.arange(0, len(tokens) - self.context, self.stride)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def unused_tokens(self) -> int:
        """How many tokens are in no window, as input or target.

        Those after the last window, and, if ``stride > context + 1``, those between windows.
        """
        span = self.context + 1  # a window and the last of its targets
        used = (len(self) - 1) * min(self.stride, span) + span
        return len(self.tokens) - used

    def __getitem__(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the chosen windows, int64, each (n, context); indices as in NumPy."""
        positions = self._starts[indices][..., None] + np.arange(self.context)  # (n, context)
        return self.tokens[positions], self.tokens[positions + 1]


class Batches:
    """An endless shuffled order of batches in which any step can be reached directly.

    An epoch is ``steps_per_epoch = ceil(len(windows) / batch_size)`` steps and shows every window
    exactly once; its last batch holds what is left and may be smaller. The order of an epoch depends on
    (seed, epoch) alone, by a counter-based generator (Philox), so a run resumed at a step sees what it
    would have seen. (NumPy keeps a generator's numbers from version to version in practice, without
    promising it.) Raises ``Error`` if batch_size is below 1 or seed outside 0..2**64-1.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int):
        self.windows = windows
        self.batch_size = _check_at_least(batch_size, 1, "batch_size")
        self.seed = _check_at_least(seed, 0, "seed")
        if self.seed >= 2**64:
            raise Error(f"seed is {seed}: choose one below 2**64")
        self.steps_per_epoch = -(-len(windows) // self.batch_size)
        self._epoch, self._order = -1, None

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step (counted from 0), int64, each (B, context)."""
        epoch, position = divmod(_check_at_least(step, 0, "step"), self.steps_per_epoch)
        if epoch != self._epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.windows))
            self._epoch, self._order = epoch, order
        first = position * self.batch_size
        return self.windows[self._order[first : first + self.batch_size]]
