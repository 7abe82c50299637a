"""The rows of data/: read, and refused in one line where they cannot be right."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from attnlib.core import Machine, Shape, UserError
from attnlib.rows import COLUMNS, FIGURES, ORIGIN, POINT, SCHEMA, SIZES, STATUSES, lacking
from attnlib.timing.machine import at_power_limit
from report.published import read

ROOT = Path(__file__).parent.parent
WORDS = ("phase", "reason", "kernel")  # columns in which an empty cell is a text


def write(path: Path, text: str):
    """Write a file so that a reader sees the old text or the new one. Raises UserError if it can't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def devices() -> list[str]:
    """The names of the folders of data/ that a report can be made from."""
    return sorted(path.parent.name for path in (ROOT / "data").glob("*/machine.json"))


def machines(folder: Path) -> dict[str, dict]:
    """The machines that the CSVs of a folder were measured on: `{machine: facts}`, from machine.json. Beside a
    Machine's facts, `dates` and `rows` say for each CSV when it was measured and how many rows it got. Raises UserError
    if the folder is none of `devices()`, or the file is damaged."""
    if folder.name not in devices() or folder.parent != ROOT / "data":
        asked = folder.name if folder.parent == ROOT / "data" else ""
        raise UserError(f"no data for device {asked!r} (there is: {', '.join(devices())})")
    try:
        known = json.loads((folder / "machine.json").read_text("utf-8"))
        if all(one["machine"] == name and one["kind"] and "ceilings" in one for name, one in known.items()):
            return known
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"data/{folder.name}/machine.json is damaged: delete it and measure again")


def unsound(rows: pd.DataFrame, numbers: list[str], names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Rows that cannot be what was written, as line numbers, and why."""
    for at in rows.index[rows.duplicated([*POINT] if {*COLUMNS} <= {*rows} else None)]:
        yield at, "the row is there twice"
    for column in numbers:
        figures = pd.to_numeric(rows[column], errors="coerce")
        for at in rows.index[(figures.isna() & rows[column].notna()) | (figures < 0) | (figures == math.inf)]:
            yield at, f"column {column}: {rows[column][at]!r} is not a number from 0 up"
    if {*SIZES} <= {*rows}:
        for at, *sizes in rows[[*SIZES]].astype(object).drop_duplicates().itertuples():
            try:
                Shape(*sizes)
            except UserError as error:
                yield at, str(error)
    if "status" in rows:
        for at in rows.index[~rows["status"].isin(STATUSES)]:
            yield at, f"status {rows['status'][at]!r} is none of {', '.join(STATUSES)}"
        figures = FIGURES if {*FIGURES} <= {*numbers} else numbers
        for at, row in zip(rows.index, rows.to_dict("records"), strict=True):
            if missing := lacking(row, figures):
                yield at, f"it is ok and lacks figures: {', '.join(missing)}"
    if names and "variant" in rows:
        for at in rows.index[~rows["variant"].isin([*names])]:
            yield at, f"variant {rows['variant'][at]!r} is none that was asked for"


def rows_of(path: Path, numbers: Iterable[str] = (), names: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of a CSV of data/<device>/.

    Raises UserError if it cannot be read, is empty, has other rows than machine.json counts or some that are `unsound`,
    lacks one of the columns `numbers`, has a variant that is none of `names`, or if it holds rows of another schema, of
    more than one machine or torch version, or of a machine that machine.json does not describe."""
    known, where, numbers = machines(path.parent), path.relative_to(ROOT), list(numbers)
    try:
        header = pd.read_csv(path, nrows=0).columns
        blanks = {column: [""] for column in header if column not in WORDS}
        rows = pd.read_csv(path, keep_default_na=False, na_values=blanks)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {where}: {error}") from error
    if missing := [column for column in (*ORIGIN, *numbers) if column not in rows]:
        raise UserError(f"{where} lacks the column(s) {', '.join(missing)}")
    if len(rows.drop_duplicates(["machine", "torch"])) != 1:
        raise UserError(f"{where} is empty, or holds rows of more than one machine or torch")
    if (machine := rows["machine"].iloc[0]) not in known:
        raise UserError(f"{where} was measured on {machine}, which machine.json does not describe")
    written = known[machine].get("rows", {}).get(path.stem)
    if written is not None and written != len(rows):
        raise UserError(f"{where} has {len(rows)} row(s) where {written} were written: measure again")
    if {*rows["schema"]} != {SCHEMA}:
        raise UserError(f"{where} has rows of another schema than {SCHEMA}: written by another version of attnlib")
    rows.index = pd.RangeIndex(2, len(rows) + 2)  # the lines of the file
    for line, text in unsound(rows, numbers, names):
        raise UserError(f"{where}, line {line}: {text}")
    return rows.reset_index(drop=True)


def load(device: str, name: str, names: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of a sweep of points, data/<device>/<name>.csv, of variants among `names`; as `rows_of`."""
    return rows_of(ROOT / "data" / device / f"{name}.csv", FIGURES, names)


def machine_of(folder: str, prefix: str = "") -> Machine:
    """The machine that the first CSV of data/<folder>/ whose name starts with `prefix` was measured on, or, where there
    is none, the first CSV of all. Its `date` names the day of each of these. Raises UserError if there are no data."""
    known, paths = machines(ROOT / "data" / folder), sorted((ROOT / "data" / folder).glob("[0-9]*.csv"))
    paths = [path for path in paths if path.name.startswith(prefix)] or paths
    if not paths:
        raise UserError(f"data/{folder} has no CSV of rows")
    facts = known[rows_of(paths[0])["machine"].iloc[0]]
    dates = {stem: day for other in known.values() for stem, day in other.get("dates", {}).items()}  # of any host
    days = {dates.get(path.stem, facts["date"]) for path in paths}
    return replace(Machine.from_facts(facts), date=" and ".join(sorted(days)))


def notes_of(folder: str, machine: Machine) -> list[str]:
    """What a reader must know of the machine, in sentences: who else used it, and whether its power limit held it."""
    paths = sorted((ROOT / "data" / folder).glob("[0-9]*.csv"))
    powers = [w for path in paths for w in pd.read_csv(path, usecols=lambda name: name == "power_w").get("power_w", [])]
    return [*machine.notes, *filter(None, [at_power_limit(powers, machine), several_occasions(paths, machine)])]


def several_occasions(paths: list[Path], machine: Machine) -> str | None:
    """A sentence on which chapters' rows are of one occasion on one machine, and which of another; None if all are."""
    known, found = machines(paths[0].parent) if paths else {}, dict[str, set[str]]()
    for path in paths:
        one = pd.read_csv(path, usecols=["machine"], nrows=1)["machine"].iloc[0]
        if known[one]["torch"] == machine.torch:  # what another PyTorch left says so itself
            found.setdefault(one, set()).add({"07": "the first appendix"}.get(path.name[:2], path.name[1]))
    if len(found) < 2:
        return None
    told = " and ".join(f"those of chapters {', '.join(sorted(chapters))}" for chapters in found.values())
    return f"The rows were measured on {len(found)} occasions, {told}; hosts and clocks may differ between them."


def published_rows(name: str) -> pd.DataFrame:
    """Another report's table, data/published/<name>.csv: times in ms, memory in MiB, or MB where the column says so.
    Raises UserError, as published.read does, for a damaged table."""
    path = ROOT / "data" / "published" / f"{name}.csv"
    read(path)
    return pd.read_csv(path)
