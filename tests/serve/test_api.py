"""What a request may contain, and what it means."""

import re

import pytest

from tinyllm.serve.api import LONGEST_TOKEN, Limits, check_model, parse_chat, parse_completion
from tinyllm.serve.errors import APIError

LIMITS = Limits(context=100, max_tokens=50, vocab_size=20, choices=6)
USER = [{"role": "user", "content": "Hi"}]


def chat(**more):
    return parse_chat({"model": "m", "messages": USER} | more, LIMITS)


def completion(**more):
    return parse_completion({"model": "m", "prompt": "Hi"} | more, LIMITS)


def test_defaults_are_those_of_openai():
    wanted = chat()
    assert (wanted.temperature, wanted.top_p, wanted.top_k, wanted.n, wanted.seed) == (
        1.0,
        None,
        None,
        1,
        None,
    )
    assert (wanted.stops, wanted.top, wanted.stream, wanted.include_usage) == ([], None, False, False)
    assert wanted.max_tokens == 50 and completion().max_tokens == 16
    assert wanted.messages == USER and not wanted.goes_on
    assert completion().prompts == ["Hi"]


def test_null_is_as_if_absent():
    names = "temperature top_p top_k n seed stop stream max_tokens logprobs tools response_format logit_bias"
    assert chat(**dict.fromkeys(names.split())) == chat()


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": 1.5}, "temperature", 1.5),
        ({"top_p": 1}, "top_p", 1),
        ({"top_k": 5}, "top_k", 5),
        ({"top_k": 0}, "top_k", None),
        ({"top_k": -1}, "top_k", None),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"n": 3}, "n", 3),
        ({"stop": "x"}, "stops", ["x"]),
        ({"stop": ["x", "yz"]}, "stops", ["x", "yz"]),
        ({"max_tokens": 9}, "max_tokens", 9),
        ({"max_completion_tokens": 8}, "max_tokens", 8),
        ({"max_completion_tokens": 8, "max_tokens": 8}, "max_tokens", 8),
        ({"logprobs": True}, "top", 0),
        ({"logprobs": True, "top_logprobs": 20}, "top", 20),
        ({"logprobs": False}, "top", None),
        ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
    ],
)
def test_parameters_of_a_chat(given, name, value):
    assert getattr(chat(**given), name) == value


@pytest.mark.parametrize(
    "given",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "tools": [],
            "tool_choice": "none",
        },
        {"response_format": {"type": "text"}, "min_p": 0, "repetition_penalty": 1.0, "modalities": ["text"]},
        {"logprobs": False, "top_logprobs": 0},
    ],
)
def test_what_has_no_effect_is_accepted(given):
    assert chat(**given) == chat()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"logit_bias": {"5": -100}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"mirostat": 2}, "mirostat"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_would_have_an_effect_is_refused_by_name(given, name):
    with pytest.raises(APIError, match=name) as refused:
        chat(**given)
    assert (refused.value.status, refused.value.param) == (400, name)
    assert refused.value.code == "unsupported_parameter"


def test_a_refusal_names_what_would_be_accepted():
    """The parameters as JSON; and of a message that is wrong in two ways its role, which says most."""
    with pytest.raises(APIError, match=re.escape('only {"type": "text"} is supported')):
        chat(response_format={"type": "json_object"})
    with pytest.raises(APIError, match="only false is supported"):
        completion(echo=True)
    with pytest.raises(APIError, match=r"temperature is 1e\+31: give a number from 0 to 1e30"):
        chat(temperature=1e31)
    with pytest.raises(APIError, match="the role is 'tool': use system, developer, user, assistant"):
        chat(messages=[{"role": "tool", "tool_call_id": "1", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, "1", True, [], 10**400, float("inf"), float("nan")]),
        ("top_p", [0, 1.1, -1, "x"]),
        ("top_k", [1.5, -2, 2**40, "5"]),
        ("n", [0, -1, 1.0, True, 10**30, 7]),
        ("seed", [1.5, "1", 2**64, -(2**63) - 1]),
        ("max_tokens", [0, -1, 51, 1e3, "5", True]),
        ("max_completion_tokens", [0, 51]),
        ("stop", ["", [""], [1], {"a": 1}, ["x"] * 17, "x" * 1001, 5]),
        ("stream", [1, "true", []]),
        ("logprobs", [1, "yes"]),
        ("top_logprobs", [1]),  # without logprobs
        ("stream_options", [{"include_usage": True}, 1]),  # without stream
        ("messages", [[], {}, "Hi", 1, None]),
        ("continue_final_message", [True, 1]),  # the last message is a user's
    ],
)
def test_wrong_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(APIError, match=name) as refused:
            chat(**{name: value})
        assert (refused.value.status, refused.value.param) == (400, name), value
        assert len(refused.value.message) < 400 and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "message",
    [
        1, "Hi", None, [], {}, {"role": "user"}, {"content": "Hi"}, {"role": "user", "content": None},
        {"role": "user", "content": 5}, {"role": "tool", "content": "x"}, {"role": ["user"], "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "image", "text": "x"}]},
        {"role": "user", "content": ["x"]}, {"role": "user", "content": "x", "tool_calls": [1]},
        {"role": "user", "content": "x", "name": "Ann"},
    ],
)  # fmt: skip
def test_wrong_messages_are_refused_by_number(message):
    with pytest.raises(APIError, match=r"messages\[1\]") as refused:
        chat(messages=[*USER, message])
    assert (refused.value.status, refused.value.param) == (400, "messages[1]")


def test_messages_in_the_forms_that_clients_send():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    answer = {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []}
    rules = {"role": "developer", "content": "Be brief."}
    found = chat(messages=[rules, {"role": "user", "content": parts}, answer])
    assert [tuple(message.values()) for message in found.messages] == [
        ("system", "Be brief."), ("user", "Hello you"), ("assistant", "Yes?")
    ]  # fmt: skip


def test_parameters_that_contradict_each_other_are_refused():
    begun = [*USER, {"role": "assistant", "content": "Hel"}]
    for given, name in (
        ({"max_completion_tokens": 4, "max_tokens": 2}, "max_completion_tokens"),
        (
            dict(messages=begun, continue_final_message=True, add_generation_prompt=True),
            "add_generation_prompt",
        ),
    ):
        with pytest.raises(APIError, match=name) as refused:
            chat(**given)
        assert (refused.value.status, refused.value.param) == (400, name)


def test_an_unfinished_answer_is_continued():
    messages = [*USER, {"role": "assistant", "content": "Hel"}]
    assert chat(messages=messages, continue_final_message=True, add_generation_prompt=False).goes_on


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_of_a_completion(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], [[]], [1, "a"], ["a", 1], [1.5], [True], [-1], [20], [10**400], [["a"]]],
)
def test_wrong_prompts_are_refused(prompt):
    with pytest.raises(APIError, match="prompt") as refused:
        completion(prompt=prompt)
    assert refused.value.param == "prompt" and len(refused.value.message) < 400


def test_the_length_of_a_prompt_is_bounded():
    """A text by the context times the longest token, ids by the context."""
    most = 100 * LONGEST_TOKEN
    assert completion(prompt=["a" * most, [1] * 100]) and chat(
        messages=[*USER, USER[0] | {"content": "a" * (most - 2)}]
    )
    for call, given in (
        (completion, {"prompt": "a" * (most + 1)}),
        (completion, {"prompt": ["a", "a" * (most + 1)]}),
        (completion, {"prompt": [1] * 101}),
        (chat, {"messages": [*USER, USER[0] | {"content": "a" * (most - 1)}]}),
    ):
        with pytest.raises(APIError, match=r"at most (25,600|100) fit") as refused:
            call(**given)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_the_number_of_texts_is_bounded():
    assert len(completion(prompt=["a"] * 3, n=2).prompts) == 3
    with pytest.raises(APIError, match="at most 6"):
        completion(prompt=["a"] * 4, n=2)
    for n in (0, 7, 129):
        with pytest.raises(APIError, match=f"n is {n}: give a whole number from 1 to 6"):
            chat(n=n)


@pytest.mark.parametrize("body", [[], "x", 5, None, True])
def test_a_body_that_is_not_an_object_is_refused(body):
    with pytest.raises(APIError, match="JSON object"):
        parse_chat(body, LIMITS)


def test_the_first_choice_has_the_seed_itself_and_others_have_their_own():
    wanted = chat(n=3, seed=5)
    assert [wanted.arguments([1], i)["seed"] for i in range(3)] == [5, [5, 1], [5, 2]]
    assert chat(n=2).arguments([1], 1)["seed"] is None


def test_an_unknown_model_is_404():
    check_model({"model": "m"}, {"m"})
    check_model({}, {"m"})
    for model, status in (("x" * 1000, 404), ("", 404), (5, 400), ([], 400)):
        with pytest.raises(APIError, match="model") as refused:
            check_model({"model": model}, {"m"})
        assert refused.value.status == status and len(refused.value.message) < 300
