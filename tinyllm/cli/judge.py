"""``tinyllm judge``: how good a model's answers to a test set are, or which of two models answers better."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from tqdm import tqdm

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, Flag, TextModelOptions, move, option
from tinyllm.data.conversations import (
    Message,
    conversations,
    is_learned,
    not_used,
    recognise,
    unused_keys,
    without_weights,
)
from tinyllm.data.examples import Row, open_examples
from tinyllm.data.instructions import alpaca, render_all
from tinyllm.data.preferences import two_examples, unused_of_pairs
from tinyllm.errors import Error
from tinyllm.inference.chat import text_stream
from tinyllm.inference.choices import LETTERS, log_prob, most_likely, parse_question
from tinyllm.inference.generate import generate
from tinyllm.inference.judge import summarize
from tinyllm.inference.judging import Item, JudgedFolder, answer_items, compare, judge_items, match, score
from tinyllm.inference.model_server import LONGEST, ModelServer, ServerFailure
from tinyllm.nn import Module
from tinyllm.tokenizers import Tokenizer
from tinyllm.tokenizers.chat_template import end_of_answer
from tinyllm.training.checkpoint import hash_weights
from tinyllm.training.config import flag
from tinyllm.training.run_folder import new_folder

# How answers are judged -> the numbers of a row
NUMBERS = {"score": ("score",), "pair": ("win",), "match": ("exact_match", "f1"), "choice": ("correct",)}

# Options -> how answers are judged where they have an effect
ONLY_BY = dict.fromkeys(("judge", "server", "timeout", "retries"), ("score", "pair"))
ONLY_BY["choices"] = ("choice",)


class Prompt(NamedTuple):
    """A conversation that the model continues, and the row it is from."""

    messages: list[Message]
    where: str


class Loaded(NamedTuple):
    """A model, the ids of all prompts, and the ids that end an answer."""

    model: Module
    tokenizer: Tokenizer
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]


Loader = Callable[[], Loaded]  # called when the model is first needed, so that only one is in memory


@dataclass(frozen=True, kw_only=True)
class _Judge:
    data: Annotated[str, option("DATA")]
    """The test set: a file of JSON or JSON lines, a folder with a test part, or a known name."""
    part: Literal["test", "valid", "train", "all"] = "test"
    """The part of it to judge; a single file is split as by finetune."""
    split_seed: Annotated[int, option("N")] = 0
    """Seed of that split, as in finetune."""
    rows: Annotated[int | None, option("N", "all")] = None
    """Only the first N rows of the part."""
    by: Literal["score", "pair", "match", "choice"] = "score"
    """score (0 to 100, by a judge), pair (of two models, by a judge), match (the reference) or choice."""
    against: Annotated[str | None, option("NAME", "")] = None
    """A second model, or a run, to compare with the first."""
    against_adapter: Annotated[str | None, option("DIR", "")] = None
    """Adapter of the second model."""
    out: Annotated[Path | None, option("DIR", "a new one in judged/")] = None
    """Folder for the answers and scores, new or that of a judgement which was stopped."""
    server: Annotated[str, option("URL")] = "http://localhost:11434/api/chat"
    """The judge's server: a URL that ends in /api/chat is Ollama's; any other is OpenAI-compatible."""
    judge: Annotated[str | None, option("NAME", "")] = None
    """The model on the server that judges, such as llama3.2."""
    timeout: Annotated[float, option("S")] = 120.0
    """Seconds that a reply of the server may take."""
    retries: Annotated[int, option("N")] = 3
    """How often a request that failed is repeated."""
    max_new_tokens: Annotated[int, option("N")] = 256
    """Maximum number of tokens in an answer, which is the most likely one."""
    choices: Literal["letter", "text"] = "letter"
    """Compare the probabilities of the letters A, B, …, or of the texts of the choices."""
    per_byte: Flag = False
    """With --choices text: divide a log-probability by the length of the text."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(DeviceOptions, _Judge, TextModelOptions):
    """Judge a model's answers to a test set, or compare those of two models.

    Every answer and score is kept at once; the same command with --out continues a stopped judgement.

    Example: tinyllm judge --run runs/instruct-1 --data instruction-data --judge llama3.2
    """

    smaller: ClassVar = ["fewer --max-new-tokens"]

    @property
    def models(self) -> dict[str, TextModelOptions]:
        """The models, by their names in the folder."""
        first = TextModelOptions(model=self.model, run=self.run, adapter=self.adapter, no_bos=self.no_bos)
        if self.against is None:
            return {"model": first}
        second = TextModelOptions(model=self.against, adapter=self.against_adapter, no_bos=self.no_bos)
        return {"model": first, "against": second}


def run(config: JudgeConfig) -> None:
    """Answer the test set with every model, judge the answers, and print the summary.

    What is cheap is checked first: options, names, data, and that the server replies. The folder keeps
    whatever is done, and the message of an interruption or a failure says how to continue.
    """
    _check(config)
    models = config.models
    weights = {
        name: f"{options.find() or options.typed} {options.adapter}" for name, options in models.items()
    }
    rows, data = _rows(config)
    device = config.open_device()
    names = ("part", "split_seed", "by", "max_new_tokens", "choices", "per_byte", "judge", "dtype", "no_bos")
    kept = {name: getattr(config, name) for name in names}
    kept |= {"data": data, "rows": len(rows), **weights}
    judge = (_Choices if config.by == "choice" else _Answers)(config, rows)
    out = config.out or new_folder(Path(config.data).stem, "judged")
    with closing(JudgedFolder(out, kept)) as folder:
        unused = not_used(judge.unused)
        print(f"{len(rows):,} rows of {config.data}{unused}; answers and scores are kept in {out}")
        again = f"the same command with --out {out} continues"
        try:
            with autocast(config.dtype):
                loaders = {
                    name: _loader(
                        config, models[name], device, judge.prompts, partial(folder.check_model, name)
                    )
                    for name in models
                }
                judged = judge(folder, loaders)
        except ServerFailure as error:
            raise ServerFailure(f"{error}; {again}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(2, f"interrupted; {again}") from None
        summary = _summary(judged, NUMBERS[config.by])
        folder.write_summary(
            {name: {key: x._asdict() for key, x in found.items()} for name, found in summary.items()}
        )
        cut = Counter(name for (name, _), record in folder.answers.found.items() if record.get("cut"))
    for name, count in cut.items():
        print(
            f"{name}: {count:,} of {len(rows):,} answers are cut, because they fill the model's context: "
            "they are judged so"
        )
    for name, found in summary.items():
        for key, value in found.items():
            without = f", {value.without} without" if value.without else ""
            print(f"{name}: {key} {value} ({value.rows:,} rows{without}; 95% interval of the mean)")
    if config.by == "pair":
        turned = sum(record["win"] == 0.5 and "tie" not in record["verdicts"] for record in judged["model"])
        print(f"the verdict depended on the order in {turned:,} of {len(rows):,} pairs, which count as ½")


def _check(config: JudgeConfig) -> None:
    config.check_least(rows=1, max_new_tokens=1, retries=0, split_seed=0)
    if not 0 < config.timeout <= LONGEST:
        raise Error(f"timeout is {config.timeout}: choose a number of seconds above 0 and up to {LONGEST:,}")
    if config.by == "pair" and config.against is None:
        raise Error("--by pair compares two models: give the second with --against")
    if config.by in ("score", "pair") and config.judge is None:
        raise Error(f"--by {config.by} asks a model on a server: name it with --judge, or use --by match")
    if config.against_adapter is not None and config.against is None:
        raise Error("--against-adapter is put on a second model: give --against, too, or use --adapter")
    for name, known in ONLY_BY.items():
        if config.by not in known and getattr(config, name) != getattr(JudgeConfig, name):
            by = " or ".join(f"--by {each}" for each in known)
            raise Error(f"{flag(name)} has no effect with --by {config.by}: omit it, or choose {by}")
    if config.per_byte and (config.by, config.choices) != ("choice", "text"):
        raise Error("--per-byte is for --by choice --choices text: omit it")


def _rows(config: JudgeConfig) -> tuple[list[Row], str]:
    """The rows to judge, and the SHA-256 of the data that they are from."""
    found = open_examples(config.data, config.split_seed)
    parts = ("train", "valid", "test") if config.part == "all" else (config.part,)
    rows = [row for part in parts for row in getattr(found, part)][: config.rows]
    if not rows:
        raise Error(f"{config.data} has no {config.part} rows: choose another --part")
    return rows, found.sha256


def _items(rows: list[Row]) -> tuple[list[tuple[Prompt, Item]], list[str]]:
    """The conversation that each row's last answer continues, and both as texts for a judge; unused keys."""
    unused = []
    if "chosen" in rows[0].values:
        pairs, rows = rows, [two_examples(row)[0] for row in rows]
        unused = unused_of_pairs(pairs)
    form = recognise(rows)
    if form.messages is None:
        raise Error(f"{rows[0].where} is a text without a question: give rows of questions and answers")
    found = []
    for row, messages in zip(rows, conversations(rows, form)):
        last = max(i for i, message in enumerate(messages) if i and is_learned(message))
        turns = [f"{message['role']}: {message['content']}" for message in messages[:last]]
        text = messages[0]["content"] if last == 1 else "\n\n".join(turns)
        prompt = Prompt(without_weights(messages[:last]), row.where)
        found.append((prompt, Item(text, messages[last]["content"])))
    return found, [*unused, *unused_keys(rows, form)]


def _loader(
    config: JudgeConfig,
    options: TextModelOptions,
    device: str,
    prompts: list[Prompt],
    check: Callable[[str], None],
) -> Loader:
    """What loads a model; ``check`` is called with the SHA-256 of its weights, prompts and ends."""

    @cache
    def load() -> Loaded:
        model, tokenizer = options.load(config.weights_dtype)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = alpaca(tokenizer)
        ids, ends = _encode(model, tokenizer, prompts), (*tokenizer.eos_ids, *end_of_answer(tokenizer))
        check(sha256(f"{hash_weights(model)} {ids} {ends}".encode()).hexdigest())
        move(model, device)
        return Loaded(model, tokenizer, ids, ends)

    return load


def _encode(model: Module, tokenizer: Tokenizer, prompts: list[Prompt]) -> list[list[int]]:
    """The ids of every prompt; raises ``Error``, naming the row, for one that fills the context."""
    chats = [(prompt.messages, True) for prompt in prompts]
    rendered = render_all(tokenizer, chats, [prompt.where for prompt in prompts])
    found = [tokenizer.with_bos(chat.encode(tokenizer)) for chat in rendered]
    for prompt, ids in zip(prompts, found):
        if len(ids) >= model.context:
            raise Error(
                f"the prompt of {prompt.where} has {len(ids):,} tokens, and the model's context is "
                f"{model.context:,}: remove the row, or shorten it"
            )
    return found


def _say(text: str) -> None:
    """Print above the progress bar."""
    tqdm.write(text, file=sys.stderr)


class _Answers:
    """Judge the answers that the models generate."""

    def __init__(self, config: JudgeConfig, rows: list[Row]):
        self.config, self.server = config, None
        pairs, self.unused = _items(rows)
        self.prompts, self.items = zip(*pairs)
        if config.by in ("score", "pair"):
            options = config.timeout, config.retries
            self.server = ModelServer(config.server, config.judge, *options, on_retry=_say)
            self.server.check()

    def __call__(self, folder: JudgedFolder, loaders: dict[str, Loader]) -> dict[str, list[dict]]:
        answers = {name: self._answer_all(folder, name, loaders.pop(name)) for name in [*loaders]}
        if self.config.by == "pair":
            return {"model": self._compare_all(folder, *answers.values())}
        return {name: self._judge_all(folder, name, its) for name, its in answers.items()}

    def _answer_all(self, folder: JudgedFolder, name: str, load: Loader) -> list[str]:
        loaded = load()
        return answer_items(folder, name, self.items, lambda row: self._answer(row, loaded))

    def _compare_all(self, folder: JudgedFolder, first: list[str], second: list[str]) -> list[dict]:
        def judge(row: int) -> dict:
            return compare(self.server.chat, self.items[row], first[row], second[row])

        return judge_items(folder, "model", len(self.items), judge)

    def _judge_all(self, folder: JudgedFolder, name: str, answers: list[str]) -> list[dict]:
        def judge(row: int) -> dict:
            if self.server is None:
                return match(self.items[row], answers[row])
            return score(self.server.chat, self.items[row], answers[row])

        return judge_items(folder, name, len(self.items), judge)

    def _answer(self, row: int, loaded: Loaded) -> dict:
        """The most likely answer of the model, and whether the context ended it."""
        model, tokenizer, prompts, stop = loaded
        unused, most = tokenizer.unused_ids(model.config.vocab_size), self.config.max_new_tokens
        steps = [*generate(model, [prompts[row]], most, 0, stop_ids=stop, suppress_ids=unused)]
        answer = "".join(text_stream(tokenizer, steps, stop)).strip()
        return {"answer": answer, "cut": len(steps) < most and int(steps[-1][0]) not in stop}


class _Choices:
    """Judge by the probabilities that the models give to the choices of questions."""

    def __init__(self, config: JudgeConfig, rows: list[Row]):
        self.config, self.by_letter = config, config.choices == "letter"
        self.questions = [parse_question(row.values, row.where) for row in rows]
        used = ("question", "choices", "answer")
        self.unused = [*dict.fromkeys(key for row in rows for key in row.values if key not in used)]
        texts = [each.listed if self.by_letter else each.question for each in self.questions]
        self.prompts = [
            Prompt([{"role": "user", "content": text}], row.where) for text, row in zip(texts, rows)
        ]

    def __call__(self, folder: JudgedFolder, loaders: dict[str, Loader]) -> dict[str, list[dict]]:
        return {name: self._choose_all(folder, name, loaders.pop(name)) for name in [*loaders]}

    def _choose_all(self, folder: JudgedFolder, name: str, load: Loader) -> list[dict]:
        loaded = load()
        return judge_items(folder, name, len(self.questions), lambda row: self._choose(row, loaded))

    def _choose(self, row: int, loaded: Loaded) -> dict:
        question, prompt = self.questions[row], loaded.prompts[row]
        texts = LETTERS[: len(question.choices)] if self.by_letter else question.choices
        try:
            answers = [loaded.tokenizer.encode_around(text, [], prompt) for text in texts]
            log_probs = [log_prob(loaded.model, prompt, answer) for answer in answers]
        except Error as error:
            raise Error(f"{self.prompts[row].where}: {error}") from None
        chosen = most_likely(log_probs, texts, self.config.per_byte)
        return {"log_probs": log_probs, "chosen": chosen, "correct": float(chosen == question.answer)}


def _summary(judged: dict[str, list[dict]], numbers: tuple[str, ...]) -> dict[str, dict]:
    """The mean of each number for each model and, for two, of the difference."""
    found = {
        name: {key: summarize([record[key] for record in records]) for key in numbers}
        for name, records in judged.items()
    }
    if len(judged) == 2:
        pairs = list(zip(*judged.values()))
        found["difference"] = {key: summarize([_minus(a[key], b[key]) for a, b in pairs]) for key in numbers}
    return found


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
