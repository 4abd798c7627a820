"""``tinyllm serve`` as a process: its address, signals, exit codes, and what it says when it cannot."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from support.chat_model import write_model

from tinyllm.cli import main, parse_options
from tinyllm.cli.serve import ServeConfig

pytest.importorskip("uvicorn")
unix = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


@contextlib.contextmanager
def started(*options, **environment):
    """A running server: the process and its port."""
    command = [sys.executable, "-P", "-m", "tinyllm", "serve", "--port", "0", *map(str, options)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        try:
            line = process.stdout.readline()
            address = r"http://127\.0\.0\.1:(\d+)/"
            found = re.fullmatch(rf"serving tiny at {address}v1, with a page at {address}\n", line)
            assert found, line + process.stderr.read()
            yield process, int(found[1])
        finally:
            process.kill()


def request(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection.getresponse()


def chat(**more):
    return {"messages": [{"role": "user", "content": "my secret"}], "seed": 0} | more


@unix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_with_its_exit_code(model, number, code):
    with started("--model", model) as (process, port):
        assert request(port, "GET", "/health").status == 200
        reply = json.loads(request(port, "POST", "/v1/chat/completions", chat(max_tokens=3)).read())
        assert reply["model"] == "tiny" and reply["usage"]["completion_tokens"] <= 3
        process.send_signal(number)
        out, log = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert "secret" not in log and "Traceback" not in log
    lines = log.splitlines()
    assert re.search(
        r" 127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s \d+ \(0 cached\) \+ \d tokens$", lines[1]
    )
    assert lines[-1] == "tinyllm: the server has ended"


@unix
def test_a_short_answer_is_completed_after_the_signal(model):
    with started("--model", model) as (process, port):
        response = request(
            port, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 60, "stream": True, "seed": 0}
        )
        first = response.readline()
        process.send_signal(signal.SIGTERM)
        events = (first + response.read()).decode().strip().split("\n\n")
        process.wait(20)
    assert events[-1] == "data: [DONE]" and process.returncode == 143


@unix
def test_a_long_answer_is_ended_with_an_error_by_the_second_signal(model):
    with started("--model", model) as (process, port):
        body = {"prompt": [97], "max_tokens": 2048, "stream": True, "seed": 0, "n": 4}
        response = request(port, "POST", "/v1/completions", body)
        first = response.readline()
        for number in (signal.SIGINT, signal.SIGTERM):  # two of the same kind may arrive as one
            process.send_signal(number)
        events = (first + response.read()).decode().strip().split("\n\n")
        log = process.communicate(timeout=20)[1]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("shutting_down", "server_error")
    assert process.returncode == 130 and "Traceback" not in log


def test_the_api_key_of_the_environment(model):
    with started("--model", model, TINYLLM_API_KEY="k3y") as (_, port):
        assert request(port, "GET", "/v1/models").status == 401
        assert request(port, "GET", "/v1/models", Authorization="Bearer k3y").status == 200


def test_a_run_can_be_served_and_hosts_are_checked(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog lay on the rug. " * 60)
    sizes = "--n-layer 1 --n-head 2 --n-embd 16 --context 16 --steps 2 --warmup 1 --prompt the"
    assert (
        main(
            [
                "train",
                "--text",
                str(text),
                "--out",
                str(tmp_path / "tiny"),
                *sizes.split(),
                "--tokenizer",
                "char",
            ]
        )
        == 0
    )
    with started("--run", tmp_path / "tiny") as (_, port):
        reply = json.loads(
            request(port, "POST", "/v1/completions", {"prompt": "the", "max_tokens": 5}).read()
        )
        assert reply["usage"]["completion_tokens"] == 5
        refused = request(port, "POST", "/v1/chat/completions", chat())
        assert refused.status == 400 and b"no chat template" in refused.read()
        assert request(port, "GET", "/health", Host="evil.example").status == 403


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file systems of Unicode names")
def test_a_folder_whose_name_is_not_utf8_has_an_escaped_name(tmp_path):
    folder = tmp_path / os.fsdecode(b"ch\xff")
    folder.mkdir()
    assert ascii(ServeConfig(model=str(folder)).name) == ascii(r"ch\xff")  # in UTF-8 if it fails


# ----------------------------------------------------------------------------- wrong arguments


def message_of(capsys, *args):
    assert main(["serve", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tinyllm: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--slots 0", "slots"),
        ("--queue 0", "queue"),
        ("--max-tokens 0", "max-tokens"),
        ("--context 1", "context"),
        ("--port 70000", "--port is 70000"),
        ("--port -1", "--port is -1"),
        ("--port x", "--port is 'x'"),
        ("--host no.such.host.invalid", "no.such.host.invalid"),
        ("--api-key=", "api_key"),
        ("--cors example.com", "cors"),
        ("--adapter no/such/folder", "no/such/folder"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(capsys, monkeypatch, model, options, problem):
    monkeypatch.setattr(ServeConfig, "load", None)
    assert problem.replace("_", "-") in message_of(capsys, "--model", model, *options.split()).replace(
        "_", "-"
    )


@pytest.fixture
def served(monkeypatch):
    """The applications that would be served: the command ends at once, as after SIGTERM."""
    served = []
    monkeypatch.setattr("tinyllm.serve.server.serve", lambda app, *_: served.append(app) or signal.SIGTERM)
    return served


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--context 100000", "100,000 tokens is more than this model's: choose at most 4,096"),
        ("--max-tokens 5000", "--max-tokens is 5000: choose at most 4,096"),
        ("--context 64 --max-tokens 65", "--max-tokens is 65: choose at most 64"),
    ],
)
def test_more_tokens_than_the_model_has_are_refused(capsys, served, model, options, said):
    assert said in message_of(capsys, "--model", model, "--port", 0, *options.split())


def test_an_answer_has_2048_tokens_or_as_many_as_the_context(served, model):
    for options in ([], ["--context", "64"], ["--max-tokens", "9"]):
        assert main(["serve", "--model", str(model), "--port", "0", *options]) == 143
    limits = [(app.state.limits.context, app.state.limits.max_tokens) for app in served]
    assert limits == [(4096, 2048), (64, 64), (4096, 9)]


@pytest.mark.parametrize(
    "option", ["--adapter none", "--no-bos", "--slots 3", "--queue 2", "--context 9", "--max-tokens 9",
               "--gpu-memory 2", "--device auto"],
)  # fmt: skip
def test_options_of_a_model_need_one(capsys, served, tmp_path, option):
    (tmp_path / "metrics.jsonl").touch()
    name, *value = option.split()
    said = message_of(capsys, "--watch", tmp_path, *([f"{name}={value[0]}"] if value else [name]))
    assert said.startswith(f"tinyllm: {name} is about a model")


def test_a_port_in_use_is_one_sentence(capsys, model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in message_of(capsys, "--model", model, "--port", port)


def test_without_the_extra_the_message_says_how_to_install_it(capsys, monkeypatch, model):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert "pip install 'tinyllm-numpy[serve]'" in message_of(capsys, "--model", model)


def test_no_model_and_an_unknown_model(capsys):
    assert "--model" in message_of(capsys)
    assert "no model 'smollm3'" in message_of(capsys, "--model", "smollm3")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(ServeConfig, "tinyllm serve", ["--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and all(
        name in page
        for name in "--host --port --slots --queue --context --max-tokens --api-key --cors --adapter".split()
    )


def test_runs_are_watched_without_a_model(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 0}\n')
    command = [sys.executable, "-P", "-m", "tinyllm", "serve", "--port", "0", "--watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = re.fullmatch(r"watching .* at http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
            page = request(int(found[1]), "GET", "/")
            assert page.status == 200 and "script-src 'self'" in page.getheader("Content-Security-Policy")
            runs = json.loads(request(int(found[1]), "GET", "/tinyllm/runs").read())["runs"]
            assert [run["last"]["step"] for run in runs] == [1]
            process.terminate()
            _, log = process.communicate(timeout=20)
            assert process.returncode == 143 if os.name != "nt" else True
            assert "GET / 200" in log and "/tinyllm/runs" not in log
        finally:
            process.kill()


def test_a_folder_to_watch_that_is_not_a_run_is_refused(tmp_path, capsys):
    assert main(["serve", "--watch", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
