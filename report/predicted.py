"""Rows beside what was predicted for them: laws, floors, ledgers."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from multiprocessing import get_context

import pandas as pd
import sympy

from attnlib import variant
from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import ACCOUNTS, B, D, H, N, Variant, c, e, g, h, law_of, peaks_until
from attnlib.memory import check
from attnlib.rows import POINT, is_missing, shape_of
from report.floor import floor

M, LENGTH = sympy.symbols("M N", positive=True)  # bytes of memory; N as a number to be solved for


def with_laws(rows: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Rows with the law, `<account>_law_bytes`, `input_bytes`, and `needed_bytes` in all; NaN without a law."""
    predicted = []
    for row in rows.to_dict("records"):
        one, shape = variant(row["variant"]), shape_of(row)
        law = law_of(one, shape, machine)
        laws = {f"{what}_law_bytes": law.bytes(what, shape, machine) if law else math.nan for what in ACCOUNTS}
        total = shape.input_bytes + max(laws.values())
        predicted.append(laws | {"input_bytes": shape.input_bytes, "needed_bytes": total})
    return rows.join(pd.DataFrame(predicted, index=rows.index))


def with_floors(rows: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Rows of a sweep with each point's floor and regime, of forward and backward."""
    found = [floor(variant(row["variant"]), shape_of(row), machine) for row in rows.to_dict("records")]
    columns = [f"{phase}_{whose}" for phase in PHASES for whose in ("floor_ms", "user_floor_ms", "regime")]
    return rows.join(pd.DataFrame(found, index=rows.index, columns=columns))


def booked(
    cases: Sequence[tuple[Variant, Shape]], machine: Machine, seen: pd.DataFrame | None = None, lanes: int = 1
) -> pd.DataFrame:
    """check.compare for each case, in so many processes; with `seen`, what the allocator saw, beside that, and for no
    other cases."""
    with ProcessPoolExecutor(lanes, get_context("forkserver")) as pool:
        each = map if lanes == 1 else partial(pool.map, chunksize=8)
        rows = pd.DataFrame(each(check.compare, *zip(*cases, strict=True), repeat(machine)))
    return rows if seen is None else rows.merge(seen[[*POINT, *check.SEEN]], on=[*POINT])


def agreement(rows: pd.DataFrame, variants: Mapping[str, Variant], machine: Machine) -> dict[str, tuple[int, int]]:
    """`{account: (measured, equal)}` of a sweep's rows that have a law and a figure: where law = ledger = allocator."""
    found = dict.fromkeys(ACCOUNTS, (0, 0))
    for row in rows.to_dict("records"):
        both = check.compare(variants[row["variant"]], shape_of(row), machine)
        for account, (measured, agreeing) in found.items() if "saved_law_bytes" in both else ():
            if not is_missing(seen := row[f"{account}_bytes"]):
                _, equal = check.sources_of({**both, f"{account}_requested_bytes": seen}, account, machine)
                found[account] = measured + 1, agreeing + equal
    return found


def solutions(variant: Variant, shape: Shape, phase: str, machine: Machine) -> dict[str, sympy.Expr]:
    """`{operation: N}` as a formula in M: the N at which the inputs and what is alive at that moment fill M bytes. The
    largest N that fits is the smallest, rounded down. Only for laws whose terms are polynomials in N."""
    values = {B: shape.batch, H: shape.heads, D: shape.head_dim, e: shape.element_size, N: LENGTH}
    values |= {c: int(shape.causal), g: int(not machine.is_cpu), h: int(shape.dtype != "float32")}
    found = {}
    for operation, terms in (moment for peak in peaks_until(phase) for moment in variant.law.moments(peak).items()):
        total = sympy.Add(3 * B * H * N * D * e, *terms.values()).subs(values)
        roots = sympy.solve(total - M, LENGTH, simplify=False)
        found[operation] = max(roots, key=lambda root: root.subs(M, 2**60)).simplify()
    return found
