"""What does a language model have besides its architecture?

A config that is read from a ``config.json`` and written to one; logits and loss from its hidden states; a
cache; its weights from a folder, a file or the hub, and into a folder; a vocabulary that can grow. An
architecture (``gpt2.py``, ``llama.py``) is a config, the layers, and ``hidden_states``.

Shapes: B batch, T time, S keys, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from tinyllm import checks, nn
from tinyllm import functional as F
from tinyllm.backend import compute_dtype
from tinyllm.errors import Error
from tinyllm.models.cache import Cache, LayerCache
from tinyllm.tensor import Tensor
from tinyllm.weights import hub, safetensors

ARCHITECTURES: dict[str, type[LanguageModel]] = {}  # model_type of a config.json -> the model's class


def register(model_class):
    """Make an architecture known to ``load_model``, to ``tinyllm train`` and whoever asks ARCHITECTURES."""
    ARCHITECTURES[model_class.config_class.model_type] = model_class
    return model_class


# Keys of a config.json that would change the computation, with the one value that is implemented. An
# architecture that has such a field implements more.
FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "reorder_and_upcast_attn": False,
    "rope_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}

# Keys of a config.json that say nothing about the computation of the logits
BOOKKEEPING = set(
    "_name_or_path _num_labels architectures bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "gradient_checkpointing id2label is_llama_config label2id max_sequence_length n_ctx n_special "
    "output_attentions output_hidden_states output_past pad_token_id predict_special_tokens pretraining_tp "
    "problem_type return_dict summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj task_specific_params torch_dtype transformers.js_config transformers_version "
    "use_cache".split()
)


class ModelConfig:
    """What the config of every architecture, a frozen dataclass of Hugging Face's names, can do.

    Each also defines ``context``, the longest sequence; ``kv_shape``, (key-value heads, head size); and
    ``of_size``, what the options of ``tinyllm train`` mean here, with an Error for one that it does not have.
    """

    model_type = ""
    hub_class = ""  # the class in ``transformers``
    sizes: Mapping[str, dict] = {}  # published ones: name -> fields

    @classmethod
    def preset(cls, size: str, **changes):
        """A published size with ``changes`` to single fields."""
        if size not in cls.sizes:
            raise Error(f"unknown {cls.model_type} size {size!r}; there are {', '.join(cls.sizes)}")
        return cls(**cls.sizes[size] | changes)

    @classmethod
    def from_dict(cls, config: Mapping):
        """From a ``config.json`` as it stands. A key that might change the model is never ignored."""
        ours, fixed = {field.name for field in fields(cls)}, FIXED | {"model_type": cls.model_type}
        for key, value in fixed.items():
            if key not in ours and config.get(key, value) != value:
                raise Error(
                    f"{cls.__name__} computes with {key}={value!r} only, and the config has {config[key]!r}"
                )
        unknown = config.keys() - ours - fixed.keys() - BOOKKEEPING
        if unknown:
            raise Error(
                f"unknown config keys: {', '.join(sorted(unknown))}; remove them if they do not change "
                f"what the model computes"
            )
        return cls(**{key: value for key, value in config.items() if key in ours})

    def to_dict(self) -> dict:
        """A ``config.json`` that ``transformers`` reads too."""
        return {"architectures": [self.hub_class], "model_type": self.model_type, **asdict(self)}

    def check(self, layers: tuple, widths: tuple, probabilities: tuple, positive: tuple, choices: dict):
        """Raise Error unless the named fields, and all that are whole numbers, have values that make sense.

        ``layers`` and ``widths`` are the sizes that have a limit, see ``checks.check_fields``.
        """
        checks.check_fields(self, layers=layers, widths=widths)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type.startswith("int") and value is not None and value < 1:
                raise Error(f"{field.name} must be a whole number of at least 1, not {value!r}")
        for name in probabilities:
            if not 0 <= getattr(self, name) < 1:
                raise Error(f"{name} must be at least 0 and below 1, not {getattr(self, name)!r}")
        for name in positive:
            if not getattr(self, name) > 0:
                raise Error(f"{name} must be positive, not {getattr(self, name)!r}")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise Error(f"{name} {getattr(self, name)!r} is not supported; use one of {', '.join(known)}")


class LanguageModel(nn.Module):
    """Base of every architecture. It is made with ``(config, rng)``; the rng draws the initial weights.

    With ``rng=None`` they are meta parameters, which take no memory until ``load_state_dict``. An
    architecture sets ``config``, its layers (``lm_head`` among them) and what is below, and defines
    ``hidden_states``.

    Any layer may be replaced, by assignment or with ``nn.replace``: a model calls its layers and does not
    look inside. ``lm_head`` may be any module, and have another number of classes.
    """

    config_class = ModelConfig
    token_embedding = ""  # the name of the layer that ids go to
    blocks = ""  # the name of the list of blocks
    prefix = ""  # what published files write before all names but the head's
    not_parameters: tuple[str, ...] = ()  # endings of keys in published files that no parameter has
    learned_positions = False  # then a cache whose oldest entries are dropped would be wrong

    def hidden_states(self, ids, cache: Cache | None = None) -> Tensor:
        """What the head reads: (B, T, C) of ids (B, T), after the final norm.

        With a ``cache`` the ids continue the text it holds, and are added to it.
        """
        raise TypeError(f"{type(self).__name__} defines no hidden_states()")

    def forward(self, ids, *, last_only: bool = False, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T), or with ``last_only`` (B, 1, V); see ``hidden_states``."""
        h = self.hidden_states(ids, cache)  # (B, T, C)
        return self.lm_head(h[:, -1:] if last_only else h)

    def loss(self, ids, targets, num_targets=None, weights=None) -> Tensor:
        """Σ cross-entropy over targets that are not -100, divided by ``num_targets`` (default: their number).

        ``weights``, an array of the targets' shape, multiply each target's loss.
        """
        return nn.call(self, self._loss, ids, targets, num_targets, weights)

    def _loss(self, ids, targets, num_targets, weights):
        head, options = self.lm_head, {"num_targets": num_targets, "weights": weights}
        plain_head = _is(head.forward, nn.Linear.forward) and _is(head.__call__, nn.Module.__call__)
        if not (plain_head and _is(self.forward, LanguageModel.forward)):
            return F.cross_entropy(self.forward(ids), targets, **options)
        h = self.hidden_states(ids)  # (B, T, C); all logits are never in memory together
        return F.linear_cross_entropy(h, head.weight, targets, linear_bias=head.bias, **options)

    @property
    def context(self) -> int:
        """The longest sequence the model takes."""
        return self.config.context

    def new_cache(self, batch: int, room: int | None = None, padding=None) -> Cache:
        """An empty ``Cache`` for ``batch`` rows of at most ``room`` tokens (None: the context)."""
        layers, (heads, head_size) = len(getattr(self, self.blocks)), self.config.kv_shape
        room = self.context if room is None else min(room, self.context)
        like = next(self.parameters()).data
        return Cache(layers, batch, heads, room, head_size, like, padding, compute_dtype(like))

    def start(self, ids, cache: Cache | None) -> tuple[np.ndarray, np.ndarray, list[LayerCache | None]]:
        """What ``hidden_states`` begins with: ids (B, T), checked; their positions; each layer's cache."""
        if nn.is_meta(next(self.parameters()).data):
            raise Error("the model has no weights yet (rng=None): give an rng, or load_state_dict()")
        ids = checks.check_ids(ids, self.config.vocab_size)
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise Error(
                f"token ids must have shape (batch, time) with at most {self.context} positions, "
                f"not {ids.shape}"
            )
        layers = len(getattr(self, self.blocks))
        if cache is None:
            return ids, np.arange(ids.shape[1]), [None] * layers
        if len(cache.keys) != layers:
            raise Error(
                f"the cache is for {len(cache.keys)} layers, and the model has {layers}: make a new one"
            )
        return ids, cache.positions(ids.shape[1]), cache.layers(*ids.shape)

    # -------------------------------------------------------------------------- weights in files

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype=np.float32):
        """From what ``load_model`` takes, in ``dtype``, in eval mode."""
        path = hub.find_model(name)
        model = cls.without_weights(path).astype(dtype)
        model.load_state_dict(hub.open_weights(path), source=str(path))
        return model.eval()

    @classmethod
    def without_weights(cls, path: Path):
        """The model at a path that ``hub.find_model`` gave, with meta parameters (see ``nn.normal``)."""
        config = hub.model_config(path)
        ours = cls.config_class.model_type
        kind = config.get("model_type", ours)
        if kind != ours:
            raise Error(f"{path} holds a model of type {kind!r}, not {ours!r}: use tinyllm.load_model")
        try:
            return cls(cls.config_class.from_dict(config), rng=None)
        except Error as error:
            raise Error(f"the config of {path} is refused: {error}") from None

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does.

        Every parameter is written, those of replaced layers under their own names: rebuild such a model and
        give it the file with ``load_state_dict``. Raises Error, naming the layers, if the folder would load
        as the plain architecture without a word: layers of another class, but with the same parameters.
        """
        config = replace(self.config, tie_word_embeddings=self._is_tied())
        self._check_replaced_layers(config)
        empty = [name for name, parameter in self.named_parameters() if nn.is_meta(parameter.data)]
        if empty:
            raise Error(f"{', '.join(empty)} have no values yet (rng=None): load them before saving")
        tensors = {
            name if name.startswith("lm_head.") else self.prefix + name: array
            for name, array in self.state_dict().items()
        }
        safetensors.save_folder(folder, config.to_dict(), tensors, overwrite=overwrite)

    def _check_replaced_layers(self, config: ModelConfig) -> None:
        models = self, type(self)(config, rng=None)
        shapes, plain_shapes = ({n: a.shape for n, a in model.state_dict().items()} for model in models)
        if shapes != plain_shapes:
            return  # whoever loads it is told the names
        kinds, plain_kinds = ({n: type(m) for n, m in model.named_modules()} for model in models)
        replaced = [name for name in kinds | plain_kinds if kinds.get(name) is not plain_kinds.get(name)]
        if replaced:
            raise Error(
                f"a folder would not tell the replaced layers {', '.join(replaced)} from plain ones: their "
                "parameters have the same names; save model.state_dict() instead"
            )

    def _is_tied(self) -> bool:
        """Whether the head has a parameter of the embedding's now, whatever the config says."""
        embedding = {id(tensor) for tensor in getattr(self, self.token_embedding).parameters()}
        return any(id(tensor) in embedding for tensor in self.lm_head.parameters())

    def checkpoint_keys(self, arrays: Mapping) -> dict[str, str]:
        """Parameter name -> key, for any of the layouts the architecture is published in.

        Names may begin with ``prefix``; ``not_parameters`` are omitted; a tied head may be stored a second
        time, if it equals the embedding.
        """
        keys, own = {}, {name for name, _ in self.named_parameters()}
        for key in arrays:
            name = key.removeprefix(self.prefix)
            if name in keys:
                raise Error(f"{key} and {keys[name]} are both given: keep one of them")
            if name in own or not name.endswith(self.not_parameters):
                keys[name] = key
        embedding = f"{self.token_embedding}.weight"
        if self._is_tied() and {"lm_head.weight", embedding} <= keys.keys():
            head = keys.pop("lm_head.weight")
            if not np.array_equal(arrays[head], arrays[keys[embedding]]):
                raise Error(f"{head} differs from the embedding, and tie_word_embeddings is true")
        return keys

    # ------------------------------------------------------------------------------- vocabulary

    def resize_token_embeddings(self, vocab_size: int, rng: np.random.Generator) -> None:
        """Make room for ids up to ``vocab_size`` - 1, in place; the old ids keep their weights bit for bit.

        The new rows of the embedding, and of a head that is not tied to it, are drawn from
        N(0, initializer_range²); the new biases of the head are 0. Gradients are dropped. Make the
        optimiser afterwards: its averages have the shape of the parameters it was made for. The old
        ids' logits are the same sums of products, though a BLAS may add up a matrix of another size in
        another order, and then the last bits differ. Raises ``Error``, and changes nothing, if the model has
        more ids already, or an embedding or a head without ``weight`` (and ``bias``) of a row for each.
        """
        old, std = self.config.vocab_size, self.config.initializer_range
        if not checks.is_integer(vocab_size) or vocab_size < old:
            raise Error(
                f"vocab_size {vocab_size!r} does not hold the model's {old} ids: choose a "
                "whole number of at least as many"
            )
        if not isinstance(rng, np.random.Generator):
            raise Error(f"rng is {rng!r}: give np.random.default_rng(seed), which draws the new rows")
        new, tensors = int(vocab_size) - old, {}  # by id: a tied weight grows once
        for name in (self.token_embedding, "lm_head"):
            layer = getattr(self, name)
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            if not (_has_rows(weight, old, ndim=2) and (bias is None or _has_rows(bias, old, ndim=1))):
                raise Error(
                    f"{name}, a {type(layer).__name__}, cannot grow: it needs a weight, and a bias or None, "
                    f"with a row for each of the model's {old} ids"
                )
            tensors |= {id(tensor): tensor for tensor in (weight, bias) if tensor is not None}
        self.zero_grad()
        for tensor in tensors.values():
            shape = (new, *tensor.shape[1:])
            rows = nn.normal(rng, shape, std).data if tensor.ndim == 2 else np.zeros(shape)
            rows = np.asarray(rows, dtype=tensor.dtype, like=tensor.data)
            tensor.replace(np.concatenate([tensor.data, rows]))
        self.config = replace(self.config, vocab_size=int(vocab_size))


def _is(method, function) -> bool:
    """Whether a bound method is this function, neither overridden in a class nor replaced in an object."""
    return getattr(method, "__func__", None) is function


def _has_rows(tensor, rows: int, ndim: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == ndim and tensor.shape[0] == rows


def look_back(query: Tensor, key: Tensor, value: Tensor, cache: LayerCache | None, score_bias=None):
    """What the queries (B, H, T, D) attend to: keys and values (B, G, S, D), and a mask or None.

    With a cache the keys and values of the text so far come before the new ones, and the mask hides those
    of padding.

    ``score_bias``, a module, is called with the distances (T, S) of each key behind each query, below 0 for
    the future. It returns what is to be added to the scores: an array that broadcasts to (B, H, T, S), or a
    Tensor without gradient. ALiBi (arXiv 2108.12409) returns -slopes * distances with slopes (H, 1, 1).
    """
    visible = None
    if cache is not None:
        (key, value), visible = cache.extend(key, value), cache.mask
    if score_bias is None:
        return key, value, visible
    T, S = query.shape[2], key.shape[2]
    if not isinstance(score_bias, nn.Module):  # a function would be lost when the model is saved
        raise Error(f"score_bias is a {type(score_bias).__name__}: give a tinyllm.nn.Module")
    added = score_bias(np.arange(S - T, S)[:, None] - np.arange(S))  # the last query stands at the last key
    if isinstance(added, Tensor):
        if added.needs_grad:
            raise Error(f"score_bias, a {type(score_bias).__name__}, would get no gradient: return .detach()")
        added = added.data
    added = np.asarray(added, like=query.data)
    if added.dtype.kind not in "fiu":
        raise Error(f"score_bias returned {added.dtype}: return numbers, which are added to the scores")
    mask = added if visible is None else np.where(visible, added, -np.inf)
    return key, value, mask.astype(query.dtype, copy=False)
