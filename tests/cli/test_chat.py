"""``tinyllm chat``: commands, Ctrl-C, a full context, pipes, devices, the download."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from support.chat_model import ANSWER, CHATML, START, Script, write_model
from support.device_array import DeviceArray
from support.fake_cupy import OutOfMemoryError, fake_cupy
from support.runs import full_disk

from tinyllm.cli import main
from tinyllm.cli.chat import HELP
from tinyllm.inference import chat as inference
from tinyllm.tokenizers import load_tokenizer
from tinyllm.weights import pull

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder, which the tests only read."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def answers(monkeypatch):
    """The model answers with the items of this list (see ``Script``)."""
    script = Script()
    monkeypatch.setattr("tinyllm.inference.chat.generate", script.generate)
    return script


class Terminal(io.StringIO):
    """Typed lines; an exception among them is raised when it is read."""

    def __init__(self, *typed):
        super().__init__()
        self.typed = list(typed)

    def isatty(self):
        return True

    def readline(self, *_):
        line = self.typed.pop(0) if self.typed else ""
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Runs ``tinyllm chat`` with lines from a pipe; returns the exit code, stdout and stderr."""

    def run(lines, *options, model=folder, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines) if stdin is None else stdin)
        words = ["--max-new-tokens", "20", *map(str, options)]
        code = main(["chat", *(() if model is None else ("--model", str(model))), *words])
        return code, *capsys.readouterr()

    return run


def test_save_writes_the_conversation_and_reports_failures(chat, answers, tmp_path, monkeypatch):
    answers.append("größer 👍")
    file = tmp_path / "said it.json"
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    elsewhere = f"/save {tmp_path / 'no' / 'x.json'}\n/save a\0b\n/save ~/mine.json\n"
    code, _, err = chat(f"/system Kurz.\nwie?\n/save {file}\n/reset\n/save {file}\n{elsewhere}")
    lines = err.splitlines()
    assert code == 0 and lines[2] == f"(saved in {file})"
    assert "said it.json' cannot be written (File exists)" in lines[4]
    assert all("cannot be written" in line for line in lines[5:7])
    said = [
        {"role": "system", "content": "Kurz."},
        {"role": "user", "content": "wie?"},
        {"role": "assistant", "content": "größer 👍"},
    ]
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == said and "größer 👍" in text and text.endswith("]\n")
    assert json.loads((tmp_path / "mine.json").read_text(encoding="utf-8")) == said[:1]


def test_save_writes_whole_or_not_at_all(chat, answers, tmp_path):
    with full_disk(30):
        code, _, err = chat(f"/system Be brief, but complete.\n/save {tmp_path / 'it.json'}\n")
    assert code == 0 and "it.json' cannot be written (File too large)" in err
    assert list(tmp_path.iterdir()) == []


def test_system_sets_and_resets_the_instructions(chat, answers):
    answers += ["ok"] * 3
    code, _, err = chat("hello\n/system  Speak Latin. \nhello\n/system\nhello\n/system \udcff\n")
    assert code == 0
    plain, instructed, again = answers.prompts
    assert plain == again and len(instructed) > len(plain)
    _, given, _, default, _, refused = err.splitlines()
    assert "these instructions" in given and "the default" in default and "lone surrogate" in refused


@pytest.mark.parametrize("line", ["/help", "/", "/save", "/save  ", "/Reset", "/resetall", "/etc/passwd ?"])
def test_an_unknown_command_prints_help_and_changes_nothing(chat, answers, line):
    answers += ["ok"] * 2
    code, _, err = chat(f"hello\n{line}\nhello\n")
    assert code == 0 and err.splitlines()[1] == f"({HELP})"
    assert answers.prompts[1].count(START) == 4  # the first message is still in the prompt


def test_reset_with_a_text_is_refused_and_the_conversation_goes_on(chat, answers):
    answers += ["ok"] * 2
    code, _, err = chat("hello\n/reset all of it\nhello\n")
    assert code == 0 and "/reset takes no text" in err.splitlines()[1]
    assert answers.prompts[1].count(START) == 4  # the first message is still in the prompt


def test_ctrl_c_in_a_terminal_keeps_the_conversation(chat, answers):
    answers += [[*b"a", KeyboardInterrupt()], [KeyboardInterrupt()], "third"]
    keys = Terminal("one\n", KeyboardInterrupt(), "two\n", "three\n", "/quit\n")
    code, out, err = chat("", stdin=keys)
    assert code == 0 and out.endswith("third\n> ") and "a …\n" in out
    assert err.count("(interrupted; /quit or Ctrl-D ends)") == 2 and err.count("; interrupted)") == 1
    assert len(answers.prompts) == 3 and keys.typed == []


def test_ctrl_c_in_a_pipe_exits_with_130(chat, answers):
    answers += [[KeyboardInterrupt()], "never"]
    code, out, err = chat("one\ntwo\n")
    assert (code, out) == (130, "") and err == "tinyllm: interrupted\n" and len(answers.prompts) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C reaches another process only through a console")
def test_ctrl_c_of_a_process_interrupts_the_answer(tmp_path):
    long = write_model(tmp_path / "long", context=20_000)  # half a minute, unless interrupted
    options = ["--max-new-tokens", "19000", "--temperature", "0"]
    command = [sys.executable, "-m", "tinyllm", "chat", "--model", str(long), *options]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=os.environ | {"PYTHONUTF8": "1"}, **pipes) as process:
        process.stdin.write(b"tell\n")
        process.stdin.flush()
        assert process.stdout.read(3)  # in the middle of the answer
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/reset\n", timeout=60)
    assert process.returncode == 0 and out.endswith(" …\n".encode())
    assert b"tokens/s; interrupted)\n(new conversation)\n" in err


def test_a_full_context_is_reported_and_the_chat_continues(tmp_path, chat):
    short = write_model(tmp_path / "short", context=64)
    lines = f"1\n2\n{'x' * 80}\n/reset\n1\n"
    code, out, err = chat(lines, "--max-new-tokens", 46, "--temperature", 0, model=short)
    first, past, much, reset, again = err.splitlines()  # 44 tokens in the context, and the 45th sampled
    assert code == 0 and out[: len(out) // 2] * 2 == out
    for line, tokens in ((first, "20"), (again, "1 of 20")):
        assert line.startswith(f"(prefill {tokens} tokens in ")
        assert line.endswith("the context of 64 tokens is full: /reset starts a new conversation)")
    for line in (past, much):
        assert line.startswith("(the conversation has ") and "tokens, but the model's context is 64: " in line
        assert line.endswith("reset it, or write a shorter message)")
    assert reset == "(new conversation)"


def test_stdout_has_only_the_answers(chat, answers):
    answers += ["one", "zwei ö"]
    code, out, err = chat("first\n\n   \n/reset\nsecond")  # no line end after the last
    assert (code, out) == (0, "one\nzwei ö\n")
    first, reset, again = err.splitlines()
    assert first.startswith("(") and first.endswith(" tokens/s)") and reset == "(new conversation)"
    assert again.startswith("(")
    assert len(answers.prompts) == 2


def test_no_lines_or_quit_end_without_output(chat, answers):
    assert chat("") == (0, "", "")
    assert chat("/quit\nnever\n") == (0, "", "")
    assert answers.prompts == ()


def test_a_terminal_shows_the_model_and_the_commands(chat, answers, folder):
    answers.append("hello")
    code, out, err = chat("", stdin=Terminal("hi\n"))
    assert code == 0 and out == "> hello\n> "
    assert err.splitlines()[0] == f"{folder}, 12,944 parameters. {HELP}."
    assert err.endswith(" tokens/s)\n\n")  # Ctrl-D ends its line


def test_a_line_that_is_not_utf8_is_refused_and_the_next_answered(chat, answers):
    answers.append("ok")
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8")
    code, out, err = chat("", stdin=stdin)
    assert (code, out) == (0, "ok\n")
    assert "lone surrogate" in err.splitlines()[0] and len(answers.prompts) == 1


def test_answers_of_a_process_depend_on_the_seed(folder):
    command = [sys.executable, "-m", "tinyllm", "chat", "--model", str(folder), "--max-new-tokens", "30"]
    runs = [
        subprocess.run([*command, "--seed", seed], input=b"hi\nyou\n", capture_output=True, timeout=120)
        for seed in ("0", "0", "1")
    ]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
    assert runs[0].stderr.count(b"prefill") == 2


def test_a_model_without_a_chat_template_is_refused_before_the_first_line(tmp_path, chat):
    plain = write_model(tmp_path / "plain", template=None)
    code, out, err = chat("", model=plain, stdin=Terminal(AssertionError("read a line")))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "no chat template" in err and f"tinyllm generate --model {plain} --prompt" in err


def test_thoughts_go_to_stderr_and_are_kept_in_the_conversation(chat, answers, tmp_path):
    answers += ["<think>\nHm. < 3\n</think>\n\nTwo.", "Three."]
    file = tmp_path / "a.json"
    code, out, err = chat(f"1+1?\n1+2?\n/save {file}\n", "--max-new-tokens", "50")
    assert (code, out) == (0, "Two.\nThree.\n") and err.startswith("Hm. < 3\n\n(prefill")
    assert json.loads(file.read_text())[1]["content"] == "<think>\nHm. < 3\n</think>\n\nTwo."


def test_an_answer_cut_off_in_its_thoughts(chat, answers):
    answers += ["<think>" + "x" * 50]
    code, out, err = chat("1+1?\n")
    assert (code, out) == (0, "\n") and err.startswith("x") and "cut off after" in err


def test_no_think_is_a_variable_of_the_template(chat, answers, tmp_path):
    template = (
        CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    thinker = write_model(tmp_path / "thinker", template=template)
    answers += ["Two.", "Two."]
    for options, end in (([], ANSWER), (["--no-think"], f"{ANSWER}<think></think>")):
        assert chat("1+1?\n", *options, model=thinker)[:2] == (0, "Two.\n")
        assert load_tokenizer(thinker).decode(answers.prompts[-1]).endswith(end)
    code, out, err = chat("1+1?\n", "--no-think")
    assert (code, out) == (2, "") and "omit --no-think" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["gemma3-270m", "gpt2"])
def test_a_base_model_is_refused_before_it_is_downloaded(chat, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinyllm.cli.chat.pull", lambda *_, **__: pytest.fail("pulled"))
    monkeypatch.setattr("tinyllm.cli.options.load_model_and_tokenizer", lambda *_: pytest.fail("loaded"))
    code, out, err = chat("y\n", model=name)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "no chat template" in err and f"tinyllm generate --model {name} --prompt" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "0"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--max-new-tokens", "0"),
        ("--seed", "-1"),
    ],
)
def test_wrong_options_are_refused_before_loading(chat, monkeypatch, option, value):
    monkeypatch.setattr("tinyllm.cli.chat.pull", lambda *_, **__: pytest.fail("pulled"))
    monkeypatch.setattr("tinyllm.cli.options.load_model_and_tokenizer", lambda *_: pytest.fail("loaded"))
    code, out, err = chat("hi\n", f"{option}={value}", model=None)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"tinyllm: {option} is ") and "choose" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [("--dtype bfloat16", "needs a GPU"), ("--gpu-memory 2", "a GPU's memory"), ("--device tpu", "'tpu'")],
)
def test_unsupported_device_options_are_refused_before_loading(chat, monkeypatch, options, said):
    monkeypatch.setattr("tinyllm.cli.options.load_model_and_tokenizer", None)
    code, out, err = chat("Hello\n", *options.split())
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_gpu_gives_the_same_answers(chat, monkeypatch):
    expected = chat("Hello\nAnd you?\n")[1]
    cupy, seen = fake_cupy(monkeypatch), []
    generate = inference.generate

    def see(model, *args, **options):
        seen.extend(type(parameter.data) for parameter in model.parameters())
        return generate(model, *args, **options)

    monkeypatch.setattr(inference, "generate", see)
    code, out, err = chat("Hello\nAnd you?\n", "--device", "auto", "--gpu-memory", "0.5")
    assert (code, out) == (0, expected)
    assert err.startswith("device: cuda (Paper GPU, CuPy 14.2.0)\n")
    assert set(seen) == {DeviceArray} and cupy.limit == 5 * 10**8


def test_full_gpu_memory_exits_with_one_line(chat, answers, monkeypatch):
    fake_cupy(monkeypatch)
    answers[:] = ["Hi.", [OutOfMemoryError(4_096, 2_000)]]
    code, out, err = chat("Hello\nAnd you?\nStill there?\n", "--device", "cuda")
    assert code == 1 and out == "Hi.\n"
    said = err.splitlines()[-1]
    assert said.startswith(
        "tinyllm: Out of memory allocating 4,096 bytes (allocated so far: 2,000 bytes), and"
    )
    assert said.endswith("are free: try fewer --max-new-tokens or --dtype bfloat16")


def test_instructions_with_a_lone_surrogate_are_refused(chat):
    code, _, err = chat("hi\n", "--system", "\udcff")
    assert code == 2 and "lone surrogate" in err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a hub with the tiny model under the known name; returns the list of downloads."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where there is no folder "smollm2"
    asked = []

    def from_hub(model, temporary):
        asked.append(model.repo)
        return write_model(temporary / "hub")

    monkeypatch.setattr(pull, "_from_hub", from_hub)
    monkeypatch.setattr(pull, "from_wheels", lambda *_: pytest.fail("the network was used"))
    return asked


@pytest.mark.parametrize("yes", ["y", "YES", " yes "])
def test_yes_downloads_the_model_once(hub, chat, answers, yes):
    answers += ["Paris", "Rome"]
    code, out, err = chat(f"{yes}\nFrance?\n", model=None)
    assert (code, out) == (0, "Paris\n") and len(hub) == 1
    assert "Apache-2.0" in err and err.index("Download it? [y/N]") < err.index("prefill")
    code, out, err = chat("Italy?\n", model=None)  # neither question nor download
    assert (code, out) == (0, "Rome\n") and len(hub) == 1
    assert err.startswith("(") and err.count("\n") == 1


@pytest.mark.parametrize("lines", ["n\nFrance?\n", "\n", "", "What is the capital of France?\n"])
def test_any_other_answer_downloads_nothing(hub, chat, tmp_path, lines):
    code, out, err = chat(lines, model=None)
    assert (code, out, hub) == (2, "", [])
    question, last = err.splitlines()[-2:]
    assert question.startswith("Download it?")
    assert last.startswith("tinyllm: the model was not downloaded") and "--yes" in last
    assert not (tmp_path / "cache").exists()


def test_option_yes_downloads_without_a_question(hub, chat, answers):
    answers.append("Paris")
    code, out, err = chat("France?\n", "--yes", model=None)
    assert (code, out, len(hub)) == (0, "Paris\n", 1) and "[y/N]" not in err and "Apache-2.0" in err


def test_a_folder_named_like_a_known_model_is_preferred(hub, chat, answers, tmp_path):
    write_model(tmp_path / "smollm2")
    answers.append("here")
    assert chat("hi\n", model=None)[:2] == (0, "here\n") and hub == []
