"""Rendering a conversation as one prompt with a model's chat template.

A chat model has been trained on texts in one format, such as SmolLM2's

    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant

The model's files define that format by a template in the language Jinja, the ``chat_template`` of a tokenizer
loaded by ``load_tokenizer``. The template is rendered to a text, which is encoded with its special tokens.

Neither the template nor the messages are trusted. The template is a program from the internet: it runs in
Jinja's sandbox, in a separate process with bounded time, memory and output. The messages are user input: a
``<|im_end|>`` in a message must be encoded as ordinary text, and must not end the turn.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, check_text

TIME_LIMIT = 20.0  # seconds; a template of one page takes 0.1, mostly the start of Python
MAX_CHARACTERS = 1_000_000  # of all messages in total, and of the prompt
# Environment variables that the process needs: to start Python, to find packages, and for the local time.
INHERITED = "PATH LD_LIBRARY_PATH DYLD_LIBRARY_PATH PYTHONHOME SYSTEMROOT HOME USERPROFILE APPDATA TZ".split()
ROLE = re.compile(r"[\w-]+", re.ASCII)
# Rendered to see what a template writes after an answer; this one occurs in no template.
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "0a1b2c"}]


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    enable_thinking: bool | None = None,
    **tokens: str | None,
) -> str:
    """The prompt of a conversation, identical to transformers' ``apply_chat_template(tokenize=False)``.

    Each message has a ``role`` (``system``, ``user``, ``assistant`` or another that the template supports)
    and a ``content``, both str. With ``add_generation_prompt`` the text ends where the assistant's answer
    begins. ``bos_token``, ``eos_token``, other ``tokens`` such as ``pad_token``, and ``enable_thinking``
    (whether Qwen3 should think before it answers) are variables for templates that use them; None leaves them
    undefined.

    The template runs in another process, in Jinja's sandbox, and its only input are these arguments. It is
    killed after 20 seconds, limited to a million characters of output and, where the system supports it
    (Linux), to 1 GiB of memory. Raises ``Error`` if it exceeds a limit, is not valid Jinja, fails, tries to
    leave the sandbox or rejects the messages, if the messages are malformed, and if jinja2 is not installed.
    """
    _check_template(template)
    conversation = _conversation(_check_messages(messages), add_generation_prompt)
    tokens |= {"bos_token": bos_token, "eos_token": eos_token}
    return _render(template, [conversation], _variables(tokens, enable_thinking))[0]


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
) -> list[int]:
    """The ids of a conversation's prompt; only the template, not a message, can produce special tokens.

    To find out which characters come from a message, the template is rendered twice: with the messages as
    they are, and with all characters that occur in special tokens replaced, in the messages, by placeholders
    that occur nowhere else. The special tokens of the second rendering come from the template alone. So:

    - If no message contains a special token, the ids are those of the text from ``render_chat``.
    - If a message contains one, or completes one together with the template, its characters are encoded as
      ordinary text between the special tokens of the template.
    - A template may transform messages depending on their content (remove ``<think>``, change the case). If
      the two renderings differ for that reason, and their special tokens differ too, ``Error`` is raised.

    This applies to all ``tokenizer.special_tokens`` that do not consist of whitespace only. Raises ``Error``
    as ``render_chat`` and ``tokenizer.encode`` do.
    """
    _check_template(template)
    conversations = [(messages, add_generation_prompt)]
    return render_chats(tokenizer, template, conversations, enable_thinking)[0].encode(tokenizer)


class RenderedChat(NamedTuple):
    """The text of a conversation, and the special tokens in it that come from the template."""

    text: str
    special: list[re.Match] | None  # None: all that are in the text

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the text; special tokens in messages are encoded as ordinary text."""
        if self.special is None:
            return tokenizer.encode(self.text, special="allow")
        return tokenizer.encode_around(self.text, self.special).tolist()


class RenderError(Error):
    """A conversation cannot be rendered; ``number`` is its own, from 0."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def render_chats(
    tokenizer: Tokenizer,
    template: str,
    conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]],
    enable_thinking: bool | None = None,
) -> list[RenderedChat]:
    """Render conversations, each with its ``add_generation_prompt``, in one process; see ``encode_chat``.

    Raises ``RenderError`` if one of them is not valid or the template fails for it.
    """
    _check_template(template)
    checked = []
    for number, (messages, flag) in enumerate(conversations):
        try:
            checked.append(_conversation(_check_messages(messages), flag))
        except Error as error:
            raise RenderError(str(error), number) from None
    texts = (message["content"] for each in checked for message in each["messages"])
    placeholders = _placeholders(tokenizer, [template, *texts])
    marked = [
        each | {"messages": [m | {"content": m["content"].translate(placeholders)} for m in each["messages"]]}
        for each in checked
    ]
    both = [each for pair in zip(checked, marked) for each in pair]
    rendered = _render(template, both, _variables(_named_tokens(tokenizer), enable_thinking))
    back = {ord(placeholder): character for character, placeholder in placeholders.items()}
    return [
        _own_special(tokenizer, rendered[2 * i], rendered[2 * i + 1], back, i) for i in range(len(checked))
    ]


def _own_special(
    tokenizer: Tokenizer, text: str, marked: str, back: dict[int, str], number: int
) -> RenderedChat:
    """Which special tokens of a text come from the template: those that ``marked`` has too."""
    every, own = tokenizer.find_special(text), tokenizer.find_special(marked)
    if marked.translate(back) == text:
        if [found.span() for found in every] != [found.span() for found in own]:
            return RenderedChat(text, own)
    elif [found[0] for found in every] != [found[0] for found in own]:
        raise RenderError(
            "a message contains a special token, which cannot be told apart from the template's own because "
            "the template transforms the messages: remove the token from the message",
            number,
        )
    return RenderedChat(text, None)


def end_of_answer(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The id of the special token that the chat template writes after an answer, or ().

    A model trained on such texts ends its answers with it, even if the model's files do not say so.
    """
    try:
        text = render_chat(tokenizer.chat_template, PROBE, False, **_named_tokens(tokenizer))
    except Error:  # not a template for this conversation
        return ()
    return end_of_probe(tokenizer, text)


def end_of_probe(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The id of the special token after the answer in the rendered ``PROBE``, or ()."""
    _, found, rest = text.rpartition(PROBE[1]["content"])
    ends = tokenizer.find_special(rest) if found else []
    return tuple(tokenizer.special_tokens[end[0]] for end in ends[:1] if not rest[: end.start()].strip())


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str | None]:
    """The special tokens that a template can name; ``eos_token`` is the first of the ``eos_ids``."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    eos = names.get(tokenizer.eos_ids[0]) if tokenizer.eos_ids else None
    return {**tokenizer.other_tokens, "bos_token": names.get(tokenizer.bos_id), "eos_token": eos}


def _placeholders(tokenizer: Tokenizer, texts: list[str]) -> dict[int, str]:
    """A character that occurs in none of the texts for each character of special tokens except whitespace."""
    characters = {ord(c) for name in tokenizer.special_tokens for c in name if not c.isspace()}
    used = set("".join(texts))
    # From the last private-use character downwards; the messages are too short to contain them all.
    free = (chr(n) for n in range(0x10FFFD, 0xFFFF, -1) if chr(n) not in used)
    return dict(zip(sorted(characters), free))


def _conversation(messages: list[dict[str, str]], add_generation_prompt: bool) -> dict:
    return {"messages": messages, "add_generation_prompt": add_generation_prompt}


def _variables(tokens: Mapping[str, str | None], enable_thinking: bool | None) -> dict:
    variables = {"tools": None, "documents": None}
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    for name, token in tokens.items():
        if token is not None:
            check_text(token)
            variables[name] = token
    return variables


def _check_template(template: str) -> None:
    if template is None:
        raise Error("the model has no chat template: use `tinyllm generate`, or choose a chat model")
    check_text(template)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise Error(f"the messages are {messages!r}: give a list of dicts with role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise Error(f"message {i} is {message!r}: give a dict with role and content, and no other keys")
        role, content = message["role"], message["content"]
        # Roles are chosen by the program, not by its user, and written into the prompt unchanged.
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise Error(f"message {i} has the role {role!r}: use letters, digits, _ and -, as in 'user'")
        try:
            check_text(content)
        except Error as error:
            raise Error(f"message {i} has invalid content: {error}") from None
    characters = sum(len(message["content"]) for message in messages)
    if characters > MAX_CHARACTERS:
        raise Error(f"the messages have {characters:,} characters: use at most {MAX_CHARACTERS:,}")
    return [dict(message) for message in messages]


def _render(template: str, conversations: list[dict], variables: dict) -> list[str]:
    """The rendered text of each conversation, in one process, so that dates in the template are the same.

    Of two that follow each other, the second is the first with placeholders; see ``render_chats``.
    """
    job = dict(template=template, conversations=conversations, variables=variables, limit=MAX_CHARACTERS)
    job["missing"] = f"a chat template needs jinja2: {pip_install('models')}"
    # Our own search path without the working folder, which may contain anything.
    path = [folder for folder in sys.path if os.path.isabs(folder) and folder != os.getcwd()]
    environment = {name: value for name, value in os.environ.items() if name in INHERITED}
    try:
        with tempfile.TemporaryDirectory() as elsewhere:
            child = subprocess.run(
                [sys.executable, "-P", "-c", _program()],
                input=json.dumps(job).encode("ascii"),
                capture_output=True,
                timeout=TIME_LIMIT,
                cwd=elsewhere,
                env=environment | {"PYTHONPATH": os.pathsep.join(path)},
                check=False,
                start_new_session=True,  # Ctrl-C in a terminal goes to the whole group
            )
        answer = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        raise Error(f"the chat template ran for {TIME_LIMIT:g} seconds: use another template") from None
    except OSError as error:
        raise Error(f"cannot start a process for the chat template ({error}): try again") from error
    except ValueError:
        raise Error(
            "the chat template crashed its process or ran out of memory: use another template"
        ) from None
    if "error" in answer:
        raise RenderError(answer["error"], answer.get("number", 0) // 2)
    return answer["texts"]


@functools.cache  # the file may be replaced while this process runs
def _program() -> str:
    """The source code of the child process, which so imports neither tinyllm nor NumPy: 0.1 s, not 0.3."""
    return "".join(map(inspect.getsource, (_child, _render_all, _environment))) + "_child()\n"


# The child process: its program consists of these three functions.


def _child() -> None:
    """Render the job on stdin and print the texts, or an error message, as JSON."""
    import json
    import sys

    job = json.load(sys.stdin)
    try:
        import jinja2
    except ImportError:
        answer = {"error": job["missing"]}
    else:
        try:
            answer = {"texts": _render_all(job)}
        except jinja2.exceptions.SecurityError as error:
            answer = {"error": f"the chat template tried to leave its sandbox ({error}): do not use it"}
        except MemoryError:
            answer = {"error": "the chat template needed more than 1 GiB of memory: use another template"}
        except Exception as error:  # a template is a program and can raise anything
            reason = f"{type(error).__name__}: {error}"
            remedy = "change the messages or use another template"
            answer = {"error": f"the chat template failed ({reason}): {remedy}"}
    print(json.dumps(answer | {"number": job.get("number", 0)}))


def _render_all(job: dict) -> list[str]:
    try:
        import resource  # not on Windows; macOS does not enforce this limit

        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    except (ImportError, OSError, ValueError):
        pass
    template = _environment().from_string(job["template"])
    texts = []
    for conversation in job["conversations"]:
        job["number"], text = len(texts), ""  # the number is for the message if it fails
        for piece in template.generate(**conversation, **job["variables"]):
            text += piece
            if len(text) > job["limit"]:
                raise ValueError(f"its output has more than {job['limit']:,} characters")
        texts.append(text)
    return texts


def _environment():
    """The Jinja environment of transformers (``utils/chat_template_utils.py``), for identical prompts.

    Blocks leave no blank lines. It adds ``break`` and ``continue``, ``raise_exception``, ``strftime_now``,
    ``tojson`` without HTML escapes, and ``{% generation %}``, which marks the assistant's part.
    """
    import datetime
    import json

    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError, TemplateRuntimeError

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (required by Jinja)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    # Jinja's Namespace allows the name __class__, and could then pose as another class.
    class Namespace(utils.Namespace):
        def __init__(*args, **kwargs):
            for name in dict(*args[1:], **kwargs):
                check_name(name)
            utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            check_name(name)
            utils.Namespace.__setitem__(self, name, value)

    def check_name(name):
        if name.startswith("_"):
            raise SecurityError(f"a namespace must not contain the name {name!r}")

    def raise_exception(message):
        raise TemplateRuntimeError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    environment.globals["namespace"] = Namespace
    return environment
