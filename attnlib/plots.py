"""One style for every figure: one colour per variant, the device in the title, a cross where memory ran out."""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from attnlib import VARIANTS

COLOURS = dict(zip(VARIANTS, sns.color_palette("colorblind"), strict=False))
REGIME_COLOURS = {"launch": "#7f7f7f", "bandwidth": "#1f77b4", "compute": "#d62728"}
WIDTH, HEIGHT = 6.3, 2.7  # inches: the text width of the PDF


def style():
    """Set the look of all figures: SVG in notebooks, and with svg.hashsalt equal figures are equal files."""
    set_matplotlib_formats("svg")
    sns.set_theme(
        context="paper", style="whitegrid", rc={"axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8}
    )
    plt.rcParams.update(
        {"svg.hashsalt": "attnlib", "figure.dpi": 100, "savefig.bbox": "tight", "axes.grid.which": "major"}
    )


def short(n) -> str:
    """A sequence length as people write it: 16384 becomes 16K."""
    return f"{n / 1024:g}K" if n >= 1024 else f"{n:g}"


def panels(titles, *, xs, device, ylabel):
    """A row of log-log axes over sequence length, one per title."""
    figure, axes = plt.subplots(
        1, len(titles), figsize=(WIDTH, HEIGHT), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set(xscale="log", yscale="log", title=f"{title} · {device}", xlabel="sequence length N")
        ax.set_xticks(sorted(set(xs)), [short(x) for x in sorted(set(xs))], rotation=45)
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0][0].set_ylabel(ylabel)
    return figure, axes[0]


def legend(figure, ax):
    """One legend for all panels, below them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def curves(rows, columns, *, device, ylabel, dashed=None, scale=1.0, oom_phases=None):
    """`columns` ({title: column}) against N, one panel each: measured as dots on a line, predicted (`dashed`) dashed.

    oom_phases: {title: phases}; a point that ran out of memory in one of them is a cross on its predicted value.
    """
    figure, axes = panels(columns, xs=rows["seq_len"], device=device, ylabel=ylabel)
    for ax, (title, column) in zip(axes, columns.items(), strict=True):
        for variant, group in rows.groupby("variant", sort=False):
            group = group.sort_values("seq_len")
            colour = COLOURS[variant]
            ax.plot(group["seq_len"], group[column] / scale, "o-", color=colour, ms=3, lw=1, label=variant)
            if dashed:
                ax.plot(group["seq_len"], group[dashed[title]] / scale, "--", color=colour, lw=1, alpha=0.7)
                lost = group[group["phase"].isin((oom_phases or {}).get(title, ())) & (group["status"] == "oom")]
                ax.plot(lost["seq_len"], lost[dashed[title]] / scale, "x", color=colour, ms=7, mew=2)
    legend(figure, axes[0])
    return figure


def exponents(slopes, *, device):
    """Local exponents of time in N against N: `slopes` has `phase, variant, seq_len, exponent, regime`."""
    figure, axes = panels(
        slopes["phase"].unique(), xs=slopes["seq_len"], device=device, ylabel="local exponent of time"
    )
    for ax, (_, part) in zip(axes, slopes.groupby("phase", sort=False), strict=True):
        ax.set_yscale("linear")
        ax.axhline(2, color="black", lw=0.8, ls=":")
        for variant, group in part.groupby("variant", sort=False):
            ax.plot(group["seq_len"], group["exponent"], "-", color=COLOURS[variant], lw=1, label=variant)
        for regime, group in part.groupby("regime"):
            ax.plot(
                group["seq_len"], group["exponent"], "o", ms=4, color=REGIME_COLOURS[regime], label=f"{regime}-bound"
            )
    legend(figure, axes[0])
    return figure


def distance(rows, *, device):
    """How many times the floor was measured, against N, for forward and backward."""
    figure, axes = panels(("forward", "backward"), xs=rows["seq_len"], device=device, ylabel="measured ÷ floor")
    for ax, phase in zip(axes, ("forward", "backward"), strict=True):
        ax.axhline(1, color="black", lw=0.8, ls=":")
        for variant, group in rows.groupby("variant", sort=False):
            ratio = group[f"{phase}_ms"] / group[f"{phase}_floor_ms"]
            ax.plot(group["seq_len"], ratio, "o-", color=COLOURS[variant], ms=3, lw=1, label=variant)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}×" if y in (2, 3, 5, 20) else ""))
    legend(figure, axes[0])
    return figure


def operations(ops, *, device):
    """Where the floor of one forward and one backward pass goes: a bar per operation, in the order they run."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.13 * len(ops) + 0.4), layout="constrained")
    for ax, (phase, part) in zip(axes, ops.groupby("phase", sort=False), strict=True):
        colours = [
            REGIME_COLOURS["compute" if c > b else "bandwidth"]
            for c, b in zip(part["compute_ms"], part["bandwidth_ms"], strict=True)
        ]
        ax.barh(range(len(part)), part["execution_ms"], color=colours)
        ax.set_yticks(range(len(part)), part["op"], fontsize=7)
        ax.invert_yaxis()
        ax.set(title=f"{phase} · {device}", xlabel="least time (ms)")
        ax.grid(axis="y", visible=False)
    return figure


def machines(rows, columns, *, ylabel):
    """Several machines against N, one line each: `rows` has `source, seq_len` and the columns of {title: column}."""
    figure, axes = panels(columns, xs=rows["seq_len"], device="d_model 64", ylabel=ylabel)
    for ax, column in zip(axes, columns.values(), strict=True):
        for colour, (source, group) in zip(sns.color_palette("dark"), rows.groupby("source", sort=False), strict=False):
            ax.plot(group["seq_len"], group[column], "o-", ms=3, lw=1, color=colour, label=source)
    legend(figure, axes[0])
    return figure
