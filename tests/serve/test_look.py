"""POST /tinyllm/inspect: what it returns is what ``inspect`` computes, and wrong requests are refused."""

import numpy as np
import pytest
from support.chat_model import ANSWER, BYTE_ID, turn
from support.page_server import PageServer

from tinyllm import Error
from tinyllm.serve.look import Looker
from tinyllm.tools.inspect import inspect

PATH = "tinyllm/inspect"
ASKED = [{"role": "user", "content": "Hi é"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PageServer(tmp_path_factory.mktemp("look") / "model") as server:
        yield server


def read(server, text):
    return server.tokenizer.encode(text, special="allow")


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_and_lens_are_those_of_the_last_position(server, layer):
    ids = read(server, turn("user", "Hi é") + ANSWER + "Yes")
    status, found = server.post(PATH, {"messages": ASKED, "ids": read(server, "Yes"), "layer": layer})
    assert status == 200 and found["layer"] == layer and (found["layers"], found["heads"]) == (2, 2)
    assert [token["id"] for token in found["tokens"]] == ids
    assert [token["special"] for token in found["tokens"]] == [i > 255 for i in ids]
    expected = inspect(server.model, ids)
    attention = np.array(found["attention"])
    assert attention.shape == (2, len(ids))
    np.testing.assert_allclose(attention, expected.attention(layer)[:, -1], atol=5.1e-5)
    np.testing.assert_allclose(attention.sum(axis=1), 1, atol=1e-2)
    tops = [row["top"] for row in found["lens"]]
    assert [[each["id"] for each in top] for top in tops] == expected.lens.ids[:, -1].tolist()
    probabilities = [[each["probability"] for each in top] for top in tops]
    np.testing.assert_allclose(probabilities, expected.lens.probabilities[:, -1], rtol=1e-5)


def test_the_last_row_of_the_lens_is_what_a_completion_reports(server):
    server.say("Y")
    body = {"messages": ASKED, "logprobs": True, "top_logprobs": 10, "max_tokens": 1}
    _, completion = server.post("v1/chat/completions", body)
    (entry,) = completion["choices"][0]["logprobs"]["content"]
    _, found = server.post(PATH, {"messages": ASKED})
    last = found["lens"][-1]["top"]
    assert [each["id"] for each in last] == [each["id"] for each in entry["top_logprobs"]]
    reported = np.exp([each["logprob"] for each in entry["top_logprobs"]])
    np.testing.assert_allclose([each["probability"] for each in last], reported, rtol=1e-4)


def test_one_head_and_the_middle_layer(server):
    _, every = server.post(PATH, {"messages": ASKED})
    _, one = server.post(PATH, {"messages": ASKED, "head": 1})
    assert every["layer"] == one["layer"] == 1
    assert one["attention"] == every["attention"][1:]


def test_an_unfinished_answer_and_its_ids_are_the_same(server):
    begun = [*ASKED, {"role": "assistant", "content": "Yes"}]
    by_text = server.post(PATH, {"messages": begun, "continue_final_message": True})
    assert by_text == server.post(PATH, {"messages": ASKED, "ids": read(server, "Yes")})


def test_half_a_character_can_be_looked_at(server):
    first = BYTE_ID["é".encode()[0]]
    status, found = server.post(PATH, {"messages": ASKED, "ids": [first]})
    assert status == 200 and found["tokens"][-1]["text"] == "\ufffd"


def test_a_prompt_without_a_chat(server):
    _, found = server.post(PATH, {"prompt": "ab", "ids": read(server, "c")})
    assert "".join(token["text"] for token in found["tokens"]) == "abc"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ([], "body"),
        ({"messages": ASKED, "layer": 2}, "layer"),
        ({"messages": ASKED, "layer": -1}, "layer"),
        ({"messages": ASKED, "layer": 1.5}, "layer"),
        ({"messages": ASKED, "head": 7}, "head"),
        ({"messages": ASKED, "ids": [258]}, "ids"),
        ({"messages": ASKED, "ids": [True]}, "ids"),
        ({"messages": ASKED, "ids": "Yes"}, "ids"),
        ({"messages": ASKED, "ids": [1] * 2000}, "tokens"),
        ({"messages": ASKED, "lens": True}, "lens"),
        ({"messages": ASKED, "stream": True}, "stream"),
        ({"prompt": "a", "temperature": 0.5}, "temperature"),
        ({"prompt": "a", "messages": ASKED}, "messages"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_wrong_requests_are_refused(server, body, named):
    status, found = server.post(PATH, body)
    assert status == 400 and named in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


def test_the_model_is_that_of_the_server(server):
    assert server.post(PATH, {"messages": ASKED, "model": "tiny", "stream": False})[0] == 200
    for body in ({"messages": ASKED}, {"prompt": "a"}):
        status, found = server.post(PATH, body | {"model": "nonexistent"})
        assert (status, found["error"]["code"]) == (404, "model_not_found")


def test_unused_ids_are_not_among_the_likely_tokens(server):
    def likely(unused):
        found = Looker(server.tokenizer, unused).look(server.model, read(server, "abc"), None, None)
        return [token["id"] for token in found["lens"][-1]["top"]]

    first, *others = likely([])
    assert likely([first])[:-1] == others


def test_the_last_text_is_kept_and_a_longer_one_than_allowed_is_refused(server):
    ids, looker = read(server, "abc"), Looker(server.tokenizer, most_tokens=3)
    calls, hidden_states = [], server.model.hidden_states
    try:
        server.model.hidden_states = lambda *args, **kwargs: calls.append(1) or hidden_states(*args, **kwargs)
        looker.look(server.model, ids, 0, None)
        passes = len(calls)
        looker.look(server.model, ids, 1, None)
        assert len(calls) == passes
        looker.look(server.model, ids[:2], 1, None)
        assert len(calls) == 2 * passes
    finally:
        del server.model.hidden_states
    with pytest.raises(Error, match="limited to 3"):
        looker.look(server.model, [*ids, 1], None, None)
