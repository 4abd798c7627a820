"""Finding a model by name: folders, files, pulled models, the hub."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm.errors import Error
from tinyllm.weights import hub as hub_module
from tinyllm.weights import pull
from tinyllm.weights.hub import find_folder, find_model, model_config, open_weights
from tinyllm.weights.safetensors import save_folder


def message_of(call, *args, **kwargs):
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub that records every request; the test sets its answer."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        def __init__(self):
            self.requests, self.revisions, self.patterns, self.answer = [], [], [], None

        def snapshot_download(self, repo_id, *, revision, allow_patterns):
            self.requests.append(repo_id)
            self.revisions.append(revision)
            self.patterns = allow_patterns
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(hub_module, "REVISIONS", {})
    return hub


def test_existing_folder_takes_precedence_over_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    for name in ("owner/name", "gpt2", "./gpt2", "gpt2/", str(tmp_path / "gpt2"), Path("owner/name")):
        assert find_folder(name) == Path(name)
    assert find_folder("~/gpt2") == tmp_path / "gpt2"
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d"],
)
def test_hub_id_is_downloaded(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hub.answer = str(tmp_path / "snapshot")
    assert find_folder(name) == tmp_path / "snapshot"
    assert hub.requests == [name]


def test_revision_is_printed_once_and_kept_for_the_process(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = "607a30d783dfa663caf39e06633721c8d4cfcd7e", "11c5a3d5811f50298f278a704980280950aedb10"
    hub.answer = str(tmp_path / "snapshots" / first)
    assert find_folder("gpt2") == find_folder("gpt2")
    assert hub.revisions == [None, first]  # somebody may push between the weights and the tokenizer
    assert capsys.readouterr().err.count(first) == 2  # one line: the revision, and its folder
    hub.answer = str(tmp_path / "snapshots" / second)
    assert find_folder(f"gpt2@{second}") == tmp_path / "snapshots" / second
    assert hub.requests == ["gpt2"] * 3 and hub.revisions[-1] == second
    assert second in capsys.readouterr().err


def test_only_necessary_files_are_downloaded(hub, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.chdir(tmp_path)
    hub.answer = str(tmp_path)
    find_folder("owner/name")
    needed = ["config.json", "model.safetensors", "model.safetensors.index.json"]
    needed += [
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    ]
    needed += ["vocab.json", "merges.txt", "special_tokens_map.json"]
    needed += ["chat_template.jinja", "generation_config.json", "added_tokens.json"]
    useless = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "README.md", "rust_model.ot"]
    useless += ["consolidated.safetensors", "original/tokenizer.py.bak", "flax_model.msgpack", "evil.py"]
    assert list(filter_repo_objects(needed + useless, allow_patterns=hub.patterns)) == needed


PATHS = ["./owner/name", "../name", "owner/name/", "/no/where", "a/b/c", "~/no-such-model", "a\\b", "a//b"]
TYPOS = ["", "runs", "gpt3", "a/..", "a/.b", "owner/na me", "owner/näme", "a/b\n", "gpt2\0"]


@pytest.mark.parametrize("name", [*PATHS, *TYPOS, pytest.param("x" * 5000, id="too long")])
def test_paths_are_never_looked_up_on_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = message_of(find_folder, name)
    assert "no folder" in text and repr(name) in text
    assert hub.requests == []


def test_file_instead_of_a_folder_is_rejected(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for name in ("gpt2", "owner/name", str(tmp_path / "model.safetensors")):
        Path(name).write_text("a file")
        text = message_of(find_folder, name)
        assert repr(name) in text and "not a folder" in text and "config.json" in text
    assert hub.requests == []


def hub_errors():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    response_error = {}
    for name in ("RepositoryNotFoundError", "GatedRepoError", "LocalEntryNotFoundError", "HFValidationError"):
        kind = getattr(huggingface_hub.utils, name)
        response_error[name] = kind.__new__(kind)
        response_error[name].args = (f"{name} first line\nsecond line",)
    return [*response_error.values(), ConnectionError("no route to host"), TimeoutError(), ValueError("odd")]


@pytest.mark.parametrize("number", range(7))
def test_failed_download_is_an_error_with_a_remedy(hub, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    hub.answer = error = hub_errors()[number]
    with pytest.raises(Error) as caught:
        find_folder("owner/name")
    text = str(caught.value)
    assert caught.value.__cause__ is error and hub.requests == ["owner/name"]
    assert "'owner/name'" in text and type(error).__name__ in text
    assert "https://huggingface.co/owner/name" in text and "hf auth login" in text
    assert "\n" not in text and "second line" not in text


def test_interrupt_is_propagated(hub, tmp_path, monkeypatch):
    import huggingface_hub

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_folder("gpt2")


def test_missing_hub_client_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = message_of(find_folder, "gpt2")
    assert "pip install huggingface_hub" in text and "https://huggingface.co/gpt2" in text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pull, "pull", lambda *_: pytest.fail("nothing is downloaded without a request"))
    return tmp_path / "cache" / "models" / "smollm2"


def test_find_model_accepts_folder_file_pulled_name_and_hub_id(hub, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd.gguf").mkdir()
    (tmp_path / "Model.GGUF").write_bytes(b"")
    for name in (
        "folder",
        "./folder",
        str(tmp_path / "folder"),
        "odd.gguf",
        "Model.GGUF",
        Path("Model.GGUF"),
    ):
        assert find_model(name) == Path(name)
    assert find_model("~/Model.GGUF") == tmp_path / "Model.GGUF"

    (cache / "hub").mkdir(parents=True)
    for name in pull.KNOWN_MODELS["smollm2"].hub.files:
        (cache / "hub" / name).write_text("")
    assert find_model("smollm2") == cache / "hub"
    assert hub.requests == []

    hub.answer = str(tmp_path / "snapshot")
    assert find_model("owner/name") == tmp_path / "snapshot"
    assert hub.requests == ["owner/name"]


def test_folder_takes_precedence_over_a_pulled_model(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert find_model("smollm2") == Path("smollm2")


def test_gpt2_is_the_pulled_model_or_else_the_hub_id(hub, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer = str(tmp_path / "snapshot")
    assert find_model("gpt2") == tmp_path / "snapshot" and hub.requests == ["gpt2"]
    folder = cache.parent / "gpt2" / "hub"
    folder.mkdir(parents=True)
    for name in pull.KNOWN_MODELS["gpt2"].hub.files.keys() - {"generation_config.json"}:
        assert find_model("gpt2") == tmp_path / "snapshot"  # not complete
        (folder / name).write_text("")
    assert find_model("gpt2") == folder
    assert find_model("openai-community/gpt2") == tmp_path / "snapshot"


def test_known_model_is_not_downloaded_without_asking(hub, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run `tinyllm pull smollm2`" in message_of(find_model, "smollm2")
    assert hub.requests == [] and not cache.exists()


@pytest.mark.parametrize("name", ["model.gguf", "owner/name.gguf", "~/none.GGUF", "a\0b.gguf"])
def test_missing_gguf_file_is_not_looked_up_on_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"no file {name!r}" in message_of(find_model, name)
    assert hub.requests == []


def test_find_model_error_lists_the_alternatives(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = message_of(find_model, "gpt3")
    for way in ("folder", ".gguf file", "smollm2", "hub id"):
        assert way in text
    Path("model.bin").write_bytes(b"")
    assert ".gguf file" in message_of(find_model, "model.bin")


def test_folder_and_gguf_file_are_opened_alike(tmp_path):
    gguf = pytest.importorskip("gguf")
    sizes = dict(embedding_length=32, block_count=1, feed_forward_length=32, context_length=8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {**sizes, "attention.head_count": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.ones((5, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_folder(tmp_path / "folder", {"model_type": "llama", "hidden_size": 32}, {"w": np.ones((5, 32))})

    path = find_model(tmp_path / "m.gguf")
    config, weights = model_config(path), open_weights(path)
    assert config["model_type"] == "llama" and config["hidden_size"] == 32
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], np.ones((5, 32)))
    path = find_model(tmp_path / "folder")
    config, weights = model_config(path), open_weights(path)
    assert config == {"model_type": "llama", "hidden_size": 32}
    np.testing.assert_array_equal(weights["w"], np.ones((5, 32)))
