"""How can one pass of a model give several tokens?

A decoding step takes about as long as reading the weights once, for one token or for a few. So a cheap guess
of the next tokens, the candidates, is processed in one pass, which gives the logits after each of them:

    text        … the  old
    candidates             bridge  over  the  river
    logits after     old ↗ bridge ↗ over ↗ the ↗ river ↗
    sampled          bridge   over     a                    2 candidates accepted, 3 tokens from one pass

The cached keys and values of the candidates from the first wrong one on are removed (``Cache.rollback``).

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), accept a
candidate x with probability min(1, p(x) / q(x)), p and q being the model's and the draft's distributions, and
otherwise sample from the normalised max(0, p - q): another text than that of plain generation, with the same
distribution. Here each token is sampled from p as always, with its usual uniform number, and the candidate is
accepted if it is equal: the very text of plain generation, which is easy to check. For greedy candidates both
rules accept with the same probability, p(x). (In float32 a product of several rows is rounded differently
from that of one row, so the texts may differ after a near-tie.)

Candidates come from the text itself, where its last tokens occurred before (prompt lookup: Saxena,
github.com/apoorvumang/prompt-lookup-decoding; Yang et al., arXiv 2304.04487, section 3), or from a smaller
model. How many are worth their cost, if any, is estimated from how many were right so far.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.backend.threads import step_of_few_rows
from tinyllm.errors import Error
from tinyllm.models.cache import SLACK, Cache
from tinyllm.models.rope import longest_cached
from tinyllm.nn import Module, evaluating
from tinyllm.tensor import no_grad

# The time of a pass of so many tokens, in steps of one token: SmolLM2-135M on two cores, between those with
# AVX-512 (2.0, 2.6, 2.1, 2.6, 2.9, 3.2, 4.1) and AVX2 (3.5, 4.0, 3.6, 4.3, 4.0, 4.5, 4.0). A step repeats
# recorded calls (``decoding.py``); a pass of several tokens runs the model, and BLAS copies weights for it.
# The numbers are fixed, not measured while generating, so that a call gives the same text again in float32.
PASS_COST = {1: 1.0, 2: 2.7, 3: 3.3, 4: 2.8, 6: 3.4, 8: 3.4, 12: 3.8, 16: 4.0}
MOST_CANDIDATES = min(max(PASS_COST) - 1, SLACK)


@functools.cache
def pass_cost(tokens: int) -> float:
    """The time of a pass of ``tokens`` tokens in steps, interpolated from ``PASS_COST``."""
    return float(np.interp(tokens, list(PASS_COST), list(PASS_COST.values())))


def worthwhile(rates: Iterable[float], most: int, cost: float = 0.0) -> int:
    """How many candidates make the most tokens per time; 0 if no number is faster than plain steps.

    Candidate j is right with probability ``rates[j]`` if those before it are, and takes ``cost`` steps to
    propose. A pass with k of them gives 1 + Σ_{j ≤ k} Π_{i ≤ j} rates[i] tokens on average.
    """
    best, count, tokens, right = 1.0, 0, 1.0, 1.0
    for k, rate in enumerate(itertools.islice(rates, most), 1):
        right *= rate
        tokens += right
        speed = tokens / (pass_cost(1 + k) + k * cost)
        if speed > best:
            best, count = speed, k
    return count


class Speculation:
    """Candidates of one text: those in its cache that are not yet accepted, and the logits after them."""

    def __init__(self, drafter: PromptLookup | DraftModel):
        self.drafter = drafter
        self.candidates: list[int] = []
        self.logits: list[np.ndarray] = []  # (1, V) after each candidate

    def accepted(self, text: Sequence[int], cache: Cache) -> np.ndarray | None:
        """The logits (1, V) after the text if its last token equals the candidate for it.

        If not, this and the following candidates are removed from the cache, and the result is None.
        """
        if self.candidates and self.candidates[0] == text[-1]:
            del self.candidates[0]
            return self.logits.pop(0)
        self.withdraw(text, cache)
        return None

    def propose(self, text: Sequence[int], cache: Cache, most: int) -> list[int]:
        """At most ``most`` candidates for the tokens after a text whose last token is not in the cache."""
        if len(text) != len(cache.texts[0]) + 1:  # a prompt: the logits at its last position are enough
            return []
        return self.drafter.candidates(text, min(most, int(cache.free[0]) - 1, MOST_CANDIDATES))

    def keep(self, candidates: list[int], logits: np.ndarray) -> np.ndarray:
        """Keep what a pass of the last token and the candidates gave, (1 + k, V); returns the first row."""
        self.candidates, self.logits = candidates, list(logits[1:, None])
        return logits[:1]

    def tidy(self, steps: Iterator, text: Sequence[int], cache: Cache) -> Iterator:
        """The same steps; at their end, or when they are abandoned, the cache holds no more than the text."""
        try:
            yield from steps
        finally:
            self.withdraw(text, cache)

    def withdraw(self, text: Sequence[int], cache: Cache) -> None:
        """Remove the candidates from the cache, unless it was used for another text since."""
        cached, count = cache.texts[0], len(self.candidates)
        own = [*text[: len(cached) - count], *self.candidates]
        self.candidates = []
        if count and cached == own:
            cache.rollback(count)


class PromptLookup:
    """Candidates are the tokens that followed the latest earlier occurrence of the longest known n-gram.

    ``rates[n]`` estimates how often the next token is right after a match of n tokens (``LONGEST``: or more).
    It is updated with every token of the text, whether a candidate was proposed or not. So speculation ends
    where the text is new, and begins again, at no cost, where it repeats itself.
    """

    LONGEST = 5
    RATES = (0.0, 0.1, 0.3, 0.45, 0.6, 0.75)  # until there is experience
    WEIGHT = 0.1  # of a new observation

    def __init__(self, prompt: Sequence[int]):
        self.prompt_length, self.read = len(prompt), 0
        self.rates = list(self.RATES)
        self.followers: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after its latest one is
        self.match = (0, 0)  # the length of the n-gram that ends the text, and its follower

    def candidates(self, text: Sequence[int], most: int) -> list[int]:
        for i in range(self.read, len(text)):
            self._read(text, i)
        self.read = len(text)
        n, start = self.match
        # Each candidate that is right makes the match one token longer.
        count = (
            worthwhile((self.rates[min(n + j, self.LONGEST)] for j in itertools.count()), most) if n else 0
        )
        period = len(text) - start  # past the end of the text its end is repeated
        return [text[start + j % period] for j in range(count)]

    def _read(self, text: Sequence[int], i: int) -> None:
        """Learn from token i of the text."""
        n, follower = self.match
        if n and i >= self.prompt_length:
            self.rates[n] += self.WEIGHT * ((text[follower] == text[i]) - self.rates[n])
        self.match = (0, 0)
        for n in range(1, min(self.LONGEST, i + 1) + 1):
            if n <= i:
                self.followers[tuple(text[i - n : i])] = i
            follower = self.followers.get(tuple(text[i + 1 - n : i + 1]))
            if follower is not None:
                self.match = (n, follower)


class DraftModel:
    """Candidates are the greedy tokens of a smaller model with the same vocabulary and its own cache.

    ``right / seen`` estimates how often they are right. Where they do not pay, the draft pauses, each time
    twice as long.
    """

    START = (3.4, 4.0)  # right and seen, until there is experience
    DECAY = 0.9  # of the older experience, with each candidate
    PAUSE = 64  # tokens

    def __init__(self, draft: Module, model: Module, capacity: int):
        self.draft, self.cache = draft, draft.new_cache(1, capacity)
        self.longest = min(self.cache.capacity, longest_cached(draft.config))
        self.cost = draft.num_parameters() / model.num_parameters()  # of a token, in the model's steps
        self.right, self.seen = self.START
        self.pause, self.resume = self.PAUSE, 0
        self.proposed: list[int] = []
        self.length = 0  # of the text that they follow

    def candidates(self, text: Sequence[int], most: int) -> list[int]:
        self._learn(text)
        self.proposed, self.length = [], len(text)
        most = min(most, self.longest - len(text) + 1)
        if most > 0 and len(text) >= self.resume:
            count = worthwhile(itertools.repeat(self.right / self.seen), most, self.cost)
            if count:
                self.proposed = self._greedy(text, count)
            elif most == MOST_CANDIDATES:
                self.resume, self.pause = len(text) + self.pause, 2 * self.pause
                self.right, self.seen = self.START
        return self.proposed

    def _learn(self, text: Sequence[int]) -> None:
        """Compare the candidates with the tokens that were sampled, up to the first wrong one."""
        for candidate, token in zip(self.proposed, text[self.length :]):
            self.right = self.DECAY * self.right + (candidate == token)
            self.seen = self.DECAY * self.seen + 1
            if candidate != token:
                return

    def _greedy(self, text: Sequence[int], count: int) -> list[int]:
        self.cache.keep_prefix([text])
        candidates, vocab_size = [], self.draft.config.vocab_size
        new = list(text[len(self.cache.texts[0]) :])
        with evaluating(self.draft), no_grad():
            for _ in range(count):
                with step_of_few_rows(len(new)):
                    logits = self.draft([new], last_only=True, cache=self.cache).data[0, 0]
                new = [int(to_device(logits[:vocab_size], "cpu").argmax())]
                candidates += new
        return candidates


def speculation(speculate, model: Module, prompts: Sequence[Sequence[int]], capacity: int) -> Speculation:
    """The speculation that ``generate`` was asked for, for texts of up to ``capacity`` tokens.

    Raises ``Error`` if it is neither "prompt" nor a model with the same vocabulary, or for several prompts.
    """
    if len(prompts) != 1:
        raise Error(f"speculate needs one prompt at a time, not {len(prompts)}: omit it, or give one prompt")
    if isinstance(speculate, str) and speculate == "prompt":
        return Speculation(PromptLookup(prompts[0]))
    check_draft(speculate, model)
    return Speculation(DraftModel(speculate, model, capacity))


def check_draft(draft, model: Module) -> None:
    """Raise ``Error`` unless ``draft`` is a language model with as many ids as the model."""
    if not isinstance(draft, Module) or not hasattr(draft, "new_cache"):
        raise Error(f'speculate is {draft!r}: give "prompt" or a smaller language model')
    sizes = draft.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise Error(
            f"the draft model has a vocabulary of {sizes[0]:,} tokens and the model of {sizes[1]:,}: "
            "speculate with a smaller model that has the same tokenizer"
        )
