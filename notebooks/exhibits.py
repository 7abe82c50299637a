"""What chapter 3 alone shows: a step of flash attention, its softmax on four scores, its curves and tables."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.patches import Rectangle

from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import Variant, bytes_needed
from attnlib.variants.tiled import take_in
from notebooks.races import worst
from notebooks.sweep_figures import brief
from report import plots
from report.accuracy import RESULTS
from report.tables import bracketed, digits, grid, mask, size, table

HELD, NOW, WRITTEN, ASIDE = "#56b4e9", "#d62728", "#3c3c3c", "#cccccc"  # in fast memory; alive for one step; done; not
SHADES = ("#08306b", "#2171b5", "#6baed6", "#c6dbef")  # of four scores


def online(scores: Sequence[float]) -> list[dict]:
    """m, ell and `fade`, what the sum before was multiplied by, after each score: `tiled.take_in` with tiles of one."""
    one, found = torch.ones(1, 1, 1), []
    m, ell, o = torch.full_like(one, -math.inf), torch.zeros_like(one), torch.zeros_like(one)
    for score in scores:
        before = m.item()
        take_in(one, score * one, one, m, ell, o, (0, 0, False))
        found.append({"m": m.item(), "ell": ell.item(), "fade": math.exp(before - m.item())})
    return found


def _blocks(ax, x: float, y: float, name: str, colours: Sequence[str | None], down: bool, wide: float = 1):
    """A row of blocks (a column, if down) from x, y on, with its name before the first."""
    for at, colour in enumerate(colours):
        corner = (x, y - at) if down else (x + at, y)
        size = (wide, 0.9) if down else (0.9, wide)
        ax.add_patch(Rectangle(corner, *size, fc=colour or "white", ec=WRITTEN, lw=0.6))
    there = (x + wide / 2, y + 1.25) if down else (x - 0.3, y + wide / 2)
    ax.text(*there, name, ha="center" if down else "right", va="center", fontsize=9)


def step(ax, blocks: int = 6, row: int = 2, column: int = 3):
    """The blocks of Q, K, V and O at one step of the forward pass, and the tiles of scores before and after it."""
    top = blocks - 1
    _blocks(ax, 0, top + 2.6, "$K$", [HELD if j == column else None for j in range(blocks)], False, 0.7)
    _blocks(ax, 0, top + 1.6, "$V$", [HELD if j == column else None for j in range(blocks)], False, 0.7)
    _blocks(ax, -1.4, top, "$Q$", [HELD if i == row else None for i in range(blocks)], True, 0.8)
    done = [HELD if i == row else ASIDE if i < row else None for i in range(blocks)]
    _blocks(ax, blocks + 0.5, top, "$O$", done, True, 0.8)
    _blocks(ax, blocks + 1.7, top, r"$m, \ell$", done, True, 0.4)
    for i in range(blocks):
        for j in range(blocks):
            seen, here = i < row or (i == row and j < column), (i, j) == (row, column)
            look = {"fc": NOW, "ec": NOW} if here else {"fc": "#eeeeee" if seen else "none", "ec": ASIDE, "ls": ":"}
            ax.add_patch(Rectangle((j, top - i), 0.9, 0.9, lw=0.8, **look))
    forth = {"arrowstyle": "->", "color": WRITTEN, "lw": 1}
    ax.annotate("", (blocks, top - row + 0.45), (column + 1, top - row + 0.45), arrowprops=forth, zorder=3)
    ax.text(-1.4, -0.75, "blue: in fast memory at this step", fontsize=7.5, color="#1a6d9c")
    ax.text(-1.4, -1.5, "red: the only scores that exist now", fontsize=7.5, color=NOW)
    ax.text(-1.4, -2.25, "grey: done; of the scores nothing is kept", fontsize=7.5, color="#666666")
    ax.set(xlim=(-2.3, blocks + 2.4), ylim=(-2.6, top + 3.6), aspect="equal")
    ax.axis("off")


def sums(ax, scores: Sequence[float]):
    """The running sum after each score, made of one piece per score, with the maximum that it is measured against."""
    for at, now in enumerate(found := online(scores)):
        bottom = 0.0
        for one, shade in zip(scores[: at + 1], SHADES, strict=False):
            piece = math.exp(one - now["m"])
            ax.bar(at, piece, 0.55, bottom=bottom, color=shade, ec="white", lw=0.5)
            bottom += piece
        ax.text(at, bottom + 0.05, f"$\\ell$ = {now['ell']:.2f}", ha="center", fontsize=8)
        if at:
            ax.text(at - 0.5, 2.3, f"×{now['fade']:.2f}\n→", ha="center", fontsize=8, color=NOW)
    ticks = [f"{score:g}\n{now['m']:g}" for score, now in zip(scores, found, strict=True)]
    ax.set_xticks(range(len(scores)), ticks)
    ax.text(-0.85, -0.045, "score\nmaximum", ha="right", va="top", fontsize=8, transform=ax.get_xaxis_transform())
    ax.text(-0.7, 2.42, "the old\nsum fades", va="center", fontsize=8, color=NOW)
    ax.set(ylim=(0, 2.75), xlim=(-0.8, len(scores) - 0.5), ylabel="sum so far, a piece for each score")
    ax.grid(visible=False)


def one_step(scores: Sequence[float]):
    """The figure of `step` and `sums`."""
    kind = {"figsize": (plots.WIDTH, 2.9), "layout": "constrained", "width_ratios": (1, 1.05)}
    figure, (left, right) = plt.subplots(1, 2, **kind)
    left.set_title("One step of the forward pass")
    right.set_title("Four scores, one at a time")
    step(left)
    sums(right, scores)
    return figure


def peaks(rows: pd.DataFrame, title: str):
    """The peak of training against N in tensors of the size of Q: the law as a line, what was measured as dots."""
    figure, (ax,) = plots.panels((title,), xs=rows["seq_len"], ylabel="peak ÷ size of Q")
    ends = {}
    for name, one in rows.sort_values("seq_len").groupby("variant", sort=False):
        own, unit, lost = plots.colour(name), one["input_bytes"] / 3, one["status"] == "oom"
        law = one["backward_peak_law_bytes"] / unit
        ax.plot(one["seq_len"], law, color=own, lw=1.2)
        ax.plot(one["seq_len"], one["backward_peak_bytes"] / unit, "o", color=own, ms=4)
        ax.plot(one["seq_len"][lost], law[lost], "x", color=own, ms=7, mew=2)
        ends[name] = (one["seq_len"].iloc[-1], law.iloc[-1], own)
    plots.name_ends(ax, ends, near=0.01, under=15)
    return figure


def crossed_over(rows: pd.DataFrame, device: str):
    """Ratios of duels against N with their intervals as bands, a panel for each phase: colours tell D, lines the type."""
    figure, axes = plots.panels(PHASES, xs=sorted(set(rows["seq_len"]))[::-2], device=device, ylabel="naive ÷ flash")
    between, named = (0.5, 2, 3, 5) if rows["ratio"].max() < 50 * rows["ratio"].min() else (), []
    looks = {"float32": {"ls": ":"}, "bfloat16": {"lw": 3, "alpha": 0.45}, "float16": {"ls": "--"}}
    for ax, phase in zip(axes, PHASES, strict=True):
        named.append({})
        plots.level(ax, 1)
        cells = rows[rows["phase"] == phase].sort_values(["head_dim", "seq_len"])
        hues = dict(zip(cells["head_dim"].unique(), plots.SPARE, strict=False))
        for (d, _), alike in cells.groupby(["head_dim", cells["dtype"] != "float32"]):
            for dtype, cell in alike.groupby("dtype"):
                ax.fill_between(cell["seq_len"], cell["low"], cell["high"], color=hues[d], alpha=0.2, lw=0)
                ax.plot(cell["seq_len"], cell["ratio"], color=hues[d], **{"lw": 1.2} | looks[dtype])
            names = " and\n".join(sorted(alike["dtype"].unique()))
            named[-1][f"{names}, D {d}"] = (*alike[["seq_len", "ratio"]].iloc[-1], hues[d])
        plots.times(ax, between)
    for ax, ends in zip(axes, named, strict=True):
        plots.name_ends(ax, ends, gap=0.13, near=0)
    return figure


def rates_drawn(rows: pd.DataFrame, product_tflop_s: float, title: str):
    """`forward_tflop_s` and `backward_tflop_s` against N, a row of panels each, without and with a mask."""
    masks, columns = [part for _, part in rows.groupby("causal")], [f"{phase}_tflop_s" for phase in PHASES]
    look = {"figsize": (plots.WIDTH, 4.2), "sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(PHASES), len(masks), **look)
    figure.suptitle(title, fontsize=9)
    for row, phase, column in zip(axes, PHASES, columns, strict=True):
        row[0].set_ylabel(f"{phase} TFLOP/s")
        for ax, part in zip(row, masks, strict=True):
            plots.level(ax, product_tflop_s)
            plots.over_lengths(ax, rows["seq_len"])
            ax.set(ylim=(0, 1.05 * max(product_tflop_s, rows[columns].max(axis=None))))
            plots.named_lines(ax, part, column, near=0.02)
            for name, few in part[part[f"{phase}_ms_count"] < 5].groupby("variant"):
                ax.plot(few["seq_len"], few[column], "o", ms=3.5, mfc="white", mec=plots.colour(name), zorder=5)
    for ax, part in zip(axes[0], masks, strict=True):
        ax.set_title("causal" if part["causal"].iloc[0] else "full")
    return figure


def in_blocks(rows: pd.DataFrame, title: str):
    """Of a block: the time with `naive` over that with each other variant, and tokens per millisecond, against N."""
    rows = rows[rows["variant"] != "sdpa_default"]
    base = rows[rows["variant"] == "naive"].set_index("seq_len")["forward_backward_ms"]
    rows = rows.assign(ratio=rows["seq_len"].map(base) / rows["forward_backward_ms"])
    how = {"xs": sorted(set(rows["seq_len"]))[::2], "ylabel": "", "sharey": False}
    figure, (left, right) = plots.panels(("time, naive ÷ kernel", "tokens per ms"), **how)
    figure.suptitle(title, fontsize=9)
    plots.level(left, 1)
    plots.named_lines(left, rows[rows["variant"] != "naive"], "ratio", near=0.02)
    plots.times(left, (0.5, 2, 3, 5))
    plots.named_lines(right, rows, "tokens_per_ms", near=0.02)
    return figure


def both_rates(rows: pd.DataFrame):
    """A table of rows of `with_rates`: TFLOP/s, forward / backward, or how the point ended."""
    phases = zip(*(bracketed(rows[f"{one}_tflop_s"], rows[f"{one}_ms_count"]) for one in PHASES), strict=True)
    ended_so = rows["status"].where(rows["forward_tflop_s"].isna(), [" / ".join(both) for both in phases])
    return grid(rows.assign(D=rows["head_dim"], mask=mask(rows), N=rows["seq_len"]), ended_so, ["D", "mask", "N"])


def spent(rows: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of each kernel of a pass, from rows of anatomy.profiled, and its `share` of the pass."""
    found = rows.groupby(["variant", "phase", "kernel", "seq_len"], sort=False)["ms"].sum().reset_index()
    return found.assign(share=found["ms"] / found.groupby(["variant", "phase", "seq_len"])["ms"].transform("sum"))


def by_kernel(rows: pd.DataFrame):
    """A table of rows of `spent`, from one per cent of a pass on."""
    rows = rows[rows["share"] >= 0.01]
    cells = [f"{digits(ms)} ({share:.0%})" for ms, share in rows[["ms", "share"]].to_numpy()]
    rows = rows.assign(kernel=rows["kernel"].map(brief), N=rows["seq_len"].map("N = {:,}".format))
    found = grid(rows, cells, ["variant", "phase", "kernel"], "N").data
    return table(found.assign(kernel=found.pop("kernel")))


def accuracies(rows: pd.DataFrame):
    """A table of rows of accuracy.compared: errors without a mask, also over those of `naive`, and over the reference's."""
    plain, found = rows[~rows["causal"]], []
    base = plain[plain["variant"] == "naive"].set_index("dtype")
    for (variant, dtype), same in rows.groupby(["variant", "dtype"], sort=False):
        row = {"dtype": dtype, "variant": variant}
        for what in RESULTS:
            error = same.loc[~same["causal"], f"{what}_error"].item()
            row[what] = f"{error:.1e} ({error / base.loc[dtype, f'{what}_error']:.2f}×)"
        found.append(row | {"of the reference": f"{worst(same.to_dict('records')):.2f}×"})
    return table(pd.DataFrame(found))


def promise(first: Variant, second: Variant, shape: Shape, machine: Machine) -> str:
    """What two variants need for a training step, inputs included, by their laws: a sentence."""
    more, less = (size(bytes_needed(one, shape, machine)) for one in (first, second))
    where = f"one sequence of N = {shape.seq_len:,}, {shape.heads} heads of {shape.head_dim}, {shape.dtype}"
    return f"**What the laws say in memory.** A training step ({where}) takes {more} with `{first.name}` and {less} with `{second.name}`, inputs included."
