"""``tinyllm judge`` from the command line, with a small server as the judge."""

import json
import shutil

import pytest
from support.chat_model import BYTE_ID, write_model
from support.model_server import FakeServer

from tinyllm import cli, load_model, load_tokenizer
from tinyllm.inference.choices import log_prob, parse_question
from tinyllm.tokenizers.chat_template import encode_chat

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(20)]
QUESTIONS = [{"question": f"{i}?", "choices": ["yes", "no", "perhaps"], "answer": i % 3} for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def judge(tmp_path, model, capsys, monkeypatch):
    """Run the command on three rows; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinyllm.inference.model_server.PAUSE", 0.001)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS), encoding="utf-8")

    def run(*arguments, data=data, rows=3, part="train"):
        command = ["judge", "--model", model, "--data", data, "--part", part, "--rows", rows]
        code = cli.main([*map(str, [*command, "--max-new-tokens", 4, *arguments])])
        return code, *capsys.readouterr()

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def server_options(server, path="/api/chat"):
    return "--server", server.url + path, "--judge", "llama", "--retries", 1, "--timeout", 5


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_scores_are_kept_and_summarised(judge, tmp_path, path):
    replies = ["ready", "80", "nice", "Score: 70"]  # the first one to the check
    with FakeServer(lambda _: replies.pop(0)) as server:
        code, out, _ = judge(*server_options(server, path), "--out", tmp_path / "judged")
    assert (code, replies) == (0, [])
    assert "model: score 75.00 (70.00 to 80.00) (2 rows, 1 without" in out
    judged = lines(tmp_path / "judged" / "judged.jsonl")
    assert [record["score"] for record in judged] == [80, None, 70]
    assert [record["replies"] for record in judged] == [["80"], ["nice"], ["Score: 70"]]
    answers = lines(tmp_path / "judged" / "answers.jsonl")
    assert [(a["prompt"], a["reference"]) for a in answers] == [(f"Say {i}.", str(i)) for i in (0, 1, 2)]
    for question, answer in zip(server.asked[1:], answers):
        assert all(answer[key] in question for key in ("prompt", "reference", "answer"))
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text(encoding="utf-8"))
    assert summary["model"]["score"]["mean"] == 75 and summary["model"]["score"]["without"] == 1


def test_a_pair_is_judged_in_both_orders(judge, model, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    verdicts = ["ready", "A", "B", "B", "B", "tie", "hm"]
    with FakeServer(lambda _: verdicts.pop(0)) as server:
        code, out, _ = judge(*server_options(server), "--by", "pair", "--against", other)
    assert code == 0
    assert "model: win 0.75 (0.50 to 1.00) (2 rows, 1 without" in out
    assert "depended on the order in 1 of 3" in out
    judged = lines(tmp_path / "judged" / "rows-1" / "judged.jsonl")
    assert [record["win"] for record in judged] == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("failure", "said"), [(500, "failed 2 times"), (b"garbage", "no message"), (30.0, "no reply in time")]
)
def test_a_server_that_fails_later_stops_and_the_same_command_continues(judge, tmp_path, failure, said):
    out_folder = tmp_path / "judged"
    replies = ["ready", "80", failure, failure]
    with FakeServer(lambda _: replies.pop(0)) as server:
        options = *server_options(server)[:-1], 0.5, "--out", out_folder
        code, _, err = judge(*options)
        assert code == 1 and said in err and f"--out {out_folder} continues" in err
        assert [record["score"] for record in lines(out_folder / "judged.jsonl")] == [80]
        before = (out_folder / "answers.jsonl").read_bytes()
        replies += ["ready", "60", "70"]
        code, out, _ = judge(*options)
    assert code == 0 and "score 70.00" in out
    assert (out_folder / "answers.jsonl").read_bytes() == before


def test_an_absent_server_is_reported_before_anything_is_written(judge, tmp_path):
    with FakeServer() as server:
        options = server_options(server)
    code, out, err = judge(*options, "--out", tmp_path / "judged")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no model server replies" in err
    assert not (tmp_path / "judged").exists()


def test_no_score_at_all_is_reported(judge, tmp_path):
    with FakeServer() as server:
        code, _, err = judge(*server_options(server), "--out", tmp_path / "judged")
    assert code == 2 and "none of the 3 rows has a score" in err
    assert len(lines(tmp_path / "judged" / "judged.jsonl")) == 3


def test_match_needs_no_server_and_compares_two_models(judge, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    code, out, _ = judge("--by", "match", "--against", other, "--out", tmp_path / "judged")
    assert code == 0
    for name in ("model", "against", "difference"):
        for number in ("exact_match", "f1"):
            assert f"{name}: {number} 0.00 (0.00 to 0.00) (3 rows;" in out
    assert len(lines(tmp_path / "judged" / "answers.jsonl")) == 6


@pytest.mark.parametrize("options", [(), ("--choices", "text"), ("--choices", "text", "--per-byte")])
def test_multiple_choice(judge, tmp_path, options):
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    code, out, _ = judge(
        "--by", "choice", *options, "--out", tmp_path / "judged", data=data, rows=4, part="all"
    )
    judged = lines(tmp_path / "judged" / "judged.jsonl")
    assert code == 0 and len(judged) == 4
    for record in judged:
        lengths = [3, 2, 7] if "--per-byte" in options else [1, 1, 1]
        scores = [log_prob / length for log_prob, length in zip(record["log_probs"], lengths)]
        assert record["chosen"] == scores.index(max(scores))
        assert all(log_prob < 0 for log_prob in record["log_probs"])
    right = sum(record["correct"] for record in judged) / 4
    assert f"model: correct {right:.2f}" in out


@pytest.mark.parametrize("choices", ["text", "letter"])
def test_a_choice_is_encoded_as_the_continuation_of_the_prompt(judge, model, tmp_path, choices):
    """The tokenizer puts a space before a text, and none before what follows the prompt's line break."""
    folder = shutil.copytree(model, tmp_path / "spaced")
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (data := tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    common = "--by", "choice", "--choices", choices, "--model", folder, "--out", tmp_path / "judged"
    assert judge(*common, data=data, rows=1, part="all")[0] == 0
    (record,) = lines(tmp_path / "judged" / "judged.jsonl")
    question, tokenizer = parse_question(QUESTIONS[0], ""), load_tokenizer(folder)
    asked, texts = (question.question, question.choices) if choices == "text" else (question.listed, "ABC")
    prompt = encode_chat(tokenizer, tokenizer.chat_template, [{"role": "user", "content": asked}])
    assert tokenizer.encode("yes") == [BYTE_ID[byte] for byte in b" yes"]
    for text, found in zip(texts, record["log_probs"], strict=True):
        answer = [BYTE_ID[byte] for byte in text.encode()]
        assert found == pytest.approx(log_prob(load_model(folder), prompt, answer), rel=1e-5)


def test_pairs_of_answers_and_messages_are_prompts(judge, tmp_path):
    pairs = [{"instruction": "Hi", "chosen": "Hello", "rejected": "No"}] * 4
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    for name, rows in (("pairs", pairs), ("messages", [{"messages": turns}] * 4)):
        data = tmp_path / f"{name}.json"
        data.write_text(json.dumps(rows), encoding="utf-8")
        out = tmp_path / f"judged-{name}"
        assert judge("--by", "match", "--out", out, data=data, rows=1)[0] == 0
    (pair,) = lines(tmp_path / "judged-pairs" / "answers.jsonl")
    assert (pair["prompt"], pair["reference"]) == ("Hi", "Hello")
    (chat,) = lines(tmp_path / "judged-messages" / "answers.jsonl")
    assert (chat["prompt"], chat["reference"]) == ("user: u\n\nassistant: a\n\nuser: u", "a")


def test_the_reference_is_an_answer_to_learn_and_unused_keys_are_named(judge, tmp_path):
    chat = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    chat[3] |= {"weight": 0, "name": "Ann"}
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "system": "Brief.", "score": 3}
    question = QUESTIONS[0] | {"subject": "logic"}
    for by, row, unused in (("match", {"messages": chat}, "name of turns"), ("match", pair, "score"),
                            ("choice", question, "subject")):  # fmt: skip
        data = tmp_path / "more.json"
        data.write_text(json.dumps([row] * 2), encoding="utf-8")
        code, out, _ = judge("--by", by, data=data, rows=1, part="all")
        assert code == 0 and f"({unused} not used)" in out
    first, second = (lines(tmp_path / "judged" / f"more-{i}" / "answers.jsonl")[0] for i in (1, 2))
    assert (first["prompt"], first["reference"]) == ("u", "a")
    assert (second["prompt"], second["reference"]) == ("system: Brief.\n\nuser: Hi", "Hello")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "pair", "--judge", "x"], "--against"),
        ([], "--judge"),
        (["--rows", "0", "--by", "match"], "--rows is 0"),
        (["--timeout", "0", "--judge", "x"], "--timeout is 0"),
        (["--timeout", "1e30", "--judge", "x"], "--timeout is 1e+30"),
        (["--server", "http://[::1", "--judge", "x"], "'http://[::1' is not the URL"),
        (["--per-byte", "--by", "match"], "--per-byte"),
        (["--judge", "x", "--by", "match"], "--judge has no effect with --by match"),
        (["--retries", "1", "--by", "choice"], "--retries has no effect with --by choice"),
        (["--choices", "text", "--judge", "x"], "--choices has no effect with --by score"),
        (["--against-adapter", "x", "--by", "match"], "give --against"),
        (["--server", "localhost", "--judge", "x"], "'localhost' is not the URL"),
        (["--by", "match", "--against", "nobody/nothing/x"], "there is no model"),
        (["--by", "choice"], "row 1 of"),
        (["--by", "match", "--data", "none.json"], "none.json"),
    ],
)
def test_wrong_requests_are_one_sentence(judge, tmp_path, arguments, said):
    code, out, err = judge(*arguments)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "judged").exists()


def test_a_judgement_continues_only_with_the_same_options_and_weights(judge, model, tmp_path):
    copied, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "judged"
    command = ("--model", copied, "--by", "match", "--out", out)
    assert judge(*command)[0] == 0
    before = (out / "answers.jsonl").read_bytes()
    for option, said in (
        (["--no-bos"], "no_bos False, not True"),
        (["--dtype", "float64"], "dtype 'float32', not 'float64'"),
    ):
        code, _, err = judge(*command, *option)
        assert code == 2 and said in err and err.count("\n") == 1
    other = load_model(copied)
    other.norm.weight.data[0] += 1
    other.save_pretrained(copied, overwrite=True)
    code, _, err = judge(*command)
    assert code == 2 and "SHA-256 of model" in err and err.count("\n") == 1
    shutil.copytree(model, copied, dirs_exist_ok=True)
    assert judge(*command)[0] == 0
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    code, _, err = judge(*command)
    assert code == 2 and "SHA-256 of model" in err
    assert (out / "answers.jsonl").read_bytes() == before


def test_answers_that_fill_the_context_are_counted(judge, tmp_path):
    data, out = tmp_path / "long.json", tmp_path / "judged"
    rows = [{"prompt": "x" * length, "completion": "y"} for length in (200, 5)]  # of a context of 256
    data.write_text(json.dumps(rows), encoding="utf-8")
    command = ("--by", "match", "--part", "all", "--max-new-tokens", 100, "--out", out)
    for _ in range(2):  # the second time from what is kept
        code, said, _ = judge(*command, data=data, part="all")
        assert code == 0 and "model: 1 of 2 answers are cut" in said
    assert sorted(record["cut"] for record in lines(out / "answers.jsonl")) == [False, True]


@pytest.mark.parametrize("choices", [["yes", "x" * 300], ["yes", "no"]])
def test_a_choice_that_does_not_fit_names_its_row(judge, tmp_path, choices):
    rows = [QUESTIONS[0], {"question": "a" * 220, "choices": choices, "answer": 0}]
    (tmp_path / "data").mkdir()
    for part in ("train", "valid"):
        (tmp_path / "data" / f"{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    code, _, err = judge("--by", "choice", "--choices", "text", data=tmp_path / "data")
    fits = choices[1] == "no"
    assert (code == 0) if fits else (code == 2 and "row 2 of" in err and "shorten" in err)


def test_a_prompt_longer_than_the_context_names_the_numbers(judge, tmp_path):
    data = tmp_path / "long.json"
    data.write_text(json.dumps([{"prompt": "x" * 400, "completion": "y"}] * 4), encoding="utf-8")
    code, _, err = judge("--by", "match", data=data)
    assert code == 2 and "row 1 of" in err and "context is 256" in err
