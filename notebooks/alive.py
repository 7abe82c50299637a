"""What chapter 2 shows: which tensors are alive when, at which one memory runs out, and how near a law's frontier is."""

from collections.abc import Mapping
from itertools import groupby

import matplotlib.pyplot as plt
import pandas as pd
import sympy
from matplotlib.colors import to_rgba

from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import SYMBOLS, Variant, bytes_needed
from attnlib.memory import fit
from attnlib.memory.ledger import ledger
from report import plots
from report.tables import GIB, table

# The N×N tensors of a ledger by the names that the text gives them: S the scores and m their row maximum, E the
# exponentials and ℓ their row sums, P the weights; d before a name is its gradient.
SOFTMAX = {
    "bmm 1": "QKᵀ",
    "bmm 2": "O",
    "mul 1": "S",
    "_softmax 1": "P",
    "_softmax_backward_data 1": "dS",
    "workspace": "dP∘P",
}
BY_HAND = {
    "bmm 1": "QKᵀ",
    "bmm 2": "O",
    "mul 1": "S",
    "sub 1": "S−m",
    "exp 1": "E",
    "div 1": "P",
    "bmm 4": "dP",
    "div 2": "E/ℓ",
}
BY_HAND |= {"div 3": "E/ℓ²", "neg 1": "−dP", "mul 2": "−dP∘E/ℓ²", "div 4": "dP/ℓ", "add 1": "dE", "mul 3": "E∘dE"}
BY_HAND |= {"neg 2": "−E∘dE", "new_zeros 1": "zeros", "scatter 1": "dm", "add 2": "dS", "mul 4": "dQKᵀ"}
NAMES = {
    "naive_custom": BY_HAND,
    "naive": SOFTMAX | {"bmm 4": "dP", "mul 2": "dQKᵀ"},
    "naive_weights_only": SOFTMAX | {"bmm 4": "dP, dS", "mul 2": "dP∘P", "sum 1": "the row sums of dP∘P"},
    "naive_recompute": SOFTMAX | {"bmm 3": "QKᵀ", "mul 2": "S", "_softmax 2": "P", "bmm 5": "dP", "mul 3": "dQKᵀ"},
}
FAMILIES = {"#a6cee3": ("QKᵀ", "S", "S−m", "zeros", "dm"), "#80cdc1": ("E",), "#b2df8a": ("P",)}
FAMILIES |= {"#fdbf6f": ("dP", "dP, dS", "−dP"), "#ffe680": ("dE", "E∘dE", "−E∘dE", "dS", "dQKᵀ")}
HUES = {name: hue for hue, names in FAMILIES.items() for name in names}
EMPTY = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the ground of a text that crosses a line
STEP, LINEAR_HUE, RED = "#cab2d6", "#bbbbbb", "#c4161c"  # what is only on the way to something; linear in N; too many


def rows_of(program: Variant, shape: Shape, machine: Machine) -> list[dict]:
    """The ledger's operations of both passes, without what is between them."""
    return [row for row in ledger(program, shape, machine) if row["phase"] in PHASES and row["op"] != "return"]


def named(program: Variant, tensor: str) -> str:
    """A tensor of a ledger by its name in the text, if it has one."""
    return NAMES.get(program.name, {}).get(tensor, tensor)


def asked_last(program: Variant, shape: Shape, machine: Machine, held_bytes: int) -> tuple[str, int]:
    """The tensor for which there was no room, given the bytes that a run then held above its inputs: the first before
    which the ledger has most nearly as many alive, and the difference."""
    known: set[str] = set()
    states = []
    for row in ledger(program, shape, machine):
        alive = row["alive_bytes"]
        for tensor in reversed([one for one in row["alive"] if one not in known]):
            alive -= row["alive"][tensor]
            states.append((abs(alive - held_bytes), tensor))
        known |= {*row["alive"]}
    miss, tensor = min(states, key=lambda state: state[0])
    return named(program, tensor), miss


def timeline(ax, program: Variant, memory_bytes: int, machine: Machine, step: float):
    """Draw what is alive after each operation at the first N that does not fit; step: points that an operation has.
    Batch 8, one head, D 64, float32. The inputs are at the bottom; what comes after memory ran out is pale."""
    fits = fit.largest_seq_len(program, Shape(8, 1, 1, 64), memory_bytes, "backward", machine)
    shape = Shape(8, 1, fits + 1, 64)
    book, matrix = rows_of(program, shape, machine), 4 * 8 * shape.seq_len**2
    large = list(dict.fromkeys(one for row in book for one, size in row["alive"].items() if size > 0.4 * matrix))
    end = next(x for x, row in enumerate(book) if row["alive_bytes"] + shape.input_bytes > memory_bytes)
    (*_, straw) = (one for one in large if one in book[end]["alive"] and one not in book[end - 1]["alive"])
    places: dict[str, list[tuple[int, float, float]]] = {one: [] for one in large}  # operation, bottom, height
    for x, row in enumerate(book):
        sizes = {one: row["alive"][one] / GIB for one in large if one in row["alive"]}
        level = (row["alive_bytes"] + shape.input_bytes) / GIB - sum(sizes.values())
        ax.bar(x, level, 1.0, color=LINEAR_HUE, lw=0)
        for one, size in sizes.items():
            places[one].append((x, level, size))
            level += size
    for one, found in places.items():
        name, (xs, bottoms, heights) = named(program, one), zip(*found, strict=True)
        shades = [to_rgba(HUES.get(name, STEP), 0.35 if x > end else 1) for x in xs]
        ax.bar(xs, heights, 1.0, bottom=bottoms, color=shades, lw=0)
        if one == straw:
            ax.bar(xs[0], heights[0], 1.0, bottom=bottoms[0], color="white", hatch="////", edgecolor=RED, lw=0.8)
            where = {"xytext": (end - 1.5, 0.99 * memory_bytes / GIB), "ha": "right", "va": "top"}
            arrow = {"arrowstyle": "-", "color": RED, "lw": 0.8}
            middle = (end - 0.5, bottoms[0] + heights[0] / 2)
            ax.annotate(
                f"one too many:\n{name}", middle, **where, fontsize=7.5, color=RED, arrowprops=arrow, bbox=EMPTY
            )
            continue
        runs = [[*run] for _, run in groupby(found, lambda place: round(place[1] / place[2]))]
        run = max(runs, key=len)  # where it lies still the longest
        upright = 90 if len(run) * step < 4.2 * len(name) else 0
        look = {"ha": "center", "va": "center", "rotation": upright, "fontsize": 7}
        ax.text(sum(x for x, *_ in run) / len(run), run[0][1] + run[0][2] / 2, name, **look)
    ax.axhline(memory_bytes / GIB, color="black", lw=1)
    parts = [sum(row["phase"] == phase for row in book) for phase in PHASES]
    ax.axvline(parts[0] - 0.5, color="black", lw=0.8, ls=":")
    ax.set_xticks([parts[0] / 2 - 0.5, parts[0] + parts[1] / 2 - 0.5], PHASES)
    ax.set(title=f"{program.name}, N = {shape.seq_len:,}", xlim=(-0.5, len(book) - 0.5))
    ax.grid(visible=False)


def timelines(programs: Mapping[str, Variant], memory_bytes: int, machine: Machine):
    """A panel for each program, the one with the most operations across the page."""
    longest = max(programs.values(), key=lambda one: len(rows_of(one, Shape(1, 1, 64, 8), machine)))
    others = [one for one in programs.values() if one is not longest]
    deep = 1 + -(-len(others) // 3)
    figure = plt.figure(figsize=(plots.WIDTH, 2.1 * deep), layout="constrained")
    cells = figure.add_gridspec(deep, 3)
    wide = figure.add_subplot(cells[0, :])
    timeline(wide, longest, memory_bytes, machine, 390 / 24)
    wide.set(title=f"{wide.get_title()} · {machine.name}", ylim=(0, 1.06 * memory_bytes / GIB), ylabel="GiB alive")
    for at, program in enumerate(others):
        ax = figure.add_subplot(cells[1 + at // 3, at % 3], sharey=wide)
        timeline(ax, program, memory_bytes, machine, 120 / 13)
        ax.set_title(ax.get_title().replace(", ", "\n"))
        ax.tick_params(labelleft=at % 3 == 0)
    return figure


def frontiers(programs: Mapping[str, Variant], gpus: Mapping[str, str], tried: pd.DataFrame | None, device: str):
    """What training needs against N by the laws of CUDA kernels, beside the memory of GPUs, `{name: size}`; and, with
    rows of frontier.search, the N found over the N predicted."""
    lengths, cuda = [4096, 8192, 16384, 32768, 40000], Machine("cuda")
    widths = [1] if tried is None else [3, 2]
    look = {"figsize": (plots.WIDTH, 2.8), "layout": "constrained", "squeeze": False, "width_ratios": widths}
    figure, ((ax, *more),) = plt.subplots(1, len(widths), **look)
    beside, ends = {"textcoords": "offset points", "fontsize": 7}, {}
    for one in programs.values():
        needs = (bytes_needed(one, Shape(8, 1, n, 64), cuda) / GIB for n in lengths)
        ends.setdefault(tuple(needs), []).append(one.name)
    for needs, names in ends.items():
        own = plots.colour(names[0])
        plots.line(ax, lengths, needs, own, names[0], "-")
        ax.annotate(", ".join(names), (lengths[-1], needs[-1]), (4, 0), color=own, va="center", **beside)
    for gpu, text in gpus.items():
        plots.level(ax, fit.nbytes(text) / GIB)
        ax.annotate(gpu, (0, fit.nbytes(text) / GIB), (3, 2), ax.get_yaxis_transform(), **beside)
    ax.set(
        yscale="log", xlabel="sequence length N", ylabel="GiB for training", title="needed, by the laws of CUDA kernels"
    )
    plots.over_lengths(ax, lengths[:-1])
    ax.set_xlim(2048, lengths[-1])
    ax.yaxis.set_major_formatter("{x:g}")
    for panel in more:
        for y, (one, rows) in enumerate(tried.groupby("variant", sort=False)):
            panel.annotate(one, (0, y), (4, 8), panel.get_yaxis_transform(), **beside)
            for pool, marker in (("expandable", "o"), ("default", "x")):
                found = rows[rows["allocator"] == pool]
                ratio = 100 * found["found_seq_len"] / found["predicted_seq_len"]
                panel.plot(ratio, [y] * len(ratio), marker, color=plots.colour(one), ms=4, mew=1.5)
                if y == 0 and len(ratio):
                    where = (-5, 0) if pool == "default" else (0, -9)
                    panel.annotate(f"{pool} pool", (min(ratio), y), where, ha="right", va="center", **beside)
        panel.axvline(100, color="black", lw=0.8, ls=":")
        panel.set(xlabel="N found, % of N predicted", yticks=[], title=device)
        panel.set_xlim(100 * (tried["found_seq_len"] / tried["predicted_seq_len"]).min() - 8, 102)
        panel.set_ylim(tried["variant"].nunique() - 0.5, -0.7)
    return figure


def components(program: Variant, shape: Shape, machine: Machine, measured: Mapping[str, float]):
    """Every term of a program between its passes and at its backward peak, as bytes, and of the latter its share;
    measured: what an allocator saw above the inputs, `{"saved": bytes, "backward_peak": bytes}`."""
    moments = {account: program.law.at(account, shape, machine) for account in measured}
    held = {account: dict.fromkeys("QKV", shape.input_bytes // 3) | sizes for account, (_, sizes) in moments.items()}
    formulas = dict.fromkeys("QKV", sympy.prod(SYMBOLS))
    for account, (operation, _) in moments.items():
        formulas |= {
            name: term for name, term in program.law.moments(account)[operation].items() if name in held[account]
        }
    sums = {account: sum(sizes.values()) for account, sizes in held.items()}
    lines = [
        ("predicted in all", "", *sums.values()),
        ("measured in all", "", *(shape.input_bytes + n for n in measured.values())),
    ]
    for name in reversed(formulas):
        lines.insert(0, (name, f"${sympy.latex(formulas[name])}$", *(sizes.get(name) for sizes in held.values())))
    frame = pd.DataFrame(lines, columns=["component", "formula", "between the phases", "at the peak"])
    frame["share of the peak"] = frame["at the peak"] / sums["backward_peak"]
    figures = {"between the phases": "{:,.0f}", "at the peak": "{:,.0f}", "share of the peak": "{:.2%}"}
    return table(frame, figures)
