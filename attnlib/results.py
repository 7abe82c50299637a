"""From data to a report: measure or load the rows, check the claims, keep the figures."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display

from attnlib import device as dev
from attnlib import stored
from attnlib.core import AttnError, Shape, Variant
from attnlib.sweep import Worker, sweep


@dataclass(frozen=True)
class Profile:
    """How much is measured: seconds of timing per point, seconds after which a point is given up, folder suffix."""

    budget_s: float
    timeout_s: float
    suffix: str


PROFILES = {"full": Profile(2.0, 300.0, ""), "quick": Profile(1.0, 60.0, "-quick")}


def profile(name: str) -> Profile:
    """The profile called `name`. Raises AttnError, with the names there are, if there is none."""
    if name not in PROFILES:
        raise AttnError(f"profile must be one of {', '.join(PROFILES)}, not {name!r}")
    return PROFILES[name]


def write(path: Path, text: str):
    """Write a file so that a reader sees the old text or the new one, never half. Raises AttnError if it can't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.partial")
        draft.write_text(text)
        os.replace(draft, path)
    except OSError as error:
        raise AttnError(f"cannot write {path}: {error.strerror}") from error


def say(text: str):
    """Show a sentence with computed numbers in it as Markdown."""
    display(Markdown(text))


class Run:
    """One notebook on one device: where its rows come from, and where its figures and claims go.

    `device` is "auto", "cpu", "cuda" or "cuda:1", measured now; with `replay` it is a folder of data/ and nothing is
    measured. ceilings: measure the device's ceilings anew, else only if this machine had none before. Raises
    AttnError for an unknown device or profile, or a folder without data.
    """

    def __init__(self, notebook, device="auto", profile_name="full", replay=False, *, ceilings=False):
        self.notebook, self.replay, self.profile, self.claims = notebook, replay, profile(profile_name), []
        if replay:
            self.folder, self.machine = device, stored.machine_of(device, notebook[:2])
            self.device = self.machine["kind"]
            if self.device == "cpu" and "threads" in self.machine:  # the CPU's kernels take memory for each thread
                torch.set_num_threads(self.machine["threads"])
        else:
            self.device, self.worker = dev.resolve(device), Worker()
            self.machine = self.worker.call(dev.describe, self.device)
            self.folder = self.machine["slug"] + self.profile.suffix
            known = self._known().get(self.machine["machine"], {}).get("ceilings")
            anew = ceilings or not known
            self.machine["ceilings"] = self.worker.call(dev.ceilings, self.device) if anew else known
        self.on_cpu = self.machine["kind"] == "cpu"

    def sweep(self, name: str, points: list[tuple[Variant, Shape]], budget_s: float | None = None) -> pd.DataFrame:
        """The rows of data/<device>/<notebook number>_<name>.csv: measured now, or loaded if this is a replay.

        budget_s: seconds of timing for each point, where it is not the profile's.
        """
        name = f"{self.notebook[:2]}_{name}"
        if not self.replay:
            self._introduce()
            path = stored.ROOT / "data" / self.folder / f"{name}.csv"
            limits = {"budget_s": budget_s or self.profile.budget_s, "timeout_s": self.profile.timeout_s}
            sweep(points, path, self.machine, device=self.device, worker=self.worker, **limits)
            self._introduce(name, len({(variant.name, shape) for variant, shape in points}))
        return stored.load(self.folder, name)

    def has(self, name: str) -> bool:
        """Whether there are rows of that name to be had: measured now, or once, which a replay must then find."""
        name = f"{self.notebook[:2]}_{name}"
        written = name in self.machine.get("rows", {})
        return not self.replay or written or (stored.ROOT / "data" / self.folder / f"{name}.csv").exists()

    def record(self, name: str, rows: Iterable[dict], numbers: Iterable[str]) -> pd.DataFrame:
        """Any other rows, as they are produced now, or from data/<device>/<notebook number>_<name>.csv in a replay.

        numbers: the columns that must be there and be numbers.

        The worker gives the device back first, so that all of it can be had. The file is written when all rows are
        there. Raises AttnError if it cannot be written, or in a replay if it is not there (see `has`), damaged, or was
        not measured on a machine that machine.json describes.
        """
        folder = stored.ROOT / "data" / self.folder
        path = folder / f"{self.notebook[:2]}_{name}.csv"
        if not self.replay:
            self.worker.stop()
            frame = pd.DataFrame(rows).assign(machine=self.machine["machine"], torch=self.machine["torch"])
            self._introduce()
            write(path, frame.to_csv(index=False))
            self._introduce(path.stem, len(frame))
        return stored.rows_of(path, numbers)

    def _known(self) -> dict[str, dict]:
        """The machines that the folder's machine.json describes, if it is there."""
        folder = stored.ROOT / "data" / self.folder
        return stored.machines(folder) if (folder / "machine.json").exists() else {}

    def _introduce(self, name: str = "", count: int = 0):
        """Describe this machine in the folder's machine.json, beside those whose rows are still there; with a name, say
        there that <name>.csv was measured today (`dates`) and how many rows it has (`rows`)."""
        folder, me = stored.ROOT / "data" / self.folder, self.machine["machine"]
        texts = [path.read_text() for path in folder.glob("*.csv")]
        kept = {one: facts for one, facts in self._known().items() if one != me and any(one in text for text in texts)}
        before, now = self._known().get(me, {}), {"dates": self.machine["date"], "rows": count}
        notes = {what: before.get(what, {}) | ({name: value} if name else {}) for what, value in now.items()}
        write(folder / "machine.json", json.dumps({**kept, me: self.machine | notes}, indent=1) + "\n")

    def agreement(self, name: str) -> pd.DataFrame | None:
        """The pairs of 0.1 ms and more that tests/agreement.py left for this very machine, or None."""
        path = stored.ROOT / "data" / self.folder / f"{name}_agreement.csv"
        pairs = pd.read_csv(path) if path.exists() else pd.DataFrame({"machine": []})
        pairs = pairs[pairs["machine"] == self.machine["machine"]]
        return pairs[pairs["reference_ms"] >= 0.1] if len(pairs) else None

    def figure(self, name: str, figure):
        """Save a matplotlib figure as figures/<device>/<notebook number>_<name>.svg and return it to be shown."""
        path = stored.ROOT / "figures" / self.folder / f"{self.notebook[:2]}_{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)  # or the notebook shows it a second time
        return figure

    def claim(self, text: str, predicted, measured, holds: bool | None = None):
        """Put a sentence to the test: print it with its two figures, and remember whether it holds.

        It holds if `predicted == measured`, unless `holds` says otherwise.
        """
        holds = bool(predicted == measured if holds is None else holds)
        print(f"{'holds' if holds else 'FAILS'}: {text} (predicted {predicted}, measured {measured})")
        self.claims.append({"claim": text, "predicted": predicted, "measured": measured, "holds": holds})

    def bound(self, text: str, measured: float, *, least: float = -math.inf, most: float = math.inf, form: str = ".2f"):
        """The claim that a figure lies between `least` and `most`."""
        limits = [
            f"{word} {limit:{form}}"
            for word, limit in (("at least", least), ("at most", most))
            if abs(limit) < math.inf
        ]
        self.claim(text, " and ".join(limits), f"{measured:{form}}", bool(least <= measured <= most))

    def close(self):
        """Write this notebook's claims to data/<device>/claims.csv. Raises AttnError if one does not hold."""
        if not self.replay:
            self.worker.stop()
        path = stored.ROOT / "data" / self.folder / "claims.csv"
        mine = pd.DataFrame(self.claims).assign(notebook=self.notebook)
        others = pd.read_csv(path, dtype=str).query("notebook != @self.notebook") if path.exists() else None
        table = pd.concat([others, mine])[["notebook", "claim", "predicted", "measured", "holds"]]
        write(path, table.sort_values("notebook", kind="stable").to_csv(index=False))
        if failed := [claim["claim"] for claim in self.claims if not claim["holds"]]:
            raise AttnError(f"{len(failed)} claim(s) of {self.notebook} do not hold: {'; '.join(failed)}")
