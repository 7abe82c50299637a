"""A sweep of points in a worker process that may die without taking the sweep, or a measured row, with it."""

import csv
import fcntl
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from attnlib.core import AttnError, Shape, Variant
from attnlib.measure import COLUMNS, FIGURES, PHASES, POINT, STATUSES, measure


class WorkerDied(Exception):
    """The worker process is gone, or failed in a way that leaves the device in doubt: it is not used any further."""


def leave_with_parent():
    """Let this process end when the one that started it does, and not mind an interrupt, which is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _serve(pipe):
    """The worker: run what is sent, `(function, arguments)`, and send back `(error or None, result)`."""
    leave_with_parent()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*arguments)))
        except AttnError as error:
            pipe.send((error, None))
        except Exception as error:
            pipe.send((WorkerDied(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"), None))


def forkserver() -> multiprocessing.context.BaseContext:
    """How to start many short-lived processes: from one that has imported this package, which touches no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnlib", "pandas"])  # heeded by whoever starts the server: by all or by none
    return context


class Worker:
    """A process of its own to touch the device: started when first called, replaced after it has died.

    context: how the process is started; a fresh interpreter, or see `forkserver`.
    """

    def __init__(self, context: multiprocessing.context.BaseContext | None = None):
        self.context, self.process = context or multiprocessing.get_context("spawn"), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Kill the process, if there is one."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = None

    def call(self, function, *arguments, timeout_s: float | None = None):
        """`function(*arguments)`, run in the worker.

        Raises AttnError as the function did, WorkerDied if the process ended or the function failed otherwise, and
        TimeoutError after `timeout_s` seconds; after the last two the process is killed.
        """
        if self.process is None:
            pipe, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            with theirs:
                process.start()
            self.pipe, self.process = pipe, process
        try:
            self.pipe.send((function, arguments))
            if not self.pipe.poll(timeout_s):
                self.stop()
                raise TimeoutError(f"not done after {timeout_s:g} s")
            error, result = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            error, result = WorkerDied(ending(self.process.exitcode)), None
        if isinstance(error, WorkerDied):
            self.stop()
        if error:
            raise error
        return result

    def call_again(self, function, *arguments, timeout_s: float | None = None):
        """`call`, and a second time if the worker died: the cause may lie outside (somebody's kill, a system short of
        memory)."""
        try:
            return self.call(function, *arguments, timeout_s=timeout_s)
        except WorkerDied:
            return self.call(function, *arguments, timeout_s=timeout_s)


def ending(exitcode: int) -> str:
    """How a process ended, in words."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"


def measure_in(worker: Worker, variant: Variant, shape: Shape, device: str, budget_s: float, timeout_s: float) -> dict:
    """The row of one point, whatever happens to the worker.

    A point whose worker dies twice is a `crash`, one that is not done after `timeout_s` seconds a `timeout`.
    """
    try:
        return worker.call_again(measure, variant, shape, device, budget_s, timeout_s=timeout_s)
    except WorkerDied as error:
        status, reason = "crash", str(error)
    except TimeoutError as error:
        status, reason = "timeout", str(error)
    return {"variant": variant.name, **shape.columns(), "status": status, "phase": "", "reason": reason}


def measured(points: list[tuple[Variant, Shape]], device: str, budget_s: float, timeout_s=300.0) -> Iterator[dict]:
    """The row of each point, in a worker, where the rows are kept by other means than `sweep`."""
    with Worker() as worker:
        for variant, shape in points:
            yield measure_in(worker, variant, shape, device, budget_s, timeout_s)


def key(row: dict) -> tuple:
    """What names a point, the same for a row as measured and as read back from a CSV."""
    return tuple(str(row[column]) for column in POINT)


def is_sound(row: dict[str, str]) -> bool:
    """Whether a row read back can be one that was written: status known, figures numbers, none missing if ok."""
    figures = [row[column] for column in FIGURES]
    try:
        numbers = [float(figure) for figure in figures if figure]
    except ValueError:
        return False
    complete = row["status"] != "ok" or all(row[f"{phase}_ms"] and row["saved_bytes"] for phase in PHASES)
    return row["status"] in STATUSES and complete and all(0 <= number < math.inf for number in numbers)


def read_partial(path: Path, machine: dict, keys: set) -> dict[tuple, int]:
    """The points that an interrupted sweep left in `path`; what cannot be gone on with is cut off, with a warning.

    A line that was not written whole goes, with all after it. Rows of another machine or other versions, or of points
    that are not asked for, go altogether: two machines never share a file.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, done, trouble = 0, {}, ""
    for number, line in enumerate(lines):
        fields = next(csv.reader([line.decode(errors="replace")]), [])
        if number == 0 and fields == COLUMNS and line.endswith(b"\n"):
            kept += len(line)
            continue
        row = dict(zip(COLUMNS, fields, strict=False))
        if number == 0 or len(fields) != len(COLUMNS) or not line.endswith(b"\n") or not is_sound(row):
            trouble = f"line {number + 1} is damaged: it and what follows is measured again"
            break
        if row["machine"] != machine["machine"] or key(row) not in keys or key(row) in done:
            kept, done, trouble = 0, {}, "it is another sweep's or another machine's: starting afresh"
            break
        kept += len(line)
        done[key(row)] = number
    if trouble:
        print(f"warning: {path}: {trouble}", file=sys.stderr)
    if lines:
        os.truncate(path, kept)
    return done


def plain_row(number, total, row) -> str:
    """A line of progress."""
    point = " ".join(str(row[column]) for column in POINT[:-1]) + (" causal" if row["causal"] else "")
    times = ", ".join(f"{phase} {row[f'{phase}_ms']:.3g} ms" for phase in PHASES[:2] if f"{phase}_ms" in row)
    return f"[{number}/{total}] {point}: {row['status']}{' in ' + row['phase'] if row['phase'] else ''} {times}"


def sweep(
    points: list[tuple[Variant, Shape]],
    path: Path,
    machine: dict,
    *,
    device: str,
    worker: Worker,
    budget_s: float = 6.0,
    timeout_s: float = 300.0,
):
    """Measure all points in order into the CSV `path`, one row each, in `worker`.

    Each row is appended to `<path>.partial` and synced to disk before the next point starts; when all are there the
    file is renamed. If an earlier run on the same `machine` (see device.describe) was interrupted, its rows are kept.
    A finished CSV is replaced only by a finished one. Progress goes to stderr: a bar on a terminal or in JupyterLab,
    lines elsewhere (the environment variable ATTNLIB_PROGRESS=bar or lines decides otherwise).
    Raises AttnError if the file cannot be written or another sweep is writing it.
    """
    partial = path.with_name(f"{path.name}.partial")
    todo = {key({"variant": variant.name, **shape.columns()}): (variant, shape) for variant, shape in points}
    style = os.environ.get("ATTNLIB_PROGRESS") or (
        "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "a", newline="") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AttnError(f"{partial} is being written by another run") from None
            done = read_partial(partial, machine, set(todo))
            writer = csv.DictWriter(file, COLUMNS)
            if not done and not os.path.getsize(partial):
                writer.writeheader()
            bar = tqdm(total=len(todo), initial=len(done), desc=path.stem, unit="point", disable=style != "bar")
            for number, (name, (variant, shape)) in enumerate(todo.items(), 1):
                if name in done:
                    continue
                row = measure_in(worker, variant, shape, device, budget_s, timeout_s)
                row |= {"machine": machine["machine"], "torch": machine["torch"]}
                writer.writerow({name: f"{x:.7g}" if isinstance(x, float) else x for name, x in row.items()})
                file.flush()
                os.fsync(file.fileno())
                bar.update()
                if style != "bar":
                    print(plain_row(number, len(todo), row), file=sys.stderr, flush=True)
            bar.close()
        os.replace(partial, path)
    except OSError as error:
        raise AttnError(f"cannot write {partial}: {error.strerror}; {path.name} is left as it was") from error
