"""The token ids of a request's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.chat_template import RenderedChat, encode_chat, render_chats


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], continue_final_message: bool = False
) -> list[int]:
    """The ids of a conversation up to where the answer begins; or continues, as the last message began it.

    A BOS token that the model expects is added unless the template begins with it. Raises ``Error`` as
    ``encode_chat`` does. The template runs in a process of its own, which takes a tenth of a second.
    """
    if continue_final_message and messages[-1]["content"]:
        ids = _unfinished(tokenizer, messages)
    else:
        asked = messages[:-1] if continue_final_message else messages
        ids = encode_chat(tokenizer, tokenizer.chat_template, asked)
    return tokenizer.with_bos(ids)


def _unfinished(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """The rendered conversation, cut off after the last message's text. A template may strip that text."""
    (chat,) = render_chats(tokenizer, tokenizer.chat_template, [(messages, False)])
    content = messages[-1]["content"]
    for text, rest in ((content, ""), (content.strip(), content[len(content.rstrip()) :])):
        before, found, _ = chat.text.rpartition(text)
        if text and found:
            end = len(before) + len(text)
            special = None if chat.special is None else [x for x in chat.special if x.end() <= end]
            return RenderedChat(chat.text[:end] + rest, special).encode(tokenizer)
    raise Error(
        "the chat template changes the last message, so that it cannot be continued: omit "
        "continue_final_message"
    )


def text_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt of ``/v1/completions``. Special tokens in a text have their ids: whoever writes the
    whole prompt writes them, too. Ids are used as they are.
    """
    if isinstance(prompt, list):
        return prompt
    return tokenizer.with_bos(tokenizer.encode(prompt, special="allow"))
