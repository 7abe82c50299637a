"""The least time a variant can take: its operations, from the ledger, at the rates the device has shown.

The roofline model (Williams, Waterman, Patterson 2009), with a third ceiling for what an operation costs before it
does anything. How far above it a measurement lies is the finding. Only a cache can undercut it: an operation that finds
its operands there does not wait for memory."""

from collections.abc import Mapping
from typing import Any

from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import Variant
from attnlib.memory.ledger import ledger


def rate_at(rates: Mapping, nbytes: int) -> float:
    """The best rate seen at `nbytes` or more, in GB/s, from one of the `{bytes: rate}` tables of machine.ceilings."""
    by_size = {int(size): rate for size, rate in rates.items()}
    largest = max(by_size)
    return max(rate for size, rate in by_size.items() if size >= min(nbytes, largest))


def operations(variant: Variant, shape: Shape, machine: Machine, rates: str = "copy_gb_s") -> list[dict[str, Any]]:
    """The ledger of `variant` with the time each operation needs at least, in milliseconds.

    bandwidth_ms: its bytes at the copy rate of tensors of its size (or another of the ceilings' `rates`); compute_ms:
    its matrix product at the GEMM rate; execution_ms: the larger of the two."""
    found = []
    for row in ledger(variant, shape, machine):
        if row["phase"] in PHASES and row["op"] != "return":
            moved = row["traffic_bytes"] / rate_at(machine.ceilings[rates], row["largest_bytes"]) / 1e6
            computed = row["flops"] / machine.ceilings["gemm_tflop_s"][shape.dtype] / 1e9
            found.append(row | {"bandwidth_ms": moved, "compute_ms": computed, "execution_ms": max(moved, computed)})
    return found


def floor(variant: Variant, shape: Shape, machine: Machine, rates: str = "copy_gb_s") -> dict[str, Any]:
    """`<phase>_floor_ms` and `<phase>_regime` for forward and backward.

    The operations run one after the other while the next ones are being launched, so the whole takes at least the sum
    of their execution times and at least the sum of their launches. The regime is what the larger sum is made of."""
    ops = operations(variant, shape, machine, rates)
    found: dict[str, Any] = {}
    for phase in PHASES:
        mine = [op for op in ops if op["phase"] == phase]
        launch = len(mine) * machine.ceilings["launch_us"] / 1e3
        compute = sum(op["execution_ms"] for op in mine if op["compute_ms"] > op["bandwidth_ms"])
        bandwidth = sum(op["execution_ms"] for op in mine if op["compute_ms"] <= op["bandwidth_ms"])
        parts = {"launch": launch * (launch > bandwidth + compute), "bandwidth": bandwidth, "compute": compute}
        found |= {f"{phase}_floor_ms": max(launch, bandwidth + compute), f"{phase}_regime": max(parts, key=parts.get)}
    return found
