"""One style for every figure: one colour per variant, the device in the title, a cross where memory ran out."""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from attnlib import VARIANTS

COLOURS = dict(zip(VARIANTS, sns.color_palette("colorblind") + sns.color_palette("dark"), strict=False))
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


def panels(titles, *, xs, device, ylabel, sharey=True):
    """A row of log-log axes over sequence length, one per title."""
    figure, axes = plt.subplots(
        1, len(titles), figsize=(WIDTH, HEIGHT), sharey=sharey, squeeze=False, layout="constrained"
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


def alive(ledgers, *, device, matrix_bytes):
    """Bytes alive after each operation, one panel per variant: `ledgers` is `{variant: rows of memory.ledger}`.

    Each colour is one N×N tensor from birth to death, grey is everything else, the unit is one N×N matrix.
    """
    lines = -(-len(ledgers) // 2)
    figure, axes = plt.subplots(
        lines, 2, figsize=(WIDTH, 2.3 * lines), sharey=True, layout="constrained", squeeze=False
    )
    highest = max(row["alive_bytes"] for rows in ledgers.values() for row in rows) / matrix_bytes
    for ax, (variant, rows) in zip(axes.flat, ledgers.items(), strict=False):
        rows = [row for row in rows if row["op"] != "return" and row["phase"] != "upstream"]
        names = list(dict.fromkeys(name for row in rows for name in row["alive"]))
        heights = {name: [row["alive"].get(name, 0) / matrix_bytes for row in rows] for name in names}
        large = [name for name in names if max(heights[name]) > 0.4]
        colours = dict(zip(large, sns.color_palette("husl", len(large)), strict=True))
        bottom = [0.0] * len(rows)
        for name in sorted(names, key=lambda name: name in large):
            kind = {"color": colours.get(name, "#bbbbbb"), "width": 1.0, "linewidth": 0}
            ax.bar(range(len(rows)), heights[name], bottom=bottom, **kind)
            bottom = [below + height for below, height in zip(bottom, heights[name], strict=True)]
        top = max(range(len(rows)), key=lambda place: bottom[place])
        note = f"{bottom[top]:.1f} in {rows[top]['op'].split(' (')[0]}"
        ax.annotate(note, (top, bottom[top]), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        ax.axvline(sum(row["phase"] == "forward" for row in rows) - 0.5, color="black", lw=0.8, ls=":")
        ax.set(title=f"{variant} · {device}", xticks=[], xlabel="operations: forward ⋮ backward")
        ax.set_ylim(0, 1.15 * highest)
    for ax in axes[:, 0]:
        ax.set_ylabel("alive, in N×N matrices")
    return figure


def frontier(needs, memories, found, *, device):
    """What training needs against N: `needs` is `{variant: {N: bytes}}`, `memories` {label: bytes} as horizontal lines.

    found: frontier rows of training, or None; a dot where memory really ended, a cross for the default pool.
    """
    figure, (ax,) = panels(["training"], xs=next(iter(needs.values())), device=device, ylabel="GiB")
    figure.set_figheight(3.6)
    for variant, points in needs.items():
        gib = [nbytes / 2**30 for nbytes in points.values()]
        ax.plot(points.keys(), gib, "--", color=COLOURS[variant], lw=1, label=variant)
    for label, nbytes in memories.items():
        ax.axhline(nbytes / 2**30, color="black", lw=0.6)
        ax.annotate(label, (0.01, nbytes / 2**30), (0, 2), ax.get_yaxis_transform(), "offset points", fontsize=7)
    ax.set_ylim(min(memories.values()) / 2**31, 2 * max(memories.values()) / 2**30)
    for row in () if found is None else found.itertuples():
        marker = "o" if row.allocator == "expandable" else "x"
        ax.plot(row.found_seq_len, row.memory_bytes / 2**30, marker, color=COLOURS[row.variant], ms=5, mew=1.5)
    legend(figure, ax)
    return figure


def block(rows, *, device):
    """A sweep of the block: time, peak memory and throughput of forward and backward against N, by variant."""
    columns = {"ms": "forward_backward_ms", "peak GiB": "backward_peak_gib", "tokens per ms": "tokens_per_ms"}
    lengths = sorted(set(rows["seq_len"]))
    figure, axes = panels(columns, xs=lengths[:: 2 if len(lengths) > 5 else 1], device="", ylabel="", sharey=False)
    figure.suptitle(device, fontsize=9)
    for ax, (title, column) in zip(axes, columns.items(), strict=True):
        ax.set_title(title)
        for variant, group in rows.dropna(subset=[column]).groupby("variant", sort=False):
            ax.plot(group["seq_len"], group[column], "o-", color=COLOURS[variant], ms=3, lw=1, label=variant)
    legend(figure, axes[0])
    return figure


def protocol(rows, product_tflop_s, *, device):
    """TFLOP/s of forward (above) and backward (below) against N, one column per head_dim and mask; `rows` has
    `forward_tflop_s` and `backward_tflop_s`. The dotted line is the matrix product's rate."""
    kinds = list(rows.groupby(["head_dim", "causal"]).groups)
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(WIDTH, 4.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(device, fontsize=9)
    for line, phase in zip(axes, ("forward", "backward"), strict=True):
        line[0].set_ylabel(f"{phase} TFLOP/s")
        for ax, (head_dim, causal) in zip(line, kinds, strict=True):
            ax.axhline(product_tflop_s, color="black", lw=0.8, ls=":")
            part = rows[(rows["head_dim"] == head_dim) & (rows["causal"] == causal)]
            for variant, group in part.groupby("variant", sort=False):
                ax.plot(
                    group["seq_len"], group[f"{phase}_tflop_s"], "o-", color=COLOURS[variant], ms=3, lw=1, label=variant
                )
            ax.set_xscale("log")
            ax.set_xticks(sorted(set(rows["seq_len"])), [short(n) for n in sorted(set(rows["seq_len"]))], rotation=45)
            ax.xaxis.set_minor_locator(NullLocator())
            if phase == "forward":
                ax.set_title(f"D {head_dim}, {'causal' if causal else 'full'}")
            else:
                ax.set_xlabel("N")
    legend(figure, axes[0][0])
    return figure


def roofline(points, *, copy_gb_s, product_tflop_s, device):
    """Useful TFLOP/s against operations per byte of memory traffic: `points` has `variant, phase, intensity,
    tflop_s`. The roof is the copy's rate up to where the matrix product's takes over."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    xs = [min(points["intensity"]) / 2, 1e3 * product_tflop_s / copy_gb_s, max(points["intensity"]) * 2]
    ax.plot(xs, [min(x * copy_gb_s / 1e3, product_tflop_s) for x in xs], color="black", lw=1)
    slope = (xs[0] * xs[1]) ** 0.5
    where = (slope, slope * copy_gb_s / 1e3)
    ax.annotate(f"copy {copy_gb_s:,.0f} GB/s", where, (-8, 4), textcoords="offset points", ha="right")
    ax.annotate(
        f"matrix product {product_tflop_s:,.3g} TFLOP/s", (xs[1], product_tflop_s), (4, 4), textcoords="offset points"
    )
    for row in points.itertuples():
        marker, label = ("o", row.variant) if row.phase == "forward" else ("s", None)
        filled = COLOURS[row.variant] if row.phase == "forward" else "none"
        ax.plot(row.intensity, row.tflop_s, marker, ms=6, mfc=filled, mec=COLOURS[row.variant], label=label)
    ax.set(xscale="log", yscale="log", xlabel="useful operations per byte of memory traffic", ylabel="useful TFLOP/s")
    ax.set(title=device, ylim=(min(points["tflop_s"]) / 2, 2 * product_tflop_s))
    legend(figure, ax)
    return figure


def ratios(rows, *, device, ylabel="naive ÷ flash"):
    """How many times as long the first variant of a duel takes as the second, against N, with the interval as a band;
    one panel per phase, one line per dtype and head_dim."""
    figure, axes = panels(("forward", "backward"), xs=rows["seq_len"], device=device, ylabel=ylabel)
    between = (0.5, 2, 3, 5) if rows["ratio"].max() < 50 * rows["ratio"].min() else ()
    for ax, phase in zip(axes, ("forward", "backward"), strict=True):
        ax.axhline(1, color="black", lw=0.8, ls=":")
        lines = rows[rows["phase"] == phase].groupby(["dtype", "head_dim"], sort=False)
        for colour, ((dtype, head_dim), line) in zip(sns.color_palette("colorblind"), lines, strict=False):
            ax.fill_between(line["seq_len"], line["low"], line["high"], color=colour, alpha=0.3, lw=0)
            ax.plot(line["seq_len"], line["ratio"], "-", color=colour, lw=1, label=f"{dtype}, D {head_dim}")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}×" if round(y, 9) in between else ""))
    legend(figure, axes[0])
    return figure


def patterns(reaches, *, counts):
    """Who sees whom: one square per `{title: [N, N] tensor}`, queries down and keys across, darker where seen in more
    of up to `counts` branches."""
    figure, axes = plt.subplots(
        1, len(reaches), figsize=(WIDTH, WIDTH / len(reaches) + 0.5), squeeze=False, layout="constrained"
    )
    for ax, (title, seen) in zip(axes[0], reaches.items(), strict=True):
        ax.imshow(seen, cmap="Blues", vmin=0, vmax=counts, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[], xlabel="keys")
    axes[0][0].set_ylabel("queries")
    return figure


def reached(shares, *, device):
    """The share of pairs that see each other against their distance, a line per `{label: (distances, shares)}`."""
    figure, ax = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    for colour, (label, (distances, share)) in zip(sns.color_palette("colorblind"), shares.items(), strict=False):
        edges, share = [*distances, 2 * distances[-1]], [*share, share[-1]]
        ax.step(edges, share, "-", where="post", color=colour, lw=1, label=label)
    ax.set(xscale="log", yscale="log", xlabel="distance |i − j|", ylabel="share of pairs seen", title=device)
    legend(figure, ax)
    return figure
