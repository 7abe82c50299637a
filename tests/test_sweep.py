"""A sweep survives what can happen to it: killed, crashed, hung, interrupted, full disk, damaged files, no locks."""

import csv
import errno
import fcntl
import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import faults
import psutil
import pytest

from attnlib import VARIANTS, family
from attnlib.core import Shape, UserError
from attnlib.rows import COLUMNS, SCHEMA
from attnlib.timing.sweep import Job, collect, point_jobs, run_jobs
from attnlib.timing.worker import Worker, WorkerDied


def points(count, fn=faults.quick, budget_s=0.003):
    """Jobs that measure a variant at `count` lengths."""
    return point_jobs([(faults.variant(fn), Shape(1, 1, n, 4)) for n in range(8, 8 + count)], "cpu", budget_s)


def numbered(count, function=dict):
    """Jobs without a device, whose row is their number."""
    return [Job(f"job {at}", function, ({"number": at},), here=True) for at in range(count)]


def read(path):
    """The rows of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(path):
    """The numbers of `numbered` jobs in a CSV."""
    return [int(row["number"]) for row in read(path)]


@pytest.fixture
def mortal():
    """A worker to be killed: it starts anew within milliseconds."""
    with Worker() as worker:
        yield worker


def test_each_point_has_its_row_in_order(tmp_path, machine, worker):
    path = tmp_path / "x.csv"
    wanted = [(v, Shape(2, 1, n, 8, causal=True)) for n in (16, 33) for v in family("plain").values()]
    assert collect(point_jobs([*wanted, wanted[0]], "cpu", 0.003), path, machine, worker=worker) == len(wanted)
    rows = read(path)
    assert tuple(rows[0]) == COLUMNS and [*tmp_path.iterdir()] == [path]
    assert [(row["variant"], row["seq_len"]) for row in rows] == [(v.name, str(s.seq_len)) for v, s in wanted]
    assert all(row["status"] == "ok" and float(row["forward_ms"]) > 0 for row in rows)
    assert {(row["machine"], row["schema"]) for row in rows} == {(machine.machine, str(SCHEMA))}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.stress)])
def test_a_worker_that_is_killed_costs_no_row(tmp_path, machine, mortal, kills):
    """At any moment, also while it starts. A point whose worker died twice has a row that says so."""
    path, rng, killed = tmp_path / "x.csv", random.Random(0), []

    def killer():
        while len(killed) < kills:
            process = mortal.process
            time.sleep(rng.uniform(0, 0.5))
            if process is not None and process is mortal.process and process.pid not in (None, *killed):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    while thread.is_alive():  # further sweeps, should one be done before its worker has been killed often enough
        collect(points(40), path, machine, worker=mortal)
        rows = read(path)
        assert [int(row["seq_len"]) for row in rows] == [*range(8, 48)]
        assert {row["status"] for row in rows} <= {"ok", "crash"}
    assert len(killed) == kills


def sweep_slowly(path, machine, count):
    """A sweep of `count` rows, in a process to be killed."""
    collect(numbered(count, faults.slowly), path, machine)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.stress)])
def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path, machine, kills):
    """The sweep's own process is killed, at any moment after it has got further: its rows are on disk, each once."""
    path, partial, before, rng = tmp_path / "x.csv", tmp_path / "x.csv.partial", 0, random.Random(1)

    def kept():
        return partial.read_bytes().count(b"origin") if partial.exists() else 0

    for _ in range(kills):
        process = Worker().context.Process(target=sweep_slowly, args=(path, machine, 60 * kills))
        process.start()
        while process.exitcode is None and kept() <= before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert before < kept() < 60 * kills and not path.exists(), "it was killed on the way"
        before = kept()
    run = []
    collect(numbered(60 * kills, lambda row: run.append(row) or row), path, machine)
    assert numbers(path) == [*range(60 * kills)] and len(run) <= 60 * kills - before


def test_a_point_that_misbehaves_costs_one_row(tmp_path, machine, mortal):
    """A crash has its reason. A bug whose text speaks of allocation is a crash too, and no want of memory."""
    path = tmp_path / "x.csv"
    wanted = [(faults.variant(fn), Shape(1, 1, 8, 4)) for fn in (faults.segfault, faults.fail, faults.misaligned)]
    wanted += [(faults.variant(faults.quick, name="refused", needs=faults.refuse), Shape(1, 1, 8, 4))]
    collect(point_jobs(wanted, "cpu", 0.003) + points(1), path, machine, worker=mortal)
    assert [(row["status"], row["reason"]) for row in read(path)] == [
        ("crash", "killed by SIGSEGV"),
        ("crash", "ValueError: a bug"),
        ("crash", "RuntimeError: misaligned allocation"),
        ("unsupported", "cannot run here"),
        ("ok", ""),
    ]


def test_a_point_that_hangs_costs_one_row(tmp_path, machine, mortal):
    path = tmp_path / "x.csv"
    collect(points(1, faults.hang), path, machine, worker=mortal, timeout_s=0.5)
    assert [(row["status"], row["reason"]) for row in read(path)] == [("timeout", "not done after 0.5 s")]


def test_a_point_beyond_memory_is_predicted_on_the_cpu(tmp_path, machine, worker):
    path = tmp_path / "x.csv"
    collect(point_jobs([(VARIANTS["naive"], Shape(64, 64, 2**17, 64))], "cpu", 0.003), path, machine, worker=worker)
    (row,) = read(path)
    assert (row["status"], row["phase"]) == ("oom", "forward") and row["reason"].startswith("predicted: ")


def test_a_job_may_have_several_rows_or_none(tmp_path, machine):
    path, rows = tmp_path / "x.csv", [[{"number": 1}, {"number": 2}], [], [{"number": 3, "also": True}]]
    assert collect([Job(str(at), list, (some,), here=True) for at, some in enumerate(rows)], path, machine) == 3
    assert numbers(path) == [1, 2, 3] and [row["also"] for row in read(path)] == ["", "", "True"]


def interrupted(path, machine, count):
    """Make `count` rows and interrupt the sweep then."""

    def stop(row):
        if row["number"] == count:
            raise KeyboardInterrupt
        return row

    with pytest.raises(KeyboardInterrupt):
        collect(numbered(count + 1, stop), path, machine)


def test_any_jobs_go_on_after_an_interruption(tmp_path, machine):
    """Not points of the table alone: whatever makes rows. What is done is not done again."""
    path, run = tmp_path / "x.csv", []
    interrupted(path, machine, 3)
    assert not path.exists()
    assert collect(numbered(6, lambda row: run.append(row["number"]) or row), path, machine) == 6
    assert run == [3, 4, 5] and numbers(path) == [*range(6)] and not path.with_name("x.csv.partial").exists()


def test_jobs_that_are_not_asked_for_any_more_leave_no_row(tmp_path, machine):
    path = tmp_path / "x.csv"
    interrupted(path, machine, 3)
    collect(numbered(6)[2:], path, machine)
    assert numbers(path) == [2, 3, 4, 5]


def line(machine, schema=SCHEMA, job=1, number=99):
    """A line of a partial file as another run may have left it."""
    entry = {"name": f"job {job}", "origin": [machine.machine, machine.torch, schema], "rows": [{"number": number}]}
    return json.dumps(entry).encode()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda machine: line(machine)[:-7], id="cut off"),
        pytest.param(lambda machine: b"\xff\xfe\x00" + line(machine), id="bytes"),
        pytest.param(lambda machine: b"[1, 2]", id="no object"),
        pytest.param(lambda machine: b'{"name": "job 1", "rows": []}', id="no origin"),
        pytest.param(lambda machine: line(replace(machine, machine="another")), id="another machine"),
        pytest.param(lambda machine: line(replace(machine, torch="1.0")), id="another torch"),
        pytest.param(lambda machine: line(machine, SCHEMA - 1), id="another schema"),
    ],
)
def test_a_line_that_cannot_be_gone_on_with_is_measured_again(tmp_path, machine, capsys, damage):
    """The others are kept, also those after it: a line that was cut off ends where the next begins."""
    path, partial, run = tmp_path / "x.csv", tmp_path / "x.csv.partial", []
    interrupted(path, machine, 1)
    good = line(machine, job=2, number=2)
    partial.write_bytes(partial.read_bytes() + b"\n" + damage(machine) + b"\n" + good)
    collect(numbered(4, lambda row: run.append(row["number"]) or row), path, machine)
    assert run == [1, 3] and numbers(path) == [0, 1, 2, 3]
    assert "warning" in (err := capsys.readouterr().err) and "1 line(s)" in err


def test_a_full_disk_stops_with_one_line_and_leaves_the_csv(tmp_path, machine, monkeypatch):
    path, real, calls = tmp_path / "x.csv", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    path.write_text("finished\n")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left on device") as error:
        collect(numbered(3), path, machine)
    assert "\n" not in str(error.value) and path.read_text() == "finished\n"
    collect(numbered(3), path, machine)
    assert numbers(path) == [0, 1, 2]


def test_an_unwritable_folder_stops_with_one_line(tmp_path, machine):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        collect(numbered(1), tmp_path / "file" / "x.csv", machine)


def test_two_sweeps_never_write_one_file(tmp_path, machine):
    with open(tmp_path / "x.csv.partial", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            collect(numbered(1), tmp_path / "x.csv", machine)


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, machine, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert collect(numbered(2), tmp_path / "x.csv", machine) == 2
    assert "no locks" in capsys.readouterr().err


def test_progress_is_a_line_for_each_job_with_how_it_ended(tmp_path, machine, monkeypatch, capsys):
    monkeypatch.setenv("ATTNLIB_PROGRESS", "lines")
    jobs = [*numbered(1), Job("bad", dict, ({"number": 1, "status": "oom"},), here=True)]
    collect(jobs, tmp_path / "x.csv", machine)
    told = [line.rpartition(" after ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["[x] job 0: done", "[x] bad: oom"]


def test_jobs_run_side_by_side_as_far_as_their_claims_have_room():
    """With room for 10, jobs that claim 4 run two at a time, and one that claims 20 alone. Each waits for another to be
    there, so that they would hang, and the test err, if they ran one by one."""
    running, most, alone, pair = [], [], [], threading.Barrier(2, timeout=60)

    def run(at):
        running.append(at)
        pair.wait()
        most.append(len(running))
        pair.wait()
        running.remove(at)
        return {"number": at}

    def run_alone(at):
        alone.append(list(running))
        return {"number": at}

    jobs = [Job(str(at), run, (at,), claim_bytes=4, here=True) for at in range(6)]
    jobs += [Job("large", run_alone, (6,), claim_bytes=20, here=True)]
    found = {row["number"] for _, rows in run_jobs(jobs, lanes=4, room_bytes=10) for row in rows}
    assert found == {*range(7)} and set(most) == {2} and alone == [[]]


def test_lanes_are_processes_and_rows_come_in_the_order_of_the_jobs(tmp_path, machine):
    jobs = [Job(f"job {at}", faults.numbered, (at,)) for at in range(6)]
    collect(jobs, tmp_path / "x.csv", machine, lanes=2)
    rows = read(tmp_path / "x.csv")
    assert [int(row["number"]) for row in rows] == [*range(6)]
    assert str(os.getpid()) not in (processes := {row["process"] for row in rows}) and len(processes) <= 2


def test_jobs_share_a_process_as_long_as_they_say():
    """Each batch of a duel has a process of its own, of all pairs alike; jobs that say nothing share one."""
    names = [(1, 0), (1, 0), (1, 1), (2, 0), (2, 0)]
    jobs = [Job(str(at), faults.whose, (), process=name) for at, name in enumerate(names)]
    first, again, second, third, last = (rows[0]["process"] for _, rows in run_jobs(jobs))
    assert first == again and third == last and len({first, second, third, os.getpid()}) == 4


def test_what_is_lost_has_a_row_if_the_job_says_which():
    lost = Job("job", faults.die, (), lost=lambda status, reason: {"status": status, "reason": reason})
    with Worker() as worker:
        ((_, rows),) = run_jobs([lost], worker=worker)
        assert rows == [{"status": "crash", "reason": "ended with exit code 1"}]
        with pytest.raises(WorkerDied, match="exit code 1"):
            list(run_jobs([replace(lost, lost=None)], worker=worker))
        slow = replace(lost, function=time.sleep, arguments=(60,))
        ((_, rows),) = run_jobs([slow], worker=worker, timeout_s=0.2)
        assert rows == [{"status": "timeout", "reason": "not done after 0.2 s"}]
        with pytest.raises(TimeoutError):
            list(run_jobs([replace(slow, lost=None)], worker=worker, timeout_s=0.2))


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_error_for_the_user_stops_a_sweep_and_keeps_what_was_done(tmp_path, machine, lanes):
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match="bad input"):
        collect([*numbered(2), Job("bad", faults.refuse_input, (), here=True)], path, machine, lanes=lanes)
    run = []
    collect(numbered(3, lambda row: run.append(row["number"]) or row), path, machine)
    assert 2 in run and (lanes > 1 or run == [2])


def test_a_worker_that_died_is_asked_once_more(tmp_path, mortal):
    assert mortal.call_again(faults.die_once, tmp_path / "died") == "alive"
    with pytest.raises(WorkerDied, match="a bug"):
        mortal.call_again(faults.fail, 0, 0, 0)


def test_a_worker_passes_errors_on(mortal):
    with pytest.raises(WorkerDied, match="ValueError: a bug"):
        mortal.call(faults.fail, 0, 0, 0)
    with pytest.raises(UserError, match="bad input"):
        mortal.call(faults.refuse_input)
    process = mortal.call(os.getpid)
    assert mortal.call(max, 1, 2) == 2 and mortal.call(os.getpid) == process, "an error for the user kills nothing"


def start_a_worker(path):
    """Start a worker, write its process down, and wait."""
    worker = Worker()
    Path(path).write_text(str(worker.call(os.getpid)))
    time.sleep(3600)


def test_a_worker_ends_with_the_process_that_started_it(tmp_path, mortal):
    """Even if that is killed: nothing may go on holding the device."""
    path = tmp_path / "worker"
    process = Worker().context.Process(target=start_a_worker, args=(path,), daemon=False)
    process.start()
    while process.exitcode is None and not (path.exists() and path.read_text()):
        time.sleep(0.01)
    process.kill()
    process.join()
    orphan = int(path.read_text())
    for _ in range(6000):  # a minute: it takes milliseconds, but for a busy machine
        if not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    pytest.fail("the worker goes on")


def test_what_an_interrupted_call_would_have_answered_is_not_taken_for_the_next_answer():
    """An interrupt falls between a question and its answer: the answer must not come to whoever asks next."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process ignores
    with Worker() as worker:
        worker.call(max, 0, 1)
        # to the main thread, which waits: a signal that another thread gets does not wake it
        threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            worker.call(faults.sleep_and_answer, 60.0, "late")
        assert worker.call(max, 1, 2) == 2
    signal.signal(signal.SIGINT, before)


def test_two_variants_of_one_name_and_shape_are_refused():
    other = faults.variant(faults.quick, name="naive")
    with pytest.raises(UserError, match="two different variants are called naive"):
        point_jobs([(VARIANTS["naive"], Shape(1, 1, 8, 4)), (other, Shape(1, 1, 8, 4))], "cpu", 0.01)
