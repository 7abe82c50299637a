"""The tables of notebook 03, each made from the rows of an experiment or from laws and nothing else."""

import math
import re

import pandas as pd

from attnlib import VARIANTS
from attnlib.accuracy import RESULTS
from attnlib.check import WRAPPED
from attnlib.core import ACCOUNTS, Shape, useful_flops
from attnlib.measure import POINT
from attnlib.memory import ledger
from attnlib.tables import MIB, NO_FIGURE, digits, table


def shape_of(row) -> Shape:
    """The Shape of a row, `{column: value}`."""
    return Shape(*(row[column] for column in POINT[1:-1]), causal=bool(row["causal"]))


def kernel(name: str) -> str:
    """A kernel's name without its return type, parameters and template arguments."""
    return re.sub(r"^void |<.*|\(.*", "", name).split("::")[-1]


def grid(rows: pd.DataFrame, column: str, unit: float = 1):
    """`column` by sequence length and variant; where there is no figure, how the point ended."""
    rows = rows[rows.groupby("variant")["status"].transform(lambda statuses: (statuses != "unsupported").any())]
    cells = rows.assign(cell=rows["status"].where(rows[column].isna(), [digits(x / unit) for x in rows[column]]))
    frame = cells.pivot(index="seq_len", columns="variant", values="cell")[list(dict.fromkeys(rows["variant"]))]
    return table(frame.reset_index().rename_axis(columns=None))


def refusals(rows: pd.DataFrame):
    """What was not supported, and why, once for each variant and reason."""
    refused = rows[rows["status"] == "unsupported"].groupby(["variant", "reason"], sort=False)["dtype"]
    frame = refused.agg(lambda dtypes: ", ".join(dict.fromkeys(dtypes))).reset_index()
    return table(frame[["variant", "dtype", "reason"]])


def mask(rows: pd.DataFrame) -> pd.Series:
    """The column `causal` in words."""
    return rows["causal"].map({True: "causal", False: "full"})


def with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a sweep with `forward_tflop_s` and `backward_tflop_s`, by the operations of core.useful_flops."""
    shapes = [shape_of(row) for row in rows.to_dict("records")]
    rates = {
        f"{phase}_tflop_s": [useful_flops(s, phase) for s in shapes] / rows[f"{phase}_ms"] / 1e9
        for phase in ("forward", "backward")
    }
    return rows.assign(**rates)


def passes_gb_s(rows: pd.DataFrame) -> pd.Series:
    """The rate at which `naive` moves the bytes of its formula in a forward pass without a mask, in GB/s."""
    plain = rows[(rows["variant"] == "naive") & ~rows["causal"].astype(bool)]
    passes = VARIANTS["naive"].traffic.forward
    return [shape_of(row).evaluate(passes) for row in plain.to_dict("records")] / plain["forward_ms"] / 1e6


def rates(rows: pd.DataFrame):
    """The protocol's table: forward / backward TFLOP/s by head_dim, mask, sequence length and variant."""
    rows = with_rates(rows).query("status != 'unsupported'")
    phases = zip(rows["forward_tflop_s"], rows["backward_tflop_s"], rows["status"], strict=True)
    cells = [
        status if math.isnan(f) else f"{digits(f)} / {NO_FIGURE if math.isnan(b) else digits(b)}"
        for f, b, status in phases
    ]
    rows = rows.assign(cell=cells, mask=mask(rows))
    frame = rows.pivot(index=["head_dim", "mask", "seq_len"], columns="variant", values="cell")
    return table(frame[list(dict.fromkeys(rows["variant"]))].reset_index().rename_axis(columns=None))


def shares(rows: pd.DataFrame):
    """Races at their longest sequence: TFLOP/s and, in brackets, the share of the matrix product raced against."""
    rows = rows[rows["seq_len"] == rows["seq_len"].max()]
    tflop_s = [useful_flops(shape_of(r), r["phase"]) / r["ms"] / 1e9 for r in rows.to_dict("records")]
    cells = [f"{digits(rate)} ({share:.0%})" for rate, share in zip(tflop_s, rows["share"], strict=True)]
    rows = rows.assign(cell=cells, mask=mask(rows), product=[digits(x) for x in rows["gemm_tflop_s"]])
    frame = rows.pivot(index=["head_dim", "mask", "phase", "product"], columns="variant", values="cell")
    frame = frame[list(dict.fromkeys(rows["variant"]))].reset_index().rename_axis(columns=None)
    return table(frame.rename(columns={"product": "matrix product"}))


def clock(speeds: pd.DataFrame, races: pd.DataFrame) -> pd.DataFrame:
    """Calls timed in three ways, by point and phase: `table_ms` in a sweep, `ms` in a race, and `do_bench_ms`."""
    keys = ["variant", "head_dim", "seq_len", "causal"]
    columns = {f"{phase}_ms": phase for phase in ("forward", "backward")}
    swept = speeds.rename(columns=columns).melt(keys, list(columns.values()), "phase", "table_ms")
    return races.merge(swept, on=[*keys, "phase"]).dropna(subset=["table_ms", "do_bench_ms"])


def picks(rows: pd.DataFrame) -> pd.DataFrame:
    """For each race the kernel behind sdpa_default (`picked`), and the `fastest` of PyTorch's own pinned kernels, with
    how many times as fast that is (`of_default`, `_low`, `_high`)."""
    found = []
    for names, race in rows.groupby(["head_dim", "causal", "seq_len", "phase"], sort=False):
        by_name = race.set_index("variant")
        pinned = by_name[by_name.index.str.startswith("sdpa_") & (by_name.index != "sdpa_default")]
        best = pinned["of_default"].idxmax()
        row = dict(zip(("head_dim", "causal", "seq_len", "phase"), names, strict=True))
        picked = pinned["kernel"].map(kernel) == kernel(by_name.loc["sdpa_default", "kernel"])
        row |= {"picked": ", ".join(pinned.index[picked]) or kernel(by_name.loc["sdpa_default", "kernel"])}
        row |= {"fastest": best, **pinned.loc[best, ["of_default", "of_default_low", "of_default_high"]].to_dict()}
        found.append(row)
    return pd.DataFrame(found)


def choice(rows: pd.DataFrame) -> list[str]:
    """How good PyTorch's pick is, in sentences: among its own kernels, and beside packages outside."""
    found, last = picks(rows), rows[rows["seq_len"] == rows["seq_len"].max()]
    better = found[(found["of_default_low"] > 1) & (found["of_default"] > 1.02)]["of_default"]
    gain = (
        f" (by {better.max():.2f} times at most, {better.median():.2f} in the median of those)" if len(better) else ""
    )
    said = [f"Races that another kernel of PyTorch's wins by more than 2 %: {len(better)} of {len(found)}{gain}."]
    for name in [name for name in rows["variant"].unique() if not name.startswith("sdpa_")]:
        won, at_last = ((part[part["variant"] == name]) for part in (rows, last))
        wins, ends = int((won["of_default_low"] > 1).sum()), at_last["of_default"]
        said.append(
            f"Outside PyTorch, `{name}` wins {wins} of {len(won)} races against the default; at the longest sequence "
            f"it is {ends.min():.2f} to {ends.max():.2f} times as fast."
        )
    return said


def default(rows: pd.DataFrame):
    """`picks` as a table."""
    found = picks(rows)
    gain = [f"{r.of_default:.2f}× [{r.of_default_low:.2f}, {r.of_default_high:.2f}]" for r in found.itertuples()]
    frame = found.assign(mask=mask(found), gain=gain)
    frame = frame[["head_dim", "mask", "seq_len", "phase", "picked", "fastest", "gain"]]
    return table(frame.rename(columns={"picked": "PyTorch picks", "gain": "the fastest is faster by"}))


def worst(rows: pd.DataFrame | dict) -> float:
    """The largest error over that of the reference, in rows of accuracy.compared or one of them."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([rows])
    return frame[[f"{r}_of_reference" for r in RESULTS]].max(axis=None)


def errors_over_naive(rows: pd.DataFrame, name: str, dtype: str) -> tuple[float, float]:
    """The smallest and the largest error of a variant over that of `naive`, over RESULTS and masks."""
    errors = rows[rows["dtype"] == dtype].set_index(["variant", "causal"])[[f"{r}_error" for r in RESULTS]].sort_index()
    over = errors.loc[name] / errors.loc["naive"]
    return over.min(axis=None), over.max(axis=None)


def accuracy(rows: pd.DataFrame):
    """Relative error of each result without a mask, and how many times that of `naive` in the same dtype; and the
    largest of all errors, mask or not, over that of the reference with the same arithmetic."""
    plain = rows[~rows["causal"] & (rows["head_dim"] == rows["head_dim"].min())]
    base = plain[plain["variant"] == "naive"].set_index("dtype")
    found = []
    for row in plain.to_dict("records"):
        errors = {r: (row[f"{r}_error"], base.loc[row["dtype"], f"{r}_error"]) for r in RESULTS}
        cells = {r: f"{mine:.1e} ({mine / theirs:.2f}×)" for r, (mine, theirs) in errors.items()}
        same = rows[(rows["variant"] == row["variant"]) & (rows["dtype"] == row["dtype"])]
        names = {"dtype": row["dtype"], "variant": row["variant"]}
        found.append({**names, **cells, "of the reference": f"{worst(same):.2f}×"})
    return table(pd.DataFrame(found))


def agreement(rows: pd.DataFrame, kind: str) -> dict[str, tuple[int, int]]:
    """`{account: (measured, equal)}` over rows of floor.with_laws: on how many the allocator saw what the law says.

    On a CPU in float32 the allocator may count some bytes more, for scale factors wrapped into tensors.
    """
    found = {}
    for account in ACCOUNTS:
        excess = (rows[f"{account}_bytes"] - rows[f"{account}_law_bytes"]).dropna()
        found[account] = len(excess), int(excess.between(0, 4 * WRAPPED if kind == "cpu" else 0).sum())
    return found


def ledgered(names: list[str], shape: Shape, kind: str) -> pd.DataFrame:
    """As traffic.measured, for a device without counters: the traffic of the ledger, each operand once an operation."""
    found = []
    for name in names:
        rows = pd.DataFrame(ledger(VARIANTS[name], shape, kind))
        for phase in ("forward", "backward"):
            moved = int(rows.loc[rows["phase"] == phase, "traffic_bytes"].sum())
            row = {"variant": name, **shape.columns(), "phase": phase, "dram_bytes": moved}
            found.append(row | {"useful_flops": useful_flops(shape, phase)})
    return pd.DataFrame(found)


def intensity(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of traffic.measured with `intensity`, useful operations per byte of memory traffic, as counted."""
    return rows.assign(intensity=rows["useful_flops"] / rows["dram_bytes"])


def moved(rows: pd.DataFrame):
    """What each variant moved through memory, as multiples of what q, k, v and o alone take, and its intensity."""
    found = []
    for row in intensity(rows).to_dict("records"):
        least = shape_of(row).input_bytes // 3 * (4 if row["phase"] == "forward" else 8)
        moved = {"moved MiB": f"{row['dram_bytes'] / MIB:,.0f}", "of the least": f"{row['dram_bytes'] / least:.1f}×"}
        counts = {"kernels": int(row["kernels"]), "operations per byte": digits(row["intensity"])}
        found.append({"variant": row["variant"], "phase": row["phase"], **counts, **moved})
    return table(pd.DataFrame(found))
