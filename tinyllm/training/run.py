"""A training run of any task, from its options to its last checkpoint: ``training_steps`` and a folder.

``run_folder.py`` writes what the run leaves behind; ``tasks/`` has what it trains.
"""

import io
import math
import signal
import threading
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout, suppress

import numpy as np
from tqdm import tqdm

from tinyllm.backend import autocast, distributed
from tinyllm.backend.device import open_device, pick_device
from tinyllm.backend.forked import can_fork
from tinyllm.backend.memory import keep_memory, out_of_memory, peak_memory
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.optim import OPTIMIZERS, AdamW, warmup_cosine, warmup_linear
from tinyllm.training.config import RunOptions, flag
from tinyllm.training.data_parallel import ShardedAdamW
from tinyllm.training.loggers import Log, check_logs, open_logs
from tinyllm.training.loop import CompletedStep, training_steps
from tinyllm.training.output import output_errors, robust_output, say
from tinyllm.training.run_folder import RunFolder
from tinyllm.training.shared_run import SharedRun, in_turn
from tinyllm.training.step import Check
from tinyllm.training.tasks.base import Task
from tinyllm.weights.runs import checkpoints, last_checkpoint


def run_task(task: Task, progress: bool = True, callback: Log | None = None) -> Module:
    """Run the training that ``task.config`` describes, or the rest of it; returns the trained model.

    With ``config.resume`` a run that was stopped for any reason continues from its newest checkpoint. On the
    same machine its results are bitwise identical to those of a run that was never stopped.

    The record of every step, as it is written to metrics.jsonl and at evaluations with the ``sample``, goes
    to the run's folder (``run_folder.py``), to the logs in ``config.log`` (``loggers.py``) and to
    ``callback``.

    SIGINT, SIGTERM and SIGHUP interrupt the step or the evaluation; a checkpoint of the last complete step is
    written, and KeyboardInterrupt raised with the signal's number as its argument. A loss or gradient norm
    that is not finite never reaches the weights: more than ``config.skip_nonfinite`` in a row raise
    FloatingPointError, after a checkpoint of the last finite step. So do weights that an update made not
    finite, which are never saved. A checkpoint or log that cannot be written raises OSError; the checkpoint
    before it stays complete. MemoryError, of the CPU or of the GPU, has options that need less memory. These
    and all other exceptions, such as one of ``callback``, are raised after a checkpoint of the last complete
    step, if that can be written.

    Output that cannot be written is dropped; the next record has its stdout_error or stderr_error.

    In float16 a gradient that overflows while the loss scale (``LossScale``) is above 1 skips the update,
    and the run continues.

    With ``config.distributed`` all processes of ``mpiexec`` call this. They train together, the first one
    writes and prints, and what one of them raises all of them raise. ``callback`` is called in each.

    Without it, ``config.processes`` forked from this one share every step (``workers.py``): by default one
    for each core if the model is small. Only this one evaluates, writes, and calls ``callback``.
    """
    check_logs(task.config.log)
    with ExitStack() as stack:
        processes = stack.enter_context(distributed.opened(task.config.distributed))
        run = SharedRun(task, processes) if processes.size > 1 else RunFolder(task)
        stack.enter_context(closing(run))
        stack.enter_context(robust_output() if run.leads else _no_output())
        try:
            return _run(run, progress, callback)
        except MemoryError as error:
            raise MemoryError(_out_of_memory(run, error)) from error


@contextmanager
def _no_output():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def open_run_device(config: RunOptions) -> str:
    """``open_device`` of a run, which must suit its processes."""
    gpu, kind = config.device != "cpu", config.distributed
    if kind is not None and config.device not in ("cpu", "cuda"):
        raise Error(
            f"--device {config.device} and --distributed: choose cpu, or cuda, a GPU for each process"
        )
    if kind is not None and gpu != (kind == "nccl"):
        raise Error(
            f"--distributed {kind} and --device {config.device}: use mpi with cpu, and nccl with cuda"
        )
    if config.processes not in (None, 1) and (gpu or kind is not None or not can_fork()):
        where = "on Linux and the CPU, without --distributed"
        raise Error(f"--processes {config.processes} share a step only {where}: use --processes 1")
    return open_device(config.device, config.dtype, config.gpu_memory)


def check_names(config: RunOptions) -> None:
    """Raise ``Error`` for a path or text that is not UTF-8: the run's JSON files could not be read again."""
    for name, value in config.to_json().items():
        for each in map(str, value if isinstance(value, tuple) else [value]):
            if (shown := each.encode("utf-8", "backslashreplace").decode()) != each:
                raise Error(f"{flag(name)} {shown} is not UTF-8, as the files of a run are: choose another")


def make_optimizer(model: Module, config: RunOptions) -> AdamW:
    """The options' optimizer with their weight decay; of AdamW, perhaps this process's share."""
    processes = distributed.current()
    if config.shard_optimizer and processes.size > 1:
        return ShardedAdamW(processes, model, config.lr, weight_decay=config.weight_decay)
    return OPTIMIZERS[config.optimizer](model, config.lr, weight_decay=config.weight_decay)


def _run(run: RunFolder, progress: bool, callback: Log | None) -> Module:
    task, config, processes = run.task, run.config, distributed.current()
    config.check_division()
    if config.resume is not None:
        run.reopen()
        if run.is_finished() and task.is_concluded(run.folder, run.about):
            say(
                f"{run.folder} is finished: its {config.steps:,} steps are done; a new run starts from its "
                f"weights with {config.restart} {run.folder}"
            )
            return task.trained(last_checkpoint(run.folder))
    else:
        check_names(config)
        run.check_new()
        task.check()
    device = open_run_device(config)
    in_turn(processes, lambda: task.load(run.folder, run.about))
    config = task.config
    model = task.model().to(device)
    optimizer = make_optimizer(model, config)
    keep_memory()
    with _signals() as check:  # from here on, so that no folder is begun and left without its config.json
        run.start(model, optimizer)
        optimizer.reserve()
        try:
            names = config.log if run.leads else ()
            with open_logs(names, run.folder, run.about) as log, autocast(config.dtype), run.sharing():
                processes.gather()  # all have come so far: an exception is now followed by a checkpoint
                logs = [each for each in (run, log, callback) if each is not None]
                _train(run, logs, check, progress)
        except OSError as error:
            remedy = f"free some space or make the folder writable, then continue with {run.resuming()}"
            raise OSError(f"{error}: {remedy}") from error
    if run.leads:
        for lines in (task.conclusion(run.log.history[-1]), run.summary()):
            if lines:
                say(lines)
    return model


def _train(run: RunFolder, logs: list[Log], check: Check, progress: bool) -> None:
    """Run the remaining steps and save the last complete one, however they end; see ``run_task``."""
    try:
        with distributed.current().agreed():
            _steps(run, logs, check, progress)
    except _Stopped as stop:
        where = run.save()
        said = f"stopped after step {run.step}; {run.resuming()} continues from {where}"
        raise KeyboardInterrupt(stop.args[0], said) from stop
    except FloatingPointError as error:
        where = run.save()
        raise FloatingPointError(f"{error}; the weights after step {run.step} are in {where}") from error
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, MemoryError):
            error.__traceback__ = None  # it references the step's arrays, and saving needs memory
        if all(distributed.current().gather(run.is_between_updates())):
            with suppress(Exception):  # what stopped the steps is raised, whether or not they can be saved
                say(f"the weights after step {run.step} are in {run.save()}")
        raise


def _steps(run: RunFolder, logs: list[Log], check: Check, progress: bool) -> None:
    """Run steps, evaluations and checkpoints, and send a record of each step to the logs."""
    task, config, tokens_before, seconds = run.task, run.config, run.tokens, 0.0
    schedule = {"cosine": warmup_cosine, "linear": warmup_linear}[config.schedule]
    lr_at = schedule(config.lr, config.initial_lr, config.final_lr, config.warmup_steps, config.steps)
    options = dict(micro_batch=config.at_once, clip=config.clip, seed=config.seed, check=check)
    options["replicas"] = run.replicas

    def is_evaluated(step: int) -> bool:
        return step % task.eval_every == 0 or step == config.steps

    def evaluate_and_log(record: dict) -> None:
        try:
            if is_evaluated(record["step"]):
                record |= _evaluation(task, run.model, record["step"], check)
        finally:  # the step's own numbers are recorded even if its evaluation fails
            record |= output_errors()
            for log in logs:
                log(record)

    if is_evaluated(run.step) and not run.log.was_evaluated(run.step):
        evaluate_and_log(run.log.take_back(run.step) or {"step": run.step, "tokens": run.tokens})
    bar = dict(unit="step", dynamic_ncols=True, disable=None if progress else True)
    steps = tqdm(range(run.step, config.steps), initial=run.step, total=config.steps, **bar)
    data = task.batch_at, task.count, task.loss
    for completed in training_steps(run.model, run.optimizer, *data, lr_at, steps, run.loss_scale, **options):
        tokens = task.tokens(completed.batch)
        record = {"step": completed.step, "tokens": run.tokens + tokens, **_outcome(run, completed)}
        record["tokens_per_s"] = round(tokens / completed.seconds, 1)
        seconds += completed.seconds
        if is_evaluated(completed.step):
            record["mean_tokens_per_s"] = round((record["tokens"] - tokens_before) / seconds, 1)
            memory = peak_memory(pick_device(config.device))
            record["peak_memory"] = memory and memory + run.replicas.memory()
        evaluate_and_log(record)
        if run.is_due():
            run.save()
        check()


def _evaluation(task: Task, model: Module, step: int, check: Check) -> dict:
    """The evaluation's numbers, which must be finite, and a sample."""
    final = step == task.config.steps
    with np.errstate(over="ignore", invalid="ignore"):
        found = task.evaluate(model, check, final)
        for key, value in found.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"after step {step} the {key} is {value}: start again with a smaller --lr or --clip"
                )
        sample = task.sample(model, step, check, final) if distributed.current().rank == 0 else None
    return found if sample is None else found | {"sample": sample}


def _outcome(run: RunFolder, completed: CompletedStep) -> dict:
    """The loss and the update in a step's record; FloatingPointError for one skipped update too many."""
    if completed.updated:
        found = {"train_loss": completed.loss, "lr": completed.lr, "grad_norm": completed.grad_norm}
    elif completed.overflowed:
        scale = f"loss scale {completed.loss_scale:,.0f}"
        what = f"the gradients overflow float16 at {scale}: the update is skipped and the scale halved"
        say(f"step {completed.step}: {what}")
        found = {"train_loss": completed.loss, "lr": completed.lr, "overflow": what}
    else:
        found = {"skipped": run.not_finite(completed), "lr": completed.lr}
    return found | ({"loss_scale": completed.loss_scale} if run.config.dtype == "float16" else {})


def what_to_try(config: RunOptions, error: MemoryError) -> str:
    """The message when memory runs out, with options that need less."""
    remedies = [*config.smaller_micro_batch, f"a new run with a shorter {config.length_option}"]
    return out_of_memory(error, config.dtype, remedies)


def _out_of_memory(run: RunFolder, error: MemoryError) -> str:
    """``what_to_try``, and the command that resumes the run."""
    said = what_to_try(run.config, error)
    if not run.about:  # there is no run yet
        return said
    command = " ".join([run.resuming(), *run.config.smaller_micro_batch])
    saved = checkpoints(run.folder)
    if not saved:
        return f"{said}; {command} starts again"
    return f"{said}; {command} continues from the checkpoint {saved[-1]}"


class _Stopped(KeyboardInterrupt):
    """A signal was received; its number is the argument."""


@contextmanager
def _signals():
    """Defer SIGINT, SIGTERM and SIGHUP until the function that this yields is called: it raises ``_Stopped``.

    So no update and no checkpoint is interrupted half-way. Only the main thread can set handlers; in another
    thread signals are left alone, as is a SIGHUP that nohup ignores.
    """
    arrived: list[int] = []
    before = {}
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def check() -> None:
        if arrived:
            raise _Stopped(arrived[0])

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            before[number] = signal.signal(number, lambda received, _: arrived.append(received))
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
