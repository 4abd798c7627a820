"""Do our readers stand files that are broken, or made to do harm?

A target is a kind of file that we read: how a valid one is made (`Target.make`), how it is read and what
came of it is checked (`Target.load`), and how it can be broken (`Target.mutations`). Each case is one
mutation of a valid folder, and has one of two good ends. The file is refused, by our own error with one
sentence that names it. Or it is loaded, and what was loaded is valid: `load` looks. Everything else is a
failure: another exception, a crash, more than ``TIME_LIMIT`` seconds, more memory than ``MEMORY_FACTOR``
times the files and ``MEMORY_BASE`` more, a file opened outside the folder, anything written, another
program or the network.

The cases run in a process of their own, which says before each one what it is about to read: whatever ends
it, the case is known, and the next process goes on after it. Every case follows from the seed and its
number, so that `fuzz(target, 1, seed, first=case)` repeats it.
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

START_LIMIT, TIME_LIMIT = 120.0, 5.0  # seconds: to start a process and load the valid file; for a case

# What a valid file of a size may need: its numbers as Python's, or 4-bit weights as float32, and the reader.
MEMORY_FACTOR, MEMORY_BASE = 20, 64 * 2**20

ADDRESS_ROOM = 2**28  # beyond that bound an allocation fails at once, before the machine feels it

HANGS = "not done, twice, after"

LONGEST_SENTENCE = 10_100  # characters; what Error leaves of a longer one

FORBIDDEN = (
    "socket.connect socket.getaddrinfo subprocess.Popen os.system os.exec os.fork os.posix_spawn os.remove "
    "os.rename os.mkdir os.rmdir os.chmod os.symlink os.truncate shutil.rmtree pickle.find_class".split()
)


@dataclass(frozen=True)
class Target:
    """A kind of file. All three are functions of a module, for another process has to find them.

    ``make(folder)`` writes a valid one, always the same. ``load(folder)`` reads it and raises
    AssertionError if what it gets is not valid. ``mutations(folder)`` lists what can be done to it.
    ``writes``: reading it may change the folder (where an interrupted work goes on).
    """

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], None]
    mutations: Callable[[Path], list[Mutation]]
    writes: bool = False


@dataclass(frozen=True)
class Failure:
    """A case that ended as none may; ``kept`` is where its folder lies, if it was to be kept."""

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
    """How many cases were tried, and what became of them: refused, loaded or failed."""

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
    """Try this many cases from number ``first`` on; ``advance()`` is called after each.

    The folders of failures are moved into ``keep``. Memory is bounded and measured on Linux only.
    """
    figures, suspect = Figures(), None
    end = first + cases
    with tempfile.TemporaryDirectory(prefix="fuzz-") as workshop:
        while first < end:
            for case, mutation, outcome in _run(target, seed, range(first, end), Path(workshop)):
                if outcome.startswith(HANGS) and case != suspect:
                    first = suspect = case  # once more: a busy machine can keep any process waiting
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
    """Each target's name and figures in turn, with a bar if there is a terminal; the cases are shared out."""
    from tqdm import tqdm

    for number, target in enumerate(targets):
        share = cases * (number + 1) // len(targets) - cases * number // len(targets)
        with tqdm(total=share, desc=target.name, unit="case", leave=False, disable=None) as bar:
            figures = fuzz(target, share, seed, keep=keep, advance=bar.update)
        yield target.name, figures


def choose(mutations: list[Mutation], seed: int, case: int) -> Mutation:
    """The mutation of a case: in turn the next of the fixed ones, in the seed's order, and of the drawn."""
    fixed = [mutation for mutation in mutations if not mutation.drawn]
    drawn = [mutation for mutation in mutations if mutation.drawn]
    if drawn and case % 2:
        return drawn[case // 2 % len(drawn)]
    turn = case // 2 if drawn else case
    return fixed[np.random.default_rng(seed).permutation(len(fixed))[turn % len(fixed)]]


# ---------------------------------------------------------------------------- the process that watches


def _run(target: Target, seed: int, cases: range, workshop: Path) -> Iterator[tuple[int, str, str]]:
    """Number, mutation and outcome of each case, to the first that ends the process, or to the end."""
    # A fresh interpreter, not a fork: a library's threads do not live on in a copy.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=workshop) as room, ours:
        child = context.Process(target=_child, args=(theirs, target, seed, cases, workshop, Path(room)))
        child.start()
        theirs.close()  # the child holds the only other end: when it dies, reading ends
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
            said = (Path(room) / "stderr").read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            outcome = f"the process died ({_ending(child)}): {said}"
        else:
            return
        finally:
            child.kill()
            child.join()
        if case is None:
            raise RuntimeError(f"{target.name}: not a case, but the watching itself failed: {outcome}")
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


# ---------------------------------------------------------------------------- the process that reads


def _child(connection, target: Target, seed: int, cases: range, workshop: Path, room: Path) -> None:
    """Send (case, mutation) before reading a case's folder, and then what became of it."""
    stderr = os.open(room / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)  # libraries write there why they end the process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    valid = room / "valid"
    valid.mkdir()
    target.make(valid)
    mutations = target.mutations(valid)
    target.load(_copy(valid, room / "first" / FOLDER))  # imports what reading needs, before anyone looks
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
    """ "refused" or "loaded", or what is wrong with the way it ended."""
    bound = MEMORY_BASE + MEMORY_FACTOR * _size(folder)
    before = _start_measuring(bound)
    watch.begin(folder)
    try:
        target.load(folder)
        outcome, problem = "loaded", ""
    except Error as error:
        outcome, problem = "refused", _what_is_wrong(error, folder)
    except BaseException:  # a panic of a Rust library is no Exception
        outcome, problem = "", traceback.format_exc().strip()[-3000:]
    finally:
        watch.end()
        taken = _stop_measuring(before)
    if problem or watch.seen:
        return problem or f"it did what reading must not: {', '.join(watch.seen)}"
    if taken > bound:
        return f"{taken / 2**20:,.0f} MB of memory, and {bound / 2**20:,.0f} are enough"
    if expect not in (None, outcome):
        return f"it was {outcome}, and should be {expect}"
    return outcome


def _what_is_wrong(error: Error, folder: Path) -> str:
    """With the error, which is to be one sentence that names the file."""
    said = str(error)
    names = [FOLDER, *(path.name for path in folder.rglob("*"))]
    if not any(name in said for name in names):
        return f"the error names no file: {said}"
    if not said.isprintable() or said.endswith(".") or len(said) > LONGEST_SENTENCE:
        return f"the error is not one sentence: {said[:LONGEST_SENTENCE]!r} ({len(said):,} characters)"
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"it ran out of memory: {said}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _start_measuring(bound: int) -> int | None:
    """Bytes of memory in use; from here on the system keeps the peak, and refuses far more than ``bound``."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: proc(5)
    limit = _kilobytes("VmSize") * 1024 + bound + ADDRESS_ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return _kilobytes("VmHWM") * 1024


def _stop_measuring(before: int | None) -> int:
    """Bytes taken at most since then."""
    if before is None:
        return 0
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return _kilobytes("VmHWM") * 1024 - before


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


class _Watch:
    """What Python opens and starts, by its audit events (PEP 578), between ``begin`` and ``end``.

    Reading Python's own files is allowed everywhere (a module that is imported late). A link in the
    folder counts as lying there: who could put it there had the right to.
    """

    def __init__(self, writes: bool):
        self.folder, self.writes, self.seen = None, writes, []
        paths = sysconfig.get_paths()
        roots = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
        self.own = [*roots, *(os.path.dirname(package.__file__) for package in (tinyllm, parity))]
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
