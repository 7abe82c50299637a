"""Will it fit? The largest sequence for a memory, from the laws, and what fills it."""

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeAlias

from attnlib.core import Device, Machine, Shape, UserError, dense_reach
from attnlib.laws import USES, Variant, bytes_needed, law_of, peaks_until

MULTIPLES = {"B": 1} | {f"{p}{i}B": b**n for i, b in (("", 1000), ("i", 1024)) for n, p in enumerate("KMGTP", 1)}
LONGEST = 10**12  # nobody's sequence; keeps the search finite


def nbytes(text: str) -> int:
    """The bytes that "24GiB" (2**30) or "80GB" (10**9) mean. Raises UserError for other text, 0, and beyond 1 PiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGTP]i?B|B)\s*", text)
    size = Fraction(match[1]) * MULTIPLES[match[2]] if match else 0
    if not 1 <= size <= MULTIPLES["PiB"]:
        raise UserError(f"memory must be a number with a unit, such as 24GiB or 80GB, up to 1PiB, not {text!r}")
    return int(size)


Sized: TypeAlias = Shape | Mapping[str, Any]  # a Shape, whatever its N, or all that it is made of but its N


def at_length(shape: Sized, seq_len: int) -> Shape:
    """The Shape of that sequence length. Raises UserError as Shape does."""
    return replace(shape, seq_len=seq_len) if isinstance(shape, Shape) else Shape(seq_len=seq_len, **shape)


def largest_seq_len(variant: Variant, shape: Sized, memory_bytes: int, phase: str, machine: Device) -> int:
    """The largest N at which `bytes_needed` is at most `memory_bytes`; 0 if not even 1 fits."""
    machine = Machine.of(machine)
    needed = lambda n: bytes_needed(variant, at_length(shape, n), machine, phase)  # noqa: E731
    return bisect_right(range(1, LONGEST), memory_bytes, key=needed)


def contents(variant: Variant, shape: Shape, phase: str, machine: Device) -> tuple[str, dict[str, int]]:
    """The operation at which most is needed, and what is alive then, `{term: bytes}`, the inputs first."""
    moments = [variant.law.at(peak, shape, machine) for peak in peaks_until(phase)]
    operation, terms = max(moments, key=lambda moment: sum(moment[1].values()))
    return operation, {"q, k, v": shape.input_bytes, **terms}


def options(shape: Sized, memory_bytes: int, machine: Device, variants: Mapping[str, Variant]) -> list[dict]:
    """`variant, inference, training`: the largest N of each dense variant that has a law and takes such shapes. (What
    is not dense looks at less in steps of N, so that it has no one largest N, and is no substitute for a dense one.)"""
    machine, two = Machine.of(machine), at_length(shape, 2)
    return [
        {"variant": v.name} | {use: largest_seq_len(v, shape, memory_bytes, use, machine) for use in USES}
        for v in variants.values()
        if v.reach is dense_reach and law_of(v, two, machine) and not v.needs(two, machine)
    ]


def explain(
    variant: Variant, shape: Sized, memory_bytes: int, use: str, machine: Device, variants: Mapping[str, Variant]
) -> str:
    """What fits, in words and a table: the largest N, what fills the memory there, and who of `variants` gets further.

    use: one of USES. Inference is a forward pass that still records a graph; under torch.no_grad a little more may fit.
    Raises UserError for another use, and for a variant without a law or one largest N, or that takes no such shapes."""
    if use not in USES:
        raise UserError(f"use must be {' or '.join(USES)}, not {use!r}")
    machine, two, name = Machine.of(machine), at_length(shape, 2), variant.name
    if variant.law and variant.reach is not dense_reach:
        raise UserError(f"{name} looks at less, in steps of N: a longer sequence can need less memory")
    bytes_needed(variant, two, machine)  # or it has no law, and says so
    if reason := variant.needs(two, machine) or variant.law.unknown(two, machine):
        what = "cannot run" if variant.needs(two, machine) else "has no law"
        raise UserError(f"{name} {what} there: {reason}")
    mask = ", causal" if two.causal else ""
    about = f"{name}, batch {two.batch}, heads {two.heads}, head_dim {two.head_dim}, {two.dtype}{mask}"
    about = f"{about}, {use} on {machine.kind}, {memory_bytes / 2**30:,.4g} GiB for tensors"
    if not (longest := largest_seq_len(variant, shape, memory_bytes, use, machine)):
        return f"{about}: not even N = 1 fits"
    operation, terms = contents(variant, at_length(shape, longest), use, machine)
    total = sum(terms.values())
    lines = [about, f"largest N: {longest:,}", f"what fills the memory there, at {operation}:"]
    lines += [f"  {size / 2**20:12,.2f} MiB {size / total:6.1%}  {term}" for term, size in terms.items()]
    lines += [f"  {total / 2**20:12,.2f} MiB         in all; N = {longest + 1:,} would need more than there is"]
    there = [{"variant": name, use: longest}, *options(shape, memory_bytes, machine, variants)]
    best: dict = max(there, key=lambda row: row[use])
    further = f"take instead: {best['variant']}, largest N {best[use]:,}"
    return "\n".join([*lines, further if best[use] > longest else "no other variant gets further"])
