"""One protocol on many machines: the published ones, those of data/, and the one at hand."""

import pandas as pd
import seaborn as sns

from attnlib import VARIANTS
from attnlib.core import Machine
from report import plots, stored
from report.predicted import agreement, with_floors
from report.tables import digits, table

PUBLISHED = {"GTX 1080": "000_gtx1080", "A800": "002_a800", "CPU (published)": "001_cpu"}
PROGRAM, D_MODEL = "naive_custom", 64  # what is compared, at which d_model


def beside(rows: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """The times of PROGRAM at one d_model on each machine, `source`; of those whose ceilings are known with `least_ms`,
    the floor of both passes, and, over the whole sweep, `points`, and on how many the laws' bytes are `equal`."""
    printed = {source: stored.published_rows(f"{file}_naive_sweep") for source, file in PUBLISHED.items()}
    found = [theirs.assign(source=source, published=True) for source, theirs in printed.items()]
    swept = {machine.name: (rows, machine)}
    for folder in stored.devices():
        known = (stored.ROOT / "data" / folder / "01_naive_sweep.csv").exists() and not folder.endswith("-quick")
        if known and (other := stored.machine_of(folder, "01_naive_sweep")).name not in swept:
            swept[other.name] = stored.load(folder, "01_naive_sweep"), other
    for name, (own, where) in swept.items():
        counts = agreement(own, VARIANTS, where).values()
        points, equal = (min(column) for column in zip(*counts, strict=True))
        own = with_floors(own[(own["variant"] == PROGRAM) & (own["head_dim"] == D_MODEL)].reset_index(drop=True), where)
        least = own["forward_floor_ms"] + own["backward_floor_ms"]
        known = {"source": name, "published": False, "points": points, "equal": equal, "least_ms": least}
        copies, product = where.ceilings["copy_gb_s"], where.ceilings["gemm_tflop_s"]["float32"]
        copy = copies[max(copies, key=int)]  # the largest: no cache holds it
        found.append(own.assign(**known, copy=copy, product=product))
    every = pd.concat(found).query("head_dim == @D_MODEL")
    every = every.assign(ms=every["forward_ms"] + every["backward_ms"])
    return every.sort_values("seq_len", kind="stable").reset_index(drop=True)


def figure(every: pd.DataFrame):
    """Milliseconds against N on each machine, and as a multiple of its floor."""
    drawn, axes = plots.panels(["forward + backward", "of its own floor"], xs=every["seq_len"], ylabel="", sharey=False)
    axes[0].set_ylabel("ms")
    plots.level(axes[1], 1)
    plots.times(axes[1], (2, 3, 5))
    for own, (source, group) in zip(sns.color_palette("dark"), every.groupby("source", sort=False), strict=False):
        marks = ":" if group["published"].iloc[0] else "o-"
        plots.line(axes[0], group["seq_len"], group["ms"], own, source, marks)
        if group["least_ms"].notna().any():
            plots.line(axes[1], group["seq_len"], group["ms"] / group["least_ms"], own, source)
    return plots.legend(drawn, axes[0])


def side_by_side(every: pd.DataFrame):
    """A row for each machine of which there are rows, see `beside`, at its longest sequence."""
    lines = []
    for source, group in every[~every["published"]].dropna(subset=["ms"]).groupby("source", sort=False):
        last = group.iloc[-1]
        cells = {"machine": source, "bytes as the laws say": f"{last['equal']:.0f} of {last['points']:.0f}"}
        cells |= {"copy GB/s": f"{last['copy']:,.0f}", "float32 TFLOP/s": digits(last["product"]), "N": last["seq_len"]}
        lines.append(cells | {"ms": digits(last["ms"]), "of its floor": f"{last['ms'] / last['least_ms']:.2f}×"})
    return table(pd.DataFrame(lines), {"N": "{:,}"})
