"""The rows of data/: read, and refused in one line where they cannot be what was written."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from attnlib import variant
from attnlib.core import AttnError, Shape
from attnlib.measure import COLUMNS, POINT, STATUSES
from attnlib.published import read
from attnlib.sweep import is_sound

ROOT = Path(__file__).parent.parent


def devices() -> list[str]:
    """The names of the folders of data/ that a report can be made from."""
    return sorted(path.parent.name for path in (ROOT / "data").glob("*/machine.json"))


def machines(folder: Path) -> dict[str, dict]:
    """The machines that the CSVs of a folder were measured on: `{machine: description}`, from machine.json.

    Raises AttnError if the folder is none of `devices()`, or the file is damaged.
    """
    if folder.name not in devices() or folder.parent != ROOT / "data":
        raise AttnError(f"no data for device {folder.name!r} (there is: {', '.join(devices())})")
    try:
        known = json.loads((folder / "machine.json").read_text())
        if all(
            facts["machine"] == machine and facts["kind"] and "ceilings" in facts for machine, facts in known.items()
        ):
            return known
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    raise AttnError(f"data/{folder.name}/machine.json is damaged: delete it and measure again")


def unsound(rows: pd.DataFrame, numbers: list[str]) -> Iterator[tuple[int, str]]:
    """Lines of a CSV that cannot be what was written, and why: there twice, no shape or status, ok without figures."""
    for at in rows.index[rows.duplicated()]:
        yield at + 2, "the row is there twice"
    if {*POINT[1:]} <= {*rows}:
        for at, *sizes in rows[POINT[1:]].astype(object).drop_duplicates().itertuples():
            try:
                Shape(*sizes)
            except AttnError as error:
                yield at + 2, str(error)
    if "status" in rows:
        for at in rows.index[~rows["status"].isin(STATUSES)]:
            yield at + 2, f"status {rows['status'][at]!r} is none of {', '.join(STATUSES)}"
        for at in rows.index[(rows["status"] == "ok") & rows[numbers].isna().any(axis=1)]:
            yield at + 2, "it is ok and lacks figures"


def rows_of(path: Path, numbers: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of a CSV of data/<device>/, with the description of their machine in `.attrs["machine"]`.

    Raises AttnError if it cannot be read, is empty, has other rows than machine.json counts or some that are `unsound`,
    lacks one of the columns `numbers` or has there what is no number of at least 0 (nothing is allowed), or if it holds
    rows of more than one machine or torch version, or of a machine that machine.json does not describe.
    """
    known, where, numbers = machines(path.parent), path.relative_to(ROOT), list(numbers)
    try:
        header = pd.read_csv(path, nrows=0).columns
        blanks = {column: [""] for column in header if column not in ("phase", "reason", "kernel")}
        rows = pd.read_csv(path, keep_default_na=False, na_values=blanks)
    except (OSError, ValueError) as error:
        raise AttnError(f"cannot read {where}: {error}") from error
    if missing := [column for column in ("machine", "torch", *numbers) if column not in rows]:
        raise AttnError(f"{where} lacks the column(s) {', '.join(missing)}")
    for column in numbers:
        figures = pd.to_numeric(rows[column], errors="coerce")
        if (bad := (figures.isna() & rows[column].notna()) | (figures < 0) | (figures == math.inf)).any():
            line = int(bad.argmax()) + 2
            raise AttnError(
                f"{where}, line {line}, column {column}: {rows[column][line - 2]!r} is not a number from 0 up"
            )
    written = known.get(str(rows["machine"].iloc[0]) if len(rows) else "", {}).get("rows", {}).get(path.stem)
    if written is not None and written != len(rows):
        raise AttnError(f"{where} has {len(rows)} row(s) where {written} were written: measure again")
    if len(rows.drop_duplicates(["machine", "torch"])) != 1:
        raise AttnError(f"{where} is empty, or holds rows of more than one machine or torch")
    for line, text in unsound(rows, numbers):
        raise AttnError(f"{where}, line {line}: {text}")
    if (machine := rows["machine"].iloc[0]) not in known:
        raise AttnError(f"{where} was measured on {machine}, which machine.json does not describe")
    rows.attrs["machine"] = known[machine]
    return rows


def machine_of(folder: str, prefix: str = "") -> dict:
    """The machine that the first CSV of data/<folder>/ whose name starts with `prefix` was measured on.

    Its `date` names the day of each of these CSVs. Raises AttnError if there is no such data.
    """
    machines(ROOT / "data" / folder)
    paths = sorted((ROOT / "data" / folder).glob(f"{prefix or '[0-9]'}*.csv"))
    if not paths:
        raise AttnError(f"data/{folder} has no CSV {prefix}*.csv")
    machine = rows_of(paths[0]).attrs["machine"]
    days = {machine.get("dates", {}).get(path.stem, machine["date"]) for path in paths}
    return machine | {"date": " and ".join(sorted(days))}


def load(device: str, name: str) -> pd.DataFrame:
    """The rows of a sweep, data/<device>/<name>.csv.

    Raises AttnError as `rows_of` does, and if columns are missing, or a row is damaged or there twice.
    """
    path = ROOT / "data" / device / f"{name}.csv"
    rows, where = rows_of(path), path.relative_to(ROOT)
    if "kernel" not in rows:  # rows measured before kernels were named
        rows["kernel"] = ""
    if missing := [column for column in COLUMNS if column not in rows]:
        raise AttnError(f"{where} lacks the column(s) {', '.join(missing)}")
    for number, row in enumerate(rows.astype(object).where(rows.notna(), "").to_dict("records"), 2):
        try:
            variant(row["variant"])
            if not is_sound({column: str(cell) for column, cell in row.items()}):
                raise AttnError("figures or status damaged")
        except AttnError as error:
            raise AttnError(f"{where}, line {number}: {error}") from error
    if rows.duplicated(POINT).any():
        raise AttnError(f"{where} names a point twice")
    return rows


def published(name: str) -> pd.DataFrame:
    """Another report's table, data/published/<name>.csv: times in ms, memory in MiB, or MB where the column says so.

    Raises AttnError, as published.read does, for a damaged table.
    """
    path = ROOT / "data" / "published" / f"{name}.csv"
    read(path)
    return pd.read_csv(path)
