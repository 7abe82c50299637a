"""The pictures of chapter 1: a sweep against its predictions, a profile against its ceilings."""

import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from attnlib.core import PHASES, Machine
from report import plots
from report.anatomy import short_name
from report.tables import bracketed, digits, size

PAIRED = 0.02  # lines closer than this are drawn one around the other, so that none hides
BEYOND = 1.5  # a share of a ceiling above which the prediction counts what was not done


def curve(ax, rows: pd.DataFrame, seen: str, law: str, phases: tuple[str, ...]) -> dict[str, tuple]:
    """A line of dots for each variant, its prediction dashed, a cross at the prediction where it ran out of memory in
    one of `phases`; the end of each, as plots.name_ends takes it. Lines that coincide lie one inside the other."""
    groups = {name: group.sort_values("seq_len") for name, group in rows.groupby("variant", sort=False)}
    ends = {name: (*group[["seq_len", law]].iloc[-1], plots.colour(name)) for name, group in groups.items()}
    for place, (name, group) in enumerate(groups.items()):
        inside = sum(abs(ends[other][1] / ends[name][1] - 1) < PAIRED for other in [*groups][place + 1 :])
        own = plots.colour(name)
        look = {"color": own, "lw": 1 + 2.5 * inside, "ms": 3 + 2.5 * inside}
        ax.plot(group["seq_len"], group[seen], "o-", **look)
        ax.plot(group["seq_len"], group[law], "--", color=own, lw=1)
        lost = group[group["phase"].isin(phases) & (group["status"] == "oom")]
        ax.plot(lost["seq_len"], lost[law], "x", color=own, ms=6 + 2 * inside, mew=1.5)
    return ends


def against_floors(rows: pd.DataFrame, machine):
    """Forward and backward together against N, measured and predicted: milliseconds, and picoseconds for each pair of
    positions, in which a quadratic cost is level."""
    pairs = rows["batch"] * rows["heads"] * rows["seq_len"] ** 2
    rows = rows.assign(least=rows["forward_floor_ms"] + rows["backward_floor_ms"])
    rows = rows.assign(each=1e9 * rows["forward_backward_ms"] / pairs, least_each=1e9 * rows["least"] / pairs)
    titles = ["a training pass", "the same, per pair of positions"]
    figure, axes = plots.panels(titles, xs=rows["seq_len"], ylabel="ms", sharey=False)
    lost = ("inputs", "forward", "backward")
    curve(axes[0], rows, "forward_backward_ms", "least", lost)
    ends = curve(axes[1], rows, "each", "least_each", lost)
    axes[1].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[1].yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "235" else "")
    axes[1].set_ylabel("ps per pair")
    plots.name_ends(axes[1], ends)
    figure.suptitle(machine.name, fontsize=9)
    return figure


def in_matrices(rows: pd.DataFrame, machine):
    """What is saved and what is held at the peak, in matrices of N × N numbers, beside the laws."""
    one = rows["batch"] * rows["heads"] * rows["seq_len"] ** 2 * 4
    kinds = {"saved": "saved for backward", "backward_peak": "peak of backward"}
    figure, axes = plots.panels([*kinds.values()], xs=rows["seq_len"], ylabel="matrices of N × N numbers")
    for ax, account in zip(axes, kinds, strict=True):
        ax.set_yscale("linear")
        drawn = rows.assign(seen=rows[f"{account}_bytes"] / one, law=rows[f"{account}_law_bytes"] / one)
        lost = ("inputs", "forward", "backward")[: 2 if account == "saved" else 3]
        ends = curve(ax, drawn, "seen", "law", lost)
    longest = rows[rows["seq_len"] == rows["seq_len"].max()].set_index("variant")["backward_peak_law_bytes"]
    axes[0].set_ylim(bottom=-0.2)
    alike, told = longest.groupby(longest), {}
    for nbytes, same in alike.groups.items():
        told[f"{', '.join(same)}\n{ends[same[0]][1]:.1f} ({size(nbytes)})"] = ends[same[0]]
    plots.name_ends(axes[1], told, gap=0.17, near=0)
    figure.suptitle(machine.name, fontsize=9)
    return figure


def operations_seen(rows: pd.DataFrame, variants: list[str], machine):
    """Bars of profiled milliseconds for each operation of `variants` at one length, ticks at the least each could take,
    the share of its ceiling beside it; forward above, backward below."""
    most = max(int((rows["variant"] == name).sum()) for name in variants)
    look = {"figsize": (plots.WIDTH, 0.11 * most + 0.6), "sharex": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(variants), **look)
    for ax, name in zip(axes, variants, strict=True):
        part = rows[rows["variant"] == name].sort_values(["phase", "place"], ascending=[False, True])
        forward = int((part["phase"] == PHASES[0]).sum())
        ys = [place + 0.8 * (place >= forward) for place in range(len(part))]
        ax.barh(ys, part["ms"], color=part["regime"].map(plots.REGIME_COLOURS), alpha=0.75)
        ax.plot(part["least_ms"], ys, "k|", ms=6)
        for y, ms, share in zip(ys, part["ms"], part["share"], strict=True):
            look = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
            ax.annotate(f"{share:.0%}" if share <= BEYOND else "see text", (ms, y), (3, 0), **look)
        ax.set_yticks(ys, part["op"].str.replace("_softmax_backward_data", "softmax’"), fontsize=7)
        ax.axhline(forward - 0.1, color="black", lw=0.8, ls=":")
        ax.set(title=f"{name}, N = {part['seq_len'].iloc[0]:,}", xlabel="ms", ylim=(most + 0.6, -0.8))
        ax.tick_params(axis="x", labelsize=7.5)
        ax.grid(axis="y", visible=False)
    axes[0].set_xlim(0, 1.15 * rows[rows["variant"].isin(variants)]["ms"].max())
    there = [regime for regime in plots.REGIME_COLOURS if regime in {*rows["regime"]}]
    marks = [Patch(color=plots.REGIME_COLOURS[regime], alpha=0.75, label=f"{regime}-bound") for regime in there]
    marks += [plt.Line2D([], [], color="black", marker="|", ls="", ms=7, label="least it could take")]
    axes[-1].legend(handles=marks, loc="lower right", fontsize=7.5, title=machine.name, title_fontsize=7.5)
    return figure


def brief(kernel: str, most: int = 36) -> str:
    """A kernel's short name without what frameworks put around it, and without its middle where it is longer."""
    bare = re.sub(r"^kernel_.*attncute|^cudnn_.*native_|(?<=_sm90|ocess)Flash.*", "", short_name(kernel))
    return bare if len(bare) <= most else f"{bare[: most // 2 - 4]} … {bare[1 - most // 2 :]}"


def exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """The local exponents of time between neighbouring lengths, of each variant and phase: `exponent` as measured,
    `of_floor`, and the floor's `regime` at the longer of the two."""
    found = []
    for phase in PHASES:
        for name, group in rows.dropna(subset=[f"{phase}_ms"]).groupby("variant", sort=False):
            timed = group.sort_values("seq_len")
            steps = np.log(timed[["seq_len", f"{phase}_ms", f"{phase}_floor_ms"]]).diff().iloc[1:].to_numpy()
            ends = zip(timed["seq_len"][:-1], timed["seq_len"][1:], timed[f"{phase}_regime"][1:], strict=True)
            for (n1, n2, regime), (step, seen, least) in zip(ends, steps, strict=True):
                found.append((name, phase, n1, n2, seen / step, least / step, f"{regime}-bound"))
    columns = ["variant", "phase", "from_seq_len", "seq_len", "exponent", "of_floor", "regime"]
    return pd.DataFrame(found, columns=columns)


def exponents_drawn(slopes: pd.DataFrame, machine):
    """The local exponents of `exponents` against N, those of the floors dashed."""
    figure, axes = plots.panels(PHASES, xs=slopes["seq_len"], device=machine.name, ylabel="local exponent of time")
    for ax, phase in zip(axes, PHASES, strict=True):
        ax.set_yscale("linear")
        plots.level(ax, 2)
        for name, group in slopes[slopes["phase"] == phase].groupby("variant", sort=False):
            ax.plot(group["seq_len"], group["of_floor"], "--", color=plots.colour(name), lw=1, alpha=0.7)
    for ax, phase in zip(axes, PHASES, strict=True):
        plots.named_lines(ax, slopes[slopes["phase"] == phase], "exponent", nested=0.8, near=0)
    return figure


def in_short(rows: pd.DataFrame, machine) -> str:
    """What a sweep, with laws, found at the longest N of D = 64 that all programs ran, and which trained the longest."""
    rows = rows[rows["head_dim"] == 64]
    longest = rows.dropna(subset=["forward_backward_ms"]).groupby("variant")["seq_len"].max().min()
    at, last = rows[rows["seq_len"] == longest].set_index("variant"), rows[rows["seq_len"] == rows["seq_len"].max()]
    took = bracketed(at["forward_backward_ms"], at["forward_backward_ms_count"])
    sizes = zip(at.index, took, at["backward_peak_bytes"].map(size), strict=True)
    few = " (in brackets: of fewer than five passes)" if "(" in "".join(took) else ""
    lost, trains = ([f"`{name}`" for name in last["variant"][last["status"] == one]] for one in ("oom", "ok"))
    roomy = int((last[last["status"] == "oom"]["needed_bytes"] <= machine.memory_bytes).sum())
    room = f" ({roomy} of them had room by their law, in pieces)" if roomy else ""
    stops = f" At N = {last['seq_len'].max():,} {', '.join(lost)} ran out of memory{room}; {', '.join(trains) or 'none'} trained."
    told = f"**In short.** A training pass over N = {longest:,} positions (batch {at['batch'].iloc[0]}, one head of 64, float32) takes{few}, and holds at its peak: {', '.join(f'`{name}` {ms} ms and {peak}' for name, ms, peak in sizes)}."
    best = [at.index[at[one] == at[one].min()] for one in ("forward_backward_ms", "backward_peak_bytes")]
    fast, small = (", ".join(f"`{name}`" for name in names) for names in best)
    return f"{told} {fast} takes the least time, {small} the least memory.{stops if lost else ''}"


def speeds_told(machine: Machine) -> list[tuple[str, str, str]]:
    """Lines of a table of a machine's ceilings: what, of which size, type or clock, and how fast."""
    ceilings = machine.ceilings
    lines = [("launch of one operation", "" if machine.is_cpu else "the host", f"{ceilings['launch_us']:.1f} µs")]
    if not machine.is_cpu and "graph_us" in ceilings:
        lines += [("the same", "the device, in a graph", f"{ceilings['graph_us']:.2f} µs")]
    for kind in ("copy", "clone"):
        for n, rate in ceilings[f"{kind}_gb_s"].items():
            cached = ", in the L2 cache" * (2 * int(n) <= machine.l2_bytes)
            lines += [(f"{kind} of a tensor", f"{size(int(n))}{cached}", f"{rate:,.0f} GB/s")]
    return lines + [("matrix product", t, f"{digits(rate)} TFLOP/s") for t, rate in ceilings["gemm_tflop_s"].items()]


def in_pieces(outdone: pd.DataFrame, machine: Machine) -> str:
    """What is to be said of points that ran out of memory though their laws had room: which, and what was said there."""
    said = outdone["reason"].iloc[0].split("Of the allocated memory ")[-1].split(" If ")[0].rstrip(".")
    named = zip(outdone["variant"], outdone["seq_len"], strict=True)
    told = f"By its law there was room for {' and '.join(f'`{name}` at N = {n:,}' for name, n in named)}."
    pieces = "What is reserved and unallocated the caching allocator holds in pieces, none of which is large enough for"
    more = "" if machine.is_cpu else f" {pieces} the next matrix: total memory is a budget, not a promise."
    return f"{told} What was said there: *{said}*.{more}"


def prices(rows: pd.DataFrame, last: pd.DataFrame, moved: Mapping[str, float], near: pd.Series) -> pd.DataFrame:
    """Of each program at the longest N, `last`, what it moves, in matrices, and takes, and holds; of all its `rows` the
    longest N that trained. near: its time over its floor."""
    trained = rows[rows["status"] == "ok"].groupby("variant")["seq_len"].max()
    floors, times = last["forward_floor_ms"] + last["backward_floor_ms"], last["forward_backward_ms"]
    columns = {"program": [*last.index], "moved": [f"{x:.1f}" for x in moved.values()], "floor ms": floors.map(digits)}
    columns |= {"measured ms": bracketed(times, last["forward_backward_ms_count"])}
    columns |= {"of the floor": [f"{near[name]:.2f}×" for name in last.index]}
    columns |= {"saved": last["saved_bytes"].map(size), "peak": last["backward_peak_bytes"].map(size)}
    return pd.DataFrame(columns | {"trained up to N": [f"{trained[name]:,}" for name in last.index]})
