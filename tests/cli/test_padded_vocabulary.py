"""A model with more ids than its tokenizer has tokens: the others are never sampled."""

import io
import sys

import numpy as np
import pytest
from support.chat_model import write_model

from tinyllm import Llama, generate
from tinyllm.cli import main
from tinyllm.errors import Error
from tinyllm.inference.chat import load_model_and_tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

IDS = 258  # of the tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A chat model, and the same one with 38 more rows, which a model without a mask would prefer."""
    path = tmp_path_factory.mktemp("models")
    for name in ("plain", "padded"):
        (path / name).mkdir()
        write_model(path / name)
    model = Llama.from_pretrained(path / "padded")
    model.resize_token_embeddings(IDS + 38, rng=0)
    model.lm_head.weight.data[IDS:] *= 20
    model.save_pretrained(path / "padded", overwrite=True)
    return path / "plain", path / "padded"


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "1.5"],
        ["--temperature", "0"],
        ["--show-probabilities", "--top-k", "None"],
        ["--grid", "--max-new-tokens", "5"],
        ["--chat"],
    ],
    ids=" ".join,
)
def test_generated_text_is_that_of_the_model_without_padding(folders, capsys, options):
    texts = []
    for folder in folders:
        assert main(["generate", "--model", str(folder), "--prompt", "hello", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_chat_answers_as_the_model_without_padding(folders, capsys, monkeypatch):
    answers = []
    for folder in folders:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        options = ["--temperature", "1.5", "--max-new-tokens", "30"]
        assert main(["chat", "--model", str(folder), *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_suppressed_ids_are_never_sampled(folders):
    model, tokenizer = load_model_and_tokenizer(str(folders[1]))
    unused = tokenizer.unused_ids(model.config.vocab_size)
    assert unused == list(range(IDS, IDS + 38))
    options = dict(temperature=3.0, rng=0, max_new_tokens=50)
    free = np.stack(list(generate(model, [[1], [2]], **options)))
    masked = np.stack(list(generate(model, [[1], [2]], **options, suppress_ids=[*unused, 5])))
    assert free.max() >= IDS > masked.max() and 5 not in masked
    for ids in ([IDS + 38], 7, [-1]):
        with pytest.raises(Error, match="suppress_ids"):
            generate(model, [[1]], suppress_ids=ids)
