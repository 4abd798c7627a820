"""How good is a classifier? Accuracy, precision, recall, the confusion matrix, and what to compare them with.

Of two classes with 90% and 10% of the texts, one can be right in 90% of the cases without reading. So every
accuracy is printed beside that of the most frequent class and of naive Bayes, which only counts words.

Shapes: N examples, K classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.errors import Error

WORD = re.compile(r"\w+(?:'\w+)*")

NAMED = 30  # classes with labels and counts in a picture


def confusion_matrix(targets: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """(K, K): in row t and column p the number of examples of class t that were predicted as class p."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (np.asarray(targets, np.int64), np.asarray(predictions, np.int64)), 1)
    return matrix


@dataclass(frozen=True)
class Scores:
    """The scores of a confusion matrix (K, K), each class against all others:

        precision = tp / (tp + fp)     recall = tp / (tp + fn)     F1 = 2 tp / (2 tp + fp + fn)

    tp counts the examples of a class that were found, fn those that were missed, and fp those of other
    classes taken for it. A score whose denominator is 0 is 0, as in scikit-learn.
    """

    matrix: np.ndarray
    labels: tuple[str, ...]

    @property
    def number(self) -> int:
        """The number of examples."""
        return int(self.matrix.sum())

    @property
    def accuracy(self) -> float:
        return float(self.matrix.trace() / max(1, self.number))

    @property
    def precision(self) -> np.ndarray:  # (K,)
        return _ratio(self.matrix.diagonal(), self.matrix.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:  # (K,)
        return _ratio(self.matrix.diagonal(), self.matrix.sum(axis=1))

    @property
    def f1(self) -> np.ndarray:  # (K,)
        return _ratio(2 * self.matrix.diagonal(), self.matrix.sum(axis=0) + self.matrix.sum(axis=1))

    def to_json(self) -> dict:
        """All scores as JSON values."""
        classes = {
            label: {"precision": p, "recall": r, "f1": f, "examples": n}
            for label, p, r, f, n in zip(
                self.labels,
                *(scores.tolist() for scores in (self.precision, self.recall, self.f1)),
                self.matrix.sum(axis=1).tolist(),
            )
        }
        return {
            "examples": self.number,
            "accuracy": self.accuracy,
            "macro_f1": float(self.f1.mean()),
            "classes": classes,
            "confusion": self.matrix.tolist(),
        }

    def describe(self) -> str:
        """The scores of each class, then the confusion matrix, as a table of text."""
        columns = ["precision", "recall", "F1", "examples", *(f"as {label}" for label in self.labels)]
        rows = [
            [f"{p:.1%}", f"{r:.1%}", f"{f:.1%}", f"{line.sum():,}", *(f"{count:,}" for count in line)]
            for p, r, f, line in zip(self.precision, self.recall, self.f1, self.matrix)
        ]
        return _table(["", *columns], [[label, *row] for label, row in zip(self.labels, rows)])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of columns, the first aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]
        )
        for row in (head, *rows)
    )


# ------------------------------------------------------------------------------------ baselines


def majority(targets: Sequence[int]) -> int:
    """The most frequent class; of several the first."""
    return int(np.bincount(np.asarray(targets)).argmax())


class NaiveBayes:
    """Multinomial naive Bayes: the classes' frequencies, and the frequencies of words in each class.

    A text with the words w_1 … w_n is assigned to the class c with the largest

        log P(c) + Σ_i log P(w_i | c),   P(w | c) = (count of w in c + 1) / (words in c + vocabulary)

    Words, in lower case, that did not occur in training are ignored. "Naive" is the assumption that words are
    independent given the class. Manning, Raghavan and Schütze, "Introduction to Information Retrieval"
    (2008), section 13.2.
    """

    def __init__(self, texts: Sequence[str], targets: Sequence[int], classes: int):
        if not texts or len(texts) != len(targets):
            raise Error(f"{len(texts)} texts do not fit {len(targets)} targets: give a target for each text")
        counts = [Counter() for _ in range(classes)]
        for text, target in zip(texts, targets):
            counts[target].update(words(text))
        vocabulary = {word for count in counts for word in count}
        totals = [count.total() + len(vocabulary) for count in counts]
        self.log_prior = np.log(np.maximum(np.bincount(targets, minlength=classes), 1e-300) / len(targets))
        self.log_likelihood = {
            word: np.array([math.log((count[word] + 1) / total) for count, total in zip(counts, totals)])
            for word in vocabulary
        }

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The class of each text."""
        known, zero = self.log_likelihood, np.zeros_like(self.log_prior)
        return [
            int((self.log_prior + sum((known[word] for word in words(text) if word in known), zero)).argmax())
            for text in texts
        ]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


# -------------------------------------------------------------------------------------- picture


def draw_confusion(scores: Scores, path: Path) -> None:
    """Draw the confusion matrix as a PNG: counts, coloured by their share of the row. Needs matplotlib.

    Of more than ``NAMED`` classes, which no page has space for, only the colours are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = len(scores.labels)
    named = range(classes if classes <= NAMED else 0)
    side = 0.7 * min(classes, NAMED)
    figure = Figure(figsize=(3 + side, 2.4 + side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = scores.matrix / np.maximum(1, scores.matrix.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in named:
        for column in named:
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = f"{scores.matrix[row, column]:,}"
            axes.text(column, row, count, ha="center", va="center", color=colour)
    if named:
        axes.set_xticks(named, scores.labels, rotation=45, ha="right")
        axes.set_yticks(named, scores.labels)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_parse_math(False)  # a $ in a label does not start a formula
    number = "" if named else ", number of the class from 0"
    title = f"accuracy {scores.accuracy:.1%} of {scores.number:,} texts"
    axes.set(xlabel=f"predicted{number}", ylabel=f"true{number}", title=title)
    figure.savefig(path, dpi=150, format="png")
