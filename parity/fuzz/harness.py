"""The fuzzer: tests that readers are safe against files that are broken or malicious.

A target is a file format: how to make a valid file (``Target.make``), how to read one and check the result
(``Target.load``), and how to break one (``Target.mutations``). Each case applies one mutation to a valid
folder. It passes if the file is refused with an ``Error`` of one sentence that names it, or if it loads and
``load`` finds the result valid. Everything else is a failure: another exception, a crash, more than
``TIME_LIMIT`` seconds, more memory than ``MEMORY_FACTOR`` times the files plus ``MEMORY_BASE``, opening a
file outside the folder, writing, starting a program, or using the network.

The cases run in a process of their own, which announces each case before reading it. If the process dies, the
case is known and another process continues after it. The seed and the number of a case determine it, so
``fuzz(target, 1, seed, first=case)`` repeats it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import parity
import tinyllm
from parity.fuzz.mutations import Mutation
from tinyllm.errors import Error

START_LIMIT, TIME_LIMIT = 120.0, 5.0  # seconds: to start a process and load the valid file; per case

# Memory that a valid file may need: Python objects for its numbers, 4-bit weights as float32, the reader.
MEMORY_FACTOR, MEMORY_BASE = 20, 64 * 2**20

ADDRESS_MARGIN = 2**28  # bytes beyond that limit at which an allocation fails, before the machine swaps

HANGS = "timed out twice after"

LONGEST_SENTENCE = 10_100  # characters; Error shortens longer ones

FORBIDDEN = (
    "socket.connect socket.getaddrinfo subprocess.Popen os.system os.exec os.fork os.posix_spawn os.remove "
    "os.rename os.mkdir os.rmdir os.chmod os.symlink os.truncate shutil.rmtree pickle.find_class".split()
)


@dataclass(frozen=True)
class Target:
    """A file format. The functions must be importable, because another process calls them.

    ``make(folder)`` deterministically writes a valid file. ``load(folder)`` reads it and raises
    AssertionError if the result is not valid. ``mutations(folder)`` lists the ways to break it. ``writes``:
    reading may change the folder, because it resumes interrupted work.
    """

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], None]
    mutations: Callable[[Path], list[Mutation]]
    writes: bool = False


@dataclass(frozen=True)
class Failure:
    """A case that failed; ``kept`` is its folder, if a folder for failures was given."""

    target: str
    seed: int
    case: int
    mutation: str
    problem: str
    kept: Path | None

    def __str__(self) -> str:
        where = f"\n    kept in {self.kept}" if self.kept else ""
        return f"{self.target}, seed {self.seed}, case {self.case} ({self.mutation}): {self.problem}{where}"


@dataclass
class Figures:
    """The number of cases, and how many were refused, loaded, or failed."""

    tries: int = 0
    refused: int = 0
    loaded: int = 0
    failures: list[Failure] = field(default_factory=list)


def fuzz(
    target: Target,
    cases: int,
    seed: int = 0,
    first: int = 0,
    keep: str | Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Figures:
    """Run ``cases`` cases starting with number ``first``; ``advance()`` is called after each.

    The folders of failures are moved into ``keep``. Memory is limited and measured on Linux only.
    """
    figures, suspect = Figures(), None
    end = first + cases
    with tempfile.TemporaryDirectory(prefix="fuzz-") as workshop:
        while first < end:
            for case, mutation, outcome in _run(target, seed, range(first, end), Path(workshop)):
                if outcome.startswith(HANGS) and case != suspect:
                    first = suspect = case  # retry once: on a busy machine any process may be slow
                    shutil.rmtree(_place(Path(workshop), target, seed, case))
                    continue
                first = case + 1
                figures.tries += 1
                if outcome in ("refused", "loaded"):
                    setattr(figures, outcome, getattr(figures, outcome) + 1)
                else:
                    kept = _keep(Path(workshop), target, seed, case, keep)
                    figures.failures.append(Failure(target.name, seed, case, mutation, outcome, kept))
                advance()
    return figures


def fuzz_all(
    targets: Sequence[Target], cases: int, seed: int = 0, keep: str | Path | None = None
) -> Iterator[tuple[str, Figures]]:
    """Divide the cases among the targets; yield each target's name and figures, with a progress bar."""
    from tqdm import tqdm

    for number, target in enumerate(targets):
        share = cases * (number + 1) // len(targets) - cases * number // len(targets)
        with tqdm(total=share, desc=target.name, unit="case", leave=False, disable=None) as bar:
            figures = fuzz(target, share, seed, keep=keep, advance=bar.update)
        yield target.name, figures


def choose(mutations: list[Mutation], seed: int, case: int) -> Mutation:
    """The mutation of a case: alternately the next fixed (in the seed's order) and the next random one."""
    fixed = [mutation for mutation in mutations if not mutation.random]
    random = [mutation for mutation in mutations if mutation.random]
    if random and case % 2:
        return random[case // 2 % len(random)]
    turn = case // 2 if random else case
    return fixed[np.random.default_rng(seed).permutation(len(fixed))[turn % len(fixed)]]


# ---------------------------------------------------------------------------- the parent process


def _run(target: Target, seed: int, cases: range, workshop: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, mutation and outcome of each case, up to the first that ends the process."""
    # A fresh interpreter, because a fork does not copy the threads of libraries.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=workshop) as scratch, ours:
        child = context.Process(target=_child, args=(theirs, target, seed, cases, workshop, Path(scratch)))
        child.start()
        theirs.close()  # the child has the only other end, so recv() raises EOFError when it dies
        case, mutation, limit = None, "", START_LIMIT
        try:
            for _ in cases:
                if not ours.poll(limit):
                    raise TimeoutError
                case, mutation = ours.recv()
                if not ours.poll(limit := TIME_LIMIT):
                    raise TimeoutError
                yield case, mutation, ours.recv()
                case, limit = None, START_LIMIT
            child.join(START_LIMIT)
        except TimeoutError:
            child.kill()
            outcome = f"{HANGS} {TIME_LIMIT:g} s"
        except EOFError:
            child.join()
            output = (Path(scratch) / "stderr").read_text(encoding="utf-8", errors="replace").strip()
            outcome = f"the process died ({_ending(child)}): {output[-2000:]}"
        else:
            return
        finally:
            child.kill()
            child.join()
        if case is None:
            raise RuntimeError(f"{target.name}: the harness failed outside of a case: {outcome}")
        yield case, mutation, outcome


def _ending(child) -> str:
    return signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"


def _place(workshop: Path, target: Target, seed: int, case: int) -> Path:
    return workshop / f"{target.name.replace(' ', '-')}-{seed}-{case}"


def _keep(workshop: Path, target: Target, seed: int, case: int, keep: str | Path | None) -> Path | None:
    place = _place(workshop, target, seed, case)
    if keep is None:
        shutil.rmtree(place)
        return None
    kept = Path(keep) / place.name
    shutil.rmtree(kept, ignore_errors=True)
    Path(keep).mkdir(parents=True, exist_ok=True)
    shutil.move(place, kept)
    return kept


# ---------------------------------------------------------------------------- the child process


def _child(connection, target: Target, seed: int, cases: range, workshop: Path, scratch: Path) -> None:
    """Send (case, mutation) before reading a case's folder, and its outcome afterwards."""
    stderr = os.open(scratch / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)  # libraries print there before they abort
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    valid = scratch / "valid"
    valid.mkdir()
    target.make(valid)
    mutations = target.mutations(valid)
    target.load(_copy(valid, scratch / "first" / FOLDER))  # performs late imports before the watch begins
    watch = _Watch(target.writes)
    for case in cases:
        place = _place(workshop, target, seed, case)
        folder = _copy(valid, place / FOLDER)
        mutation = choose(mutations, seed, case)
        mutation.apply(folder, np.random.default_rng([seed, case]))
        connection.send((case, mutation.name))
        outcome = _outcome(target, folder, watch, mutation.expect)
        connection.send(outcome)
        if outcome in ("refused", "loaded"):
            shutil.rmtree(place)


FOLDER = "fuzzed"


def _copy(folder: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True)
    return Path(shutil.copytree(folder, place, symlinks=True))


def _outcome(target: Target, folder: Path, watch: _Watch, expect: str | None) -> str:
    """ "refused", "loaded", or a description of the failure."""
    bound = MEMORY_BASE + MEMORY_FACTOR * _size(folder)
    before = _start_measuring(bound)
    watch.begin(folder)
    try:
        target.load(folder)
        outcome, problem = "loaded", ""
    except Error as error:
        outcome, problem = "refused", _what_is_wrong(error, folder)
    except BaseException:  # a panic in a Rust library is not an Exception
        outcome, problem = "", traceback.format_exc().strip()[-3000:]
    finally:
        watch.end()
        taken = _stop_measuring(before)
    if problem or watch.seen:
        return problem or f"the reader is not allowed to: {', '.join(watch.seen)}"
    if taken > bound:
        return f"it took {taken / 2**20:,.0f} MB of memory, but the limit is {bound / 2**20:,.0f} MB"
    if expect not in (None, outcome):
        return f"it was {outcome}, but should be {expect}"
    return outcome


def _what_is_wrong(error: Error, folder: Path) -> str:
    """What is wrong with the error, which must be one sentence that names the file; "" if nothing is."""
    message = str(error)
    names = [FOLDER, *(path.name for path in folder.rglob("*"))]
    if not any(name in message for name in names):
        return f"the error does not name the file: {message}"
    if not message.isprintable() or message.endswith(".") or len(message) > LONGEST_SENTENCE:
        return f"the error is not one sentence: {message[:LONGEST_SENTENCE]!r} ({len(message):,} characters)"
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"it ran out of memory: {message}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _start_measuring(bound: int) -> int | None:
    """Reset the system's peak and limit memory to a margin above ``bound``; return the bytes in use."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak: proc(5)
    limit = _kilobytes("VmSize") * 1024 + bound + ADDRESS_MARGIN
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return _kilobytes("VmHWM") * 1024


def _stop_measuring(before: int | None) -> int:
    """The peak number of bytes taken since ``_start_measuring``."""
    if before is None:
        return 0
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return _kilobytes("VmHWM") * 1024 - before


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


class _Watch:
    """Records forbidden operations between ``begin`` and ``end``, with Python's audit events (PEP 578).

    Reading Python's own files is always allowed, because modules may be imported late, and so is the null
    device, which is read instead of an empty file. A link in the folder counts as inside: only a user with
    access to the folder can create it.
    """

    def __init__(self, writes: bool):
        self.folder, self.writes, self.seen = None, writes, []
        paths = sysconfig.get_paths()
        roots = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
        self.own = [os.devnull, *roots, *(os.path.dirname(package.__file__) for package in (tinyllm, parity))]
        sys.addaudithook(self._hook)

    def begin(self, folder: Path) -> None:
        self.seen = []
        self.folder = os.path.abspath(folder)

    def end(self) -> None:
        self.folder = None

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event == "open" and not isinstance(arguments[0], int):
            path, _, flags = arguments
            path = os.path.abspath(os.fsdecode(path))
            inside = _under(path, self.folder)
            writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not inside and (writing or not any(_under(path, root) for root in self.own)):
                self.seen.append(f"opened {path}")
            elif writing and not self.writes:
                self.seen.append(f"opened {path} for writing")
        elif event in FORBIDDEN and not self.writes:
            self.seen.append(f"{event}{arguments!r}")


def _under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
