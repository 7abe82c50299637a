"""From data to a report: measure or load the rows, put claims to the test, keep the figures."""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from attnlib.core import Machine, Shape, UserError
from attnlib.laws import Variant
from attnlib.timing.machine import ceilings, describe, resolve
from attnlib.timing.room import memory_free
from attnlib.timing.sweep import Job, collect, point_jobs
from attnlib.timing.worker import Worker
from report import stored
from report.skipping import NotMeasured, Skipping
from report.stored import write
from report.tables import table

CLAIMS = "ATTNLIB_CLAIMS"  # the variable that names the file to which a notebook's claims go, for the build to check


@dataclass(frozen=True)
class Profile:
    """How much is measured."""

    budget_s: float  # of timing per point
    patience_s: float  # up to which all 100 passes of a point of the first chapter's sweep may take
    ceiling_s: float  # of timing for each of the device's ceilings
    timeout_s: float  # after which a point is given up
    suffix: str  # of the folder


PROFILES = {"full": Profile(0.7, 10.0, 0.3, 300.0, ""), "quick": Profile(0.1, 0.0, 0.05, 60.0, "-quick")}


def profile(name: str) -> Profile:
    """The profile called `name`. Raises UserError, with the names there are, if there is none."""
    if name not in PROFILES:
        raise UserError(f"profile must be one of {', '.join(PROFILES)}, not {name!r}")
    return PROFILES[name]


def say(text: str):
    """Show a sentence with computed numbers in it as Markdown."""
    display(Markdown(text))


class Run:
    """One notebook on one device: where its rows come from, and where its figures go.

    `device` is "auto", "cpu", "cuda" or "cuda:1", measured now; with `replay` it is a folder of data/ and nothing is
    measured. `machine` is what it was measured on: in a replay nothing asks the computer at hand. anew: measure its
    ceilings again, else only if it has none. Raises UserError for an unknown device or profile, or for no data."""

    def __init__(self, notebook, device="auto", profile_name="full", replay=False, *, anew=False):
        self.notebook, self.replay, self.profile, self.claims = notebook, replay, profile(profile_name), []
        self.skipping = Skipping(lambda text: self._keep({"kind": "error", "claim": text}))
        self.skipping.install()
        self.lanes = 1 if replay else min(12, os.cpu_count() or 1)  # processes at a time, where nothing is timed
        if replay:
            self.folder, self.machine = device, stored.machine_of(device, notebook[:2])
            self.device = self.machine.kind
            return
        self.device, self.worker = resolve(device), Worker()
        machine = self.worker.call(describe, self.device)
        self.folder = machine.slug + self.profile.suffix
        known = {} if anew else self._facts().get(machine.machine, {}).get("ceilings", {})
        if "graph_us" not in known:  # there are none, or of an older make
            known = self.worker.call(ceilings, self.device, self.profile.ceiling_s)
        self.machine = replace(machine, ceilings=known)

    def path(self, name: str) -> Path:
        """The file of this notebook's rows called `name`: data/<device>/<notebook number>_<name>.csv."""
        return stored.ROOT / "data" / self.folder / f"{self.notebook[:2]}_{name}.csv"

    def sweep(
        self, name: str, points: Sequence[tuple[Variant, Shape]], budget_s: float | None = None, patience_s: float = 0.0
    ) -> pd.DataFrame:
        """The rows of `(variant, shape)` points, measured now, or loaded if this is a replay: then those there are.
        budget_s: seconds of timing for a point, at most the profile's own in the quick one; patience_s: up to which it
        gets all its passes nevertheless, see timing.measure. Raises NotMeasured in a replay without such rows."""
        if not self.replay:
            seconds = budget_s or self.profile.budget_s
            seconds = min(seconds, self.profile.budget_s) if self.profile.suffix else seconds
            jobs = point_jobs(points, self.device, seconds, patience_s)
            self._collect(name, jobs, worker=self.worker, timeout_s=self.profile.timeout_s)
        self._must_have(name)
        return stored.load(self.folder, self.path(name).stem, {variant.name for variant, _ in points})

    def collect(self, name: str, jobs: Sequence[Job], numbers: Iterable[str], lanes: int = 1) -> pd.DataFrame:
        """The rows of any other jobs, as `sweep`. numbers: the columns that must be there and be numbers; lanes: how
        many jobs may run side by side, as far as the device's memory has room for what they claim. Raises UserError if
        rows cannot be written or are damaged, NotMeasured if no job gave one, or as `sweep`."""
        if not self.replay:
            apart = lanes > 1 or any(job.process is not None or job.here for job in jobs)
            room_bytes = self.worker.call(memory_free, self.device) if lanes > 1 else 0
            if lanes > 1:
                self.worker.stop()  # it gives the device back, so that all of it can be had
            self._collect(name, jobs, worker=None if apart else self.worker, lanes=lanes, room_bytes=room_bytes)
            if not self.path(name).exists():
                raise NotMeasured(f"Nothing could be measured here for *{name}* of chapter {int(self.notebook[:2])}.")
        self._must_have(name)
        return stored.rows_of(self.path(name), numbers)

    def measured(self, name: str, variants: Mapping[str, Variant]) -> dict[str, Variant]:
        """Of `variants` those to be measured, in a replay those that the rows called `name` have, if there are any."""
        rows = self.replay and self.path(name).exists()
        there = stored.rows_of(self.path(name))["variant"].unique() if rows else variants
        return {name: variants[name] for name in variants if name in there}

    def has(self, name: str) -> bool:
        """Whether there are rows of that name to be had: measured now, or once."""
        return not self.replay or self.path(name).exists()

    def of_chapter(self, notebook: str, name: str, numbers: Iterable[str] = ()) -> pd.DataFrame:
        """The rows of a sweep that another chapter measured on this machine, or, with `numbers`, of other jobs, see
        `collect`. Raises NotMeasured, which says by what command, where there are none."""
        path = self.path(name).with_name(f"{notebook}_{name}.csv")
        if not path.exists():
            text = f"Chapter {int(notebook)} was not measured on this device yet"
            raise NotMeasured(f"{text} (*{name}*): `make report ONLY={notebook}`.")
        return stored.rows_of(path, numbers) if numbers else stored.load(self.folder, path.stem)

    def machine_behind(self, name: str) -> Machine:
        """What the rows of that name were measured on, which may be another host's device than other rows here."""
        return stored.machine_of(self.folder, self.path(name).stem)

    def full_only(self, what: str):
        """Raise NotMeasured in the quick profile, which leaves `what` to the full one."""
        if self.profile.suffix:
            raise NotMeasured(f"{what}: left to the full profile.")

    def gpu_only(self, what: str):
        """Raise NotMeasured on a CPU: `what` cannot be had there."""
        if self.machine.is_cpu:
            raise NotMeasured(f"{what} needs a GPU: not measured on this device.")

    def agreement(self, name: str) -> pd.DataFrame | None:
        """The pairs of 0.1 ms and more that tests/agreement.py left for this very machine, or None."""
        path = stored.ROOT / "data" / self.folder / f"{name}_agreement.csv"
        pairs = pd.read_csv(path) if path.exists() else pd.DataFrame({"machine": []})
        pairs = pairs[pairs["machine"] == self.machine.machine]
        return pairs[pairs["reference_ms"] >= 0.1] if len(pairs) else None

    def figure(self, name: str, figure):
        """Save a matplotlib figure as build/<device>/figures/<notebook number>_<name>.svg and return it to be shown."""
        path = stored.ROOT / "build" / self.folder / "figures" / f"{self.notebook[:2]}_{name}.svg"
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        write(path, text.getvalue())
        plt.close(figure)  # or the notebook shows it a second time
        return figure

    def law(self, text: str, expected, measured, holds: bool | None = None):
        """What must hold on any machine: `expected == measured`, unless `holds` says otherwise. A broken one stands in
        red at its place and on the first page, and the build's exit status is 1; of those that hold `laws` tells."""
        holds = bool(expected == measured if holds is None else holds)
        if not holds:
            figures = [f"`` {figure} ``" for figure in (expected, measured)]  # as they are, whatever they contain
            say(f"::: broken\n**Broken law.** `` {text} ``: expected {figures[0]}, measured {figures[1]}.\n:::")
        self._note("law", text, expected, measured, holds)

    def laws(self):
        """Say how many laws were put to the test so far and how many hold; a table of them, with figures."""
        tested = [one for one in self.claims if one["kind"] == "law"]
        broken = sum(not law["holds"] for law in tested)
        outcome = f"**{broken} of them {'is' if broken == 1 else 'are'} broken.**" if broken else "All of them hold."
        say(f"Laws that this chapter puts to the test: {len(tested)}. {outcome}")
        frame = pd.DataFrame(tested, columns=["claim", "expected", "measured", "holds"])
        return table(frame.assign(holds=frame["holds"].map({True: "holds", False: "broken"})))

    def observe(self, text: str, measured: float, *, least=-math.inf, most=math.inf, form: str = ".2f") -> bool:
        """What this machine showed beside `least` and `most`: whether it holds here. It costs nobody the report."""
        ends = {"at least": least, "at most": most}
        limits = " and ".join(f"{word} {limit:{form}}" for word, limit in ends.items() if math.isfinite(limit))
        holds = self._note("observation", text, limits, f"{measured:{form}}", bool(least <= measured <= most))
        outcome = "Holds" if holds else "Does not hold"
        say(f"*Observed:* {text}: {measured:{form}} (threshold: {limits}). **{outcome} here.**")
        return holds

    def _note(self, kind: str, text: str, expected, measured, holds: bool) -> bool:
        """Keep a law or an observation for the build."""
        figures = {"expected": str(expected), "measured": str(measured)}
        self.claims.append({"kind": kind, "claim": text, **figures, "holds": holds})
        self._keep(self.claims[-1])
        return holds

    def _keep(self, record: dict) -> bool:
        """Write a record for the build, where there is one; whether there is."""
        if path := os.environ.get(CLAIMS):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return bool(path)

    def _must_have(self, name: str):
        """Raise NotMeasured where a replay has no rows of that name."""
        if not self.has(name):
            raise NotMeasured(f"Not measured on this device yet: *{name}* of chapter {int(self.notebook[:2])}.")

    def _facts(self) -> dict[str, dict]:
        """What the folder's machine.json says, if it is there."""
        folder = stored.ROOT / "data" / self.folder
        return stored.machines(folder) if (folder / "machine.json").exists() else {}

    def _collect(self, name: str, jobs: Sequence[Job], **how):
        """Measure into this notebook's file, which is not there if no job gave a row."""
        path = self.path(name)
        self._introduce()
        count = collect(jobs, path, self.machine, **how)
        if not count:
            path.unlink()
        self._introduce(path.stem, {"dates": self.machine.date, "rows": count} if count else ())

    def _introduce(self, stem: str = "", notes: Mapping | tuple = ()):
        """Describe this machine in machine.json, beside those whose rows are there, with new `notes` on `stem`."""
        folder, me, known = stored.ROOT / "data" / self.folder, self.machine.machine, self._facts()
        texts = [path.read_text("utf-8") for path in folder.glob("*.csv")]
        kept = {one: facts for one, facts in known.items() if one != me and any(one in text for text in texts)}
        gpus = ("multiprocessors", "compute_capability") if self.machine.is_cpu else ()  # of which a CPU has none
        mine = {what: x for what, x in asdict(self.machine).items() if x and what not in gpus}
        for what in ("dates", "rows"):
            before = known.get(me, {}).get(what, {})
            mine[what] = {of: x for of, x in before.items() if of != stem}
            mine[what] |= {stem: notes[what]} if what in notes else {}
        write(folder / "machine.json", json.dumps({**kept, me: mine}, indent=1) + "\n")
