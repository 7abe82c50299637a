"""What the overview shows: all kinds of attention side by side, what they move, and what to use when."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Rectangle

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.dilated.attention import dilated_variant
from attnlib.laws import LINEAR, SCORES, Variant, evaluate, law_of
from attnlib.memory.fit import largest_seq_len
from notebooks import races
from notebooks.branches import patterns
from report import plots, stored
from report.predicted import with_laws
from report.race import duels
from report.run import CLAIMS, Run
from report.skipping import NotMeasured
from report.tables import GIB, NO_FIGURE, digits, size, table

DUEL = ["first_ms", "second_ms", "ratio", "rounds", "run"]  # the numbers of a row of a duel
HEADS = 8  # of the tables
SIZED = {"saved": "saved", "peak": "backward_peak"}
LAWFUL = {"gib": "", "law_gib": "_law"}
FUSED = "sdpa_(flash|efficient|cudnn)|fa4"  # the kernels that write no matrix
CALLED = {"fa4": "the package flash-attn-4", "sdpa_cudnn": "cuDNN", "sdpa_efficient": "the memory-efficient kernel"}


def all_kinds(run: Run) -> pd.DataFrame:
    """Training passes of each kernel of chapter 3 and of one dilated attention of chapter 4, in one type: time `ms` and
    peak `gib` for each head, the peak by the law, `law_gib`, where there is one, and `kind`, the name to draw it by."""
    kernels = run.of_chapter("03", "memory").query("status in ('ok', 'oom') and variant != 'tiled'")
    kernels = kernels[kernels["dtype"] == kernels["dtype"].mode()[0]].reset_index(drop=True)
    dilated = run.of_chapter("04", "memory").query("status == 'ok'")
    dilated = dilated[dilated["variant"] == dilated["variant"].iloc[-1]]
    every = pd.concat([with_laws(kernels, run.machine), dilated], ignore_index=True)
    per_head = {name: every[f"backward_peak{law}_bytes"] / every["heads"] / GIB for name, law in LAWFUL.items()}
    every["kind"] = every["variant"].str.replace("dilated_.*", "dilated", regex=True)
    times = {"ms": every["forward_backward_ms"] / every["heads"], "passes": every["forward_backward_ms_count"]}
    return every.assign(**times, **per_head)


def drawn(every: pd.DataFrame, fused: Iterable[str], device: str):
    """Time and memory for each head against N, of plain, some `fused` and dilated attention, with the laws of memory
    dashed and a cross where memory ran out."""
    rows = every[every["kind"].isin(["naive", *fused, "dilated"])].sort_values("seq_len")
    rows = rows[rows["seq_len"] <= rows.loc[rows["kind"] != "dilated", "seq_len"].max()]  # names stand at one end
    xs = rows.loc[rows["kind"] != "dilated", "seq_len"]
    figure, axes = plots.panels(["time", "memory"], xs=xs, device=device, ylabel="", sharey=False)
    for ax, column, label in zip(axes, ("ms", "gib"), ("ms per head", "memory per head"), strict=True):
        ax.set_ylabel(label)
        ends, furthest = {}, rows["seq_len"].max()
        for kind, group in rows.groupby("kind", sort=False):
            own, seen = plots.colour(kind), group.dropna(subset=[column])
            plots.line(ax, seen["seq_len"], seen[column], own, kind)
            ends[kind] = (*seen[["seq_len", column]].iloc[-1], own)
            if column == "gib":
                lost = group[group["status"] == "oom"]
                ax.plot(group["seq_len"], group["law_gib"], "--", color=own, lw=1)
                ax.plot(lost["seq_len"], lost["law_gib"], "x", color=own, ms=7, mew=2)
        for name in [name for name, (n, *_) in ends.items() if n < furthest]:  # above a line that ends before
            n, y, own = ends.pop(name)
            how = {"ha": "right", "va": "bottom", "color": [0.7 * part for part in plots.to_rgb(own)], "size": 7.5}
            ax.annotate(name, (n, y), (-5, 1), textcoords="offset points", **how)
        plots.name_ends(ax, ends, gap=0.08, near=0)
    limits, powers = axes[1].get_ylim(), range(-30, 11, 5)
    axes[1].set_yticks([2.0**power for power in powers], [size(2 ** (30 + power)) for power in powers])
    axes[1].set_ylim(limits)
    axes[1].minorticks_off()
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
    law (0 for what is not dense: no one N is searched for); `keys`, how many a query sees on average."""
    n, dtype, kernel = common_length(every), every["dtype"].iloc[0], every["variant"].iloc[-1].removeprefix("dilated_")
    widths = [w // (8 if machine.is_cpu else 1) for w in (2048, 4096, 8192, 16384, 32768)]
    sparse = dilated_variant("dilated", widths, (1, 2, 4, 8, 16), kernel=kernel)
    shape, found = Shape(1, HEADS, n, 64, dtype), []
    seen = every[every["seq_len"] == n].dropna(subset=["ms"]).set_index("kind")
    measured = {account: HEADS * seen[f"{account}_bytes"] / seen["heads"] for account in ("saved", "backward_peak")}
    for one in [VARIANTS[name] for name in every["variant"].unique() if name in VARIANTS] + [sparse]:
        if one.name in seen.index and (one.law or one is sparse):
            law = law_of(one, shape, machine)
            row = {"variant": one.name, "ms": HEADS * seen["ms"][one.name], "passes": int(seen["passes"][one.name])}
            row["keys"] = evaluate(one.flops.forward, shape, machine) / (4 * HEADS * 64 * n)
            row |= {what: law.bytes(what, shape, machine) if law else by[one.name] for what, by in measured.items()}
            found.append(row | {"longest": 0 if one is sparse else longest(one, dtype, machine)})
    return pd.DataFrame(found)


def as_table(numbers: pd.DataFrame):
    """`as_numbers`, each beside plain attention; a time of fewer than five passes in brackets."""
    plain, few = numbers.set_index("variant").loc["naive"], numbers["passes"] < 5
    cells = {"variant": numbers["variant"], **{to: numbers[of].map(size) for to, of in SIZED.items()}}
    cells |= {"of plain": (numbers["backward_peak"] / plain["backward_peak"]).map("{:.1%}".format)}
    cells |= {"ms": numbers["ms"].map(digits).where(~few, numbers["ms"].map(digits).map("({})".format))}
    cells |= {"faster": (plain["ms"] / numbers["ms"]).map("{:.1f}×".format)}
    return table(pd.DataFrame(cells | {"longest N": numbers["longest"].map(lambda n: f"{n:,}" if n else NO_FIGURE)}))


def crossed(run: Run, chapter: str, name: str) -> pd.DataFrame:
    """The crossovers of a chapter's duels, of each run."""
    return races.crossings(pd.DataFrame(duels(run.of_chapter(chapter, name, DUEL).to_dict("records"))))


def starting(cells: pd.DataFrame) -> str:
    """From which N on the second wins: "forward from N = 512, backward from N = 1,024"; what two runs say if they lie
    more than a tenth apart."""
    told = []
    for phase, runs in cells.groupby("phase", sort=False):
        one, ends = runs.iloc[0], [*runs["seq_len"]]
        each = [
            f"{'≤' if n <= one['shortest'] else '='} {n:,.0f}".replace("= inf", f"> {one['longest']:,}") for n in ends
        ]
        told.append(f"{phase} from N {' or '.join(each if max(ends) > 1.1 * min(ends) else each[:1])}")
    return ", ".join(told).replace("or = ", "or ")


def speed(ratios: Iterable[float]) -> str:
    """How many times as fast something is, in each phase; or how many times as long it takes, if that is so in all."""
    if max(ratios) < 1:
        return f"it takes {' and '.join(f'{1 / ratio:.1f}' for ratio in ratios)} times as long"
    return f"it is {' and '.join(f'{ratio:.1f}' for ratio in ratios)} times as fast"


def unmet(run: Run) -> tuple[int, pd.DataFrame]:
    """How many observations the chapters made, and those that do not hold here: as this very build notes them, or else
    as data/<device>/claims.csv has them. Raises NotMeasured where nothing has."""
    made = sorted(Path(os.environ.get(CLAIMS, "none/none")).parent.glob("*.claims"))
    kept = stored.ROOT / "data" / run.folder / "claims.csv"
    claims = [pd.read_json(path, lines=True).assign(notebook=path.stem) for path in made]
    if not claims and not kept.exists():
        raise NotMeasured("No chapter has made a claim on this device yet.")
    seen = pd.concat(claims or [pd.read_csv(kept)]).query("kind == 'observation'")
    return len(seen), seen[~seen["holds"].astype(bool)]


def road(machine: Machine):
    """Where the bytes of a forward pass live, and what each kind moves between memory and chip, by counting."""
    shape, rates = Shape(1, HEADS, 16384, 64, "bfloat16"), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    linear, scores = evaluate(LINEAR, shape, machine), evaluate(SCORES, shape, machine)
    moved = (4 * sum(rates) + 3 * sum(rates[1:])) * linear
    kinds = {
        "plain": (6 * scores + 4 * linear, "Q, K, V, O and N × N\nscores and weights", "one operation at a time"),
        "flash": (4 * linear, "Q, K, V, O", "a block of scores,\ntheir maximum and sum"),
        "dilated": (moved, "Q, K, V, O", "the same, on every\nr-th row of a segment"),
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
    atlas = run.of_chapter("05", "atlas", ["saved_bytes"]).query("training and spelling != 'the fused call'")
    dtype = atlas["dtype"].iloc[0]
    return atlas[atlas["dtype"] == dtype].set_index("spelling")["fused"].fillna("").rename(dtype)


def recognised(spelled: pd.Series) -> str:
    """How many ways to spell attention a compiler turned into a fused kernel, and how many of those with a mask."""
    masked = spelled[spelled.index.str.contains("causal")]
    told = f"{(spelled != '').sum()} of {len(spelled)} ways to spell attention in {spelled.name} become a fused kernel when"
    return f"{told} compiled for training, and {(masked != '').sum()} of the {len(masked)} with a mask"


def to_repeat(again: pd.DataFrame) -> tuple[str, str]:
    """Of rows of repeated passes the kernel to take if bits must repeat, the fastest of those that do in all of
    their rows at the longest N when asked to, and what that costs it."""
    again = again[again["seq_len"] == again["seq_len"].max()]
    asked = again[again["deterministic"].astype(str) == "True"]
    same = asked.groupby("variant")["same_bits"].agg(lambda told: (told.astype(str) == "True").all())
    times = asked[asked["variant"].isin(same.index[same])].groupby("variant")["ms"].sum()
    each, costs = ["variant", "heads"], ["ms", "peak_bytes"]
    if times.empty:
        return NO_FIGURE, "no kernel repeats them"
    first = times.idxmin()
    strict, loose = (again[again["deterministic"].astype(str) == on].set_index(each)[costs] for on in ("True", "False"))
    ratios = (strict / loose).loc[first]
    longer, more, heads = ratios["ms"], ratios["peak_bytes"].max(), " and ".join(map(str, sorted(ratios.index)))
    memory = f", up to {more:.1f} times the memory" if more >= 1.1 else ""
    if longer.max() < 1.1:
        return first, f"deterministic algorithms take no longer there{memory}"
    told = f"deterministic algorithms: {longer.min():.1f} to {longer.max():.1f} times as long{memory}"
    return first, f"{told}, backward at N = {again['seq_len'].iloc[0]:,}, with {heads} heads"


def advice(run: Run, every: pd.DataFrame, best: str, spelled: Mapping[str, str], again: pd.DataFrame):
    """What to use when, with thresholds from the chapters' rows. best: the fastest fused kernel; spelled: `{spelling:
    fused operator or ""}`; again: rows of repeated passes."""
    dtype, pays = every["dtype"].iloc[0], crossed(run, "04", "duels")
    both = every[every["kind"].isin(["dilated", best])]
    over, opponent = crossed(run, "03", "crossover").query("dtype == @dtype"), pays["first"].iloc[0]
    second = next(iter(over["second"]), "the flash kernel")
    froms = "; ".join(f"D = {d}: {starting(cells)}" for d, cells in over.groupby("head_dim"))
    reached = {name: f"{longest(VARIANTS[name], dtype, run.machine):,}" for name in ("naive", best)}
    ends = f"by the laws memory ends it at N = {reached['naive']}, {best} at {reached[best]}"
    fused = ", ".join(name for name, became in spelled.items() if became)
    both = both.pivot_table("ms", "seq_len", "kind").dropna().iloc[[0, -1]]
    told = ", ".join(f"{speed([row[best] / row['dilated']])} at N = {n:,}" for n, row in both.iterrows())
    raced = run.of_chapter("03", "race", races.OF_DEFAULT)
    mine, same = raced[raced["variant"] == best], {*races.picks(raced)["picked"]} == {best}
    won, lost = (mine["of_default_low"] > 1).sum(), mine[mine["of_default_high"] < 1]
    where = sorted({f"{phase} at N = {n:,}" for phase, n in zip(lost["phase"], lost["seq_len"], strict=True)})
    default = f"wins {won} of {len(mine)} races against PyTorch's default, loses {', '.join([str(len(lost)), *where])}"
    brief = every[(every["seq_len"] == every["seq_len"].min()) & (every["kind"] != "dilated")].set_index("kind")["ms"]
    quick = ", ".join(f"{one} {digits(HEADS * brief[one])}" for one in dict.fromkeys([brief.idxmin(), second, "naive"]))
    each = f"a training pass at N = {every['seq_len'].min():,}, ms: {quick}; {second} over naive, {froms}"
    longer = f"beside {best} {told}; " * (best != opponent) + f"over {opponent} {starting(pays)}" + patterns(run)
    first = best if same or won >= len(lost) else "what PyTorch picks"
    less = "dilated" + " or another" * ("window" in longer) if pays["seq_len"].min() <= pays["longest"].max() else best
    lines = [
        ("all pairs, causal or not", first, "what PyTorch picks by itself" if same else default, "3"),
        ("short sequences, no mask", brief.idxmin(), each, "3"),
        ("the weights themselves", "naive", ends, "2, 3"),
        ("long sequences, a pattern will do", less, longer, "4"),
        ("a program of others, compiled", "see whether it was fused", f"in training: {fused or 'none tried'}", "5"),
        ("the same bits on every run, of PyTorch's kernels", *to_repeat(again), "5"),
    ]
    return table(pd.DataFrame(lines, columns=["when", "use", "threshold here", "chapter"]))
