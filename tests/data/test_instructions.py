"""Instructions: formats, templates, and the ids and masks of conversations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_model import CHATML, END, START
from support.instructions import CHATS, chat_tokenizer, of_bytes, reference, render_in_process, turns
from support.tokenizers import write_sentencepiece_like

from tinyllm.data import instructions
from tinyllm.data.conversations import conversations, prompt_of, recognise
from tinyllm.data.examples import Row
from tinyllm.data.instructions import (
    Encoded,
    alpaca,
    check_template,
    encode_conversations,
    encode_text,
    shorten,
)
from tinyllm.errors import Error
from tinyllm.tokenizers import CharTokenizer, chat_template, load_tokenizer
from tinyllm.tokenizers.chat_template import encode_chat

RENDER = chat_template._render  # in processes of their own


def rows(*values):
    return [Row(each, f"row {number} of data.json") for number, each in enumerate(values, 1)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        render_in_process(patched)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def encoded(tokenizer, chats):
    return encode_conversations(tokenizer, rows(*({} for _ in chats)), chats)


def test_a_conversation_that_is_too_long_to_render_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 9)
    with pytest.raises(Error, match=r"row 2 of data\.json: the messages have 10 characters"):
        encoded(tokenizer, [turns("short", "one"), turns("0123456789", "x")])


# ------------------------------------------------------------------------------------------- masks


def test_ids_and_masks_equal_those_written_by_hand(tokenizer):
    for messages, found in zip(CHATS, encoded(tokenizer, CHATS), strict=True):
        ids, learned = reference(messages)
        assert found.ids.tolist() == ids.tolist(), messages
        assert found.learned.tolist() == learned.tolist(), messages
        assert not found.divided


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12) | st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "a<|im_end|>\n<|im_start|>assistant\n", "\n", " "]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(words, words), min_size=1, max_size=3), min_size=1, max_size=6))
def test_masks_of_random_conversations(tokenizer, many):
    chats = [turns(*(text for pair in pairs for text in pair)) for pairs in many]
    for messages, found in zip(chats, encoded(tokenizer, chats), strict=True):
        ids, learned = reference(messages)
        assert found.ids.tolist() == ids.tolist()
        assert found.learned.tolist() == learned.tolist()


def test_what_precedes_an_answer_is_the_prompt_of_generation(tokenizer):
    for messages, found in zip(CHATS, encoded(tokenizer, CHATS), strict=True):
        prompt = encode_chat(tokenizer, tokenizer.chat_template, prompt_of(messages))
        assert found.ids[: len(prompt)].tolist() == prompt
        assert not found.learned[: len(prompt)].any() and found.learned[len(prompt)]


def test_an_answer_of_weight_0_is_not_learned(tokenizer):
    chat = turns("a", "b", "c", "d", "e", "f")
    ids, learned = reference(chat)
    wrong = np.flatnonzero(learned)[2:4]  # "d" and its end
    chat[3]["weight"], chat[5]["weight"] = 0, 1
    (found,) = encoded(tokenizer, [chat])
    assert found.ids.tolist() == ids.tolist()
    assert found.learned.tolist() == [x and i not in wrong for i, x in enumerate(learned)]
    (whole,) = encode_conversations(tokenizer, rows({}), [chat], prompts=True)
    assert np.flatnonzero(~whole.learned).tolist() == wrong.tolist()


def test_a_token_across_the_border_is_divided(tmp_path):
    """GPT-2 has a token for two spaces: the prompt's last and the answer's first would be one."""
    tokenizer = load_tokenizer("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else ' A:') + m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} A:{% endif %}"
    )
    (found,) = encoded(tokenizer, [turns("x", ":)")])
    assert found.divided
    answer = [*tokenizer.encode(":)"), 50256]
    assert found.ids[found.learned].tolist() == answer
    assert tokenizer.decode(found.ids) == "Q: x A::)<|endoftext|>"
    (plain,) = encoded(tokenizer, [turns("x", " y")])
    assert not plain.divided


def test_a_divided_answer_gets_no_space_in_front(tmp_path):
    """Llama 2's tokenizer adds one in front of a text, and an answer is not the beginning of one."""
    template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    config = {"eos_token": "</s>", "chat_template": template}
    tokenizer = load_tokenizer(write_sentencepiece_like(tmp_path, config=config))
    chat = turns("yes", "Hi you.", "no </s>", "Hi")  # the user's </s> is ordinary text
    (found,) = encoded(tokenizer, [chat])
    assert found.divided
    text = "USER: yes ASSISTANT: Hi you.</s> USER: no </s> ASSISTANT: Hi</s>"
    assert tokenizer.decode(found.ids) == text
    assert tokenizer.decode_bytes(found.ids[found.learned]) == b"Hi you.</s>Hi</s>"
    prompt = encode_chat(tokenizer, template, chat[:1])
    assert found.ids[: len(prompt)].tolist() == prompt


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer, monkeypatch):
    other = load_tokenizer(tokenizer.name.removesuffix("/tokenizer.json"))
    other.chat_template = CHATML.replace("message['content']", "(message['content'] if loop.last else '…')")
    with pytest.raises(Error, match=r"row 1 of data\.json: the chat template renders a turn differently"):
        encoded(other, [turns("a", "b", "c", "d")])
    other.chat_template = CHATML.replace("<|im_end|>'", "' + ('<|im_end|>' if loop.index < 3 else '')")
    with pytest.raises(Error, match=r"row 1 of data\.json: the chat template does not end an answer"):
        encoded(other, [turns("a", "b", "c", "d")])
    other.chat_template = CHATML + "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    monkeypatch.setattr(chat_template, "_render", RENDER)  # it says which conversation failed
    monkeypatch.setattr(instructions, "RENDERED_AT_ONCE", 2)
    with pytest.raises(Error, match=r"row 2 of data\.json: the chat template failed .*too long"):
        encoded(other, [turns("a", "b"), turns("a", "b", "c", "d")])


def test_many_conversations_are_rendered_in_several_processes(tokenizer, monkeypatch):
    whole = encoded(tokenizer, CHATS)
    monkeypatch.setattr(chat_template, "_render", RENDER)
    monkeypatch.setattr(instructions, "RENDERED_AT_ONCE", 7)
    for one, other in zip(whole, encoded(tokenizer, CHATS), strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.learned, other.learned)


# --------------------------------------------------------------------------------------- templates


def test_the_alpaca_template_is_the_books():
    tokenizer = load_tokenizer("gpt2")
    tokenizer.chat_template = alpaca(tokenizer)
    values = {"instruction": "Add", "input": "2+2", "output": "4"}
    chats = conversations(rows(values), recognise(rows(values)))
    (found,) = encoded(tokenizer, chats)
    assert tokenizer.decode(found.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd\n\n### Input:\n2+2\n\n### Response:\n4<|endoftext|>"
    )
    assert tokenizer.decode(found.ids[found.learned]) == "4<|endoftext|>"
    check_template(tokenizer)


def test_a_template_needs_its_special_tokens_and_an_end(tokenizer):
    gpt2 = load_tokenizer("gpt2")
    gpt2.chat_template = CHATML
    with pytest.raises(Error, match=r"--special-tokens '<\|im_start\|>' '<\|im_end\|>'"):
        check_template(gpt2)
    gpt2.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(Error, match="without a special token"):
        check_template(gpt2)
    with pytest.raises(Error, match=r"--special-tokens '<\|endoftext\|>'"):
        alpaca(CharTokenizer("abc"))
    other = load_tokenizer(tokenizer.name.removesuffix("/tokenizer.json"))
    other.eos_ids = (5,)
    assert check_template(other) == (END, 5)
    assert alpaca(tokenizer).count("<|im_end|>") == 1


# ------------------------------------------------------------------------------------ text, lengths


def test_a_bos_token_precedes_an_example_and_is_not_an_answers(tokenizer):
    other = load_tokenizer(tokenizer.name.removesuffix("/tokenizer.json"))
    other.bos_id, other.add_bos = 0, True
    ids, learned = reference(CHATS[1])
    (found,) = encoded(other, [CHATS[1]])
    assert found.ids.tolist() == [0, *ids] and found.learned.tolist() == [False, *learned]
    assert encode_text(other, *rows({"text": "ab"})).ids.tolist() == [0, *of_bytes("ab"), END]


def test_a_text_is_learned_whole_and_ends_once(tokenizer):
    for text in ("ab", "ab<|im_end|>"):
        found = encode_text(tokenizer, *rows({"text": text}))
        assert found.ids.tolist() == [*of_bytes("ab"), END]
        assert found.learned.all()
    assert encode_text(tokenizer, *rows({"text": "<|im_start|>"})).ids.tolist() == [START, END]
    with pytest.raises(Error, match=r"row 1 of data\.json: 'text' is 3"):
        encode_text(tokenizer, *rows({"text": 3}))
    with pytest.raises(Error, match=r"row 1 of data\.json: 'text' is empty"):
        encode_text(tokenizer, *rows({"text": ""}))


def test_examples_are_cut_and_counted():
    def example(length, answer):
        learned = np.zeros(length, bool)
        learned[answer:] = True
        return Encoded(np.arange(length), learned)

    divided = example(9, 5)._replace(divided=True)  # and left out
    found = shorten([example(4, 2), example(9, 3), divided], 5, rows({}, {}, {}))
    assert [ids.tolist() for ids, _ in found.examples] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert (found.cut, found.left_out, found.divided) == (2, 1, 0)
    (note,) = found.notes("training", "--max-length", 4)
    assert note.startswith("2 training examples are longer than 4 tokens") and "1 of them" in note
    with pytest.raises(Error, match="no example has an answer within the first 1 tokens"):
        shorten([example(4, 2)], 2, rows({}))
