"""The tables of the report, each made from the rows of a sweep and nothing else."""

import numpy as np
import pandas as pd

from attnlib import variant as named
from attnlib.core import ACCOUNTS, Shape, Variant
from attnlib.floor import floor
from attnlib.measure import PHASES
from attnlib.memory import ledger

MIB, GIB = 2**20, 2**30
NO_FIGURE = "–"


def table(frame: pd.DataFrame, formats: dict | None = None):
    """A DataFrame as a table of the report: its columns formatted, a dash where there is no figure."""
    return frame.style.format(formats, na_rep=NO_FIGURE).hide(axis="index")


def size(nbytes: float) -> str:
    """Bytes in the largest unit that leaves a number of at least one: "64 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024


def digits(value: float) -> str:
    """Three significant digits without an exponent: "0.0351", "1,210"."""
    return f"{float(f'{value:.3g}'):,.10g}"


def law_and_ledger(variants: dict[str, Variant], shapes: list[Shape], what: str, device: str) -> tuple[int, int]:
    """The sum over variants, shapes and phases of `what` ("flops" or "traffic"): from the formulas, from the ledger."""
    column = {"flops": "flops", "traffic": "traffic_bytes"}[what]
    formula = counted = 0
    for variant in variants.values():
        for shape in shapes:
            phases = getattr(variant, what)
            formula += shape.evaluate(phases.forward + phases.backward, device)
            counted += sum(row[column] for row in ledger(variant, shape, device) if row["phase"] != "upstream")
    return formula, counted


def ceilings(found: dict):
    """device.ceilings as a table."""
    rows = [("launch of one operation", "", f"{found['launch_us']:.1f} µs")]
    for kind in ("copy", "clone"):
        for nbytes, rate in found[f"{kind}_gb_s"].items():
            rows.append((f"{kind} of a tensor", size(int(nbytes)), f"{rate:,.0f} GB/s"))
    for dtype, rate in found["gemm_tflop_s"].items():
        rows.append(("matrix product", dtype, f"{rate:.3g} TFLOP/s"))
    return table(pd.DataFrame(rows, columns=["ceiling", "of", "rate"]))


def prediction(variant: Variant, shapes: list[Shape], machine: dict):
    """What a variant should cost at `shapes`: floors, regimes, and the bytes needed above the inputs."""
    rows = []
    for shape in shapes:
        least = floor(variant, shape, machine)
        cells = {"seq_len": shape.seq_len}
        for phase in PHASES[:2]:
            cells[f"{phase} ms"] = digits(least[f"{phase}_floor_ms"])
            cells[f"{phase} regime"] = f"{least[f'{phase}_regime']}-bound"
        rows.append(
            {**cells, "peak": size(max(variant.law.bytes(account, shape, machine["kind"]) for account in ACCOUNTS))}
        )
    return table(pd.DataFrame(rows))


def full(rows: pd.DataFrame):
    """The published reports' table: d_model, seq_len, forward, backward, memory before backward, status."""
    frame = pd.DataFrame(
        {
            "d_model": rows["head_dim"],
            "seq_len": rows["seq_len"],
            "forward ms": rows["forward_ms"],
            "backward ms": rows["backward_ms"],
            "memory before backward MiB": rows["memory_before_backward_bytes"] / MIB,
            "status": rows["status"] + rows["phase"].map(lambda phase: f" in {phase}" if phase else ""),
        }
    ).sort_values(["d_model", "seq_len"])
    return table(frame, {"forward ms": digits, "backward ms": digits, "memory before backward MiB": "{:,.1f}"})


def pivot(rows: pd.DataFrame, column: str, unit: float = 1, form=digits, columns: str = "head_dim"):
    """`column` by sequence length and d_model, or another of the columns."""
    frame = (rows.assign(x=rows[column] / unit).pivot(index="seq_len", columns=columns, values="x")).reset_index()
    label = "seq_len \\ d_model" if columns == "head_dim" else "seq_len"
    frame.columns = [label, *(str(name) for name in frame.columns[1:])]
    return table(frame, dict.fromkeys(frame.columns[1:], form))


def spread(rows: pd.DataFrame):
    """Mean ± standard deviation beside median, 20th and 80th percentile, of forward and backward."""
    found = []
    for phase in PHASES[:2]:
        for row in rows.dropna(subset=[f"{phase}_ms"]).to_dict("records"):
            m = {name: row[f"{phase}_ms{name}"] for name in ("", "_p20", "_p80", "_mean", "_std", "_count")}
            mean = f"{digits(m['_mean'])} ± {digits(m['_std'])}"
            median = f"{digits(m[''])} ({digits(m['_p20'])} to {digits(m['_p80'])})"
            found.append((row["seq_len"], phase, mean, median, int(m["_count"])))
    return table(pd.DataFrame(found, columns=["seq_len", "phase", "mean ± std", "median (p20 to p80)", "samples"]))


def frontier(rows: pd.DataFrame, memory_bytes: int):
    """Per variant the largest working and the smallest failing configuration, and what the failing one needs."""
    found = []
    for variant, group in rows.sort_values(["seq_len", "head_dim"]).groupby("variant", sort=False):
        works, fails = group[group["status"] == "ok"], group[group["status"] == "oom"]
        last = works.iloc[-1] if len(works) else None
        lost = fails.iloc[0] if len(fails) else None
        name = lambda row: NO_FIGURE if row is None else f"N {row['seq_len']}, d_model {row['head_dim']}"  # noqa: E731
        phase = NO_FIGURE if lost is None else lost["phase"]
        need = NO_FIGURE
        if f"{phase}_peak_law_bytes" in rows:
            total = lost["input_bytes"] + lost[f"{phase}_peak_law_bytes"]
            need = f"{total / GIB:.1f} of {memory_bytes / GIB:.1f} GiB"
        found.append((variant, name(last), name(lost), phase, need))
    return table(pd.DataFrame(found, columns=["variant", "largest working", "smallest failing", "phase", "needs"]))


def exponents(slopes: pd.DataFrame, rows: pd.DataFrame):
    """Local exponents of one variant with their regimes, and the single exponent of a least-squares fit."""
    found = []
    for phase, part in slopes.groupby("phase", sort=False):
        for s in part.itertuples():
            found.append((phase, f"{s.from_seq_len} → {s.seq_len}", f"{s.exponent:.2f}", f"{s.regime}-bound"))
        found.append((phase, "one fit through all", f"{fit(rows, phase):.2f}", "none"))
    return table(pd.DataFrame(found, columns=["phase", "seq_len", "exponent", "regime"]))


def fit(rows: pd.DataFrame, phase: str) -> float:
    """The exponent of a least-squares line through log(time) against log(N)."""
    seen = rows.dropna(subset=[f"{phase}_ms"])
    return float(np.polyfit(np.log(seen["seq_len"]), np.log(seen[f"{phase}_ms"]), 1)[0])


def distance(rows: pd.DataFrame, machine: dict):
    """At each variant's longest timed sequence, how many times its floor it took, by the copy and the clone ceiling."""
    table_rows = []
    for variant, group in rows.groupby("variant", sort=False):
        for phase in PHASES[:2]:
            row = group.dropna(subset=[f"{phase}_ms"]).sort_values("seq_len").iloc[-1]
            shape = Shape(*row[["batch", "heads", "seq_len", "head_dim", "dtype"]], causal=bool(row["causal"]))
            least = [floor(named(variant), shape, machine, f"{kind}_gb_s") for kind in ("copy", "clone")]
            times = [f"{row[f'{phase}_ms'] / floors[f'{phase}_floor_ms']:.2f}×" for floors in least]
            table_rows.append((variant, phase, row["seq_len"], digits(row[f"{phase}_ms"]), *times))
    columns = ["variant", "phase", "seq_len", "measured ms", "of the floor (copy)", "of the floor (clone)"]
    return table(pd.DataFrame(table_rows, columns=columns))


def growth(rows: pd.DataFrame, others: dict[str, pd.DataFrame]):
    """Growth of memory before backward where the sequence gets four times as long, at d_model 16."""
    at16 = lambda frame: frame[frame["head_dim"] == 16].set_index("seq_len")  # noqa: E731
    columns = {name: at16(other)["memory_before_backward_mib"] for name, other in others.items()}
    for variant, group in rows.groupby("variant", sort=False):
        columns[variant] = at16(group)["memory_before_backward_bytes"]
    lengths = sorted(set().union(*(column.dropna().index for column in columns.values())))
    found = [
        (f"{n} → {4 * n}", *(column.get(4 * n, np.nan) / column.get(n, np.nan) for column in columns.values()))
        for n in lengths
        if 4 * n in lengths
    ]
    return table(pd.DataFrame(found, columns=["seq_len", *columns]), dict.fromkeys(columns, "{:.2f}×"))


def options(rows: pd.DataFrame):
    """Forward + backward time and backward peak of each variant by dtype, mask and arrangement of heads."""
    found = {}
    for row in rows.to_dict("records"):
        option = ", ".join((row["dtype"], *["causal"] * row["causal"], *[f"{row['heads']} heads"] * (row["heads"] > 1)))
        figures = f"{digits(row['forward_backward_ms'])} ms, {row['backward_peak_bytes'] / MIB:,.0f} MiB"
        found.setdefault(option, {"option": option})[row["variant"]] = (
            figures if row["status"] == "ok" else row["status"]
        )
    return table(pd.DataFrame(found.values()))


def beside_published(rows: pd.DataFrame, others: dict[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """Published figures and this machine's at d_model 64 in one frame: `source, seq_len, forward_ms, backward_ms`."""
    mine = rows[rows["variant"] == "naive_custom"].assign(source=name)
    frames = [other.assign(source=source) for source, other in others.items()] + [mine]
    frame = pd.concat([f[f["head_dim"] == 64] for f in frames])
    return frame[["source", "seq_len", "forward_ms", "backward_ms"]].sort_values("seq_len", kind="stable")


def published(beside: pd.DataFrame):
    """beside_published as a table, forward / backward in milliseconds."""
    cells = beside.assign(
        cell=[
            NO_FIGURE if np.isnan(f) else f"{digits(f)} / {NO_FIGURE if np.isnan(b) else digits(b)}"
            for f, b in zip(beside["forward_ms"], beside["backward_ms"], strict=True)
        ]
    )
    frame = cells.pivot(index="seq_len", columns="source", values="cell")[beside["source"].unique()]
    return table(frame.reset_index().rename_axis(columns=None))


def agreement(pairs: dict[str, pd.DataFrame]):
    """How far the two times of a pair lie apart, |ratio - 1|, by sequence length: median and 90th percentile."""
    columns = {}
    for name, frame in pairs.items():
        off = (frame["ratio"] - 1).abs().groupby(frame["seq_len"])
        columns |= {f"{name}, median": off.median(), f"{name}, 90 %": off.quantile(0.9)}
    return table(pd.DataFrame(columns).reset_index(), dict.fromkeys(columns, "{:.1%}"))
