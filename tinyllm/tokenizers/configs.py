"""The config files next to a published vocabulary: added tokens, ids that begin or end a text, template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from warnings import warn

from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.files import read_json, read_text
from tinyllm.tokenizers.base import Tokenizer

ADDED_TOKENS, CHAT_TEMPLATE = "added_tokens.json", "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
SPACING = ("lstrip", "rstrip", "single_word")
FLAGS = ("special", "normalized", *SPACING)  # of an ``AddedToken``

# Special tokens that end a turn of a chat, by the names that llama.cpp looks for. Older files name only the
# token that ends a text as eos.
END_OF_TURN = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|return|>", "<|call|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<turn|>"),
)
# Those that end a text, by the names that llama.cpp looks for: a chat model may end its answer with one.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]")


def read_added_tokens(folder: Path) -> dict[int, dict]:
    """The tokens that a model's folder adds to its vocabulary: id -> properties of an ``AddedToken``.

    They are in ``added_tokens_decoder`` of ``tokenizer_config.json``, here with all ``FLAGS``, or else in
    ``added_tokens.json``, names and ids. Those that a config names, such as ``eos_token``, are special.
    """
    named, absent = named_tokens(folder), {}
    own, added = (_read(folder, name) for name in ("tokenizer_config.json", ADDED_TOKENS))
    if "added_tokens_decoder" in own:
        found, source = own["added_tokens_decoder"], folder / "tokenizer_config.json"
        entries = list(found.items()) if isinstance(found, dict) else [(None, found)]
        absent = dict.fromkeys(SPACING, False)
    else:
        source = folder / ADDED_TOKENS
        entries = [(i, {"content": name, "normalized": name not in named}) for name, i in added.items()]
    tokens = {}
    for key, token in entries:
        match token:
            case {"content": str(name)} if (
                name and re.fullmatch("[0-9]{1,9}", str(key)) and _has_flags(token)
            ):
                flags = absent | {flag: token[flag] for flag in FLAGS if flag in token}
                flags.setdefault("normalized", not flags.get("special"))
                flags["special"] = flags.get("special", False) or name in named
                tokens[int(key)] = {"content": name, **flags}
            case _:
                raise Error(f"{source} adds the token {token!r} with the id {key!r}: correct it")
    if len({token["content"] for token in tokens.values()}) < len(entries):
        raise Error(f"{source} adds two tokens with the same name or id: correct it")
    return tokens


def _has_flags(token: dict) -> bool:
    """Whether all properties of a token that are given are true or false."""
    return all(isinstance(token.get(flag, False), bool) for flag in FLAGS)


def named_tokens(folder: Path) -> set[str | None]:
    """The tokens that a config in a model's folder names, such as ``eos_token``: they are special."""
    found = []
    for config in (_read(folder, name) for name in ("tokenizer_config.json", "special_tokens_map.json")):
        found += [token for key, token in config.items() if key.endswith("_token")]
        more = [config.get(f"{kind}_special_tokens") for kind in ("additional", "extra")]
        found += [token for tokens in more if isinstance(tokens, list) for token in tokens]
    return {_name_of(token) for token in found}


def tokenizer_class(folder: Path) -> str:
    """The class of ``transformers`` that ``tokenizer_config.json`` names, without "Fast"; GPT-2's if none."""
    named = _read(folder, "tokenizer_config.json").get("tokenizer_class")
    if named is None and str(_read(folder, "config.json").get("model_type")).startswith("qwen"):
        raise Error(
            f"{folder} does not say how its tokenizer splits a text: add the class to tokenizer_config.json, "
            'as "tokenizer_class": "Qwen2Tokenizer"'
        )
    return str(named or "GPT2Tokenizer").removesuffix("Fast")


def _read(folder: Path, name: str) -> dict:
    return read_json(folder / name) if (folder / name).exists() else {}


def _name_of(token) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def read_configs(tokenizer: Tokenizer, folder: Path) -> None:
    """Set the ids around a text and ``chat_template`` from the configs in a model's folder.

    Where the configs have no value, the ids from the vocabulary itself are kept.
    """
    own, generation, config = (
        _read(folder, name) for name in ("tokenizer_config.json", GENERATION_CONFIG, "config.json")
    )
    model = generation or config
    usual = model.get("bos_token_id") if tokenizer.bos_id is None else tokenizer.bos_id
    bos = _ids_of(tokenizer, [own.get("bos_token", usual)], folder)
    eos = _ids_of(tokenizer, [own.get("eos_token"), *_as_list(model.get("eos_token_id"))], folder)
    eos = eos or tokenizer.eos_ids
    tokenizer.bos_id = bos[0] if bos else tokenizer.template_bos
    for key in ("add_bos_token", "add_eos_token"):
        if own.get(key) not in (None, True, False) or is_integer(own.get(key)):
            raise Error(f"{folder / 'tokenizer_config.json'} has {key} {own[key]!r}: make it true or false")
    if own.get("add_bos_token") is not None:
        tokenizer.add_bos = own["add_bos_token"]
    if tokenizer.add_bos and tokenizer.template_bos not in (None, tokenizer.bos_id):
        named, first = _name_of(own["bos_token"]), tokenizer.decode([tokenizer.template_bos])
        raise Error(
            f"{folder} has the bos_token {named!r} in tokenizer_config.json, but the template in "
            f"tokenizer.json puts {first!r} before a text: make them the same"
        )
    if own.get("add_eos_token") is not None:
        tokenizer.closing_ids = (tokenizer.closing_ids or eos[:1]) if own["add_eos_token"] else ()
    tokenizer.chat_template = _chat_template(folder, own)
    named = {key: _name_of(token) for key, token in own.items() if key.endswith("_token")}
    tokenizer.other_tokens = {key: name for key, name in named.items() if name is not None}
    ends = [name for name in END_OF_TURN if name in (tokenizer.chat_template or "")]
    tokenizer.eos_ids = distinct([*eos, *end_ids(tokenizer, ends)])


def check_prefix_space(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ``Error`` if the config says otherwise than the vocabulary whether a text begins with a space."""
    said = _read(folder, "tokenizer_config.json").get("add_prefix_space")
    if said is not None and said != tokenizer.decode_bytes(tokenizer.encode("a")).startswith(b" "):
        raise Error(
            f"{folder / 'tokenizer_config.json'} has add_prefix_space {said}, unlike the vocabulary: save "
            "the tokenizer as tokenizer.json with transformers"
        )


def end_ids(tokenizer: Tokenizer, names: Sequence[str] = (*END_OF_TURN, *ENDS_OF_TEXT)) -> list[int]:
    """The ids of the special tokens with these names, of those that there are."""
    return [tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens]


def distinct(ids: list[int | None]) -> tuple[int, ...]:
    """The ids that are not None, in order, without repetitions."""
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _ids_of(tokenizer: Tokenizer, found: list, folder: Path) -> tuple[int, ...]:
    """The ids of tokens given as ids, names, or Hugging Face's dicts with the name as ``content``."""
    ids = []
    for token in found:
        name = token.get("content") if isinstance(token, dict) else token
        i = tokenizer.special_tokens.get(name) if isinstance(name, str) else name
        if is_integer(token) and not 0 <= token < tokenizer.vocab_size:
            # transformers writes the ids of GPT-2's vocabulary into the config of any GPT-2; -1 means none.
            warn(
                f"a config in {folder} has the special token {token}, which is ignored: the tokenizer has "
                f"{tokenizer.vocab_size} ids",
                stacklevel=2,
            )
            continue
        if token is not None and not (is_integer(i) and 0 <= i < tokenizer.vocab_size):
            raise Error(
                f"a config in {folder} has the special token {token!r}, not special in {tokenizer.name}: "
                "correct or remove it"
            )
        ids.append(i)
    return distinct(ids)


def _chat_template(folder: Path, tokenizer_config: dict) -> str | None:
    """The template in ``chat_template.jinja`` or else ``tokenizer_config.json``, where it may be a list."""
    file = folder / CHAT_TEMPLATE
    if file.exists():
        return read_text(file)
    match tokenizer_config.get("chat_template"):
        case None | str() as template:
            return template
        case list(templates):
            for entry in templates:
                match entry:
                    case {"name": "default", "template": str(template)}:
                        return template
    raise Error(f"{folder / 'tokenizer_config.json'} has a chat_template that is not a text: correct it")
