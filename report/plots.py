"""One style for every figure: one colour per variant, the device in the title, a cross where memory ran out."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import rcdefaults
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

COLOURS = {"naive_custom": "#0173b2", "naive": "#de8f05", "naive_weights_only": "#029e73", "naive_recompute": "#d55e00"}
COLOURS |= {"sdpa_math": "#cc78bc", "sdpa_efficient": "#ca9161", "sdpa_flash": "#fbafe4", "sdpa_cudnn": "#949494"}
COLOURS |= {"sdpa_default": "#ece133", "fa4": "#001c7f", "tiled": "#b1400d", "dilated": "#12711c", "window": "#8c0800"}
COLOURS |= {"strided": "#591e71", "random_blocks": "#592f0d"}
SPARE = ("#56b4e9", "#a23582", "#3c3c3c", "#b8850a", "#006374", *sns.husl_palette(24).as_hex())
REGIME_COLOURS = {"launch": "#7f7f7f", "latency": "#b39ddb", "bandwidth": "#4db6ac", "compute": "#c2185b"}
WIDTH, HEIGHT = 6.3, 2.7  # inches: the text width of the PDF


def colour(variant):
    """A variant's colour; one that has none yet keeps the first that no other has."""
    return COLOURS.setdefault(variant, next((one for one in SPARE if one not in COLOURS.values()), "#000000"))


def style():
    """Set the look of all figures: SVG in notebooks, and with svg.hashsalt equal figures are equal files."""
    rcdefaults()  # a user's own matplotlibrc is for the user's own figures
    set_matplotlib_formats("svg")
    look = {"axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "axes.grid.which": "major"}
    sns.set_theme(context="paper", style="whitegrid", rc=look)
    plt.rcParams.update({"svg.hashsalt": "attnlib", "svg.fonttype": "none", "figure.dpi": 100, "savefig.bbox": "tight"})


def over_lengths(ax, lengths):
    """A logarithmic axis over sequence lengths, written as people do: 16384 becomes 16K."""
    lengths = sorted(set(lengths))
    ax.set_xscale("log")
    ax.set_xticks(lengths, [f"{n / 1024:g}K" if n >= 1024 else f"{n:g}" for n in lengths], rotation=45)
    ax.xaxis.set_minor_locator(NullLocator())


def panels(titles, *, xs, ylabel, device="", sharey=True):
    """A figure and a row of log-log axes over sequence length, one per title."""
    kind = {"figsize": (WIDTH, HEIGHT), "sharey": sharey, "squeeze": False, "layout": "constrained"}
    figure, (axes,) = plt.subplots(1, len(titles), **kind)
    for ax, title in zip(axes, titles, strict=True):
        ax.set(yscale="log", title=f"{title} · {device}" if device else title, xlabel="sequence length N", ymargin=0.16)
        over_lengths(ax, xs)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def line(ax, xs, ys, own, label, marks="o-"):
    """One line in its own colour."""
    ax.plot(xs, ys, marks, color=own, ms=3, lw=1, label=label)


def name_ends(ax, ends, gap: float = 0.09, near: float = 0.03, under: float = 5):
    """Write names beside the ends `{name: (x, y, colour)}` of lines, once all that shares the axes is drawn: `gap` of
    their height apart, with one text for ends closer than `near`. `under` a line that ends early stands its name."""
    ax.get_ylim()  # or the transformation is that of before the last line
    furthest, placed = max(x for x, *_ in ends.values()), list[list]()
    for name, (x, y, own) in sorted(ends.items(), key=lambda end: end[1][1]):
        dark = {"color": tuple(0.7 * part for part in to_rgb(own)), "fontsize": 7.5, "annotation_clip": False}
        at = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]
        if x < furthest:
            ax.annotate(name, (x, y), (0, -under), textcoords="offset points", ha="center", va="top", **dark)
        elif placed and at - placed[-1][0] < near:
            placed[-1][2] += f", {name}"
        else:
            placed.append([at, (x, y), name, own, dark])
    heights = [at for at, *_ in placed]
    for one in range(1, len(heights)):
        heights[one] = max(heights[one], heights[one - 1] + gap)
    for one in reversed(range(len(heights))):
        heights[one] = min(heights[one], 1.0 if one == len(heights) - 1 else heights[one + 1] - gap)
    for height, (_, end, name, own, dark) in zip(heights, placed, strict=True):
        lead = {"arrowstyle": "-", "color": own, "lw": 0.6, "relpos": (0, 0.5)}
        ax.annotate(name, end, (1.03, height), textcoords="axes fraction", va="center", arrowprops=lead, **dark)


def named_lines(ax, rows, column, nested: float = 0, **how):
    """A line for each variant, `column` against N, wider by `nested` than the next one; names at the ends."""
    rows = rows.dropna(subset=[column]).sort_values("seq_len")
    groups, ends = dict([*rows.groupby("variant", sort=False)]), {}
    for wider, (name, group) in zip(reversed(range(len(groups))), groups.items(), strict=True):
        ax.plot(group["seq_len"], group[column], "o-", color=colour(name), lw=1 + nested * wider, ms=3 + nested * wider)
        ends[name] = (*group[["seq_len", column]].iloc[-1], colour(name))
    name_ends(ax, ends, **how)


def level(ax, y):
    """A dotted line to compare with."""
    ax.axhline(y, color="black", lw=0.8, ls=":")


def times(ax, between):
    """Write the axis as multiples, with the minor ticks `between` named."""
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}×" if round(y, 9) in between else ""))


def legend(figure, ax):
    """The figure with one legend for all panels, below them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def roofline(points, *, copy_gb_s, product_tflop_s, device):
    """TFLOP/s against operations per byte, `variant, phase, intensity, tflop_s`, under rates of copy and product."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    xs = [min(points["intensity"]) / 2, 1e3 * product_tflop_s / copy_gb_s, max(points["intensity"]) * 4]
    ax.plot(xs, [min(x * copy_gb_s / 1e3, product_tflop_s) for x in xs], color="black", lw=1)
    at = np.log(points[["intensity", "tflop_s"]].to_numpy())
    for place, (row, here) in enumerate(zip(points.itertuples(), at, strict=True)):
        own, forth, (aside, above) = colour(row.variant), row.phase == "forward", (at - here).T
        alike = (abs(at - here) < 0.12).all(axis=1) & (points["phase"] == row.phase).to_numpy()
        look = {"ms": 6 + 4 * alike[place + 1 :].sum(), "mfc": own if forth else "none"}  # one is a ring around another
        ax.plot(row.intensity, row.tflop_s, "o" if forth else "s", mec=own, **look)
        taken = [((way * aside > 0.12) & (way * aside < 1) & (abs(above) < 0.2)).any() for way in (1, -1)]
        offset, ha = [((7, 0), "left"), ((-7, 0), "right"), ((6, -8), "left")][[*taken, False].index(False)]
        text, how = "" if alike[:place].any() else ", ".join(points["variant"][alike]), {"va": "center", "size": 7.5}
        ax.annotate(text, (row.intensity, row.tflop_s), offset, textcoords="offset points", ha=ha, **how)
    ax.set(xscale="log", yscale="log", xlabel="useful operations per byte of memory traffic", ylabel="useful TFLOP/s")
    roof = f"slope: a copy, {copy_gb_s:,.0f} GB/s · top: a matrix product, {product_tflop_s:,.3g} TFLOP/s"
    ax.set(title=f"{device} · {roof}", ylim=(min(points["tflop_s"]) / 2, 2 * product_tflop_s))
    return figure
