"""What does a language model have besides its architecture?

A config, which is read from and written to ``config.json``; logits and a loss computed from its hidden
states; a key-value cache; weights loaded from a folder, a file or the hub and saved to a folder; a vocabulary
that can be extended. An architecture (``gpt2.py``, ``llama.py``) adds a config, layers and ``hidden_states``.

Shapes: B batch, T time, S keys, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from operator import attrgetter
from pathlib import Path

import numpy as np

from tinyllm import checks, nn
from tinyllm import functional as F
from tinyllm.backend import compute_dtype
from tinyllm.errors import Error
from tinyllm.models.cache import Cache, LayerCache
from tinyllm.models.packed import Packed
from tinyllm.models.rope import changes_with_length
from tinyllm.models.saving import OWN, is_plain, save_model
from tinyllm.tensor import Tensor
from tinyllm.weights import hub

ARCHITECTURES: dict[str, type[LanguageModel]] = {}  # model_type in config.json -> model class


def register(model_class):
    """Class decorator that adds an architecture to ``load_model`` and ``tinyllm train``."""
    name, needed = model_class.__name__, "config_class.model_type token_embedding blocks"
    if unset := [attribute for attribute in needed.split() if not attrgetter(attribute)(model_class)]:
        raise Error(f"{name} cannot be registered: set {', '.join(unset)}")
    ARCHITECTURES[model_class.config_class.model_type] = model_class
    return model_class


def full_name(name: str) -> str:
    """The ``model_type`` of which ``name`` is the short form, such as "gemma3"; else ``name`` itself."""
    short = {each.config_class.short_name: model_type for model_type, each in ARCHITECTURES.items()}
    return short.get(name, name)


def model_type_of(config: Mapping, default: str | None = None):
    """The ``model_type`` of a ``config.json``, without ``OWN``."""
    kind = config.get("model_type", default)
    return kind.removeprefix(OWN) if isinstance(kind, str) else kind


def architecture_of(path: Path) -> type[LanguageModel]:
    """The class that the config at a path returned by ``hub.find_model`` names."""
    config = hub.model_config(path)
    kind = model_type_of(config)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        not_text = " (a model of images and text)" if "text_config" in config else ""
        supported = ", ".join(ARCHITECTURES)
        raise Error(f"{path}: model_type {kind!r}{not_text} is not supported; supported: {supported}")
    return ARCHITECTURES[kind]


# Keys of a config.json that change the computation, and the only value implemented without such a field
FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "reorder_and_upcast_attn": False,
    "rope_interleaved": False,
    "router_jitter_noise": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}

# Keys of a config.json that do not affect the logits, unless the architecture's config has such a field
BOOKKEEPING = set(
    "_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures "
    "bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size "
    "eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id "
    "gradient_checkpointing id2label is_decoder is_llama_config label2id length_penalty max_length "
    "max_sequence_length max_window_layers min_length n_ctx n_special no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_attentions output_hidden_states output_past output_scores "
    "pad_token_id predict_special_tokens prefix pretraining_tp problem_type remove_invalid_values "
    "repetition_penalty return_dict return_dict_in_generate sep_token_id summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers.js_config transformers_version typical_p use_cache".split()
)


class ModelConfig:
    """Base class of every architecture's config, a frozen dataclass with Hugging Face's field names.

    A subclass has the fields ``vocab_size`` and ``tie_word_embeddings``, and defines ``model_type``,
    ``context`` (the longest sequence), ``hidden_size``, ``kv_shape`` (key-value heads, head size), and
    ``of_size``: it maps options of ``tinyllm train`` to fields, and raises ``Error`` for those it lacks.
    """

    model_type = ""
    hub_class = ""  # the class in ``transformers``
    classifier_class = ""  # the class of a classifier there, if it is not named like ``hub_class``
    short_name = ""  # another name for ``model_type`` at the command line
    is_standard = True  # whether that class computes the same with this config
    initializer_range = 0.02  # the standard deviation of new weights, unless it is a field
    sizes: Mapping[str, dict] = {}  # published sizes: name -> fields
    may_be_zero: tuple[str, ...] = ()  # integer fields; the others are at least 1

    def window_of(self, layer: int) -> int | None:
        """How many positions, its own included, a query of this layer attends to; None for all up to it."""

    @classmethod
    def preset(cls, size: str, **changes):
        """The config of a published size, with the fields in ``changes`` overridden."""
        if size not in cls.sizes:
            raise Error(f"unknown {cls.model_type} size {size!r}; choose one of {', '.join(cls.sizes)}")
        return cls(**cls.sizes[size] | changes)

    @classmethod
    def from_dict(cls, config: Mapping):
        """From the contents of a ``config.json``. A key that might affect the result is never ignored."""
        config = {**config, "model_type": model_type_of(config, cls.model_type)}
        ours, fixed = {field.name for field in fields(cls)}, FIXED | {"model_type": cls.model_type}
        for key, value in fixed.items():
            if key not in ours and config.get(key) not in (None, value):
                raise Error(
                    f"{cls.__name__} supports only {key}={value!r}, but the config has {config[key]!r}"
                )
        unknown = config.keys() - ours - fixed.keys() - BOOKKEEPING
        unknown = [key for key in unknown if config[key] is not None and not key.startswith("unsloth_")]
        if unknown:
            raise Error(
                f"unknown config keys: {', '.join(sorted(unknown))}; remove them if they do not affect "
                f"what the model computes"
            )
        return cls(**{key: value for key, value in config.items() if key in ours})

    def to_dict(self, standard: bool = True) -> dict:
        """The contents of a ``config.json``, which ``transformers`` refuses unless the model is standard."""
        own = "" if standard and self.is_standard else OWN
        names = {"architectures": [own + self.hub_class], "model_type": own + self.model_type}
        return names | asdict(self)

    def check(self, layers: tuple, widths: tuple, probabilities: tuple, positive: tuple, choices: dict):
        """Raise ``Error`` unless the named fields, and all integer fields, have valid values.

        ``layers`` and ``widths`` name the sizes with an upper limit, see ``checks.check_fields``.
        """
        checks.check_fields(self, layers=layers, widths=widths)
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in self.may_be_zero else 1
            if checks.is_integer_field(field) and value is not None and value < least:
                raise Error(f"{field.name} must be a whole number of at least {least}, not {value!r}")
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
    """Base class of every architecture. A model is created by ``Class(config, rng)``.

    ``rng``, a generator or an integer seed, samples the initial weights. With ``rng=None`` they are meta
    parameters, which take no memory until ``load_state_dict``. A subclass sets its layers, among them
    ``lm_head``, and the class attributes below, and defines ``hidden_states``.

    Any layer may be replaced, by assignment or with ``nn.replace``: a model calls its layers and never reads
    their parameters. ``lm_head`` may be any module, and its number of classes may differ from the vocabulary.
    """

    config_class = ModelConfig
    token_embedding = ""  # the name of the layer that embeds the ids
    blocks = ""  # the name of the list of blocks
    depth = ""  # the config's field for their number
    into_residual = "o_proj", "down_proj"  # the names of a block's projections into the residual stream
    prefix = ""  # what published files prepend to every name but the head's
    not_parameters: tuple[str, ...] = ()  # suffixes of keys in published files that are not parameters
    logit_softcap: float | None = None  # what ``F.softcap`` applies to the head's output, if anything
    learned_positions = False  # if true, a cache cannot drop its oldest entries: it would change positions

    def configure(self, config, rng) -> np.random.Generator | None:
        """Set ``config``, check its type, and return the generator that ``rng`` gives."""
        if not isinstance(config, self.config_class):
            found, wanted = checks.described(config), self.config_class.__name__
            raise Error(f"config is {found}: pass a {wanted}(...)")
        self.config = config
        return checks.as_generator(rng)

    def hidden_states(self, ids, cache: Cache | None = None) -> Tensor:
        """The head's input: (B, T, C) for ids (B, T), after the final norm.

        With a ``cache`` the ids continue the cached text and are added to the cache.
        """
        raise TypeError(f"{type(self).__name__} defines no hidden_states()")

    def forward(self, ids, *, last_only: bool = False, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T), with ``last_only`` (B, 1, V); see ``hidden_states``."""
        h = self.hidden_states(ids, cache)  # (B, T, C)
        return self.head_logits(h[:, -1:] if last_only else h)

    def head_logits(self, h) -> Tensor:
        """Logits (..., V) of hidden states (..., C): the head's output, with the cap if there is one."""
        logits = self.lm_head(h)
        return logits if self.logit_softcap is None else F.softcap(logits, self.logit_softcap)

    def loss(self, ids, targets, num_targets=None, weights=None, cache: Packed | None = None) -> Tensor:
        """Σ cross-entropy over all targets but -100, divided by ``num_targets`` (default: their number).

        ``weights``, an array of the targets' shape, multiplies each target's loss. ``Packed`` in place of a
        cache keeps the sequences that share a row apart.
        """
        return nn.call(self, self._loss, ids, targets, num_targets, weights, cache)

    def _loss(self, ids, targets, num_targets, weights, cache):
        if _is(self.forward, LanguageModel.forward):
            return self.head_loss(self.hidden_states(ids, cache), targets, num_targets, weights)
        logits = self.forward(ids, cache=cache)
        return F.cross_entropy(logits, targets, num_targets=num_targets, weights=weights)

    def head_loss(self, h, targets, num_targets=None, weights=None) -> Tensor:
        """``loss`` of hidden states (..., C), of which some may be omitted, and their targets (...)."""
        head, options = self.lm_head, {"num_targets": num_targets, "weights": weights}
        plain = _is(head.forward, nn.Linear.forward) and _is(head.__call__, nn.Module.__call__)
        if not (plain and _is(self.head_logits, LanguageModel.head_logits)):
            return F.cross_entropy(self.head_logits(h), targets, **options)
        # Fused with the head: the full logits (..., V) are never in memory.
        options |= {"linear_bias": head.bias, "softcap": self.logit_softcap}
        return F.linear_cross_entropy(h, nn.loaded(head.weight), targets, **options)

    @property
    def context(self) -> int:
        """The maximum sequence length."""
        return self.config.context

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache:
        """An empty ``Cache`` for ``batch`` rows of at most ``capacity`` tokens (default: the context)."""
        heads, head_size = self.config.kv_shape
        capacity = self.context if capacity is None else checks.check_at_least(capacity, 1, "capacity")
        batch, capacity = checks.check_at_least(batch, 1, "batch"), min(capacity, self.context)
        like = next(self.parameters()).data
        cache = Cache(self.windows(), batch, heads, capacity, head_size, like, compute_dtype(like))
        cache.changes = [length for length, _ in changes_with_length(self.config)]
        return cache

    def windows(self) -> list[int | None]:
        """Of each block: how many positions a query attends to; see ``ModelConfig.window_of``.

        A layer keeps its own when blocks are removed. The config's count if not every layer has one.
        """
        own = [vars(module)["window"] for module in self.modules() if "window" in vars(module)]
        blocks = range(len(getattr(self, self.blocks)))
        return own if len(own) == len(blocks) else [self.config.window_of(i) for i in blocks]

    def start(self, ids, cache: Cache | None) -> tuple[np.ndarray, np.ndarray, list[LayerCache | None]]:
        """The inputs of ``hidden_states``: validated ids (B, T), their positions, and every layer's cache."""
        nn.loaded(next(self.parameters()), "this model")
        ids = checks.check_ids(ids, self.config.vocab_size)
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise Error(
                f"token ids must have shape (batch, time) with at most {self.context} positions, not "
                f"{ids.shape}: pass one sequence as [ids], and shorten a longer one"
            )
        layers = len(getattr(self, self.blocks))
        if cache is None:
            return ids, np.arange(ids.shape[1]), [None] * layers
        cached = len(getattr(cache, "keys", ()))
        if cached != layers:
            raise Error(f"the cache has {cached} layers and the model {layers}: create one with new_cache()")
        return ids, cache.positions(ids.shape[1]), cache.layers(*ids.shape)

    # -------------------------------------------------------------------------- weights in files

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype=np.float32):
        """``load_model`` for this class: the model in ``dtype`` and eval mode."""
        path = hub.find_model(name)
        model = cls.without_weights(path).astype(dtype)
        model.load_state_dict(hub.open_weights(path), source=str(path))
        return model.eval()

    @classmethod
    def without_weights(cls, path: Path):
        """The model at a path returned by ``hub.find_model``, with meta parameters (see ``nn.normal``)."""
        config = hub.model_config(path)
        ours = cls.config_class.model_type
        kind = model_type_of(config, ours)
        if kind != ours:
            raise Error(f"{path} contains a model of type {kind!r}, not {ours!r}: use tinyllm.load_model")
        try:
            return cls(cls.config_class.from_dict(config), rng=None)
        except Error as error:
            raise Error(f"the config of {path} is not supported: {error}") from None

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does.

        The config gets the current number of blocks. Parameters of replaced layers are saved under their own
        names; to load such a model, rebuild it and call ``load_state_dict``. If ``transformers`` would
        compute something else, the config has a ``model_type`` that it refuses, and a warning is logged.

        Raises ``Error``, naming the layers, if replaced layers have the names and shapes of the original
        ones, because the folder would silently load as the plain architecture.
        """
        config = self.current_config()
        contents = config.to_dict(standard=is_plain(self, type(self)(config, rng=None)))
        tensors = {
            name if name.startswith("lm_head.") else self.prefix + name: array
            for name, array in self.state_dict().items()
        }
        save_model(folder, self, contents, tensors, overwrite)

    def current_config(self, **changes) -> ModelConfig:
        """The config with the current number of blocks, tied if the head is, and ``changes``."""
        changes |= {self.depth: len(getattr(self, self.blocks))} if self.depth else {}
        return replace(self.config, tie_word_embeddings=self._is_tied(), **changes)

    def _is_tied(self) -> bool:
        """Whether the head currently shares a parameter with the embedding, whatever the config says."""
        embedding = {id(tensor) for tensor in getattr(self, self.token_embedding).parameters()}
        return any(id(tensor) in embedding for tensor in self.lm_head.parameters())

    def checkpoint_keys(self, arrays: Mapping) -> dict[str, str]:
        """Parameter name -> key, for every layout in which the architecture is published.

        Keys may begin with ``prefix``; keys that end in one of ``not_parameters`` are skipped; a tied head
        may be stored again if it equals the embedding.
        """
        keys, own = {}, {name for name, _ in self.named_parameters()}
        for key in arrays:
            name = key.removeprefix(self.prefix)
            if name in keys:
                raise Error(f"{key} and {keys[name]} are the same parameter: keep one of them")
            if name in own or not name.endswith(self.not_parameters):
                keys[name] = key
        embedding = f"{self.token_embedding}.weight"
        if self._is_tied() and {"lm_head.weight", embedding} <= keys.keys():
            head = keys.pop("lm_head.weight")
            if not np.array_equal(arrays[head], arrays[keys[embedding]]):
                raise Error(f"{head} differs from the embedding: set tie_word_embeddings to false")
        return keys

    # ------------------------------------------------------------------------------- vocabulary

    def resize_token_embeddings(self, vocab_size: int, rng: np.random.Generator | int) -> None:
        """Extend the vocabulary to ``vocab_size`` ids, in place. Existing rows are bitwise unchanged.

        New rows of the embedding, and of a head not tied to it, are sampled from N(0, initializer_range²);
        new biases are 0. Gradients are dropped. Create the optimizer afterwards, because its averages have
        the parameters' shapes. The existing ids' logits are the same sums of products, but BLAS may sum a
        matrix of another size in another order, which changes the rounding. Raises ``Error``, and changes
        nothing, if the model has more ids, or if the embedding or the head has no ``weight`` (and ``bias``)
        with one row per id.
        """
        old, std = self.config.vocab_size, self.config.initializer_range
        if not checks.is_integer(vocab_size) or vocab_size < old:
            raise Error(
                f"vocab_size {vocab_size!r} is too small for the model's {old} ids: choose {old} or more"
            )
        rng = checks.as_generator(rng)
        if rng is None:
            raise Error("rng is None: pass a seed such as rng=0, to sample the new rows")
        new, tensors = int(vocab_size) - old, {}  # keyed by id(), so that a tied weight is extended once
        for name in (self.token_embedding, "lm_head"):
            layer = getattr(self, name)
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            if not (_has_rows(weight, old, ndim=2) and (bias is None or _has_rows(bias, old, ndim=1))):
                raise Error(
                    f"{name}, a {type(layer).__name__}, cannot be extended: its weight, and its bias unless "
                    f"None, must have a row for each of the model's {old} ids"
                )
            nn.loaded(weight, name)
            tensors |= {id(tensor): tensor for tensor in (weight, bias) if tensor is not None}
        self.zero_grad()
        for tensor in tensors.values():
            shape = (new, *tensor.shape[1:])
            rows = nn.normal(rng, shape, std).data if tensor.ndim == 2 else np.zeros(shape)
            rows = np.asarray(rows, dtype=tensor.dtype, like=tensor.data)
            tensor.replace(np.concatenate([tensor.data, rows]))
        self.config = replace(self.config, vocab_size=int(vocab_size))


def _is(method, function) -> bool:
    """Whether a bound method is this function, overridden neither in a subclass nor on the instance."""
    return getattr(method, "__func__", None) is function


def _has_rows(tensor, rows: int, ndim: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == ndim and tensor.shape[0] == rows
