"""Read an implementation off a published memory table: the sums of tensors that print every one of its figures.

A closed form is a whole number of each of TERMS. Which print the table is found; which tensors they were, inferred."""

import csv
import re
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, lcm
from pathlib import Path

import numpy as np
import pandas as pd
import sympy

from attnlib.core import Machine, Shape, UserError
from attnlib.laws import LINEAR, SCORES, B, D, H, N, Terms, e, evaluate
from attnlib.rows import SIZES

TERMS: Terms = {"L": LINEAR, "S": SCORES, "M": N**2, "R": e * B * H * N, "P": e * D**2, "W": sympy.Integer(8_519_680)}
# of a fixed size and small, so that only a table whose digits resolve 512 bytes can tell how many there were
FIXED: Terms = {"A": sympy.Integer(512), "X": sympy.Integer(2**25)}
EVERY = TERMS | FIXED
MEANING = {
    "L": "a tensor like Q",
    "S": "an N×N matrix for each head",
    "M": "a boolean N×N mask for all heads",
    "R": "a number for each query, such as its maximum",
    "P": "a D×D projection",
    "W": "a cuBLAS workspace, before Hopper",
    "A": "a block of the CUDA allocator, of the smallest size",
    "X": "a cuBLAS workspace, on Hopper",
}

SHAPE = SIZES[:-1]  # no published table has a mask
ENDINGS = ("ok", "oom")
NOWHERE = Machine("cpu")  # the terms ask no machine
UNIT_BYTES = {"mib": 2**20, "mb": 10**6}  # by the end of a column's name


def read(path: Path, *figures: str) -> pd.DataFrame:
    """A published table with its cells as text, so that the printed precision is known, and the Shapes as `shape`.
    Raises UserError, with file, line and column, if it cannot be read, lacks `status`, one of `figures` or a shape's
    columns, has a damaged shape, or text in a column of times or memory, or nothing though status is ok."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if missing := [column for column in (*SHAPE, "status", *figures) if column not in columns]:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path} names a column twice")
    numeric = [column for column in columns if re.fullmatch(r".*_(ms|ms_std|mib|mb)", column)]
    for number, row in lines:
        if None in row:  # csv's key for what has no column: a comma inside a number
            raise UserError(f"{path}, line {number}: more cells than columns")
        if row["status"] not in ENDINGS:
            raise UserError(f"{path}, line {number}: status {row['status']!r} is none of {', '.join(ENDINGS)}")
        for column in numeric:
            if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", row[column]) and (row[column] or row["status"] == "ok"):
                raise UserError(f"{path}, line {number}, column {column}: {row[column]!r} is not a number")
        try:
            sizes = [int(row[size]) if re.fullmatch(r"[0-9]{1,15}", row[size]) else row[size] for size in SHAPE]
            row["shape"] = Shape(*sizes)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return pd.DataFrame([row for _, row in lines], columns=[*columns, "shape"])


def _decimals(figure: str) -> int:
    """The digits after the point of a printed number."""
    return len(figure.partition(".")[2])


def _sizes(rows: pd.DataFrame, column: str, terms: Terms) -> tuple[pd.DataFrame, int, dict[str, np.ndarray]]:
    """The rows with a figure in `column`, its unit in bytes, each term's bytes. Raises UserError if there are none."""
    unit = UNIT_BYTES.get(column.rpartition("_")[2])
    if column not in rows or unit is None or (rows := rows[rows[column] != ""]).empty:
        raise UserError(f"nothing to fit: no figures in a memory column {column!r}, in MiB (_mib) or MB (_mb)")
    evaluated = {name: [evaluate(term, shape, NOWHERE) for shape in rows["shape"]] for name, term in terms.items()}
    return rows, unit, {name: np.array(nbytes, dtype=object) for name, nbytes in evaluated.items()}


def terms_for(rows: pd.DataFrame, column: str) -> Terms:
    """TERMS, and FIXED where half a last digit of `column` is less than those. Raises UserError without figures."""
    rows, unit, _ = _sizes(rows, column, {})
    return EVERY if max(unit / 10 ** _decimals(figure) for figure in rows[column]) < 512 else TERMS


def closed_forms(rows: pd.DataFrame, column: str, limit: int = 16, terms: Terms | None = None) -> list[dict[str, int]]:
    """Every choice of 0 to `limit` of each term that prints all figures of `column`, the fewest tensors first. rows:
    from `read`; terms: `{name: bytes}`, positive formulas in laws' symbols, else `terms_for` the column; of FIXED a
    form names those it has. Exact: 22.3 MiB are 22.25 to 22.35, both included. Raises UserError without figures."""
    terms, own = terms or terms_for(rows, column), terms is not None
    rows, unit, sizes = _sizes(rows, column, terms)
    ends = [[(Fraction(x) + way * Fraction(1, 2 * 10 ** _decimals(x))) * unit for x in rows[column]] for way in (-1, 1)]
    order = sorted(terms, key=lambda name: -max(sizes[name]))  # the largest first: it leaves the least to try
    found = []

    def choose(chosen: dict, least: np.ndarray, most: np.ndarray):
        """Add to `found` every completion of `chosen` by `least` to `most` bytes in each row."""
        if len(chosen) == len(order):
            found.append({name: chosen[name] for name in terms if own or chosen[name] or name not in FIXED})
            return
        name, *others = order[len(chosen) :]
        rest = limit * sum(sizes[other] for other in others)
        first, last = max((least - rest) / sizes[name]), min(most / sizes[name])
        for count in range(max(ceil(first), 0), min(floor(last), limit) + 1):
            used = count * sizes[name]
            choose(chosen | {name: count}, least - used, most - used)

    choose({}, *map(np.array, ends))
    return sorted(found, key=lambda form: sum(form.values()))


def dependencies(rows: pd.DataFrame, column: str, terms: Terms = TERMS) -> list[dict[str, int]]:
    """What `column` cannot tell apart: sums of terms that are 0 in every row, `{"S": 1, "M": -32}` for S = 32 M. All
    such sums are combinations of these. Raises UserError if there are no figures."""
    _, _, sizes = _sizes(rows, column, terms)
    found = []
    for vector in sympy.Matrix([list(column) for column in sizes.values()]).T.nullspace():
        scale = lcm(*(int(entry.q) for entry in vector)) * sympy.sign(next(filter(None, vector)))
        found.append({name: int(entry * scale) for name, entry in zip(terms, vector, strict=True) if entry})
    return found


def reproduce(rows: pd.DataFrame, column: str, form: dict[str, int], terms: Terms = EVERY) -> pd.DataFrame:
    """Each figure of `column` beside what `form`, from `closed_forms`, prints at its precision, ties to even as Python.
    Columns: the shape's, `published` and `derived`, both text, and `equal`. Raises UserError if there are no figures,
    or for a form with a name that is none of `terms`."""
    rows, unit, sizes = _sizes(rows, column, known_in(terms, form))
    derived = []
    for figure, nbytes in zip(rows[column], sum(count * sizes[name] for name, count in form.items()), strict=True):
        digits = round(Fraction(nbytes, unit) * 10 ** _decimals(figure))
        derived.append(f"{Decimal(digits).scaleb(-_decimals(figure)):f}")
    table = rows[[*SHAPE, column]].rename(columns={column: "published"}).assign(derived=derived)
    return table.assign(equal=table["published"] == table["derived"])


def beyond(form: dict[str, int], listed: dict[str, int], shape: Shape, terms: Terms = EVERY) -> dict[str, int]:
    """What a closed form has that a report's own list has not: `{count × meaning: bytes}` at `shape`; a term without a
    MEANING goes by its name. Raises UserError for a form with a name that is none of `terms`."""
    more = {name: count - listed.get(name, 0) for name, count in form.items() if count > listed.get(name, 0)}
    sizes = {name: evaluate(term, shape, NOWHERE) for name, term in known_in(terms, more).items()}
    return {f"{count} × {MEANING.get(name, name)}": count * sizes[name] for name, count in more.items()}


def known_in(terms: Terms, form: dict[str, int]) -> Terms:
    """Those of `terms` that a form names. Raises UserError for any other name."""
    if unknown := [name for name in form if name not in terms]:
        raise UserError(f"no term is called {', '.join(unknown)}: hand over the terms that the form was found with")
    return {name: terms[name] for name in form}
