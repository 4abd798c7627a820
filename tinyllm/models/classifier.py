"""How does a language model classify a text?

The hidden state of the last token has seen the whole text. A linear layer, ``score``, maps it to one logit
per class: logits = W h_last with W (K, C). In a batch shorter texts are padded on the right. Attention is
causal, so no real token sees the padding, and the state to classify is that of the last *real* token.

This is the model of ``GPT2ForSequenceClassification`` and ``LlamaForSequenceClassification`` in
``transformers``, whose folders are read and written. There the last real token is the last that differs from
``pad_token_id``; here rows have ``lengths``, so that a text may end with any token.

Shapes: B batch, T time, C channels, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tinyllm import checks, nn
from tinyllm import functional as F
from tinyllm.errors import Error
from tinyllm.models.base import LanguageModel, architecture_of
from tinyllm.models.packed import padded
from tinyllm.models.saving import is_plain, save_model
from tinyllm.tensor import Tensor
from tinyllm.weights import hub

POOLINGS = ("last", "first", "mean")
SUFFIX, HEAD = "ForSequenceClassification", re.compile("LMHeadModel$|ForCausalLM$")  # of ``hub_class``
SCORE, SINGLE_LABEL = "score.weight", "single_label_classification"


class SequenceClassifier(nn.Module):
    """``model``, any language model, with a layer that scores the K ``labels`` in place of its head.

    ``pooling`` is the hidden state to classify: of the "last" real token, of the "first", or the "mean" over
    all real tokens. Names of parameters are those of the checkpoints of ``transformers``, such as
    ``transformer.h.0.attn.c_attn.weight``; ``language_model`` is the model, whose ``lm_head`` is now the
    ``score``. ``pad_id``, the id that fills rows, is only written to the config: ``transformers`` needs it.

    ``rng``, a generator or an integer seed, samples W from N(0, initializer_range²); None: a meta parameter.
    """

    def __init__(self, model: LanguageModel, labels: Sequence[str], rng, pooling: str = "last", pad_id=None):
        if not isinstance(model, LanguageModel):
            raise Error(f"model is a {type(model).__name__}: pass a language model, such as GPT2(...)")
        self.labels, self.pooling, self.pad_id = check_labels(labels), pooling, pad_id
        if pooling not in POOLINGS:
            raise Error(f"pooling is {pooling!r}: choose one of {', '.join(POOLINGS)}")
        config = model.config
        shape = config.hidden_size, len(self.labels)
        rng, like = checks.as_generator(rng), next(model.parameters())
        self.score = nn.Linear(*shape, bias=False, rng=rng, std=config.initializer_range).astype(like.dtype)
        model.lm_head = self.score
        setattr(self, model.prefix.rstrip("."), model)

    @property
    def language_model(self) -> LanguageModel:
        """The model below the ``score``."""
        return next(value for value in vars(self).values() if isinstance(value, LanguageModel))

    @property
    def config(self):
        return self.language_model.config

    @property
    def context(self) -> int:
        """The maximum sequence length."""
        return self.config.context

    def forward(self, ids, lengths=None) -> Tensor:
        """Logits (B, K) for ids (B, T), of which only the first ``lengths`` (B,) in a row are real.

        By default all are. Raises ``Error`` unless every length is an integer from 1 to T.
        """
        ids = checks.check_ids(ids, self.config.vocab_size)
        if ids.ndim != 2:
            raise Error(f"token ids have shape {ids.shape}: give (batch, time), one text as [ids]")
        B, T = ids.shape
        lengths = np.full(B, T) if lengths is None else checks.check_integers(lengths, "lengths")
        if lengths.shape != (B,) or not ((lengths >= 1) & (lengths <= T)).all():
            raise Error(
                f"lengths are {np.asarray(lengths).tolist()}: give one for each of the {B} rows, from 1 to "
                f"their {T} tokens"
            )
        model = self.language_model
        return self.score(self.pool(model.hidden_states(ids, padded(lengths, T, model)), lengths))

    def pool(self, h: Tensor, lengths: np.ndarray) -> Tensor:
        """The state (B, C) to classify, from all states (B, T, C)."""
        B, T, _ = h.shape
        if self.pooling == "mean":
            share = (np.arange(T) < lengths[:, None]) / lengths[:, None]  # (B, T): rows sum to 1
            share = np.asarray(share.astype(h.dtype), like=h.data)
            return (h * share[:, :, None]).sum(axis=1)
        last = lengths.astype(np.int64) - 1 if self.pooling == "last" else np.zeros(B, np.int64)
        return h[np.arange(B, like=h.data), np.asarray(last, like=h.data)]

    def loss(self, ids, lengths, targets, num_targets=None) -> Tensor:
        """Σ cross-entropy of the ``targets`` (B,), divided by ``num_targets`` (default: their number).

        A target is a class's index in ``labels``, or -100 to ignore the row.
        """
        return F.cross_entropy(self(ids, lengths), targets, num_targets=num_targets)

    # ------------------------------------------------------------------------ weights in files

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype=np.float32):
        """The classifier in a folder (of ``transformers``, or a run's), in ``dtype`` and eval mode.

        Raises ``Error`` if its config is not that of a classifier with two or more classes.
        """
        path = hub.find_model(name)
        model = cls.without_weights(path).astype(dtype)
        model.load_state_dict(hub.open_weights(path), source=str(path))
        return model.eval()

    @classmethod
    def without_weights(cls, path: Path):
        """The classifier at a path returned by ``hub.find_model``, with meta parameters."""
        config = dict(hub.model_config(path))
        if not is_classifier(config):
            raise Error(f"{path} contains no classifier ({SUFFIX} in its config): fine-tune one first")
        architecture = architecture_of(path)
        try:
            labels, pooling = _labels_of(config), config.pop("pooling", "last")
            config.pop("num_labels", None)
            model = architecture(architecture.config_class.from_dict(config), rng=None)
            return cls(model, labels, None, pooling, config.get("pad_token_id"))
        except Error as error:
            raise Error(f"the config of {path} is not supported: {error}") from None

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does.

        If ``transformers`` would compute something else, for instance with another ``pooling``, the config
        has a ``model_type`` that it refuses. Raises ``Error`` as ``LanguageModel.save_pretrained`` does.
        """
        model = self.language_model
        config = model.current_config()
        original = SequenceClassifier(type(model)(config, rng=None), self.labels, None)
        contents = config.to_dict(standard=is_plain(self, original) and self.pooling == "last")
        plain, own = config.hub_class, config.classifier_class or HEAD.sub(SUFFIX, config.hub_class)
        contents |= {
            "architectures": [name.replace(plain, own) for name in contents["architectures"]],
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
            "problem_type": SINGLE_LABEL,
        }
        if self.pooling != "last":
            contents["pooling"] = self.pooling
        save_model(folder, self, contents, self.state_dict(), overwrite)

    def checkpoint_keys(self, arrays: Mapping) -> dict[str, str]:
        """Parameter name -> key; see ``LanguageModel.checkpoint_keys``."""
        model = self.language_model
        found = model.checkpoint_keys(arrays).items()
        return {name if name == SCORE else model.prefix + name: key for name, key in found}


def is_classifier(config: Mapping) -> bool:
    """Whether a ``config.json`` is that of a classifier of texts."""
    found = config.get("architectures")
    return isinstance(found, list) and any(isinstance(x, str) and x.endswith(SUFFIX) for x in found)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes. Raises ``Error`` unless they are two or more different strings."""
    labels = tuple(labels)
    if not all(isinstance(label, str) and label for label in labels) or len({*labels}) < max(2, len(labels)):
        raise Error(f"labels are {list(labels)}: give the names of two or more classes, all different")
    return labels


def _labels_of(config: Mapping) -> tuple[str, ...]:
    """The labels in a config: ``id2label``, or if it is omitted ``num_labels``, by default 2, numbers."""
    if config.get("problem_type") not in (None, SINGLE_LABEL):
        raise Error(f"problem_type is {config['problem_type']!r}, and only {SINGLE_LABEL!r} is supported")
    names = config.get("id2label")
    if names is None:
        count = checks.check_at_least(config.get("num_labels", 2), 1, "num_labels")
        if count > checks.MAX_WIDTH:
            raise Error(f"num_labels must be at most {checks.MAX_WIDTH:,}, not {count:,}")
        names = {number: f"LABEL_{number}" for number in range(count)}
    if not isinstance(names, Mapping) or {str(key) for key in names} != {str(n) for n in range(len(names))}:
        raise Error(f"id2label is {names!r}: it must map the numbers from 0 on to names")
    return check_labels([names[key] for key in sorted(names, key=int)])
