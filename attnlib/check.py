"""The three accounts of memory held against each other: law, ledger, and, on a GPU, the allocator."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import torch

from attnlib import VARIANTS
from attnlib import device as dev
from attnlib.core import ACCOUNTS, DTYPES, AttnError, Shape
from attnlib.measure import POINT
from attnlib.memory import ledger, observe, reached
from attnlib.sweep import Worker

BLOCK = 512  # the CUDA caching allocator hands out multiples of this many bytes
SOURCES = ("law", "ledger", "requested")


def draw(seed: int, count: int) -> list[Shape]:
    """`count` random sizes (B and H 1 to 9, N 1 to 3000, D 1 to 256), each in every dtype, causal or not.

    Raises AttnError if `count` is not positive.
    """
    if count < 1:
        raise AttnError(f"count must be a positive integer, not {count}")
    pick = random.Random(seed).randint
    sizes = [(pick(1, 9), pick(1, 9), pick(1, 3000), pick(1, 256)) for _ in range(count)]
    return [Shape(*size, dtype, causal) for size in sizes for dtype in DTYPES for causal in (False, True)]


def seen_by_the_allocator(name: str, shape: Shape, device: str) -> dict[str, int]:
    """`<account>_requested_bytes` and `<account>_allocated_bytes` of a real run; nothing where it has no room."""
    variant = VARIANTS[name]
    need = shape.input_bytes + max(variant.law.bytes(account, shape, device) for account in ACCOUNTS)
    torch.cuda.empty_cache()
    if need > dev.memory_free(device):
        return {}
    for size in (Shape(1, 1, 16, shape.head_dim, shape.dtype, shape.causal), shape):  # the first makes the workspaces
        seen = observe(variant, *size.inputs(device), causal=shape.causal, backward=True)
    requested = (seen.current["forward"], seen.peak["forward"], seen.peak["backward"])
    allocated = (seen.current_blocks["forward"], seen.peak_blocks["forward"], seen.peak_blocks["backward"])
    found = {}
    for account, wanted, given in zip(ACCOUNTS, requested, allocated, strict=True):
        found |= {f"{account}_requested_bytes": wanted, f"{account}_allocated_bytes": given}
    return found


def compare(name: str, shape: Shape, device: str) -> dict:
    """One row: the shape's columns and, for each of ACCOUNTS, `<account>_<source>_bytes` for each of SOURCES.

    For a GPU also `rounding`, by how much blocks of BLOCK bytes exceed the tensors that the ledger has alive then.
    Where a ledger cannot run the variant, the law stands alone.
    """
    variant = VARIANTS[name]
    row = {"variant": name, **shape.columns()}
    row |= {f"{account}_law_bytes": variant.law.bytes(account, shape, device) for account in ACCOUNTS}
    for account, moment in reached(ledger(variant, shape, device)).items() if variant.ledgered else ():
        row[f"{account}_ledger_bytes"] = moment["alive_bytes"]
        if device != "cpu":
            row[f"{account}_rounding_bytes"] = sum(-nbytes % BLOCK for nbytes in moment["alive"].values())
    return row


def compare_all(name: str, shape: Shape, device: str) -> dict:
    """`compare`, and on a GPU the allocator's account beside it."""
    row = compare(name, shape, device)
    return row if device == "cpu" else row | seen_by_the_allocator(name, shape, device)


def check(shapes: list[Shape], device: str = "cpu") -> Iterator[dict]:
    """The rows of `compare` for every variant that has a law, at every shape that it takes, in order.

    A GPU's run in a worker, the CPU's on all cores.
    """
    names = [name for name, variant in VARIANTS.items() if variant.law]
    cases = [(name, s, device) for s in shapes for name in names if not VARIANTS[name].needs(s, torch.device(device))]
    if device == "cpu":
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver")) as pool:
            yield from pool.map(compare_all, *zip(*cases, strict=True), chunksize=24)
    else:
        with Worker() as worker:
            yield from (worker.call(compare_all, *case) for case in cases)


WRAPPED = (
    16  # bytes that the CPU's allocator may count beyond the law: scale factors wrapped into tensors of one element
)


def tally(rows: pd.DataFrame, device: str) -> dict[str, tuple[int, int]]:
    """`{account: (measured, equal)}` over the rows of a sweep: on how many of them law = ledger = allocator."""
    found = {account: (0, 0) for account in ACCOUNTS}
    for row in rows.to_dict("records"):
        booked = compare(row["variant"], Shape(*(row[size] for size in POINT[1:])), device)
        for account, (measured, equal) in found.items():
            law, ledger, seen = (
                booked[f"{account}_law_bytes"],
                booked[f"{account}_ledger_bytes"],
                row[f"{account}_bytes"],
            )
            if not pd.isna(seen):
                same = law == ledger and 0 <= seen - law <= (WRAPPED if device == "cpu" else 0)
                found[account] = (measured + 1, equal + same)
    return found


def mismatches(row: dict) -> list[str]:
    """A text for each account of a row on which the sources differ, with the terms of the law."""
    shape = Shape(*(row[size] for size in POINT[1:]))
    device = "cuda" if {"saved_rounding_bytes", "saved_requested_bytes"} & set(row) else "cpu"
    found = []
    for account in ACCOUNTS:
        seen = {source: row[key] for source in SOURCES if (key := f"{account}_{source}_bytes") in row}
        if len(set(seen.values())) > 1:
            operation, terms = VARIANTS[row["variant"]].law.at(account, shape, device)
            figures = ", ".join(f"{source} {nbytes}" for source, nbytes in seen.items())
            found.append(f"{row['variant']} {shape}: {account}: {figures}; law at {operation}: {terms}")
    return found


def report(seed: int, count: int, device: str) -> int:
    """Check `count` random sizes, print each mismatch; 0 if there is none, else 1. Raises AttnError as `draw` does."""
    rows, wrong, unseen = 0, 0, 0
    for row in check(draw(seed, count), device):
        found = mismatches(row)
        rows, wrong, unseen = rows + 1, wrong + bool(found), unseen + ("saved_requested_bytes" not in row)
        print(*found, sep="\n", end="\n" if found else "")
    sources = "law = ledger" if device == "cpu" else "law = ledger = allocator"
    lacking = f" ({unseen} had no room on the device: law and ledger alone)" if device != "cpu" and unseen else ""
    print(f"{sources} for {rows - wrong} of {rows} configurations, to the byte{lacking}")
    return int(wrong > 0)
