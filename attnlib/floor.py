"""The least time a variant can take: its operations, from the ledger, at the rates the device has shown.

The roofline model (Williams, Waterman, Patterson 2009), with a third ceiling for what an operation costs before it
does anything. How far above it a measurement lies is the finding. Only a cache can undercut it: an operation that finds
its operands there does not wait for memory.
"""

import math

import pandas as pd

from attnlib import variant as named
from attnlib.core import ACCOUNTS, Shape, Variant
from attnlib.measure import POINT
from attnlib.memory import ledger

REGIMES = ("launch", "bandwidth", "compute")


def rate_at(rates: dict, nbytes: int) -> float:
    """The best rate seen at `nbytes` or more, in GB/s, from one of the `{bytes: rate}` tables of device.ceilings."""
    rates = {int(size): rate for size, rate in rates.items()}
    largest = max(rates)
    return max(rate for size, rate in rates.items() if size >= min(nbytes, largest))


def operations(variant: Variant, shape: Shape, machine: dict, rates: str = "copy_gb_s") -> pd.DataFrame:
    """The ledger of `variant` with the time each operation needs at least, in milliseconds.

    bandwidth_ms: its bytes at the copy rate of tensors of its size (or another of the ceilings' `rates`); compute_ms:
    its matrix product at the GEMM rate; execution_ms: the larger of the two.
    """
    rows = (
        pd.DataFrame(ledger(variant, shape, machine["kind"]))
        .query("phase != 'upstream' and op != 'return'")
        .reset_index(drop=True)
    )
    speeds = [rate_at(machine["ceilings"][rates], nbytes) for nbytes in rows["largest_bytes"]]
    rows["bandwidth_ms"] = rows["traffic_bytes"] / speeds / 1e6
    rows["compute_ms"] = rows["flops"] / machine["ceilings"]["gemm_tflop_s"][shape.dtype] / 1e9
    rows["execution_ms"] = rows[["bandwidth_ms", "compute_ms"]].max(axis=1)
    return rows


def floor(variant: Variant, shape: Shape, machine: dict, rates: str = "copy_gb_s") -> dict:
    """`<phase>_floor_ms` and `<phase>_regime` for forward and backward.

    The operations run one after the other while the next ones are being launched, so the whole takes at least the sum
    of their execution times and at least the sum of their launches. The regime is what the larger sum is made of.
    """
    found = {}
    for phase, ops in operations(variant, shape, machine, rates).groupby("phase"):
        launch = len(ops) * machine["ceilings"]["launch_us"] / 1e3
        compute_bound = ops["compute_ms"] > ops["bandwidth_ms"]
        compute = ops["execution_ms"][compute_bound].sum()
        bandwidth = ops["execution_ms"][~compute_bound].sum()
        found[f"{phase}_floor_ms"] = max(launch, bandwidth + compute)
        parts = (launch if launch > bandwidth + compute else 0.0, bandwidth, compute)
        found[f"{phase}_regime"] = REGIMES[parts.index(max(parts))]
    return found


def with_laws(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """`rows` of a sweep with the bytes of each point's laws (`<account>_law_bytes`), of its inputs (`input_bytes`), and
    `needed_bytes` in all, on a device of that kind, "cpu" or "cuda"."""
    predicted = []
    for row in rows[POINT].itertuples(index=False):
        law, shape = named(row.variant).law, Shape(*row[1:6], causal=bool(row.causal))
        laws = {f"{account}_law_bytes": law.bytes(account, shape, kind) for account in ACCOUNTS}
        needed = {"input_bytes": shape.input_bytes, "needed_bytes": shape.input_bytes + max(laws.values())}
        predicted.append(laws | needed)
    return rows.join(pd.DataFrame(predicted, index=rows.index))


def with_predictions(rows: pd.DataFrame, machine: dict) -> pd.DataFrame:
    """`with_laws`, and each point's floor and regime."""
    points = [(named(row[0]), Shape(*row[1:6], causal=bool(row[6]))) for row in rows[POINT].itertuples(index=False)]
    floors = pd.DataFrame([floor(variant, shape, machine) for variant, shape in points], index=rows.index)
    return with_laws(rows, machine["kind"]).join(floors)


def exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Local exponents of time in N, log(t₂/t₁)/log(N₂/N₁) between neighbouring lengths of each variant.

    Columns: `variant, phase, from_seq_len, seq_len, exponent`, and the `regime` of the longer of the two.
    """
    found = []
    for phase in ("forward", "backward"):
        for variant, group in rows.dropna(subset=[f"{phase}_ms"]).groupby("variant", sort=False):
            points = group.sort_values("seq_len")[["seq_len", f"{phase}_ms", f"{phase}_regime"]].to_numpy()
            for (n1, t1, _), (n2, t2, regime) in zip(points, points[1:], strict=False):
                found.append((variant, phase, n1, n2, math.log(t2 / t1) / math.log(n2 / n1), regime))
    return pd.DataFrame(found, columns=["variant", "phase", "from_seq_len", "seq_len", "exponent", "regime"])
