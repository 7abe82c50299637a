"""The pictures of notebook 04: branches as strided views, when dilated attention pays, and time per token."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from attnlib.core import PHASES, Shape
from attnlib.dilated.definition import dilated_reach
from attnlib.dilated.views import Branches, all_views, offset
from report import plots
from report.run import Run
from report.skipping import NotMeasured
from report.tables import digits


def schematic(branches: Branches, heads: int, seq_len: int):
    """The rows of each head, numbered by their place in memory, once for each branch: coloured by segment, filled where
    they are kept, under the view that takes them. Beside it, in how many branches each query sees each key."""
    figure = plt.figure(figsize=(plots.WIDTH, 3.3), layout="constrained")
    places = figure.add_gridspec(heads, 2, width_ratios=(3.3, 1))
    ax = figure.add_subplot(places[:, 0])
    for place, (width, rate) in enumerate(branches):
        top = place * (heads + 1.3)
        (view,) = all_views(1, heads, seq_len, ((width, rate),), "modulo")  # one, where r ≥ H or r = 1
        steps = view.strides((heads * seq_len, seq_len, 1))
        axes = [at for at, size in enumerate(view.size) if size > 1]
        text = f"{' × '.join(str(view.size[at]) for at in axes)} rows, steps {', '.join(str(steps[at]) for at in axes)}"
        ax.text(0, top - 0.25, f"w = {width}, r = {rate}: a view of {text}", size=8)
        for head in range(heads):
            for row in range(seq_len):
                own = sns.color_palette("Dark2")[row // width]
                kept = row % width % rate == offset(head, heads, rate, "modulo")
                corner, ink = (row + 0.05, top + head + 0.05), "white" if kept else "grey"
                ax.add_patch(Rectangle(corner, 0.9, 0.9, fc=own if kept else "none", ec=own, lw=0.8))
                ax.text(row + 0.5, top + head + 0.53, head * seq_len + row, size=7, color=ink, ha="center", va="center")
            ax.text(-0.2, top + head + 0.53, f"head {head}", size=7, ha="right", va="center")
    ax.set(xlim=(-2, seq_len), ylim=(len(branches) * (heads + 1.3) - 1.1, -1))
    ax.axis("off")
    widths, rates = zip(*branches, strict=True)
    seen = dilated_reach(Shape(1, heads, seq_len, 1), segment_lengths=widths, dilation_rates=rates)
    for head in range(heads):
        ax = figure.add_subplot(places[head, 1])
        ax.imshow(seen[head], cmap="Blues", vmin=0, vmax=len(branches), interpolation="nearest")
        ax.set(xticks=[], yticks=[], ylabel="queries", title=f"head {head}")
    ax.set_xlabel("keys")
    return figure


def rounded(text: str) -> str:
    """A text whose long numbers have three digits and commas."""
    return re.sub(r"\d{4,}", lambda found: f"{float(f'{float(found[0]):.3g}'):,.0f}", text)


def span(values: pd.Series, form: str = "") -> str:
    """The smallest to the largest of some values, or the one where they print alike."""
    return " to ".join(dict.fromkeys(f"{x:{form}}" if form else digits(x) for x in (values.min(), values.max())))


def paying(by_clock: Mapping[str, pd.DataFrame], promised: Mapping[int, float], device: str):
    """Ratios of duels against N, one panel per phase, a line with its interval for each clock; dashed, what the
    operations promise."""
    figure, axes = plots.panels(PHASES, xs=[*promised], device=device, ylabel="dense ÷ dilated")
    for ax, phase in zip(axes, PHASES, strict=True):
        plots.level(ax, 1)
        ax.plot([*promised], [*promised.values()], "--", color="black", lw=1)
        near, far = sorted(promised)[-2:]
        middle = (near * far) ** 0.5, (promised[near] * promised[far]) ** 0.5
        ax.annotate("promised", middle, (-6, 4), textcoords="offset points", size=8, ha="right")
        above, own = len(by_clock) > 1, plots.colour("dilated")
        for style, (clock, rows) in zip(("-", "-."), by_clock.items(), strict=False):
            cell = rows[rows["phase"] == phase].sort_values("seq_len")
            ax.fill_between(cell["seq_len"], cell["low"], cell["high"], color=own, alpha=0.3, lw=0)
            plots.line(ax, cell["seq_len"], cell["ratio"], own, clock, f"o{style}")
            beside, above = (0, 9) if above else (4, -11), False
            at = cell[["seq_len", "ratio"]].iloc[0]
            ax.annotate(clock, at, beside, textcoords="offset points", color=own, size=8)
        ax.margins(y=0.12)
        plots.times(ax, (0.2, 0.5, 2, 5, 20))
    figure.set_figheight(2.4)
    return figure


def per_token(cases: Mapping[str, pd.DataFrame], device: str):
    """Time per token, `<phase>_ns`, against N: one panel per phase, a line for each variant, its name beside it."""
    lengths = sorted({n for rows in cases.values() for n in rows["seq_len"]})
    figure, axes = plots.panels(PHASES, xs=lengths, device=device, ylabel="ns per token")
    for ax, phase in zip(axes, PHASES, strict=True):
        for name, rows in cases.items():
            rows = rows.dropna(subset=f"{phase}_ns").sort_values("seq_len")
            plots.line(ax, rows["seq_len"], rows[f"{phase}_ns"], plots.colour(name), name)
            n, ns = rows[["seq_len", f"{phase}_ns"]].iloc[-1]
            beside, side = ((0, 7), "center") if name == "dilated" else ((-6, -2), "right")
            ax.annotate(name, (n, ns), beside, textcoords="offset points", color=plots.colour(name), size=8, ha=side)
        ticks = lengths[::2]
        names = [f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 1024:g}K" if n >= 1024 else f"{n}" for n in ticks]
        ax.set_xticks(ticks, names, rotation=0)
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    figure.set_figheight(2.4)
    return figure


def pays_from(by_clock: Mapping[str, pd.DataFrame]) -> list[str]:
    """From which N on dilated attention pays by each clock, from crossings: between which where one run has only its
    interval."""
    told = []
    for clock, cells in by_clock.items():
        each = []
        for phase, cell in cells.groupby("phase", sort=False):
            ends = [rounded(f"{n:.0f}") for n in sorted(cell["seq_len"]) if math.isfinite(n)]
            span = f"from N = {' to '.join(dict.fromkeys(ends))} on" if ends else "at no length tried"
            low, high = cell[["low", "high"]].iloc[0]
            if len(cell) == 1 and math.isfinite(high) and low < high:  # no second run
                span = f"from somewhere between N = {low:.0f} and {high:.0f} on"
            each.append(rounded(f"{phase} {span}"))
        told.append(f"{clock}, {' and '.join(each)}")
    return told


def few_behind(at: pd.DataFrame, base: int) -> list[str]:
    """Which times of lengths from `base` on stand on fewer than five passes, and from where on."""
    counted = {"forward": "forward_ms_count", "of both passes together": "forward_backward_ms_count"}
    few = {what: at.index[(at.index >= base) & (at[column] < 5)] for what, column in counted.items()}
    return [f"{what} from N = {ns[0]:,} on" for what, ns in few.items() if len(ns)]


def flatness(times: pd.Series, base: int, flat: Mapping[str, bool], few: list[str], lengths: pd.DataFrame) -> list[str]:
    """What is to be said of the time of a token over N, and of where memory ended."""
    told, whole = [], (digits(times.min()), digits(times.max()))
    later = [digits(end) for end in (times.iloc[1:].min(), times.iloc[1:].max())]
    if flat:
        grown = f"While $N$ grows {times.index[-1] / base:,.0f}-fold, the forward time of a token lies between"
        told += [
            f"The line is {'as' if all(flat.values()) else 'not as'} flat as predicted. {grown} {' and '.join(whole)} ns,"
        ]
        told[-1] += f" and from the second of these lengths on between {' and '.join(later)} ns."
        if not all(flat.values()) and times.iloc[0] == times.max():
            told.append("What makes the shortest dearer was not traced.")
    if few:
        told += [
            f"Fewer than five passes stand behind these times {', and '.join(few)}; @tbl-dilated-lengths counts them."
        ]
    ended = lengths[lengths["status"] != "ok"]
    return told + [
        f"At N = {n:,} memory ends in the {phase} pass."
        for n, phase in zip(ended["seq_len"], ended["phase"], strict=True)
    ]


def patterns(run: Run) -> str:
    """What chapter 4's sparse patterns of as many keys take forward, in words; nothing where they were not measured."""
    names = ["window", "random_blocks", "dilated_1024"]
    with suppress(NotMeasured):
        rows = run.of_chapter("04", "remedies").set_index("variant")
        told = [f"{name} {digits(rows['forward_ms'][name])}" for name in names if rows["forward_ms"].get(name, 0) > 0]
        where = f"at N = {rows['seq_len'].max():,}"
        return f"; of about a thousand keys {where}, forward, ms: {', '.join(told)}" if told else ""
    return ""
