"""The least time a variant can take: its operations, from the ledger, at the rates the device has shown.

The roofline model (Williams, Waterman, Patterson 2009), with a third ceiling for what an operation costs before it
does anything. How far above it a measurement lies is the finding. There is a floor for each clock: the device's, of
operations that have all been launched, and the user's, who waits for the host to launch them as well."""

from collections.abc import Mapping
from typing import Any

from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import Variant
from attnlib.memory.ledger import ledger


def rate_at(rates: Mapping, nbytes: int) -> float:
    """The most that can be hoped for at `nbytes`, in GB/s, from one of the `{bytes: rate}` tables of machine.ceilings.

    The best rate of the sizes seen from the next one below `nbytes` up: what runs in a cache may run at that one's."""
    by_size = {int(size): rate for size, rate in rates.items()}
    below = max((size for size in by_size if size <= nbytes), default=0)
    return max(rate for size, rate in by_size.items() if size >= below)


def operations(variant: Variant, shape: Shape, machine: Machine) -> list[dict[str, Any]]:
    """The ledger of `variant`, what moves bytes or computes, with the time each operation needs at least, in ms.

    bandwidth_ms: its bytes at the copy rate of tensors of its size; compute_ms:
    its matrix product at the GEMM rate; latency_ms: what a tiny operation takes, on a CPU its launch; execution_ms: the
    largest of the three, which `regime` names: "bandwidth", "compute", or "latency", on a CPU "launch"."""
    ceilings, tiny, found = machine.ceilings, "launch" if machine.is_cpu else "latency", []
    # an older machine.json of a GPU does not tell it, and nothing is no more than it was
    latency = (ceilings["launch_us"] if machine.is_cpu else ceilings.get("graph_us", 0.0)) / 1e3
    for row in ledger(variant, shape, machine):
        if row["phase"] in PHASES and (row["traffic_bytes"] or row["flops"]):
            moved = row["traffic_bytes"] / rate_at(ceilings["copy_gb_s"], row["largest_bytes"]) / 1e6
            computed = row["flops"] / ceilings["gemm_tflop_s"][shape.dtype] / 1e9
            least = {"bandwidth": moved, "compute": computed, tiny: latency}
            regime = max(least, key=least.get)
            row |= {"bandwidth_ms": moved, "compute_ms": computed, "latency_ms": latency}
            found.append(row | {"execution_ms": least[regime], "regime": regime})
    return found


def floor(variant: Variant, shape: Shape, machine: Machine) -> dict[str, Any]:
    """For forward and backward: `<phase>_floor_ms` and `<phase>_regime` on the device's clock, `<phase>_user_floor_ms`
    on the user's.

    On the device's, operations run one after the other: the sum of what each takes at least, and the regime of most of
    that sum. On the user's, they run while the next ones are being launched: the whole takes at least as long, and at
    least as long as all launches. On a CPU the two are one."""
    ops, found = operations(variant, shape, machine), dict[str, Any]()
    for phase in PHASES:
        mine = [op for op in ops if op["phase"] == phase]
        shares = {op["regime"]: 0.0 for op in mine}
        for op in mine:
            shares[op["regime"]] += op["execution_ms"]
        total, regime = sum(shares.values()), max(shares, key=shares.get)
        launches = 0.0 if machine.is_cpu else len(mine) * machine.ceilings["launch_us"] / 1e3
        found |= {f"{phase}_floor_ms": total, f"{phase}_regime": regime}
        found |= {f"{phase}_user_floor_ms": max(total, launches)}
    return found
