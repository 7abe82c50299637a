"""The tables and figures of chapter 5, and the passes of other chapters on which its forecast is tried."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.dilated.attention import dilated_variant
from attnlib.laws import law_of
from attnlib.rows import SIZES, shape_of
from notebooks.block import in_block
from report import plots
from report.forecast import Forecast, forecasts
from report.run import Run
from report.skipping import NotMeasured
from report.stored import rows_of
from report.tables import MIB, NO_FIGURE, digits, size, table

SEGMENTS = (2048, 4096, 8192, 16384, 32768)  # chapter 4's own


def spellings_drawn(timed: pd.DataFrame, trained: pd.DataFrame, machine: Machine):
    """Times of each spelling of `timed`, as written and compiled, over that of the fused call; beside them what it keeps
    in training, by `trained`: matrices `before` and `after`, and in `fused` the operator that it became, or nothing."""
    base = timed.set_index("spelling")["ms"].get("the fused call", timed["compiled_ms"].min())
    timed, kept = timed.iloc[::-1].reset_index(drop=True), trained.set_index("spelling")
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 0.19 * len(timed) + 0.7), layout="constrained")
    for at, row in timed.iterrows():
        what = kept.loc[row["spelling"]] if row["spelling"] in kept.index else {"fused": "itself"}
        own = plots.colour("sdpa_flash" if machine.is_cpu else "sdpa_cudnn") if what["fused"] else plots.colour("naive")
        ends = row["ms"] / base, row["compiled_ms"] / base
        ax.plot(ends, [at, at], color=own, lw=1)
        ax.plot(ends[0], at, "o", color=own, mfc="white")
        ax.plot(ends[1], at, "o", color=own)
        told = "" if what["fused"] == "itself" else f"{what['before']:.1f} → "
        told += "fused" if what["fused"] else f"{what['after']:.1f}"
        ax.text(1.02, at, told, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5)
    ax.text(1.02, len(timed), "matrices saved", transform=ax.get_yaxis_transform(), va="center", fontsize=7.5)
    ax.set_yticks(range(len(timed)), timed["spelling"], fontsize=7.5)
    sized = "{dtype}, {heads} heads × {seq_len:,} × {head_dim}".format(**timed.iloc[0])
    ax.set(xscale="log", xlabel=f"time over that of the fused call · {machine.name}, {sized}")
    ax.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], [f"{tick:g}×" for tick in ticks])
    ax.minorticks_off()
    return figure


def spelled_out(atlas: pd.DataFrame, written: Mapping[str, str]):
    """What becomes of each spelling in each type, in training and inference; `before` and `after` in matrices."""
    columns: dict[str, dict] = {}
    for row in atlas.to_dict("records"):
        text = f"{row['before']:.1f} → {'fused' if row['fused'] else format(row['after'], '.1f')}"
        use = f"{row['dtype']}, {'training' if row['training'] else 'inference'}"
        columns.setdefault(row["spelling"], {"spelling": row["spelling"]})[use] = text
    return table(pd.DataFrame([columns[one] for one in written if one in columns]).fillna(NO_FIGURE))


def other_versions(run: Run, atlas: pd.DataFrame) -> list[str]:
    """A sentence for each atlas that another PyTorch left beside this one, 05_atlas_of_torch_<version>.csv: of how many
    programs something else became, fused or in the matrices kept, and which."""
    keys, told = ["spelling", "dtype", "training"], []
    for path in sorted(run.path("atlas").parent.glob("05_atlas_of_torch_*.csv")):
        other = rows_of(path, ["saved_bytes", "compiled_saved_bytes"]).fillna({"fused": ""})
        both = atlas.merge(other, on=keys, suffixes=("", "_there"))
        changed = both[
            (both["fused"] != both["fused_there"])
            | (both["compiled_saved_bytes"] != both["compiled_saved_bytes_there"])
        ]
        uses = changed["training"].map({True: "in training", False: "in inference"})
        names = [f"*{a}* in {b} {c}" for a, b, c in zip(changed["spelling"], changed["dtype"], uses, strict=True)]
        outcome = f"something else of {len(names)}: {', '.join(names)}" if names else "the same of all"
        told.append(f"PyTorch {other['torch'].iloc[0]} makes, of the {len(both)} programs, {outcome}.")
    return told


def as_their_kernel(trained: pd.DataFrame, machine: Machine) -> tuple[int, int]:
    """How many spellings became a fused kernel that has a law, and how many of them keep what it says."""
    names = {"cudnn": "sdpa_cudnn", "efficient": "sdpa_efficient", "flash_attention": "sdpa_flash"}
    kept = []
    for row in trained[trained["fused"] != ""].to_dict("records"):
        kernel = VARIANTS[next(names[part] for part in names if part in row["fused"])]
        if law := law_of(kernel, shape_of(row), machine):
            kept.append(law.bytes("saved", shape_of(row), machine) == row["compiled_saved_bytes"])
    return len(kept), sum(kept)


def repeats(rows: pd.DataFrame) -> pd.Series:
    """Of rows of repeated passes, whether their bits were the same, whatever a CSV makes of that."""
    return rows["same_bits"].astype(str) == "True"


def twice(again: pd.DataFrame):
    """Passes as they come → under deterministic algorithms."""
    found = []
    again = again.assign(same=repeats(again))
    for (name, heads, n), rows in again.groupby(["variant", "heads", "seq_len"], sort=False):
        plain, strict = rows.sort_values("deterministic").to_dict("records")
        ran = pd.isna(strict["refused"])
        bits = ["yes" if one["same"] else "no" for one in (plain, strict)]
        cells = {"variant": name, "heads": heads, "N": n, "D": plain["head_dim"], "type": plain["dtype"]}
        cells["same bits"] = f"{bits[0]} → {bits[1] if ran else 'refused'}"
        for title, column, show in (("ms", "ms", digits), ("peak", "peak_bytes", size)):
            cells[title] = show(plain[column]) + (f" → {show(strict[column])}" if ran else "")
        if plain["peak_bytes"] > max(strict["peak_bytes"], plain["law_bytes"]):
            cells["peak"] = cells["peak"].replace(" →", f" ({size(plain['peak_bytes'] - plain['law_bytes'])} beyond) →")
        found.append(cells)
    return table(pd.DataFrame(found))


def energies(first: pd.DataFrame, idle: float):
    """The energy of each call, by `what`; idle: watts."""
    lines = []
    for what, row in first.drop(index="idle", errors="ignore").iterrows():
        line = {"what": what, "joules": f"{digits(row['joules'])} [{digits(row['low'])}, {digits(row['high'])}]"}
        line |= {"without idle": digits(row["joules"] - idle * row["ms"] / 1e3)}
        line |= {"watts": f"{row['watts']:.0f}", "MHz": f"{row['clock_mhz']:.0f}"}
        line["GFLOP/J"] = digits(row["work"] / row["joules"] / 1e9) if row["work"] else NO_FIGURE
        lines.append(line | {"ms": digits(row["ms"]), "over a burst": f"{row['ms'] / row['burst_ms']:.2f}×"})
    return table(pd.DataFrame(lines))


def graphs(clocks: pd.DataFrame):
    """Passes by each clock, in microseconds, and what a graph gains over a call alone, the column `gain`."""
    shown = clocks[["variant", "seq_len", "phase"]].assign(phase=clocks["phase"].str.replace("_", " + "))
    for title, column in (("alone", "alone"), ("in a row", "in_a_row"), ("queued", "queued"), ("graph", "graph")):
        shown[title] = (1e3 * clocks[f"{column}_ms"]).map(digits)
    return table(shown.assign(gain=clocks["gain"].map("{:.1f}×".format)))


def there(run: Run, chapter: str, name: str) -> bool:
    """Whether another chapter's rows are there."""
    return run.path(name).with_name(f"{chapter}_{name}.csv").exists()


def passes_tried(run: Run, speeds: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Every pass of 0.1 ms and more of chapters 1, 3 and 4 beside its forecast; `new`: whether no speed was taken at
    its shape. Raises NotMeasured where none of these chapters was."""
    widths = [w // (8 if machine.is_cpu else 1) for w in SEGMENTS]
    names = ["cpu"] if machine.is_cpu else ["cudnn", "flash", "efficient"]
    over = {f"dilated_{one}": dilated_variant("dilated", widths, (1, 2, 4, 8, 16), kernel=one) for one in names}
    shorter = [w // (16 if machine.is_cpu else 1) for w in SEGMENTS]
    known = {name: one for name, one in VARIANTS.items() if name not in ("tiled", "naive_compiled")}
    sources = dict.fromkeys([("01", "naive_sweep"), ("01", "options"), ("03", "protocol"), ("03", "memory")], known)
    sources |= {("03", "block"): {name: in_block(one) for name, one in known.items()}, ("04", "memory"): over}
    sources["04", "lengths"] = {"dilated": dilated_variant("dilated", shorter, (1, 2, 4, 6, 12), kernel=names[0])}
    made, found = Forecast(speeds, machine), []
    for (chapter, name), variants in sources.items():
        if there(run, chapter, name):
            rows = forecasts(run.of_chapter(chapter, name), variants, made, 0.1)
            found.append(rows.assign(chapter=int(chapter), sweep=name.replace("_", " ")))
    if not found:
        raise NotMeasured("Chapters 1, 3 and 4 were not measured on this device yet: `make report`.")
    points, taken = pd.concat(found, ignore_index=True), {*map(tuple, speeds[[*SIZES]].to_numpy())}
    return points.assign(new=[tuple(shape) not in taken for shape in points[[*SIZES]].to_numpy()])


def points_drawn(points: pd.DataFrame, limit: float, machine: Machine):
    """Forecast over measured time, by chapter."""
    chapters = points.groupby("chapter")
    figure, axes = plt.subplots(1, len(chapters), figsize=(plots.WIDTH, 2.6), sharey=True, layout="constrained")
    for ax, (chapter, part) in zip([axes] if len(chapters) == 1 else axes, chapters, strict=True):
        for phase, mark in (("forward", "."), ("backward", "x")):
            mine = part[part["phase"] == phase]
            ax.plot(mine["ms"], mine["forecast_ms"] / mine["ms"], mark, ms=4, alpha=0.6, color="#3c3c3c", label=phase)
        ax.set(xscale="log", yscale="log", xlabel="measured, ms", title=f"chapter {chapter}")
        for end in (1 - limit, 1, 1 + limit):
            plots.level(ax, end)
            ax.text(
                1.01, end, f"{end - 1:+.0%}".replace("+0%", ""), transform=ax.get_yaxis_transform(), size=6, va="center"
            )
        ax.set_yticks(ticks := (0.7, 0.8, 1, 1.2, 1.5), [f"{tick}×" for tick in ticks])
        ax.set_yticks([], minor=True)
    figure.supylabel("forecast ÷ measured", size="medium")
    figure.suptitle(machine.name, size="small")
    return plots.legend(figure, figure.axes[-1])


def misses(points: pd.DataFrame, limit: float):
    """How far the forecast misses, by sweep, and of shapes at which no speed was taken."""
    found = []
    for (chapter, sweep), part in points.groupby(["chapter", "sweep"], sort=False):
        off, new = part["off"], part.loc[part["new"], "off"].abs()
        cells = {"chapter": chapter, "sweep": sweep, "passes": len(off), "median": f"{off.median():+.1%}"}
        cells |= {f"within {share:.0%}": f"{(off.abs() <= share).mean():.0%}" for share in (0.15, limit)}
        cells |= {"largest": f"{off[off.abs().idxmax()]:+.0%}", "of other shapes": len(new)}
        found.append(cells | {"of these": f"{(new <= limit).mean():.0%}" if len(new) else NO_FIGURE})
    return table(pd.DataFrame(found))


def not_in_it(run: Run, shape: Shape, names: tuple[str, ...]) -> list[str]:
    """What chapter 3 measured of kernels at a shape: each one's peak and time; nothing where it was not measured."""
    if not there(run, "03", "memory"):
        return []
    rows, want = run.of_chapter("03", "memory"), shape.columns()
    rows = rows[rows["variant"].isin(names) & rows[[*want]].eq([*want.values()]).all(axis=1)]
    rows = rows[rows["forward_backward_ms"].notna()].itertuples()
    return [
        f"`{row.variant}` peaks at {digits(row.backward_peak_bytes / MIB)} MiB and takes {digits(row.forward_backward_ms)} ms"
        for row in rows
    ]
