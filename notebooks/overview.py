"""What the overview shows: all kinds of attention side by side, what they move, and what to use when."""

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Rectangle

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.dilated.attention import dilated_variant
from attnlib.laws import LINEAR, SCORES, Variant, evaluate, law_of
from attnlib.memory.fit import largest_seq_len
from notebooks import races
from report import plots
from report.predicted import with_laws
from report.race import duels
from report.run import Run
from report.tables import GIB, NO_FIGURE, digits, size, table

DUEL = ["first_ms", "second_ms", "ratio", "rounds", "run"]  # the numbers of a row of a duel
HEADS = 8  # of the tables
FUSED = "sdpa_(flash|efficient|cudnn)|fa4"  # the kernels that write no matrix


def all_kinds(run: Run) -> pd.DataFrame:
    """Training passes of each kernel of chapter 3 and of one dilated attention of chapter 4, in one type: time `ms` and
    peak `gib` for each head, the peak by the law, `law_gib`, where there is one, and `kind`, the name to draw it by."""
    kernels = run.of_chapter("03", "memory").query("status in ('ok', 'oom') and variant != 'tiled'")
    kernels = kernels[kernels["dtype"] == kernels["dtype"].mode()[0]].reset_index(drop=True)
    dilated = run.of_chapter("04", "memory").query("status == 'ok'")
    dilated = dilated[dilated["variant"] == dilated["variant"].iloc[-1]]
    every = pd.concat([with_laws(kernels, run.machine), dilated], ignore_index=True)
    each = {"gib": "backward_peak_bytes", "law_gib": "backward_peak_law_bytes"}
    per_head = {name: every[column] / every["heads"] / GIB for name, column in each.items()}
    every["kind"] = every["variant"].str.replace("dilated_.*", "dilated", regex=True)
    return every.assign(ms=every["forward_backward_ms"] / every["heads"], **per_head)


def kernel_of(every: pd.DataFrame) -> str:
    """What runs underneath the dilated attention that is shown."""
    return every["variant"].iloc[-1].removeprefix("dilated_")


def drawn(every: pd.DataFrame, fused: Iterable[str], machine: Machine):
    """Time and memory for each head against N, of plain, some `fused` and dilated attention, with the laws of memory
    dashed and a cross where memory ran out."""
    rows = every[every["kind"].isin(["naive", *fused, "dilated"])].sort_values("seq_len")
    rows = rows[rows["seq_len"] <= rows.loc[rows["kind"] != "dilated", "seq_len"].max()]  # names stand at one end
    figure, axes = plots.panels(["time", "memory"], xs=rows["seq_len"], device=machine.name, ylabel="", sharey=False)
    for ax, column, label in zip(axes, ("ms", "gib"), ("ms per head", "GiB per head"), strict=True):
        ax.set_ylabel(label)
        ends = {}
        for kind, group in rows.groupby("kind", sort=False):
            own, seen = plots.colour(kind), group.dropna(subset=[column])
            plots.line(ax, seen["seq_len"], seen[column], own, kind)
            ends[kind] = (*seen[["seq_len", column]].iloc[-1], own)
            if column == "gib":
                lost = group[group["status"] == "oom"]
                ax.plot(group["seq_len"], group["law_gib"], "--", color=own, lw=1)
                ax.plot(lost["seq_len"], lost["law_gib"], "x", color=own, ms=7, mew=2)
        plots.name_ends(ax, ends, gap=0.07, near=0.04)
    return figure


def longest(one: Variant, dtype: str, machine: Machine) -> int:
    """The longest sequence that the device's memory can train on, by the law."""
    return largest_seq_len(one, Shape(1, HEADS, 1, 64, dtype), machine.memory_bytes, "backward", machine)


def common_length(every: pd.DataFrame) -> int:
    """16384, or the longest N at which plain attention and the dilated one were both measured."""
    seen = every.query("status == 'ok'").groupby("kind")["seq_len"].agg(set)
    return max(n for n in seen["naive"] & seen["dilated"] if n <= 16384)


def as_numbers(every: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Of each kind at `common_length` what a training pass of HEADS keeps and holds at its peak, by the law or, where
    there is none, as measured; its `ms`, scaled like that from the heads that were measured; and the longest N by the
    law (0 for what is not dense: it holds less and less for each pair, so that no one N is searched for)."""
    n, dtype = common_length(every), every["dtype"].iloc[0]
    widths = [w // (8 if machine.is_cpu else 1) for w in (2048, 4096, 8192, 16384, 32768)]
    sparse = dilated_variant("dilated", widths, (1, 2, 4, 8, 16), kernel=kernel_of(every))
    shape, found = Shape(1, HEADS, n, 64, dtype), []
    seen = every[every["seq_len"] == n].dropna(subset=["ms"]).set_index("kind")
    measured = {account: HEADS * seen[f"{account}_bytes"] / seen["heads"] for account in ("saved", "backward_peak")}
    for one in [VARIANTS[name] for name in every["variant"].unique() if name in VARIANTS] + [sparse]:
        if one.name in seen.index and (one.law or one is sparse):
            law = law_of(one, shape, machine)
            row = {"variant": one.name, "ms": HEADS * seen["ms"][one.name]}
            row |= {what: law.bytes(what, shape, machine) if law else by[one.name] for what, by in measured.items()}
            found.append(row | {"longest": 0 if one is sparse else longest(one, dtype, machine)})
    return pd.DataFrame(found)


def fastest(numbers: pd.DataFrame) -> str:
    """Of `as_numbers` the fused kernel that takes the least time."""
    fused = numbers[numbers["variant"].str.match(FUSED)]
    return fused.loc[fused["ms"].idxmin(), "variant"]


def as_table(numbers: pd.DataFrame):
    """`as_numbers`, each beside plain attention."""
    plain = numbers.set_index("variant").loc["naive"]
    cells = {
        "variant": numbers["variant"],
        "kept": numbers["saved"].map(size),
        "peak": numbers["backward_peak"].map(size),
    }
    cells |= {"of plain": (numbers["backward_peak"] / plain["backward_peak"]).map("{:.1%}".format)}
    cells |= {"ms": numbers["ms"].map(digits), "faster": (plain["ms"] / numbers["ms"]).map("{:.1f}×".format)}
    return table(pd.DataFrame(cells | {"longest N": numbers["longest"].map(lambda n: f"{n:,}" if n else NO_FIGURE)}))


def crossed(run: Run, chapter: str, name: str) -> pd.DataFrame:
    """The first run's crossovers of a chapter's duels."""
    rows = pd.DataFrame(duels(run.of_chapter(chapter, name, DUEL).to_dict("records")))
    return races.crossings(rows).query("run == 1")


def road(machine: Machine):
    """Where the bytes of a forward pass live, and what each kind moves between memory and chip, by counting."""
    shape, rates = Shape(1, HEADS, 16384, 64, "bfloat16"), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    linear, scores = evaluate(LINEAR, shape, machine), evaluate(SCORES, shape, machine)
    kinds = {
        "plain": (6 * scores + 4 * linear, "Q, K, V, O and N × N\nscores and weights", "one operation at a time"),
        "flash": (4 * linear, "Q, K, V, O", "a block of scores,\ntheir maximum and sum"),
        "dilated": (
            (4 * sum(rates) + 3 * sum(rates[1:])) * linear,
            "Q, K, V, O",
            "the same, on every\nr-th row of a segment",
        ),
    }
    places = ("cores", "caches", "DRAM") if machine.is_cpu else ("registers,\nshared memory", "L2 cache", "HBM")
    figure, axes = plt.subplots(1, len(kinds), figsize=(plots.WIDTH, 2.3), layout="constrained")
    for ax, (kind, (nbytes, stays, inside)) in zip(axes, kinds.items(), strict=True):
        boxes = ((0.76, 0.24, inside, "#dce8f2"), (0.6, 0.09, "", "#ececec"), (0.0, 0.24, stays, "#f2e6d8"))
        for (y, high, text, own), place in zip(boxes, places, strict=True):
            ax.add_patch(Rectangle((0.0, y), 1, high, fc=own, ec="none"))
            ax.text(0.5, y + high / 2, text, ha="center", va="center", fontsize=7.5)
            if kind == "plain":
                ax.text(-0.04, y + high / 2, place, ha="right", va="center", fontsize=7.5, color="#555555")
        wide = 0.3 * (nbytes / kinds["plain"][0]) ** 0.5  # so that all three can be seen
        ax.add_patch(Rectangle((0.25 - wide / 2, 0.24), wide, 0.52, fc=plots.REGIME_COLOURS["bandwidth"], ec="none"))
        ax.text(0.46, 0.42, size(nbytes), va="center", fontsize=9)
        ax.set(title=kind, xlim=(0, 1), ylim=(0, 1))
        ax.axis("off")
    return figure


def became(run: Run) -> pd.Series:
    """The fused operator that each spelling of chapter 5 became in training, in the type that names the series, or ""."""
    atlas = run.of_chapter("05", "atlas", ["saved_bytes"]).fillna({"fused": ""})
    atlas = atlas[atlas["training"] & (atlas["spelling"] != "the fused call")]
    dtype = atlas["dtype"].iloc[0]
    return atlas[atlas["dtype"] == dtype].set_index("spelling")["fused"].rename(dtype)


def recognised(spelled: pd.Series) -> str:
    """How many ways to spell attention a compiler turned into a fused kernel, of those with a mask as well."""
    masked = spelled[[one for one in spelled.index if "causal" in one]]
    return (
        f"{int((spelled != '').sum())} of {len(spelled)} ways to spell attention in {spelled.name} become a fused kernel when "
        f"compiled for training, and {int((masked != '').sum())} of the {len(masked)} with a mask"
    )


def to_repeat(again: pd.DataFrame) -> tuple[str, str]:
    """Of rows of repeated passes the kernel to take if bits must repeat, the fastest of those that do in all of
    their rows at the longest N when asked to, and what that costs it."""
    again = again[again["seq_len"] == again["seq_len"].max()]
    asked = again[again["deterministic"].astype(str) == "True"]
    same = asked.groupby("variant")["same_bits"].agg(lambda told: (told.astype(str) == "True").all())
    times = asked[asked["variant"].isin(same.index[same])].groupby("variant")["ms"].sum()
    each = ["variant", "heads"]
    if times.empty:
        return NO_FIGURE, "no kernel repeats them"
    first = times.idxmin()
    strict, loose = (again[again["deterministic"].astype(str) == on].set_index(each)["ms"] for on in ("True", "False"))
    ratios = (strict / loose).loc[first]
    if ratios.max() < 1.1:
        return first, "deterministic algorithms take no longer there"
    return first, f"deterministic algorithms: {ratios.min():.1f} to {ratios.max():.1f} times as long"


def advice(run: Run, every: pd.DataFrame, best: str, spelled: Mapping[str, str], again: pd.DataFrame):
    """What to use when, with thresholds from the chapters' rows. best: the fastest fused kernel; spelled: `{spelling:
    fused operator or ""}`; again: rows of repeated passes."""
    dtype = every["dtype"].iloc[0]
    crossover = crossed(run, "03", "crossover").query("head_dim == 64 and dtype == @dtype")
    second = next(iter(crossover["second"]), "the flash kernel")
    also = "" if second == best else "already "
    reached = {name: f"{longest(VARIANTS[name], dtype, run.machine):,}" for name in ("naive", best)}
    bits = to_repeat(again)
    fused = ", ".join(name for name, became in spelled.items() if became)
    ends = f"by the laws memory ends it at N = {reached['naive']}, {best} at {reached[best]}"
    pays = crossed(run, "04", "duels")
    lines = [
        ("all pairs, no mask", best, f"{also}{second} over naive {races.froms(crossover)}", "3"),
        ("the weights themselves", "naive", ends, "2, 3"),
        (
            "long sequences, a pattern will do",
            "dilated",
            f"over dense {races.froms(pays)}, both by {pays['first'].iloc[0]}, queued",
            "4",
        ),
        ("a program of others, compiled", "see whether it was fused", f"in training: {fused or 'none tried'}", "5"),
        ("the same bits on every run", *bits, "5"),
    ]
    return table(pd.DataFrame(lines, columns=["when", "use", "threshold here", "chapter"]))
