"""What the overview shows: all kinds of attention side by side, what they move, and what to use when."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Rectangle

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.dilated.attention import dilated_variant
from attnlib.laws import LINEAR, SCORES, Variant, evaluate
from attnlib.memory.fit import largest_seq_len
from notebooks import races
from report import plots
from report.predicted import with_laws
from report.race import duels
from report.run import Run
from report.tables import GIB, NO_FIGURE, digits, size, table

DUEL = ["first_ms", "second_ms", "ratio", "rounds", "run"]  # the numbers of a row of a duel
HEADS = 8  # of the tables


def all_kinds(run: Run) -> pd.DataFrame:
    """Training passes of each kernel of chapter 3 and of one dilated attention of chapter 4, in one type: time `ms` and
    peak `gib` for each head, and, of what has a law there, the peak by it, `law_gib`."""
    kernels = run.of_chapter("03", "memory").query("status == 'ok' and variant != 'tiled'")
    kernels = kernels[kernels["dtype"] == kernels["dtype"].mode()[0]].reset_index(drop=True)
    dilated = run.of_chapter("04", "memory").query("status == 'ok'")
    dilated = dilated[dilated["variant"] == dilated["variant"].iloc[-1]]
    every = pd.concat([with_laws(kernels, run.machine), dilated], ignore_index=True)
    each = {"gib": "backward_peak_bytes", "law_gib": "backward_peak_law_bytes"}
    per_head = {name: every[column] / every["heads"] / GIB for name, column in each.items()}
    return every.assign(ms=every["forward_backward_ms"] / every["heads"], **per_head)


def kernel_of(every: pd.DataFrame) -> str:
    """What runs underneath the dilated attention that is shown."""
    return every["variant"].iloc[-1].removeprefix("dilated_")


def drawn(every: pd.DataFrame, machine: Machine):
    """Time and memory against sequence length, the laws dashed."""
    figure, axes = plots.panels(["time", "memory"], xs=every["seq_len"], device=machine.name, ylabel="", sharey=False)
    for ax, column, label in zip(axes, ("ms", "gib"), ("ms per head", "GiB per head"), strict=True):
        plots.lines(ax, every.dropna(subset=[column]), column)
        ax.set_ylabel(label)
    for name, group in every.dropna(subset=["law_gib"]).groupby("variant"):
        axes[1].plot(group["seq_len"], group["law_gib"], "--", color=plots.colour(name), lw=1, alpha=0.7)
    return plots.legend(figure, axes[0])


def longest(one: Variant, dtype: str, machine: Machine) -> int:
    """The longest sequence that the device's memory can train on, by the law."""
    return largest_seq_len(one, Shape(1, HEADS, 1, 64, dtype), machine.memory_bytes, "backward", machine)


def as_numbers(every: pd.DataFrame, machine: Machine):
    """What each keeps and holds at N = 16384, or the longest that was measured, its time, and how far it gets."""
    at, dtype = min(16384, int(every.loc[every["variant"] == "naive", "seq_len"].max())), every["dtype"].iloc[0]
    widths = [w // (8 if machine.is_cpu else 1) for w in (2048, 4096, 8192, 16384, 32768)]
    sparse = dilated_variant(every["variant"].iloc[-1], widths, (1, 2, 4, 8, 16), kernel=kernel_of(every))
    found, shape = [], Shape(1, HEADS, at, 64, dtype)
    for one in [VARIANTS[name] for name in every["variant"].unique() if name in VARIANTS] + [sparse]:
        if one.law:
            ms = every.loc[(every["variant"] == one.name) & (every["seq_len"] == at), "ms"]
            cells = {"variant": one.name, "kept for backward": size(one.law.bytes("saved", shape, machine))}
            cells |= {f"peak at N = {at:,}": size(one.law.bytes("backward_peak", shape, machine))}
            cells |= {"ms": digits(HEADS * ms.iloc[0]) if len(ms) else NO_FIGURE}
            # what is not dense holds less and less for each pair: its memory has no one longest N that is searched for
            found.append(cells | {"longest N": NO_FIGURE if one is sparse else f"{longest(one, dtype, machine):,}"})
    return table(pd.DataFrame(found))


def crossed(run: Run, chapter: str, name: str) -> pd.DataFrame:
    """The first run's crossovers of a chapter's duels."""
    rows = pd.DataFrame(duels(run.of_chapter(chapter, name, DUEL).to_dict("records")))
    return races.crossings(rows).query("run == 1")


def froms(cells: pd.DataFrame) -> str:
    """From which N on the second wins: "forward from N = 512, backward from N = 1024"."""
    told = [f"{row['phase']} from N = {races.length(row['seq_len'], row)}" for row in cells.to_dict("records")]
    return ", ".join(text.replace("N = >", "N >").replace("N = ≤", "N ≤") for text in told)


def road(machine: Machine):
    """What a forward pass of each kind moves between memory and chip, by counting."""
    shape, rates = Shape(1, HEADS, 16384, 64, "bfloat16"), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    linear, scores = evaluate(LINEAR, shape, machine), evaluate(SCORES, shape, machine)
    kinds = {
        "plain": (6 * scores + 4 * linear, "scores, weights: N × N", "one operation\nafter another"),
        "flash": (4 * linear, "Q, K, V, O", "a block of scores,\ntheir maximum and sum"),
        "dilated": (
            (4 * sum(rates) + 3 * sum(rates[1:])) * linear,
            "Q, K, V, O",
            "the same, on every\nr-th row of a segment",
        ),
    }
    figure, axes = plt.subplots(1, len(kinds), figsize=(plots.WIDTH, 2.0), layout="constrained")
    for ax, (kind, (nbytes, stays, inside)) in zip(axes, kinds.items(), strict=True):
        for y, text, own in ((0.72, f"chip: {inside}", "#dce8f2"), (0.02, f"memory: {stays}", "#f2e6d8")):
            ax.add_patch(Rectangle((0.02, y), 0.96, 0.26, fc=own, ec="none"))
            ax.text(0.5, y + 0.13, text, ha="center", va="center", fontsize=7)
        wide = 0.3 * (nbytes / kinds["plain"][0]) ** 0.5  # so that all three can be seen
        ax.add_patch(Rectangle((0.22 - wide / 2, 0.28), wide, 0.44, fc=plots.REGIME_COLOURS["bandwidth"], ec="none"))
        ax.text(0.45, 0.5, f"{size(nbytes)}\nat N = {shape.seq_len:,}", va="center", fontsize=8)
        ax.set(title=kind, xlim=(0, 1), ylim=(0, 1))
        ax.axis("off")
    return figure


def advice(run: Run, every: pd.DataFrame, best: str, spelled: Mapping[str, str], again: pd.DataFrame):
    """What to use when, with thresholds from the chapters' rows. best: the fastest fused kernel; spelled: `{spelling:
    fused operator or ""}`; again: rows of repeated passes."""
    dtype = every["dtype"].iloc[0]
    crossover = crossed(run, "03", "crossover").query("head_dim == 64 and dtype == @dtype")
    second = next(iter(crossover["second"]), "the flash kernel")
    reached = {name: f"{longest(VARIANTS[name], dtype, run.machine):,}" for name in ("naive", best)}
    same = again[again["same_bits"].astype(str) == "True"]
    bits = {on: ", ".join(rows["variant"].unique()) for on, rows in same.groupby("deterministic")}
    fused = ", ".join(name for name, became in spelled.items() if became)
    ends = f"memory ends it at N = {reached['naive']}, {best} at {reached[best]}"
    lines = [
        ("all pairs, no mask", best, f"{second} over naive {froms(crossover)}", "3"),
        ("the weights themselves", "naive", ends, "2, 3"),
        (
            "long sequences, a pattern will do",
            f"dilated over {kernel_of(every)}",
            froms(crossed(run, "04", "duels")),
            "4",
        ),
        ("a program of others, compiled", "see whether it was fused", f"in training: {fused or 'none tried'}", "5"),
        ("the same bits on every run", bits.get(True, NO_FIGURE), f"without asking: {bits.get(False, 'none')}", "5"),
    ]
    return table(pd.DataFrame(lines, columns=["when", "use", "threshold here", "chapter"]))
