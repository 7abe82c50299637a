"""The three accounts of memory held against each other: law, ledger, and, on a GPU, the allocator."""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import torch

from attnlib import VARIANTS
from attnlib import device as dev
from attnlib.core import ACCOUNTS, DTYPES, AttnError, Shape
from attnlib.measure import POINT
from attnlib.memory import ledger, observe, reached
from attnlib.sweep import Worker, forkserver, leave_with_parent

MOST = 100_000  # random sizes in one check: days of work
ABREAST = 4  # workers that observe at once
BLOCK = 512  # the CUDA caching allocator hands out multiples of this many bytes
SOURCES = ("law", "ledger", "requested")
SEEN = [f"{account}_{kind}_bytes" for account in ACCOUNTS for kind in ("requested", "allocated")]

# bytes that the CPU's allocator may count beyond the law, in float32, for scale factors wrapped into tensors
WRAPPED = 16


def draw(seed: int, count: int) -> list[Shape]:
    """`count` random sizes (B and H 1 to 9, N 1 to 3000, D 1 to 256), each in every dtype, causal or not.

    Raises AttnError if `count` is not positive, or beyond reason.
    """
    if not 1 <= count <= MOST:
        raise AttnError(f"count must be an integer from 1 to {MOST}, not {count}")
    pick = random.Random(seed).randint
    sizes = [(pick(1, 9), pick(1, 9), pick(1, 3000), pick(1, 256)) for _ in range(count)]
    return [Shape(*size, dtype, causal) for size in sizes for dtype in DTYPES for causal in (False, True)]


def cases(shapes: list[Shape], device: str, names=VARIANTS) -> list[tuple[str, Shape, str]]:
    """`(variant, shape, device)` for every variant of `names` that a law and a ledger account for, at every shape.

    Where it does not take a shape, head_dim is rounded up to a multiple of 8; if it does not take that, it is left out.
    """
    found = []
    for shape in shapes:
        wider = replace(shape, head_dim=-(-shape.head_dim // 8) * 8)
        for name in (name for name in names if VARIANTS[name].law and VARIANTS[name].ledgered):
            taken = [size for size in (shape, wider) if not VARIANTS[name].needs(size, device)]
            found += [(name, size, device) for size in taken[:1]]
    return found


def needed(name: str, shape: Shape, device: str) -> int:
    """The bytes of the inputs and of the most that is held beside them, by the law."""
    return shape.input_bytes + max(VARIANTS[name].law.bytes(account, shape, device) for account in ACCOUNTS)


def observed(name: str, shape: Shape, device: str) -> dict:
    """The shape's columns and SEEN, what the allocator saw in a real run on a GPU; None where it has no room."""
    variant, row = VARIANTS[name], {"variant": name, **shape.columns()} | dict.fromkeys(SEEN)
    torch.cuda.empty_cache()
    if needed(name, shape, device) > dev.memory_free(device):
        return row
    for size in (Shape(1, 1, 16, shape.head_dim, shape.dtype, shape.causal), shape):  # the first makes the workspaces
        seen = observe(variant, *size.inputs(device), causal=shape.causal, backward=True)
    figures = zip(
        ACCOUNTS,
        (seen.current["forward"], seen.peak["forward"], seen.peak["backward"]),
        (seen.current_blocks["forward"], seen.peak_blocks["forward"], seen.peak_blocks["backward"]),
        strict=True,
    )
    for account, requested, allocated in figures:
        row |= {f"{account}_requested_bytes": requested, f"{account}_allocated_bytes": allocated}
    return row


def observe_all(todo: list[tuple[str, Shape, str]]) -> Iterator[dict]:
    """`observed` for each of `cases`, in any order: four workers share those of which eight have room, one has the
    rest."""

    def share(cases):
        with Worker() as worker:
            return [worker.call(observed, *case) for case in cases]

    with Worker() as worker:
        free = worker.call(dev.memory_free, todo[0][2])
    small = [case for case in todo if 8 * needed(*case) <= free]
    with ThreadPoolExecutor(ABREAST) as pool:
        for rows in pool.map(share, (small[at::ABREAST] for at in range(ABREAST))):
            yield from rows
    yield from share([case for case in todo if 8 * needed(*case) > free])


def compare(name: str, shape: Shape, device: str) -> dict:
    """The shape's columns and `<account>_law_bytes`, `<account>_ledger_bytes` for each of ACCOUNTS.

    Also `<account>_rounding_bytes`, by how much blocks of BLOCK bytes exceed what the ledger has alive then.
    Where a ledger cannot run the variant, the law stands alone.
    """
    variant = VARIANTS[name]
    row = {"variant": name, **shape.columns()}
    row |= {f"{account}_law_bytes": variant.law.bytes(account, shape, device) for account in ACCOUNTS}
    for account, moment in reached(ledger(variant, shape, device)).items() if variant.ledgered else ():
        row[f"{account}_ledger_bytes"] = moment["alive_bytes"]
        row[f"{account}_rounding_bytes"] = sum(-nbytes % BLOCK for nbytes in moment["alive"].values())
    return row


def check(todo: list[tuple[str, Shape, str]], seen: pd.DataFrame | None = None) -> pd.DataFrame:
    """`compare` for each of `cases`, on all cores, beside what the allocator saw, the rows of `observed`.

    Raises AttnError if one of the cases is not among the rows of `seen`.
    """
    with ProcessPoolExecutor(os.cpu_count(), forkserver(), initializer=leave_with_parent) as pool:
        rows = pd.DataFrame(pool.map(compare, *zip(*todo, strict=True), chunksize=24))
    if seen is None:
        return rows
    both = rows.merge(seen[[*POINT, *SEEN]], how="left", on=POINT, indicator=True)
    if lacking := int((both["_merge"] == "left_only").sum()):
        raise AttnError(f"{lacking} of {len(rows)} configurations were not measured")
    return both.drop(columns="_merge")


def tally(rows: pd.DataFrame, device: str) -> dict[str, tuple[int, int]]:
    """`{account: (measured, equal)}` over the rows of a sweep: on how many of them law = ledger = allocator."""
    found = {account: (0, 0) for account in ACCOUNTS}
    for row in rows.to_dict("records"):
        booked = compare(row["variant"], Shape(*(row[size] for size in POINT[1:])), device)
        for account, (measured, equal) in found.items():
            law, seen = booked[f"{account}_law_bytes"], row[f"{account}_bytes"]
            if not pd.isna(seen):
                equal_books = law == booked.get(f"{account}_ledger_bytes", law)
                same = equal_books and 0 <= seen - law <= WRAPPED * (device == "cpu")
                found[account] = (measured + 1, equal + same)
    return found


def mismatches(rows: pd.DataFrame, device: str) -> list[str]:
    """A text for each row and account on which the sources differ, with the terms of the law.

    What is missing in a row is no mismatch: no ledger can run the variant, or the allocator had no room.
    """
    found = []
    for account in ACCOUNTS:
        columns = [f"{account}_{source}_bytes" for source in SOURCES if f"{account}_{source}_bytes" in rows]
        for row in rows[rows[columns].nunique(axis=1) > 1].to_dict("records"):
            shape = Shape(*(row[size] for size in POINT[1:]))
            operation, terms = VARIANTS[row["variant"]].law.at(account, shape, device)
            figures = ", ".join(f"{c.split('_')[-2]} {row[c]:.0f}" for c in columns if not pd.isna(row[c]))
            found.append(f"{row['variant']} {shape}: {account}: {figures}; law at {operation}: {terms}")
    return found


def report(seed: int, count: int, device: str) -> int:
    """Check `count` random sizes, print each mismatch; 0 if there is none, else 1. Raises AttnError as `draw` does."""
    todo = cases(draw(seed, count), device)
    seen = None if device == "cpu" else pd.DataFrame(observe_all(todo))
    rows = check(todo, seen)
    found = mismatches(rows, device)
    print(*found, sep="\n", end="\n" if found else "")
    wrong = len({text.split(": ")[0] for text in found})
    unseen = 0 if seen is None else int(seen[SEEN[0]].isna().sum())
    sources = "law = ledger" if device == "cpu" else "law = ledger = allocator"
    lacking = f" ({unseen} had no room on the device: law and ledger alone)" if unseen else ""
    print(f"{sources} for {len(rows) - wrong} of {len(rows)} configurations, to the byte{lacking}")
    return int(wrong > 0)
