"""The weights that a run starts from: those of another run or of a published model (``train --from``).

The new run has the config and the tokenizer of its source, and a fresh optimizer. The tokenizer is copied
into its folder. Once the run has a checkpoint, neither resuming nor generating needs the source again.
"""

import hashlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

from tinyllm.data.token_file import tokenizer_sha256
from tinyllm.errors import Error
from tinyllm.files import read_file, sha256_of, write_whole
from tinyllm.models import LanguageModel, ModelConfig, empty_model
from tinyllm.tokenizers import Tokenizer, load_tokenizer
from tinyllm.tokenizers.base import FILE_NAME
from tinyllm.tokenizers.configs import CHAT_TEMPLATE
from tinyllm.tokenizers.huggingface import TokenizersTokenizer
from tinyllm.training.begun import begun_config
from tinyllm.training.checkpoint import hash_weights
from tinyllm.training.config import CONFIG_NAMES, TrainConfig, flag
from tinyllm.training.metrics import METRICS
from tinyllm.weights.hub import find_model, open_weights
from tinyllm.weights.runs import STEP, last_checkpoint

FINE_TUNING_LR = 3e-4  # published weights take a tenth of the learning rate that suits random ones

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
ADDED_TOKENS = ("added_tokens.json", "special_tokens_map.json")
OTHER_TOKENIZER_FILES = (*ADDED_TOKENS, "tokenizer_config.json")


def starting_from(source: str) -> TrainConfig:
    """The options of a run that starts from ``source``, which the caller may change with ``replace``.

    If it is a run, or one of a run's checkpoint folders, they are that run's options. If it is a model, as
    ``find_model`` finds it, they are the defaults with the model's architecture and a lower learning rate.
    Raises ``Error`` if there is no such run or model.
    """
    try:
        weights, run = find_source(source)
        config = empty_model(weights).config
    except Error as error:
        or_run = ", or a run's folder" * str(error).startswith("no folder")
        raise Error(f"--from: {error}{or_run}") from None
    options = _options_of(config) | {"start_from": source, "warmup": None, "init": "gpt2"}
    if run is not None:
        begun = begun_config(run)
        options |= {"context": begun.context, "special_tokens": (), "tokenizer": str(run)}
        return replace(begun, out=None, resume=None, **options)
    context = min(config.context, TrainConfig.context)
    place = tokenizer_place(weights, config.vocab_size)
    return TrainConfig(**options, lr=FINE_TUNING_LR, context=context, tokenizer=str(place))


def starting_model(config: TrainConfig, checkpoint: Path | None) -> LanguageModel:
    """The model of ``config.start_from``, or of the run's own ``checkpoint`` if there is one, in eval mode.

    Raises ``Error``, naming it, for an option that contradicts the source's architecture.
    """
    weights = checkpoint or find_source(config.start_from)[0]
    model = check_architecture(config, weights)
    if config.dropout != _options_of(model.config)["dropout"]:
        model = with_dropout(model, config.dropout)
    model = model.astype(config.parameter_dtype)
    model.load_state_dict(open_weights(weights), source=str(weights))
    return model


def check_architecture(config: TrainConfig, weights: Path | None = None) -> LanguageModel:
    """The model that the run starts from, without its weights.

    Raises ``Error``, naming the option, if one contradicts it.
    """
    model = empty_model(weights or find_source(config.start_from)[0])
    fixed = _options_of(model.config) | {"init": "gpt2", "special_tokens": ()}
    for name, value in fixed.items():
        if name != "dropout" and getattr(config, name) != value:
            raise Error(
                f"{flag(name)} {getattr(config, name)} contradicts the model of --from {config.start_from}, "
                f"which has {value}: omit it"
            )
    if config.tokenizer == "char" or config.tokenizer.startswith("bpe:"):
        raise Error(
            f"--tokenizer {config.tokenizer} would learn other ids than those of the model of --from "
            f"{config.start_from}: omit it"
        )
    if config.context > model.context:
        raise Error(
            f"--context is {config.context}, and the model of --from {config.start_from} takes at most "
            f"{model.context} tokens: choose no more"
        )
    return model


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ``Error`` unless the tokenizer is that of the source, if it has one: with another, ids mean other
    tokens than those that the model learned.
    """
    weights, run = find_source(config.start_from)
    own = run or weights
    if config.tokenizer == str(own) or (run is None and not has_tokenizer(weights)):
        return
    if hash_tokenizer(tokenizer, config.tokenizer) != hash_tokenizer(load_tokenizer(own), own):
        raise Error(
            f"--tokenizer {config.tokenizer} is not the tokenizer of --from {config.start_from}, whose ids "
            "mean other tokens: omit it"
        )


def with_dropout(model: LanguageModel, dropout: float) -> LanguageModel:
    """A model of meta parameters with the same config but for its dropout probabilities."""
    names = [field.name for field in fields(model.config) if field.name.endswith(("pdrop", "dropout"))]
    return type(model)(replace(model.config, **dict.fromkeys(names, dropout)), rng=None)


def describe_start(source: str, model: LanguageModel, begun: dict | None) -> dict:
    """What config.json records: the source, the path of its weights, and the SHA-256 of their numbers.

    Raises ``Error`` if these are not the weights of ``begun``, what a resumed run recorded.
    """
    weights, sha256 = find_source(source)[0], hash_weights(model)
    if begun is not None and sha256 != begun["sha256"]:
        raise Error(
            f"the weights in {weights} are not those that the run was started with: restore them, or start a "
            "new run"
        )
    return {"from": source, "weights": str(weights), "sha256": sha256}


def has_tokenizer(weights: Path) -> bool:
    """Whether a model's folder or file has its tokenizer."""
    return not weights.is_dir() or bool(_tokenizer_files(weights, (FILE_NAME, *VOCABULARY_FILES, "*.gguf")))


def tokenizer_place(weights: Path, vocab_size: int) -> str | Path:
    """Where a model's tokenizer is: in its folder or file, or GPT-2's for a folder without one."""
    return "gpt2" if vocab_size == 50257 and not has_tokenizer(weights) else weights


def save_tokenizer(tokenizer: Tokenizer, place: str | Path, folder: Path) -> None:
    """Save the tokenizer in a folder: one of ours as JSON, a published one as a copy of its files.

    One that got additional special tokens is written as a ``tokenizer.json``. A chat template is written as a
    file of its own, which takes precedence over one in a copied file.
    """
    if tokenizer.chat_template is not None:
        write_whole(folder / CHAT_TEMPLATE, tokenizer.chat_template.encode())
    if is_ours(tokenizer):
        tokenizer.save(folder)
        return
    if tokenizer.added_tokens:
        (folder / "tokenizer.json").write_bytes(_extended_json(tokenizer))
        added = {"add_bos_token": tokenizer.add_bos, "add_eos_token": bool(tokenizer.closing_ids)}
        config = json.dumps(added)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    else:
        for file in _tokenizer_files(Path(place), (*VOCABULARY_FILES, *OTHER_TOKENIZER_FILES)):
            known = file.name in (*VOCABULARY_FILES, *OTHER_TOKENIZER_FILES) or file.suffix == ".gguf"
            name = "tokenizer.json" if read_file(file, 1) == b"{" else "tokenizer.model"
            shutil.copyfile(file, folder / (file.name if known else name))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    (folder / "generation_config.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")


def load_own_tokenizer(folder: Path, about: dict) -> Tokenizer:
    """The tokenizer of the run in a folder with this config.json. Raises ``Error`` if it has changed."""
    tokenizer = load_tokenizer(folder)
    if hash_tokenizer(tokenizer, folder) != about["tokenizer"]["sha256"]:
        raise Error(f"the tokenizer in {folder} changed since the run was started: copy it back")
    return tokenizer


def hash_tokenizer(tokenizer: Tokenizer, place: str | Path) -> str:
    """The SHA-256 of everything that determines a text's ids."""
    if is_ours(tokenizer):
        return tokenizer_sha256(tokenizer)
    digest = hashlib.sha256()
    if tokenizer.added_tokens:  # as that of the file in which it is saved
        digest.update(hashlib.sha256(_extended_json(tokenizer)).digest())
        return digest.hexdigest()
    for file in _tokenizer_files(Path(place), (*VOCABULARY_FILES, *ADDED_TOKENS)):
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def _extended_json(tokenizer: Tokenizer) -> bytes:
    """The ``tokenizer.json`` of a published tokenizer with additional special tokens.

    Raises ``Error`` if it is not one that Hugging Face's library runs, which can write it.
    """
    if not isinstance(tokenizer, TokenizersTokenizer):
        raise Error(f"special tokens cannot be added to the published tokenizer {tokenizer.name}: omit them")
    return tokenizer.tokenizer.to_str().encode()


def is_ours(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is saved as tinyllm's JSON; other formats are copied as files."""
    try:
        tokenizer.to_json()
    except Error:
        return False
    return True


def find_source(source: str) -> tuple[Path, Path | None]:
    """The path of a source's weights, and the folder of its run if they belong to one."""
    path = Path(source).expanduser()
    if STEP.fullmatch(path.name) and (path.parent / METRICS).exists():
        return path, path.parent
    if (path / METRICS).exists():
        return last_checkpoint(path), path
    return find_model(source), None


def _options_of(config: ModelConfig) -> dict:
    """A model's config as options of ``tinyllm train``, without the context."""
    names = {name: name for name in ("n_layer", "n_head", "n_embd", "qkv_bias")} | CONFIG_NAMES
    found = {option: getattr(config, name) for name, option in names.items() if hasattr(config, name)}
    del found["context"]  # that of a run may be shorter
    only_of_one = {name: getattr(TrainConfig, name) for name in ("n_kv_head", "qkv_bias", "head_bias")}
    return only_of_one | found


def _tokenizer_files(place: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of a tokenizer in a folder; if it has none of ``names``, a GGUF file's."""
    if place.name in VOCABULARY_FILES[2:]:
        return [place.with_name(name) for name in VOCABULARY_FILES[2:]]
    if not place.is_dir():
        return [place]
    found = [file for name in names for file in sorted(place.glob(name))]
    return found or sorted(place.glob("*.gguf"))
