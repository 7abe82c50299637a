"""Many things to measure, in workers that may die, and on disk one by one, so that an interrupted sweep goes on."""

import csv
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from attnlib.core import Machine, Shape, UserError
from attnlib.laws import Variant, bytes_needed, law_of
from attnlib.memory.check import observed
from attnlib.rows import COLUMNS, ORIGIN, SCHEMA
from attnlib.timing.measure import measure
from attnlib.timing.worker import Worker, WorkerDied

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One thing to measure: a function that is run in a worker and returns a row, or several."""

    name: str  # what tells it from all others of a sweep, in words: by it an interrupted sweep knows what it has
    function: Callable
    arguments: tuple
    process: Any = None  # jobs that follow each other share a worker as long as this is the same
    claim_bytes: int = 0  # device memory that it may need: how many jobs run at once depends on it
    # (status, reason) -> the row in its place if its worker died twice ("crash") or took too long ("timeout"); without
    # it the error is raised
    lost: Callable[[str, str], Row] | None = None
    here: bool = False  # whether it runs in this process: it touches no device, and starts processes of its own


def point_name(variant: Variant, shape: Shape) -> str:
    """A point in words: "naive 8 1 1024 64 float32 causal"."""
    *sizes, causal = shape.columns().values()
    return " ".join(map(str, [variant.name, *sizes])) + " causal" * bool(causal)


def point_jobs(
    points: Iterable[tuple[Variant, Shape]], device: str, budget_s: float, patience_s: float = 0.0
) -> list[Job]:
    """`measure` of each `(variant, shape)`, each once, as jobs."""

    def job(name: str, variant: Variant, shape: Shape) -> Job:
        point = {"variant": variant.name, **shape.columns()}
        lost = lambda status, reason: {**point, "status": status, "phase": "", "reason": reason}  # noqa: E731
        return Job(name, measure, (variant, shape, device, budget_s, patience_s), lost=lost)

    wanted: dict[str, tuple[Variant, Shape]] = {}
    for point in points:
        if wanted.setdefault(point_name(*point), point)[0] is not point[0]:
            raise UserError(f"two different variants are called {point[0].name}")
    return [job(name, *point) for name, point in wanted.items()]


def observation_jobs(cases: Iterable[tuple[Variant, Shape]], device: str, machine: Machine) -> list[Job]:
    """check.observed of each case on a device, as jobs that claim twice what their law says."""
    claims = ((one, 2 * bytes_needed(*one, machine) if law_of(*one, machine) else 0) for one in cases)
    return [Job(point_name(*one), observed, (*one, device), claim_bytes=claim) for one, claim in claims]


def run_jobs(
    jobs: Sequence[Job],
    *,
    worker: Worker | None = None,
    lanes: int = 1,
    room_bytes: int = 0,
    timeout_s: float | None = None,
) -> Iterator[tuple[Job, list[Row]]]:
    """Each job with its rows, as they are done: one after the other, or in up to `lanes` workers side by side.

    worker: for jobs that need no process of their own, if there is one already. room_bytes: of device memory, which the
    jobs that run at once share by their claims; a job that claims more than that runs alone. timeout_s: after which a
    job is given up. Raises what a job raises that has no row for it."""
    space, left, local = threading.Condition(), [room_bytes], threading.local()
    started: list[Worker] = []

    def worker_for(job: Job) -> Worker:
        if worker and lanes == 1 and job.process is None:
            return worker
        if not hasattr(local, "worker"):
            local.worker, local.process = Worker(), None
            started.append(local.worker)
        if job.process != local.process:
            local.worker.stop()
        local.process = job.process
        return local.worker

    def rows_of(job: Job) -> Row | Iterable[Row]:
        if job.here:
            return job.function(*job.arguments)
        try:
            return worker_for(job).call_again(job.function, *job.arguments, timeout_s=timeout_s)
        except (WorkerDied, TimeoutError) as error:
            if job.lost is None:
                raise
            return job.lost("crash" if isinstance(error, WorkerDied) else "timeout", str(error))

    def run(job: Job) -> tuple[Job, list[Row]]:
        claim = min(job.claim_bytes, room_bytes)
        with space:
            space.wait_for(lambda: left[0] >= claim)
            left[0] -= claim
        try:
            found = rows_of(job)
            return job, [found] if isinstance(found, dict) else list(found)
        finally:
            with space:
                left[0] += claim
                space.notify_all()

    try:
        if lanes == 1:
            yield from map(run, jobs)
            return
        pool = ThreadPoolExecutor(lanes)
        try:
            yield from (future.result() for future in as_completed([pool.submit(run, job) for job in jobs]))
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        for one in started:
            one.stop()


class Partial:
    """The rows of a sweep that is not finished: a file with a JSON object a line, one for each job that is done. A job
    whose line is not whole is done again. Raises UserError if another run has the file, else OSError."""

    def __init__(self, path: Path, machine: Machine) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.synced = 0.0
        self.file = path.open("a+", encoding="utf-8", errors="replace")
        self.origin = [machine.machine, machine.torch, SCHEMA]  # rows of any other are not gone on with
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{path} is being written by another run") from None
        except OSError:
            print(f"warning: {path}: no locks on this file system: let no other run write it", file=sys.stderr)

    def done(self) -> dict[str, list[Row]]:
        """`{name: rows}` of the jobs that are done; what cannot be gone on with is left out, with a warning."""
        found, useless = {}, 0
        self.file.seek(0)
        for line in filter(str.strip, self.file):
            try:
                entry = json.loads(line)
                if entry["origin"] != self.origin:
                    raise ValueError
                found[entry["name"]] = [dict(row) for row in entry["rows"]]
            except (ValueError, KeyError, TypeError):
                useless += 1
        if useless:
            text = f"{useless} line(s) are damaged, or of another machine or version: measured again"
            print(f"warning: {self.file.name}: {text}", file=sys.stderr)
        return found

    def add(self, job: Job, rows: list[Row]) -> None:
        """Keep the rows of a job: nothing that ends this process loses them; a power cut, those of the last second."""
        # the line break comes first, so that a line that was cut off stays alone
        self.file.write("\n" + json.dumps({"name": job.name, "origin": self.origin, "rows": rows}))
        self.file.flush()
        if time.monotonic() - self.synced > 1:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write rows as a CSV that a reader sees whole or not at all; those of points with all their columns, in order."""
    seen = dict.fromkeys(column for row in rows for column in row)
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS if {*seen} <= {*COLUMNS} else [*seen])
        writer.writeheader()
        writer.writerows({name: f"{x:.9g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    os.replace(draft, path)


def collect(jobs: Sequence[Job], path: Path, machine: Machine, **how: Any) -> int:
    """Run all jobs and write their rows, in the jobs' order, into the CSV `path`. Returns how many rows there are.

    The rows of each job are written to `<path>.partial` before the next is asked for; when all are there the CSV is
    written. If an earlier run on the same `machine` (see timing.machine.describe) was interrupted, its rows are kept. A
    finished CSV is replaced only by a finished one. Progress goes to stderr: a bar on a terminal or in JupyterLab,
    lines elsewhere (the environment variable ATTNLIB_PROGRESS=bar or lines decides otherwise). how: as `run_jobs` takes
    it. Raises UserError if the file cannot be written or another run is writing it."""
    bars = "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"
    lines = os.environ.get("ATTNLIB_PROGRESS", bars) != "bar"
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        kept = Partial(unfinished, machine)
        with kept.file:
            done = kept.done()
            todo, begun = [job for job in jobs if job.name not in done], time.monotonic()
            with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=path.stem, disable=lines) as bar:
                for job, rows in run_jobs(todo, **how):
                    kept.add(job, rows)
                    done[job.name] = rows
                    bar.update()
                    if lines:
                        ends = ", ".join(dict.fromkeys(str(row.get("status", "done")) for row in rows))
                        after = f"after {time.monotonic() - begun:.0f} s"
                        print(f"[{path.stem}] {job.name}: {ends} {after}", file=sys.stderr, flush=True)
            origin = dict(zip(ORIGIN, (machine.machine, machine.torch, SCHEMA), strict=True))
            found = [row | origin for job in jobs for row in done[job.name]]
            write_csv(path, found)
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; it is left as it was") from error
    return len(found)
