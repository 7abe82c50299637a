"""A sweep survives what can happen to it: killed, crashed, hung, full disk, damaged files."""

import csv
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import faults
import pytest
import torch

from attnlib import NAIVE, VARIANTS
from attnlib.core import AttnError, Shape
from attnlib.sweep import COLUMNS, Worker, WorkerDied, forkserver, key, sweep

QUICK = {"device": "cpu", "budget_s": 0.003, "timeout_s": 60.0}


def points(count, fn=faults.quick):
    return [(faults.variant(fn), Shape(1, 1, n, 4)) for n in range(8, 8 + count)]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_point_has_its_row_in_order(tmp_path, machine, worker):
    path = tmp_path / "x.csv"
    wanted = [(VARIANTS[name], Shape(2, 1, n, 8, causal=True)) for n in (16, 33) for name in NAIVE]
    sweep(wanted, path, machine, worker=worker, **QUICK)
    rows = read(path)
    assert list(rows[0]) == COLUMNS and not path.with_name("x.csv.partial").exists()
    assert [key(row) for row in rows] == [key({"variant": v.name, **s.columns()}) for v, s in wanted]
    assert all(row["status"] == "ok" and float(row["forward_ms"]) > 0 for row in rows)


def test_a_worker_killed_twenty_times_costs_no_row(tmp_path, machine, worker):
    path, wanted, rng, kills = tmp_path / "x.csv", points(400), random.Random(0), []

    def killer():
        while len(kills) < 20:
            process = worker.process
            time.sleep(rng.uniform(0, 2))
            if process is not None and process is worker.process and process.pid:
                os.kill(process.pid, signal.SIGKILL)
                kills.append(process.pid)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    while thread.is_alive():  # further sweeps, should one be done before its worker has been killed often enough
        sweep(wanted, path, machine, worker=worker, **QUICK)
        assert Counter(key(row) for row in read(path)) == Counter(
            key({"variant": v.name, **s.columns()}) for v, s in wanted
        )
    assert len(set(kills)) == 20
    assert {row["status"] for row in read(path)} <= {"ok", "crash"}


RUN = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from test_sweep import *
from attnlib import device
if __name__ == "__main__":
    with Worker() as worker:
        sweep(points({count}), Path(sys.argv[1]), device.describe("cpu"), worker=worker, **QUICK)
"""


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path, machine):
    here, path, count = Path(__file__).parent, tmp_path / "x.csv", 100
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(here.parent), tests=str(here), count=count))
    rng, partial, before = random.Random(1), tmp_path / "x.csv.partial", 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, script, path], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not partial.exists() or len(partial.read_bytes().splitlines()) <= before + 2):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(partial.read_bytes().splitlines()) if partial.exists() else 0
    subprocess.run([sys.executable, script, path], check=True, stderr=subprocess.DEVNULL)
    assert Counter(int(row["seq_len"]) for row in read(path)) == Counter(range(8, 8 + count))


def test_a_point_that_misbehaves_costs_one_row(tmp_path, machine, worker):
    path = tmp_path / "x.csv"
    wanted = [pair for fn in (faults.segfault, faults.fail, faults.hang, faults.quick) for pair in points(1, fn)]
    wanted.append((faults.variant(faults.quick, name="refused", needs=faults.refuse), Shape(1, 1, 8, 4)))
    sweep(wanted, path, machine, worker=worker, **QUICK | {"timeout_s": 10.0})
    assert [(row["status"], row["reason"]) for row in read(path)] == [
        ("crash", "killed by SIGSEGV"),
        ("crash", "ValueError: a bug"),
        ("timeout", "not done after 10 s"),
        ("ok", ""),
        ("unsupported", "cannot run here"),
    ]


def test_a_point_beyond_memory_is_predicted_on_the_cpu(tmp_path, machine, worker):
    path = tmp_path / "x.csv"
    sweep([(VARIANTS["naive"], Shape(64, 64, 2**17, 64))], path, machine, worker=worker, **QUICK)
    (row,) = read(path)
    assert (row["status"], row["phase"]) == ("oom", "forward") and row["reason"].startswith("predicted: ")


@pytest.mark.parametrize("damage", [b"quick,1,1,", b"quick,1,1,10,4,float32,False,0.1\n", b"\xff\xfe\n", "text"])
def test_a_damaged_last_line_is_measured_again(tmp_path, machine, worker, capsys, damage):
    path, partial = tmp_path / "x.csv", tmp_path / "x.csv.partial"
    sweep(points(2), path, machine, worker=worker, **QUICK)
    kept = path.read_bytes()
    if damage == "text":  # a row that is whole, but for a figure that is none
        cells = kept.splitlines()[-1].replace(b"quick,1,1,9,", b"quick,1,1,10,").split(b",")
        damage = b",".join([*cells[:7], b"fast", *cells[8:]]) + b"\n"
    partial.write_bytes(kept + damage)
    sweep(points(4), path, machine, worker=worker, **QUICK)
    assert "warning" in capsys.readouterr().err
    assert path.read_bytes().startswith(kept) and [int(row["seq_len"]) for row in read(path)] == [8, 9, 10, 11]


def test_rows_of_another_machine_are_not_gone_on_with(tmp_path, machine, worker, capsys):
    path = tmp_path / "x.csv"
    sweep(points(2), path, {**machine, "machine": "another"}, worker=worker, **QUICK)
    os.replace(path, tmp_path / "x.csv.partial")
    sweep(points(3), path, machine, worker=worker, **QUICK)
    assert "another machine" in capsys.readouterr().err
    assert [row["machine"] for row in read(path)] == [machine["machine"]] * 3


def test_a_full_disk_stops_with_one_line_and_leaves_the_csv(tmp_path, machine, worker, monkeypatch):
    path, real, calls = tmp_path / "x.csv", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    path.write_text("finished\n")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AttnError, match="No space left on device") as error:
        sweep(points(3), path, machine, worker=worker, **QUICK)
    assert "\n" not in str(error.value) and path.read_text() == "finished\n"
    sweep(points(3), path, machine, worker=worker, **QUICK)
    assert [int(row["seq_len"]) for row in read(path)] == [8, 9, 10]


def test_an_unwritable_folder_stops_with_one_line(tmp_path, machine, worker):
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnError, match="cannot write"):
        sweep(points(1), tmp_path / "file" / "x.csv", machine, worker=worker, **QUICK)


def test_two_sweeps_never_write_one_file(tmp_path, machine, worker):
    import fcntl

    with open(tmp_path / "x.csv.partial", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(AttnError, match="another run"):
            sweep(points(1), tmp_path / "x.csv", machine, worker=worker, **QUICK)


def test_a_worker_that_died_is_asked_once_more(tmp_path, worker):
    assert worker.call_again(faults.die_once, tmp_path / "died") == "alive"
    with pytest.raises(WorkerDied, match="a bug"):
        worker.call_again(faults.fail, 0, 0, 0)


@pytest.mark.gpu
def test_what_forks_from_a_process_that_imported_the_package_can_use_the_gpu():
    with Worker(forkserver()) as worker:
        assert worker.call(torch.cuda.mem_get_info, "cuda")[0] > 0


def test_a_worker_passes_errors_on():
    with Worker() as worker:
        with pytest.raises(WorkerDied, match="ValueError: a bug"):
            worker.call(faults.fail, 0, 0, 0)
        assert worker.call(max, 1, 2) == 2
