"""Comparison of a tinyllm model with its PyTorch twin and with ``transformers``, layer by layer.

All three run with the same weights on the same tokens. The outputs of all layers and all gradients are
compared.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from parity.compare.capture import OUTPUT, capture
from parity.compare.layers import BOUNDS, Comparison, Row, compare_captures
from parity.twins import bridge
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES
from tinyllm.nn import Module

FUSED = (
    "tinyllm's loss is the one used in training, which fuses the head and the cross-entropy. It never holds "
    "the gradient of all logits at once, so the gradient of lm_head's output exists only on the other sides."
)

THEIR_LOSS = (
    "The loss of transformers is computed here in float64, from its logits. Its own loss converts the logits "
    "to float32 even in a float64 model, which is an error of about 3e-8."
)

COPIED = "The weights of transformers were copied from tinyllm."

LOADED = "Both tinyllm and transformers loaded the folder with their own loaders."


@dataclass
class Findings:
    """The result of ``examine``: tinyllm against its twin and against transformers."""

    twin: Comparison
    theirs: Comparison
    facts: dict[str, str] = field(default_factory=dict)  # model, batch, dtype, versions
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[tuple[Row | None, Row | None]]:
        """(against the twin, against transformers), in the order of computation."""
        twin = {(row.kind, row.name): row for row in self.twin.rows}
        theirs = {(row.kind, row.name): row for row in self.theirs.rows}
        return [(twin.get(key), theirs.get(key)) for key in twin | theirs]

    @property
    def first(self) -> tuple[Row, str] | None:
        """The first row that exceeds its bound, with its reference: "the twin" or "transformers"."""
        for line in self.lines:
            for row, side in zip(line, ("the twin", "transformers")):
                if row is not None and not row.agrees:
                    return row, side
        return None

    def verdict(self) -> str:
        """One sentence: all comparisons agree, or the first layer that differs."""
        if self.first is None:
            worst = [f"{side.worst.relative:.1e}" for side in (self.twin, self.theirs)]
            count = len(self.twin.rows) + len(self.theirs.rows)
            return (
                f"All {count} comparisons are within their bounds. The errors closest to their bounds are "
                f"{worst[0]} (twin) and {worst[1]} (transformers)."
            )
        row, side = self.first
        rows = (self.twin if side == "the twin" else self.theirs).rows
        before = rows[rows.index(row) - 1] if row is not rows[0] else None
        after = f"Everything up to the {before} agrees." if before else "It is the first row."
        return (
            f"First diverging layer: {row.name}. The {row} differs from that of {side} by "
            f"{row.relative:.1e} (bound {row.bound:.1e}). {after}"
        )

    def one_sided(self) -> dict[str, list[str]]:
        """The names that were not compared, by side; ``*`` stands for all block numbers."""
        return {
            "in tinyllm, not in the twin": _grouped(self.twin.only_ours),
            "in the twin, not in tinyllm": _grouped(self.twin.only_theirs),
            "in tinyllm, not in transformers": _grouped(self.theirs.only_ours),
            "in transformers, not in tinyllm": _grouped(self.theirs.only_theirs),
        }

    def __str__(self) -> str:
        """The page as plain text."""
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        width = max(len((a or b).name) for a, b in self.lines)
        numbers = "{:>8}  {:>8}".format
        title = f"{'':<{width}}  {'':22}  {'':<18}  {'--- twin ---':^18}  {'- transformers -':^18}"
        head = f"{'layer':<{width}}  {'compared':22}  {'shape':<18}  {numbers('abs', 'relative')}"
        lines += ["", title, f"{head}  {numbers('abs', 'relative')}  {'bound':>8}"]
        for pair in self.lines:
            row = pair[0] or pair[1]
            cells = [numbers(*(f"{x:.1e}" for x in (r.absolute, r.relative)) if r else "--") for r in pair]
            verdict = "agrees" if all(r is None or r.agrees for r in pair) else "DIFFERS"
            lines.append(
                f"{row.name:<{width}}  {row.kind:<22}  {row.shape!s:<18}  {'  '.join(cells)}  "
                f"{row.bound:8.1e}  {verdict}"
            )
        lines.append("")
        lines += [f"Only {side}: {', '.join(names)}." for side, names in self.one_sided().items() if names]
        return "\n".join([*lines, *self.notes, "", self.verdict()])


def examine(ours: Module, twin, theirs, ids, targets) -> Findings:
    """Run the three models on ids and targets, both (B, T), forward and backward, and compare them.

    ``ours`` is a tinyllm model, ``twin`` its twin (``bridge.to_torch``) and ``theirs`` its counterpart in
    ``transformers`` (``bridge.to_transformers``). All three must have the same weights.
    """
    batch = (ids, targets)
    logits = capture(ours, ids, lambda model, ids: model(ids).detach())  # the fused loss has no logits
    loss = capture(ours, batch, _loss)
    run = replace(loss, outputs=logits.outputs | loss.outputs)
    names = bridge.transformers_names(ours, theirs)
    facts = {
        "batch": f"{ids.shape[0]} × {ids.shape[1]} tokens, {(targets != -100).sum()} targets",
        "dtype": str(next(ours.parameters()).dtype),
        "versions": f"NumPy {np.__version__}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }
    return Findings(
        _with_loss(compare_captures(run, capture(twin, batch, _loss))),
        _with_loss(compare_captures(run, capture(theirs, batch, _their_loss), names)),
        facts,
        [FUSED, THEIR_LOSS, *filter(None, [twin.note]), BOUNDS],
    )


def _loss(model, ids, targets):
    return model.loss(ids, targets)


def _their_loss(model, ids, targets):
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100)


def _with_loss(comparison: Comparison) -> Comparison:
    """The comparison with the returned value under the name "loss"."""
    rows = [replace(row, name="loss") if row.name == OUTPUT else row for row in comparison.rows]
    return replace(comparison, rows=rows)


def _grouped(names: list[str]) -> list[str]:
    """The names with block numbers grouped: h.0.mlp.act and h.1.mlp.act become h.*.mlp.act (2)."""
    count = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return [f"{name} ({times})" if times > 1 else name for name, times in count.items()]


# ------------------------------------------------------------------------- models and batches


def random_models(arch: str, sizes: dict, dtype: str, seed: int):
    """(tinyllm model, twin, transformers model) with the same random weights, in eval mode.

    Matrices preserve the scale of their inputs. Biases and norms are perturbed with a standard deviation of
    0.3, because at their initial values 0 and 1 a missing bias or norm weight would not be noticed.
    """
    rng = np.random.default_rng(seed)
    ours = ARCHITECTURES[arch]
    model = ours(bridge.twin_of(ours).random_config(**sizes), rng=rng).astype(dtype).eval()
    for parameter in model.parameters():
        noise = rng.standard_normal(parameter.shape)
        if parameter.ndim == 2:
            parameter.data[...] = noise / np.sqrt(parameter.shape[1])
        else:
            parameter.data[...] += 0.3 * noise
    return model, bridge.to_torch(model), bridge.to_transformers(model)


def models_of(folder: Path, dtype: str):
    """(tinyllm model, twin, transformers model, note on how the latter was loaded) for a model's folder."""
    ours, twin = bridge.load_pair(folder, dtype)
    if not twin.can_be_published(ours.config):
        return ours, twin, bridge.to_transformers(ours), COPIED
    kind = getattr(transformers, twin.published)
    return ours, twin, twin.exact(_read_by_transformers(kind, folder, dtype, twin.attention)), LOADED


def _read_by_transformers(kind, folder: Path, dtype: str, attention: str):
    transformers.utils.logging.disable_progress_bar()
    theirs = kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    return theirs.eval()


def random_batch(model: Module, batch: int, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and targets, both (batch, tokens); about one target in five is ignored (-100)."""
    _check_length(model, tokens)
    V, rng = model.config.vocab_size, np.random.default_rng(seed)
    ids = rng.integers(0, V, (batch, tokens))
    targets = np.where(rng.random(ids.shape) < 0.2, -100, rng.integers(0, V, ids.shape))
    targets[0, 0] = rng.integers(0, V)
    return ids, targets


def given_batch(model: Module, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of at least two ids as (ids, targets), both (1, T): each target is the next id."""
    if len(ids) < 2:
        raise Error("--ids needs at least two token ids, because each is the target of the one before")
    _check_length(model, len(ids) - 1)
    checked = check_ids(np.array([ids]), model.config.vocab_size, name="--ids")
    return checked[:, :-1], checked[:, 1:]


def _check_length(model: Module, tokens: int) -> None:
    if tokens > model.context:
        raise Error(f"{tokens} tokens exceed the model's context of {model.context}: use fewer")
