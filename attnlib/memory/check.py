"""The accounts of memory held against each other: law, ledger, and what the allocator saw."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from operator import itemgetter

import torch

from attnlib.core import DTYPES, Device, Machine, Shape, UserError
from attnlib.laws import ACCOUNTS, Variant, law_of
from attnlib.memory.allocator import observe
from attnlib.memory.ledger import ledger, reached
from attnlib.rows import POINT, is_missing, shape_of

ALLOCATION_UNIT = 512  # the CUDA caching allocator hands out multiples of this many bytes
SEEN = tuple(f"{account}_{kind}_bytes" for account in ACCOUNTS for kind in ("requested", "allocated"))


def wrapped_scalars(machine: Device) -> int:
    """Bytes that the CPU's allocator may count beyond a law in float32: a number becomes a float64 tensor of 8 bytes,
    which the graph may keep, and is copied in another tensor's dtype, at most 8 bytes. On a GPU none. (In the half-size
    types kernels on the CPU take buffers of their own, of which no law is known.)"""
    return 16 if Machine.of(machine).is_cpu else 0


def draw(seed: int, count: int) -> list[Shape]:
    """`count` random sizes (B and H 1 to 9, N 1 to 3000, D 1 to 256), each in every dtype, causal or not. Raises
    UserError if `count` is not positive, or beyond reason."""
    if not 1 <= count <= 100_000:  # which take days
        raise UserError(f"count must be an integer from 1 to 100000, not {count}")
    pick = random.Random(seed).randint
    sizes = [(pick(1, 9), pick(1, 9), pick(1, 3000), pick(1, 256)) for _ in range(count)]
    return [Shape(*size, dtype, causal) for size in sizes for dtype in DTYPES for causal in (False, True)]


def cases(shapes: Iterable[Shape], machine: Device, variants: Mapping[str, Variant]) -> list[tuple[Variant, Shape]]:
    """Every variant that a law and a ledger account for, at every shape: where it does not take one, with head_dim
    rounded up to a multiple of 8, and where it does not take that either, not at all."""
    machine, found = Machine.of(machine), []
    for shape, variant in product(shapes, [variant for variant in variants.values() if variant.ledgered]):
        wider = replace(shape, head_dim=-(-shape.head_dim // 8) * 8)
        taken = [size for size in (shape, wider) if not variant.needs(size, machine)]
        found += [(variant, size) for size in taken[:1] if law_of(variant, size, machine)]
    return found


def observed(variant: Variant, shape: Shape, device: str | torch.device) -> dict:
    """The point's columns and SEEN, what the device's allocator saw in a real run; None where it had no room, and for
    blocks, `<account>_allocated_bytes`, of which only CUDA's allocator knows."""
    row = {"variant": variant.name, **shape.columns(), **dict.fromkeys(SEEN)}
    try:
        for size in (replace(shape, batch=1, seq_len=16), shape):  # the first makes the workspaces
            seen = observe(variant, *variant.inputs(size, device), causal=shape.causal, backward=True)
    except torch.OutOfMemoryError:
        return row
    finally:
        torch.cuda.empty_cache()
    row |= {f"{account}_requested_bytes": nbytes for account, nbytes in seen.requested.items()}
    return row | {f"{account}_allocated_bytes": nbytes for account, nbytes in seen.allocated.items()}


def compare(variant: Variant, shape: Shape, machine: Device = "cpu") -> dict:
    """The point's columns and `<account>_law_bytes`, `<account>_ledger_bytes` for each of ACCOUNTS, and
    `<account>_rounding_bytes`, by how much blocks of ALLOCATION_UNIT bytes exceed what the ledger has alive then. Where
    a ledger cannot run the variant, the law stands alone; without a law that holds there, the ledger does."""
    machine, law = Machine.of(machine), law_of(variant, shape, machine)
    row = {"variant": variant.name, **shape.columns()}
    if law:
        row |= {f"{account}_law_bytes": law.bytes(account, shape, machine) for account in ACCOUNTS}
    for account, moment in reached(ledger(variant, shape, machine)).items() if variant.ledgered else ():
        row[f"{account}_ledger_bytes"] = moment["alive_bytes"]
        row[f"{account}_rounding_bytes"] = sum(-nbytes % ALLOCATION_UNIT for nbytes in moment["alive"].values())
    return row


def with_observed(booked: Iterable[dict], seen: Iterable[Mapping]) -> list[dict]:
    """The rows of `compare`, each with the SEEN of the row of `observed` for the same point, if there is one."""
    point = itemgetter(*POINT)
    found = {point(row): {column: row[column] for column in SEEN} for row in seen}
    return [row | found.get(point(row), {}) for row in booked]


def sources_of(row: Mapping, account: str, machine: Device) -> tuple[dict[str, int], bool]:
    """What a row has of an account, `{source: bytes}`, and whether it agrees to the byte, but for `wrapped_scalars`."""
    found = {source: row.get(f"{account}_{source}_bytes") for source in ("law", "ledger", "requested")}
    figures = {source: int(nbytes) for source, nbytes in found.items() if not is_missing(nbytes)}
    booked = {nbytes for source, nbytes in figures.items() if source != "requested"}
    most = max(booked, default=figures.get("requested", 0))  # of a block nothing is booked
    return figures, len(booked) < 2 and 0 <= figures.get("requested", most) - most <= wrapped_scalars(machine)


def mismatches(rows: Iterable[Mapping], variants: Mapping[str, Variant], machine: Device) -> list[str]:
    """A text for each row of `with_observed` and account on which the sources differ, with the terms of the law. What
    is missing in a row is no mismatch: no ledger can run the variant, or the allocator had no room."""
    found = []
    for row, account in product(rows, ACCOUNTS):
        figures, equal = sources_of(row, account, machine)
        if not equal:
            shape, text = shape_of(row), ", ".join(f"{source} {nbytes}" for source, nbytes in figures.items())
            law = law_of(variants[row["variant"]], shape, machine)
            operation, terms = law.at(account, shape, machine) if law else ("none", {})
            found.append(f"{row['variant']} {shape}: {account}: {text}; law at {operation}: {terms}")
    return found
