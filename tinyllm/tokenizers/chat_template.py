"""A conversation as one prompt, by the chat template that a model brings.

A chat model has been trained on texts of one shape, such as SmolLM2's

    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant

and brings that shape along as a template in the language Jinja: ``chat_template`` of a tokenizer that
``load_tokenizer`` read from a model's files. Rendering it gives a text, and the text's special tokens become
ids.

Neither source of that text is trusted. The template comes from the internet and is a program: it runs in
Jinja's sandbox, in a process of its own with bounded time, memory and output. The messages come from
whoever types: a message that says ``<|im_end|>`` must stay a message that says so, and not end itself.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, check_text

TIME_LIMIT = 20.0  # seconds; a template of a page takes 0.1, most of it Python's own start
MAX_CHARACTERS = 1_000_000  # of all messages together, and of the prompt
ROLE = re.compile(r"[\w-]+", re.ASCII)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The prompt of a conversation, as transformers' ``apply_chat_template(tokenize=False)`` renders it.

    Each message has a ``role`` (``system``, ``user``, ``assistant`` or what else the template knows) and
    a ``content``, both str. With ``add_generation_prompt`` the text ends where the assistant's answer
    begins. The names of the model's first and last token are there for templates that write them; None
    leaves one undefined.

    The template runs in another process, in Jinja's sandbox, and gets the messages and nothing else. It
    is ended after 20 seconds; more than a million characters are refused, and so is more than 1 GiB of
    memory where the system can bound that (Linux). Raises ``Error`` for any of these, for a template that
    is not Jinja, fails, or leaves the sandbox, for messages that it refuses itself or that are not as
    above, and if jinja2 is not installed.
    """
    _check_template(template)
    variables = _variables(add_generation_prompt, bos_token, eos_token)
    return _render(template, [_check_messages(messages)], variables)[0]


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a conversation's prompt, in which only the template makes special tokens.

    Which characters come from a message is found by rendering twice: once as it is, and once with the
    characters of which special tokens consist replaced, in the messages, by placeholders that occur nowhere
    else. A special token that is still there was made by the template alone. So:

    - Where no message says a special token, the ids are those of the rendered text, ``render_chat``'s.
    - Where one does, or would complete one together with the template, its characters are encoded as
      ordinary text, between the special tokens of the template.
    - A template may treat a message by what it says (cut out ``<think>``, change the case). Where the two
      renderings differ for that reason and also in their special tokens, ``Error`` says so.

    It holds for special tokens as ``tokenizer.special_tokens`` has them, unless one is made of whitespace.
    Raises ``Error`` as ``render_chat`` and ``tokenizer.encode`` do.
    """
    _check_template(template)
    messages = _check_messages(messages)
    bos_token, eos_token = _first_and_last(tokenizer)
    placeholders = _placeholders(tokenizer, [template, *(message["content"] for message in messages)])
    marked_messages = [
        message | {"content": message["content"].translate(placeholders)} for message in messages
    ]
    variables = _variables(add_generation_prompt, bos_token, eos_token)
    text, marked = _render(template, [messages, marked_messages], variables)
    said, made = tokenizer.find_special(text), tokenizer.find_special(marked)
    back = {ord(placeholder): character for character, placeholder in placeholders.items()}
    if marked.translate(back) == text:
        if [found.span() for found in said] != [found.span() for found in made]:
            return tokenizer.encode_around(text, made).tolist()
    elif [found[0] for found in said] != [found[0] for found in made]:
        raise Error(
            "a message says a special token, and the chat template treats messages by what they say, so the "
            "two cannot be told apart: remove the token from the message"
        )
    return tokenizer.encode(text, special="allow")


def _first_and_last(tokenizer: Tokenizer) -> tuple[str | None, str | None]:
    """The names of the tokenizer's ``bos_id`` and of the first of its ``eos_ids``."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return names.get(tokenizer.bos_id), names.get(tokenizer.eos_ids[0]) if tokenizer.eos_ids else None


def _placeholders(tokenizer: Tokenizer, texts: list[str]) -> dict[int, str]:
    """For each character of the special tokens, except whitespace, one that occurs in none of the texts."""
    characters = {ord(c) for name in tokenizer.special_tokens for c in name if not c.isspace()}
    used = set("".join(texts))
    # From the last private-use character downwards; messages are too short to use all of them up.
    free = (chr(n) for n in range(0x10FFFD, 0xFFFF, -1) if chr(n) not in used)
    return dict(zip(sorted(characters), free))


def _variables(add_generation_prompt: bool, bos_token: str | None, eos_token: str | None) -> dict:
    variables = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    for name, token in (("bos_token", bos_token), ("eos_token", eos_token)):
        if token is not None:
            check_text(token)
            variables[name] = token
    return variables


def _check_template(template: str) -> None:
    if template is None:
        raise Error("the model brings no chat template: give it a text to continue, or take a chat model")
    check_text(template)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise Error(f"the messages are {messages!r}: give a list of at least one, with role and content each")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise Error(f"message {i} is {message!r}: give it a role and a content, and nothing else")
        role, content = message["role"], message["content"]
        # A role is a program's word, not a user's: it is written into the prompt as it is.
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise Error(f"message {i} has the role {role!r}: use letters, digits, _ and -, as in 'user'")
        try:
            check_text(content)
        except Error as error:
            raise Error(f"message {i} has no proper content: {error}") from None
    characters = sum(len(message["content"]) for message in messages)
    if characters > MAX_CHARACTERS:
        raise Error(f"the messages have {characters:,} characters, more than {MAX_CHARACTERS:,}: omit some")
    return [dict(message) for message in messages]


def _render(template: str, conversations: list[list[dict[str, str]]], variables: dict) -> list[str]:
    """The template's text for each conversation, at one moment: a template may write the date."""
    job = dict(template=template, conversations=conversations, variables=variables, limit=MAX_CHARACTERS)
    # Sent as source, so that the process need not import tinyllm and NumPy: 0.1 s instead of 0.3.
    program = "".join(inspect.getsource(part) for part in (_child, _render_all, _environment)) + "_child()\n"
    path = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", program],
            input=json.dumps(job).encode("ascii"),
            capture_output=True,
            timeout=TIME_LIMIT,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        answer = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        raise Error(f"the chat template ran for {TIME_LIMIT:g} seconds: use another template") from None
    except OSError as error:
        raise Error(f"no process could be started for the chat template ({error}): try again") from error
    except ValueError:
        raise Error("the chat template ended its process, or had no memory: use another template") from None
    if "error" in answer:
        raise Error(answer["error"])
    return answer["texts"]


# The other process: these three functions are its whole program.


def _child() -> None:
    """Render the job on stdin and print the texts, or an error's sentence, as JSON."""
    import json
    import sys

    job = json.load(sys.stdin)
    try:
        import jinja2
    except ImportError:
        answer = {"error": "a chat template needs jinja2: pip install 'tinyllm-numpy[models]'"}
    else:
        try:
            answer = {"texts": _render_all(job)}
        except jinja2.exceptions.SecurityError as error:
            answer = {"error": f"the chat template tried to leave its sandbox ({error}): do not trust it"}
        except MemoryError:
            answer = {"error": "the chat template needed more than 1 GiB of memory: use another template"}
        except Exception as error:  # a template is a program: it can raise anything
            reason = f"{type(error).__name__}: {error}"
            remedy = "change the messages or use another template"
            answer = {"error": f"the chat template gave no prompt ({reason}): {remedy}"}
    print(json.dumps(answer))


def _render_all(job: dict) -> list[str]:
    try:
        import resource  # not on Windows; and macOS does not keep this limit

        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    except (ImportError, OSError, ValueError):
        pass
    template = _environment().from_string(job["template"])
    texts = []
    for messages in job["conversations"]:
        text = ""
        for piece in template.generate(messages=messages, **job["variables"]):
            text += piece
            if len(text) > job["limit"]:
                raise ValueError(f"it wrote more than {job['limit']:,} characters")
        texts.append(text)
    return texts


def _environment():
    """Jinja as transformers sets it up (``utils/chat_template_utils.py``), so that prompts are the same.

    Blocks leave no lines behind; there are ``break`` and ``continue``, ``raise_exception``,
    ``strftime_now``, ``tojson`` without HTML, and ``{% generation %}``, which marks the assistant's part.
    """
    import datetime
    import json

    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError, TemplateRuntimeError

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's way)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    # Jinja's own takes the name __class__ and then passes for what it is not.
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
            raise SecurityError(f"a namespace must not have the name {name!r}")

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
