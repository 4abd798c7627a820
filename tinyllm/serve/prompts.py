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
    if continue_final_message:
        ids = _unfinished(tokenizer, messages)
    else:
        ids = encode_chat(tokenizer, tokenizer.chat_template, messages)
    return tokenizer.with_bos(ids)


def _unfinished(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """The rendered conversation up to the end of the last message's text.

    A character that occurs nowhere else marks that end; a template that strips texts leaves it there.
    """
    texts = [tokenizer.chat_template, *(message["content"] for message in messages)]
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
    last = messages[-1] | {"content": messages[-1]["content"] + mark}
    (chat,) = render_chats(tokenizer, tokenizer.chat_template, [([*messages[:-1], last], False)])
    if chat.text.count(mark) != 1:
        raise Error(
            "the chat template does not render the last message as it is, so that it cannot be continued: "
            "omit continue_final_message"
        )
    text = chat.text.partition(mark)[0]
    special = None if chat.special is None else [found for found in chat.special if found.end() <= len(text)]
    return RenderedChat(text, special).encode(tokenizer)


def text_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt of ``/v1/completions``. Special tokens in a text have their ids: whoever writes the
    whole prompt writes them, too. Ids are used as they are.
    """
    if isinstance(prompt, list):
        return prompt
    return tokenizer.with_bos(tokenizer.encode(prompt, special="allow"))
