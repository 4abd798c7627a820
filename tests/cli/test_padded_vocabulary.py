"""A model with more ids than its tokenizer has tokens: the others are never sampled.

And one with fewer: Gemma's tokenizer has an id for images, which models without images lack.
"""

import io
import sys

import numpy as np
import pytest
from support.chat_model import write_model

from tinyllm import Llama, generate
from tinyllm.cli import main
from tinyllm.errors import Error
from tinyllm.inference.chat import load_model_and_tokenizer
from tinyllm.tokenizers.base import IMAGE_TOKEN

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

IDS = 258  # of the tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A chat model, the same one with 38 more rows, which a model without a mask would prefer, and the same
    one with a tokenizer that has an id for images.
    """
    path = tmp_path_factory.mktemp("models")
    for name in ("plain", "padded", "images"):
        (path / name).mkdir()
        write_model(path / name)
    model = Llama.from_pretrained(path / "padded")
    model.resize_token_embeddings(IDS + 38, rng=0)
    model.lm_head.weight.data[IDS:] *= 20
    model.save_pretrained(path / "padded", overwrite=True)
    file = str(path / "images" / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    tokenizer.save(file)
    return path / "plain", path / "padded", path / "images"


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
def test_generated_text_is_that_of_the_model_with_the_tokenizers_ids(folders, capsys, options):
    texts = []
    for folder in folders:
        assert main(["generate", "--model", str(folder), "--prompt", "hello", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts == texts[:1] * 3


def test_chat_answers_as_the_model_with_the_tokenizers_ids(folders, capsys, monkeypatch):
    answers = []
    for folder in folders:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        options = ["--temperature", "1.5", "--max-new-tokens", "30"]
        assert main(["chat", "--model", str(folder), *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers == answers[:1] * 3


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
