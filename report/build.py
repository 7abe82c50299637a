"""Runs the notebooks on a device and turns them into build/<device>/report.html and report.pdf.

`python -m report.build measure` runs everything on this machine, `replay --device nvidia-h200` rebuilds the report from
committed data, `publish` does the same and keeps claims, figures and report. The Makefile's targets call it. The report
is always built: what is broken, stopped or not there stands on its first page, and decides the exit status."""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import torch

from attnlib.core import Machine, UserError
from attnlib.timing.machine import describe, resolve
from attnlib.timing.worker import Worker, WorkerDied
from report import stored
from report.calculator import laws_in_javascript
from report.chapters import Once, execute, own_kernel
from report.export import cell_of, export, heading, labels
from report.run import CLAIMS, PROFILES, profile
from report.skipping import plain
from report.stored import write

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
EXPECTED_MINUTES = {("cuda", "full"): 23, ("cuda", "quick"): 6, ("cpu", "full"): 20, ("cpu", "quick"): 5}
TIMED_ON = {"cuda": "an H200", "cpu": "two CPU cores"}  # what these minutes are of
REPLAYED_AT_ONCE = 2  # chapters of a replay: nothing is timed in it, and two kernels have room everywhere
GENERATED = {".partial", ".draft", ".pyc", ".ipynb_checkpoints"}  # files and folders that git ignores


def claims_of(out: Path) -> tuple[list[dict], list[str]]:
    """The claims that the notebooks made, in their order, which are written to claims.csv as well; and a sentence for
    each cell that failed."""
    found = []
    for path in sorted((out / "notebooks").glob("*.claims")):
        for line in path.read_text("utf-8").splitlines():
            try:
                found.append({"notebook": path.stem, **json.loads(line)})
            except ValueError:  # the last line of a kernel that was killed while it wrote
                continue
    columns = ["notebook", "kind", "claim", "expected", "measured", "holds"]
    claims, errors = ([one for one in found if (one["kind"] == "error") == wrong] for wrong in (False, True))
    write(out / "claims.csv", pd.DataFrame(claims, columns=columns).to_csv(index=False))
    return claims, [f"chapter {int(one['notebook'][:2])}: {one['claim']}" for one in errors]


def expectation(machine: Machine, parameters: dict, only: str) -> str:
    """How long it will take, in a line."""
    if parameters.get("replay"):
        return f"replaying what was measured on {machine.name}: a few minutes"
    minutes, where = EXPECTED_MINUTES[machine.kind, parameters["profile"]], TIMED_ON[machine.kind]
    part = f"chapter {int(only)} of a report that takes" if only else f"profile {parameters['profile']},"
    return f"measuring {machine.name}: {part} about {minutes} minutes on {where}"


def chapter(
    notebook: Path, out: Path, machine: Machine, parameters: dict, only: str, environment: dict, errors=None
) -> tuple[str, str]:
    """Execute a notebook into build/<device>/, or put a title and a notice in its place: why it stopped, and why it is
    not there, or "". environment: the variables of the process that builds, which this one may not have."""
    number, target, folder = notebook.name[:2], out / "notebooks" / notebook.name, out.name
    chosen = parameters | ({"device": folder, "replay": True} if only and only != number else {})
    rows, given = [*(out.parents[1] / "data" / folder).glob(f"{number}_*.csv")], nbformat.read(notebook, 4)
    if chosen.get("replay") and not rows and not given.metadata.get("attnlib", {}).get("stands_alone"):
        how = f"make report{' PROFILE=quick' * (parameters['profile'] == 'quick')} ONLY={number}"
        notice = f"Not measured on this device yet: `{how}`"
        nbformat.write(nbformat.v4.new_notebook(cells=[cell_of(heading(given), notice)]), target)
        missing = f"chapter {int(number)} is not there: not measured on this device yet"
        print(f"{notebook.name}: {missing}", flush=True)
        return "", missing
    print(f"{notebook.name} on {machine.name} ...", flush=True)
    begun, errors = time.monotonic(), errors or Once(sys.stderr)
    os.environ |= environment | {CLAIMS: str(target.with_suffix(".claims"))}
    reason = execute(notebook, target, chosen, machine.kind, errors)
    errors.write("\n" * bool(errors.rest))
    print(f"{notebook.name} {'stopped' if reason else 'done'} in {time.monotonic() - begun:.0f} s", flush=True)
    return f"chapter {int(number)} stopped before its end: {reason}" if reason else "", ""


def every_chapter(lanes: int, **how) -> tuple[list[str], list[str]]:
    """`chapter` of each notebook, the overview last as it is of all others' rows, `lanes` of them at a time: why some
    stopped, and why some are not there."""
    notebooks, context = sorted(NOTEBOOKS, key=lambda one: one.name.startswith("00")), get_context("forkserver")
    if lanes == 1:
        outcomes = [*map(partial(chapter, **how, errors=Once(sys.stderr)), notebooks)]
    else:
        context.set_forkserver_preload(["report.chapters"])
        how["environment"] = {"OMP_NUM_THREADS": "1"} | how["environment"]  # or each wants all cores
        # an interrupt ends a chapter at once, and none is begun after it
        with ProcessPoolExecutor(lanes, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
            outcomes = [*pool.map(partial(chapter, **how), notebooks)]
    stopped, missing = ([*filter(None, one)] for one in zip(*outcomes, strict=True))
    return stopped, missing


def build(folder: str, machine: Machine, parameters: dict, only: str = "") -> tuple[list[str], list[str]]:
    """Execute every notebook and export the report to build/<folder>/, whatever becomes of them: what is wrong with it,
    and which chapters are not in it. A report of an earlier run is removed first.

    only: the number of the one notebook that measures ("02"). It and a replay rebuild the others from their data, and
    put a title and a notice in place of those that have none, unless their metadata say that they stand alone. Raises
    UserError for a number that no notebook has or a parameter that a notebook does not declare, before anything is
    touched; later if files cannot be written."""
    if only and not any(notebook.name.startswith(f"{only}_") for notebook in NOTEBOOKS):
        raise UserError(f"no notebook has the number {only!r}")
    for notebook in NOTEBOOKS:
        if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(notebook))):
            raise UserError(f"{notebook.name} has no parameter {', '.join(unknown)}")
    print(expectation(machine, parameters, only), flush=True)
    out = ROOT / "build" / folder
    for name in ("report.html", "report.pdf", "claims.csv"):
        (out / name).unlink(missing_ok=True)
    for name in ("notebooks", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "notebooks").mkdir(parents=True)
    own_kernel(ROOT / "build" / "jupyter")
    how = {"out": out, "machine": machine, "parameters": parameters, "only": only, "environment": {**os.environ}}
    stopped, missing = every_chapter(REPLAYED_AT_ONCE if parameters.get("replay") else 1, **how)
    claims, failed = claims_of(out)
    told = "chapter {}: {claim} (expected {expected}, measured {measured})"
    fallen = (law for law in claims if law["kind"] == "law" and not law["holds"])
    broken = [told.format(int(law["notebook"][:2]), **law) for law in fallen]
    notices = [("broken", f"**Broken law**, {plain(text)}") for text in broken]
    notices += [("notice", plain(text[0].upper() + text[1:])) for text in (*stopped, *failed, *missing, *machine.notes)]
    wrong = [f"broken law, {text}" for text in broken] + stopped + failed
    if lacking := [name for name in ("pypandoc", "typst") if not importlib.util.find_spec(name)]:
        print(f"measured, not exported: this Python lacks {', '.join(lacking)}; elsewhere: make replay DEVICE={folder}")
        return wrong, missing
    try:
        export(out, machine, notices, labels(NOTEBOOKS), laws_in_javascript(machine))
        for name in ("report.html", "report.pdf"):
            print((out / name).relative_to(ROOT))
    except UserError as error:
        wrong.append(str(error))
    return wrong, missing


def fingerprint(folder: str) -> str:
    """The SHA-256 of all that a replayed report is made of: rows, notebooks, attnlib and report/."""
    found = [*(ROOT / "data").glob("*.csv")]
    for place in (f"data/{folder}", "data/published", "notebooks", "attnlib", "report"):
        found += [path for path in (ROOT / place).rglob("*.*") if path.is_file()]
    ours = [path for path in sorted(found) if not {path.suffix, path.parent.name} & GENERATED]
    return hashlib.sha256(b"".join(str(p.relative_to(ROOT)).encode() + p.read_bytes() for p in ours)).hexdigest()


def publish(folder: str):
    """Keep what a replay made: claims.csv in data/<folder>/; in figures/<folder>/ the SVGs, in place of those that were
    there, the reports, and the digest of what they are made of. Each file is replaced by a whole one, or OSError."""
    made, kept = sorted((ROOT / "build" / folder / "figures").glob("*.svg")), ROOT / "figures" / folder
    for path in made:
        write(kept / path.name, path.read_text("utf-8"))
    for name in {path.name for path in kept.glob("*.svg")} - {path.name for path in made}:
        (kept / name).unlink()
    write(ROOT / "data" / folder / "claims.csv", (ROOT / "build" / folder / "claims.csv").read_text("utf-8"))
    for name in ("report.html", "report.pdf"):
        os.replace(shutil.copyfile(ROOT / "build" / folder / name, kept / f"{name}.partial"), kept / name)
    write(kept / "digest.txt", f"{fingerprint(folder)}\n")
    print(f"published: data/{folder}/claims.csv; in figures/{folder}/ {len(made)} figures, report.html and report.pdf")


def each_gpu() -> list[str]:
    """The first GPU of each model in this machine. Raises UserError if there is none."""
    models = {}
    with Worker() as worker:
        for index in range(torch.cuda.device_count()):
            models.setdefault(worker.call(describe, f"cuda:{index}").name, f"cuda:{index}")
    if not models:
        raise UserError("DEVICE=all measures every GPU model, and torch sees no GPU")
    return list(models.values())


def main() -> int:
    """The command line; 0 if the report is there, no law is broken and no chapter stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("measure", "replay", "publish"))
    parser.add_argument("--device", default="auto", help="auto, all, cpu, cuda, cuda:1; else a folder of data/")
    parser.add_argument("--profile", default="full", help=" or ".join(PROFILES))
    parser.add_argument("--only", default="", metavar="NN", help="measure this notebook, rebuild the others from data")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for kernels
    os.environ.setdefault("ATTNLIB_PROGRESS", "bar" if sys.stderr.isatty() else "lines")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or a kernel warns of frozen modules
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Attempting to run cuBLAS")  # as in attnlib.timing.worker
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets its number
        stream.reconfigure(errors="backslashreplace")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # whatever it logs as an error it raises as well
    try:
        asked = profile(options.profile)
        if options.command == "measure":
            wrong = []
            for device in each_gpu() if options.device == "all" else [resolve(options.device)]:
                with Worker() as worker:
                    machine = worker.call(describe, device)
                parameters = {"device": device, "profile": options.profile}
                os.environ["ATTNLIB_MEASURES"] = "1"  # for report.run in the kernels
                wrong += build(machine.slug + asked.suffix, machine, parameters, options.only)[0]
        else:
            if options.only:
                raise UserError(f"--only says what to measure, and {options.command} measures nothing")
            folder, machine = options.device, stored.machine_of(options.device)
            measured = next(name for name, p in reversed(PROFILES.items()) if folder.endswith(p.suffix))
            wrong, missing = build(folder, machine, {"device": folder, "profile": measured, "replay": True})
            if options.command == "publish" and (wrong or missing):
                wrong = ["not published", *wrong, *missing]
            elif options.command == "publish":
                publish(folder)
        if wrong:
            raise UserError("; ".join(wrong))
    except (UserError, WorkerDied, BrokenProcessPool, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the next `make report` goes on with the sweep that it was in", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after an interrupt, Jupyter's unfinished tasks would have their say at a normal exit
