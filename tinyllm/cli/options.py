"""Options that several commands share, and parsing."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import tyro

from tinyllm.backend.device import open_device
from tinyllm.backend.dtypes import Precision, weights_dtype
from tinyllm.backend.memory import keep_memory
from tinyllm.checks import check_at_least
from tinyllm.errors import Error
from tinyllm.inference.chat import find_tokenizer, load_model_and_tokenizer, own_tokenizer
from tinyllm.inference.sampling import check_sampling
from tinyllm.inference.speculative import check_draft
from tinyllm.models import load_model
from tinyllm.nn import Module, lora_layers
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import FILE_NAME, Tokenizer, check_fits
from tinyllm.training.config import flag
from tinyllm.weights.adapter_config import check_causal_lm, find_adapter, read_adapter_config
from tinyllm.weights.adapters import load_adapter
from tinyllm.weights.hub import HUB_ID
from tinyllm.weights.pull import KNOWN_MODELS
from tinyllm.weights.runs import STEP, checkpoints, last_checkpoint
from tinyllm.weights.safetensors import is_adapter, read_config


def option(metavar: str, default: str | None = None, help: str | None = None):
    """How ``--help`` shows an option: the name of its value, and its default in words ("": no default)."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})", help=help)


METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def readable(options: type, **metavars: str) -> type:
    """A dataclass whose options without ``option`` look the same in ``--help`` as those that have it.

    A default such as None is not shown: the option's text says what it stands for.
    """
    hidden, switch = ("", "None"), {"True": "on", "False": "off"}

    def hint(default: str) -> str:
        return "" if default in hidden else f"(default: {switch.get(default, default)})"

    for name, kind in get_type_hints(options, include_extras=True).items():
        if get_origin(kind) is ClassVar or "help_behavior_hint" in str(kind):
            continue
        value, *extras = get_args(kind) if get_origin(kind) is Annotated else (kind,)
        shown = next((METAVARS[each] for each in METAVARS if value in (each, each | None)), None)
        if get_origin(value) is tuple:
            shown = f"[{METAVARS[get_args(value)[0]]} ...]"
        elif extras and shown:  # positional
            shown = f"[{shown}]"
        looks = tyro.conf.arg(metavar=metavars.get(name, shown), help_behavior_hint=hint)
        options.__annotations__[name] = Annotated[kind, looks]
    return options


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    run: Annotated[Path | None, option("DIR", "")] = None
    """Folder of a run, such as runs/python-docs-1, whose newest checkpoint is used, or of a checkpoint."""
    model: Annotated[str | None, option("NAME", "")] = None
    """Instead of --run: smollm2, gemma3-270m, gpt2, a model's folder, a .gguf file, or a Hugging Face id."""

    def find(self) -> Path | None:
        """The checkpoint of the run that --run or --model names; None if --model names a model.

        Raises Error unless exactly one is given and, as far as no download is needed, exists.
        """
        if (self.run is None) == (self.model is None):
            raise Error("choose the model with either --run DIR or --model NAME")
        checkpoint = find_checkpoint(self.run, self.model)
        if checkpoint is None:
            check_model_name(self.model, KNOWN_MODELS)
        return checkpoint

    @property
    def names_checkpoint(self) -> bool:
        """Whether the option names one checkpoint of a run, not the run."""
        return bool(STEP.fullmatch(Path(self.run or self.model).name))

    @property
    def typed(self) -> str:
        """The option that chooses the model, as typed."""
        return f"--model {self.model}" if self.run is None else f"--run {self.run}"

    def check_least(self, **least: int) -> None:
        """Raise Error for an option that is given and is less than its least value."""
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None:
                check_at_least(value, minimum, name)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(ModelOptions):
    adapter: Annotated[str | None, option("DIR", "")] = None
    """Put a LoRA adapter on the model: a folder of PEFT, a run that trained one, or a hub id."""

    def find(self) -> Path | None:
        if self.adapter is not None:
            read_adapter_config(find_adapter(self.adapter))
        return super().find()

    def put_adapter(self, model: Module) -> None:
        """Put the adapter of --adapter, if there is one, on the model."""
        if self.adapter is None:
            return
        if lora_layers(model):
            raise Error(f"{self.typed} has an adapter already: omit --adapter")
        folder = find_adapter(self.adapter)
        check_causal_lm(folder)
        load_adapter(model, folder)
        model.eval()

    def tokenizer_place(self, checkpoint: Path | None) -> str | Path:
        """The argument of ``load_tokenizer``: the adapter's own, or else that of the model; see ``find``."""
        own = self.adapter and own_tokenizer(self.adapter)
        return own or (find_tokenizer(self.model) if checkpoint is None else checkpoint.parent)


@dataclass(frozen=True, kw_only=True)
class TextModelOptions(AdapterOptions):
    no_bos: Flag = False
    """Do not begin a text with a BOS token, though the model's files say that it expects one."""

    def load(self, dtype) -> tuple[Module, Tokenizer]:
        """The model, in ``dtype``, and its tokenizer; Error as ``find``."""
        checkpoint = self.find()
        if checkpoint is None:
            model, tokenizer = load_model_and_tokenizer(self.model, dtype)
        else:
            model, tokenizer = load_model(checkpoint, dtype), load_tokenizer(checkpoint.parent)
            # A run that started from a published model has its tokenizer, and may have its padding.
            check_fits(tokenizer, model, padded=not (checkpoint.parent / FILE_NAME).exists())
            # Other runs are trained on texts without BOS, whatever tokenizer they use.
            tokenizer.add_bos = tokenizer.add_bos and "start" in read_config(checkpoint.parent)
        if self.adapter is not None:
            self.put_adapter(model)
            if (trained_with := own_tokenizer(self.adapter)) is not None:  # may have more tokens
                tokenizer = load_tokenizer(trained_with)
                check_fits(tokenizer, model, padded=True)
        tokenizer.add_bos &= not self.no_bos
        return model, tokenizer


def find_checkpoint(run: Path | None, model: str | None) -> Path | None:
    """The checkpoint that --run or --model names, the newest of a run; None if --model names a model.

    Raises Error if --run names a model or does not exist, or for a folder that contains runs.
    """
    folder = Path(model if run is None else run).expanduser()
    if run is not None and not folder.exists():
        siblings = [str(path) for path in folder.parent.glob("*") if checkpoints(path)]
        raise Error(f"there is no run {run}{did_you_mean(str(folder), siblings)}: check the path")
    if STEP.fullmatch(folder.name) and folder.exists() and "train" in _config(folder.parent):
        return folder
    config = _config(folder)
    if "train" in config or (checkpoints(folder) and not any(folder.glob("model.safetensors*"))):
        return last_checkpoint(folder)
    runs = sorted(path for path in folder.glob("*") if checkpoints(path))
    if runs:
        raise Error(f"{folder} is not a run but contains runs: choose one, such as --run {runs[-1]}")
    if run is not None and ("model_type" in config or is_adapter(folder)):
        raise Error(f"--run {run} is a model's folder, not a run: use --model {run}")
    return None if run is None else last_checkpoint(run)


def _config(folder: Path) -> dict:
    try:
        return read_config(folder)
    except Error:
        return {}


def check_model_name(name: str, known: Iterable[str]) -> None:
    """Raise Error for a name that is not known, not the path of a file or folder, and not a hub id."""
    if name in known or HUB_ID.fullmatch(name) or Path(name).expanduser().exists():
        return
    raise Error(
        f"there is no model {name!r}{did_you_mean(name, known)}: choose {', '.join(known)}, a model's or a "
        "run's folder, a .gguf file, or a hub id (owner/name, or gpt2)"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    max_new_tokens: Annotated[int, option("N")] = 100
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, option("T")] = 0.8
    """Divisor of the logits: 0 always takes the most likely token, above 1 is more random."""
    top_k: Annotated[int | None, option("K")] = 40
    """Sample from the K most likely tokens only; None means from all."""
    top_p: Annotated[float | None, option("P", "off")] = None
    """Sample from the smallest set of most likely tokens with total probability P, such as 0.9."""
    seed: Annotated[int, option("N")] = 0
    """Seed of the sampling: the same seed and prompt give the same text."""

    @property
    def sampling(self) -> tuple[float, int | None, float | None]:
        """Temperature, top-k and top-p, the arguments of ``generate``."""
        return self.temperature, self.top_k, self.top_p

    def check_sampling(self, min_new_tokens: int = 0) -> None:
        """Raise Error for a value out of range, before a model is loaded."""
        check_sampling(*self.sampling)
        check_at_least(self.seed, 0, "seed")
        check_at_least(self.max_new_tokens, min_new_tokens, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    speculate: Annotated[str | None, option("NAME", "off")] = None
    """Guess tokens, from the text so far (prompt) or with a smaller model or run: the same text, faster."""

    def find_draft(self) -> None:
        """Raise Error if --speculate names neither prompt nor a model, before any is loaded."""
        if self.speculate not in (None, "prompt") and find_checkpoint(None, self.speculate) is None:
            check_model_name(self.speculate, ("prompt", *KNOWN_MODELS))

    def load_draft(self, model: Module, dtype, device: str) -> Module | str | None:
        """The argument ``speculate`` of ``generate``: a draft on its device, "prompt" or None.

        Raises Error if the draft has not the model's vocabulary.
        """
        if self.speculate in (None, "prompt"):
            return self.speculate
        draft = load_model(find_checkpoint(None, self.speculate) or self.speculate, dtype)
        check_draft(draft, model)
        move(draft, device)
        return draft


@dataclass(frozen=True, kw_only=True)
class SpecialOptions:
    special: Literal["refuse", "allow", "text"] = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (one id each), or encode as text."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: Annotated[str, option("NAME")] = "cpu"
    """cpu, cuda, cuda:1 and so on, or auto: a GPU if CuPy finds one, otherwise the CPU."""
    dtype: Precision = "float32"
    """Type of weights and matrix products (tf32: of products only); half precision and tf32 need a GPU."""
    gpu_memory: Annotated[float | None, option("GB", "no limit")] = None
    """Maximum GPU memory to use, in GB (10^9 bytes)."""

    def open_device(self) -> str:
        """Make the device ready and return its name. Raises Error if it does not support the options."""
        return open_device(self.device, self.dtype, self.gpu_memory)

    @property
    def weights_dtype(self):
        return weights_dtype(self.dtype)


def move(model: Module, device: str) -> None:
    """Move the model to its device, and let freed memory be reused by the next step."""
    keep_memory()
    model.to(device)


# ---------------------------------------------------------------------------------- parsing


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)`` with the known word that begins so, or else is most alike, or nothing."""
    known, word = {name.lower(): name for name in known}, word.lower()
    longer = [name for name in known if word and name.startswith(word)]
    close = longer or difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {known[close[0]]}?)" if close else ""


def taken(name: str, args: list[str], program: str) -> tuple[str | None, list[str]]:
    """The value of an option that must be known first, or None, and the other arguments."""
    value, rest, words = None, [], iter(args)
    for word in words:
        found, equals, after = word.partition("=")
        if found != name:
            rest.append(word)
            continue
        value = after if equals else next(words, "")
        if not value or value.startswith("--"):
            raise Error(f"{name} needs a value; see {program} --help")
    return value, rest


def values_of(options) -> dict:
    """The values of a dataclass by name, not copied as by ``asdict``."""
    return {field.name: getattr(options, field.name) for field in fields(options)}


def parse_options(options: type, program: str, args: list[str], **more):
    """An instance of the dataclass ``options`` from command-line arguments; ``more`` goes to ``tyro.cli``.

    Raises Error where tyro would print a box and exit. After ``--help`` the process exits with code 0.
    """
    if not {"-h", "--help"} & set(args):
        _check_names(options, program, args, complete="default" in more)
    box, page = io.StringIO(), _Page()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(page):
            return tyro.cli(options, prog=program, args=args, **more)
    except SystemExit as stop:
        if not stop.code:
            print(wrap_help(page.getvalue()), end="")
            raise
    rows = [row.strip("│ ") for row in box.getvalue().splitlines()[1:]]
    # In a terminal without UTF-8, a line of hyphens also follows the title.
    text = itertools.dropwhile(_is_line, rows)
    sentence = " ".join(itertools.takewhile(lambda row: not _is_line(row), text)).rstrip(".")
    if choice := re.fullmatch(
        r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", sentence
    ):
        value, name, known = choice.groups()
        known = ", ".join(each for each in known.replace("'", "").split(", ") if each != "None")
        sentence = f"{name} is {value}{did_you_mean(value.strip(chr(39)), known.split(', '))}: choose {known}"
    sentence = re.sub(r"^Missing value for argument '(\S+)'.*", r"\1 needs a value", sentence)
    if kind := re.match(r"Error parsing (\S+): .*?(int|float)\b.*: ('.*')", sentence):
        number = "a whole number" if kind[2] == "int" else "a number"
        sentence = f"{kind[1]} is {kind[3]}: give {number}"
    if kind := re.match(r"Error parsing (\S+): no type matching {None}\|(\w+) .* from \[(.*)\]", sentence):
        number = {"INT": "a whole number", "FLOAT": "a number"}.get(kind[2], kind[2])
        sentence = f"{kind[1]} is {kind[3]}: give {number}, or None"
    if word := re.match(r"Unrecognized options: (?!-)(.*)", sentence):
        meant = "text" in options.__dataclass_fields__
        sentence = f"{word[1]!r} is not an option{f' (did you mean --text {word[1]}?)' * meant}"
    raise Error(f"{sentence}; see {program} --help")


class _Page(io.StringIO):
    """A help text, in the colours and characters that stdout supports."""

    def __init__(self):
        super().__init__()
        self.isatty, self._encoding = sys.stdout.isatty, getattr(sys.stdout, "encoding", None)

    @property
    def encoding(self):
        return self._encoding


def wrap_help(text: str) -> str:
    """The text with the lines that are too long for the terminal wrapped between words and options."""
    width, lines = max(40, shutil.get_terminal_size().columns), []
    for line in text.splitlines():
        plain = re.sub(r"\x1b\[[\d;]*m", "", line)
        if len(plain) > width:
            plain = re.sub(r"\[[^][]*\]", lambda option: option[0].replace(" ", "\0"), plain)
            indent = re.match(r"(usage: |  [\w -]+?   *|  )?", plain)[0]
            found = textwrap.wrap(plain, width, subsequent_indent=" " * len(indent), break_on_hyphens=False)
            line = "\n".join(found).replace("\0", " ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _check_names(options: type, program: str, args: list[str], complete: bool) -> None:
    """Raise Error for an unknown option, or for a required one that is missing unless ``complete``."""
    given = [word.partition("=")[0].replace("_", "-") for word in args if re.match(r"--\w\S*$", word)]
    named = {flag(field.name): field for field in fields(options)}
    known = [*named, *(flag(f"no_{name.strip('-')}") for name in named)]
    for word in given:
        if word not in known:
            raise Error(f"unknown option {word}{did_you_mean(word, known)}; see {program} --help")
    for name, field in named.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and not complete and "Positional" not in str(field.type) and name not in given:
            raise Error(f"{name} is missing; see {program} --help")


def _is_line(row: str) -> bool:
    return not row.strip("─-")


def as_typed(sentence: str, config) -> str:
    """The library's ``top_k is 0`` in the words of the command line: ``--top-k is 0``."""
    names = "|".join(field.name for field in fields(config))
    return re.sub(rf"(^|\bset )({names})(?= is | to '| must )", lambda m: m[1] + flag(m[2]), sentence)
