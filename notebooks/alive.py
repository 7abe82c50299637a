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
SOFTMAX = {"bmm 1": "QKᵀ", "bmm 2": "O", "mul 1": "S", "_softmax 1": "P"}
SOFTMAX |= {"_softmax_backward_data 1": "dS", "workspace": "dP∘P"}
BY_HAND = {"bmm 1": "QKᵀ", "bmm 2": "O", "mul 1": "S", "sub 1": "S−m", "exp 1": "E", "div 1": "P"}
BY_HAND |= {"bmm 4": "dP", "div 2": "E/ℓ", "div 3": "E/ℓ²", "neg 1": "−dP", "mul 2": "−dP∘E/ℓ²", "div 4": "dP/ℓ"}
BY_HAND |= {"add 1": "dE", "mul 3": "E∘dE", "neg 2": "−E∘dE", "new_zeros 1": "zeros", "scatter 1": "dm"}
BY_HAND |= {"add 2": "dS", "mul 4": "dQKᵀ"}
NAMES = {"naive_custom": BY_HAND, "naive": SOFTMAX | {"bmm 4": "dP", "mul 2": "dQKᵀ"}}
NAMES["naive_weights_only"] = SOFTMAX | {"bmm 4": "dP, dS", "mul 2": "dP∘P", "sum 1": "the row sums of dP∘P"}
NAMES["naive_recompute"] = SOFTMAX | {"bmm 3": "QKᵀ", "mul 2": "S", "_softmax 2": "P", "bmm 5": "dP", "mul 3": "dQKᵀ"}
HUES = dict.fromkeys(("QKᵀ", "S", "S−m", "zeros", "dm"), "#a6cee3") | {"E": "#80cdc1", "P": "#b2df8a"}
HUES |= dict.fromkeys(("dP", "dP, dS", "−dP"), "#fdbf6f")
HUES |= dict.fromkeys(("dE", "E∘dE", "−E∘dE", "dS", "dQKᵀ"), "#ffe680")
STEP, LINEAR_HUE, RED = "#cab2d6", "#bbbbbb", "#c4161c"  # what is only on the way to something; linear in N; too many


def book_of(program: Variant, shape: Shape, machine: Machine) -> list[dict]:
    """The ledger's operations of both passes, without what is between them."""
    return [row for row in ledger(program, shape, machine) if row["phase"] in PHASES and row["op"] != "return"]


def tensor_named(program: Variant, tensor: str) -> str:
    """A tensor of a ledger by its name in the text, if it has one."""
    return NAMES.get(program.name, {}).get(tensor, tensor)


def asked_last(program: Variant, shape: Shape, machine: Machine, held_bytes: int) -> tuple[str, int]:
    """The tensor for which there was no room, given the bytes that a run then held above its inputs: the first before
    which the ledger has most nearly as many alive, and the difference."""
    known, states = set(), []
    for row in ledger(program, shape, machine):
        alive = row["alive_bytes"]
        for tensor in reversed([one for one in row["alive"] if one not in known]):
            alive -= row["alive"][tensor]
            states.append((abs(alive - held_bytes), tensor))
        known |= {*row["alive"]}
    miss, tensor = min(states, key=lambda state: state[0])
    return tensor_named(program, tensor), miss


def timeline(ax, program: Variant, memory_bytes: int, machine: Machine, step: float):
    """Draw what is alive after each operation at the first N that does not fit; step: points that an operation has.
    Batch 8, one head, D 64, float32. The inputs are at the bottom; what comes after memory ran out is pale."""
    shape = Shape(8, 1, 1 + fit.largest_seq_len(program, Shape(8, 1, 1, 64), memory_bytes, "backward", machine), 64)
    book, matrix = book_of(program, shape, machine), 4 * 8 * shape.seq_len**2
    large = list(dict.fromkeys(one for row in book for one, size in row["alive"].items() if size > 0.4 * matrix))
    end = next(x for x, row in enumerate(book) if row["alive_bytes"] + shape.input_bytes > memory_bytes)
    straw = [one for one in large if one in book[end]["alive"] and one not in book[end - 1]["alive"]][-1:]
    places: dict[str, list[tuple[int, float, float]]] = {one: [] for one in large}  # operation, bottom, height
    for x, row in enumerate(book):
        sizes = {one: row["alive"][one] / GIB for one in large if one in row["alive"]}
        level = (row["alive_bytes"] + shape.input_bytes) / GIB - sum(sizes.values())
        ax.bar(x, level, 1.0, color=LINEAR_HUE, lw=0)
        for one, size in sizes.items():
            places[one].append((x, level, size))
            level += size
    for one, found in places.items():
        name, (xs, bottoms, heights) = tensor_named(program, one), zip(*found, strict=True)
        tints = [to_rgba(HUES.get(name, STEP), 0.35 if x > end else 1) for x in xs]
        ax.bar(xs, heights, 1.0, bottom=bottoms, color=tints, lw=0)
        if [one] == straw:
            ax.bar(xs[0], heights[0], 1.0, bottom=bottoms[0], color="white", hatch="////", edgecolor=RED, lw=0.8)
            ends = (end - 0.5, bottoms[0] + heights[0] / 2), (end - 1, 0.98 * memory_bytes / GIB)
            look = {"ha": "right", "va": "top", "fontsize": 7, "color": RED, "arrowprops": {"arrowstyle": "-"}}
            ax.annotate("one too many:" + " \n"[step < 10] + name, *ends, **look)
            continue
        runs = [[*run] for _, run in groupby(found, lambda place: round(place[1] / place[2]))]
        run = max(runs, key=len)  # where it lies still the longest
        look = {"ha": "center", "va": "center", "fontsize": 7, "rotation": 90 * (len(run) * step < 4.2 * len(name))}
        ax.text(sum(x for x, *_ in run) / len(run), run[0][1] + run[0][2] / 2, name, **look)
    ax.axhline(memory_bytes / GIB, color="black", lw=1)
    parts = [sum(row["phase"] == phase for row in book) for phase in PHASES]
    ax.axvline(parts[0] - 0.5, color="black", lw=0.8, ls=":", ymax=0.7)
    ax.set_xticks([parts[0] / 2 - 0.5, parts[0] + parts[1] / 2 - 0.5], PHASES)
    ax.set(title=f"{program.name}, N = {shape.seq_len:,}", xlim=(-0.5, len(book) - 0.5))
    ax.grid(visible=False)


def timelines(programs: Mapping[str, Variant], memory_bytes: int, machine: Machine):
    """A panel for each program, the one with the most operations across the page."""
    longest = max(programs.values(), key=lambda one: len(book_of(one, Shape(1, 1, 64, 8), machine)))
    others = [one for one in programs.values() if one is not longest]
    deep = 1 + -(-len(others) // 3)
    figure = plt.figure(figsize=(plots.WIDTH, 1.8 * deep), layout="constrained")
    cells = figure.add_gridspec(deep, 3)
    wide = figure.add_subplot(cells[0, :])
    timeline(wide, longest, memory_bytes, machine, 390 / 24)
    wide.set(yticks=[memory_bytes / GIB * quarter / 4 for quarter in range(5)], ylim=(0, 1.06 * memory_bytes / GIB))
    wide.set(title=f"{wide.get_title()} · {machine.name}", ylabel="GiB alive")
    for at, program in enumerate(others):
        ax = figure.add_subplot(cells[1 + at // 3, at % 3], sharey=wide)
        timeline(ax, program, memory_bytes, machine, 120 / 13)
        ax.set_title(ax.get_title().replace(", ", "\n"))
        ax.tick_params(labelleft=at % 3 == 0)
    return figure


def tries(programs: Mapping[str, Variant], gpus: Mapping[str, str], tried: pd.DataFrame | None, device: str):
    """What training needs against N by the laws of CUDA kernels, beside the memory of GPUs, `{name: size}`; and, with
    rows of frontier.search, the N found over the N predicted."""
    lengths, cuda = [4096, 8192, 16384, 32768, 40000], Machine("cuda")
    look = {"figsize": (plots.WIDTH, 2.6), "layout": "constrained", "width_ratios": [3] if tried is None else [3, 2]}
    figure, ((ax, *more),) = plt.subplots(1, len(look["width_ratios"]), squeeze=False, **look)
    beside, ends = {"textcoords": "offset points", "fontsize": 7}, {}
    for one in programs.values():
        needs = (bytes_needed(one, Shape(8, 1, n, 64), cuda) / GIB for n in lengths)
        ends.setdefault(tuple(needs), []).append(one.name)
    for needs, names in ends.items():
        own, end = plots.colour(names[0]), (lengths[-1], needs[-1])
        plots.line(ax, lengths, needs, own, names[0], "-")
        ax.annotate(", ".join(names), end, (4, 0), color=own, va="center", **beside)
    for gpu, text in gpus.items():
        plots.level(ax, fit.nbytes(text) / GIB)
        ax.annotate(gpu, (0, fit.nbytes(text) / GIB), (3, 2), ax.get_yaxis_transform(), **beside)
    ax.set(yscale="log", xlabel="sequence length N", ylabel="GiB for training", title="by the laws of CUDA kernels")
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
                    look = beside | {"xytext": (-5, 0) if pool == "default" else (0, -9), "ha": "right"}
                    panel.annotate(f"{pool} pool", (min(ratio), y), va="center", **look)
        least = 100 * (tried["found_seq_len"] / tried["predicted_seq_len"]).min()
        panel.set(xlabel="N found, % of N predicted", title=device, xlim=(least - 8, 102), yticks=[])
        panel.set_ylim(y + 0.5, -0.7)
    return figure


def components(program: Variant, shape: Shape, machine: Machine, measured: Mapping[str, float]):
    """Every term of a program between its phases and at its backward peak, in bytes, the inputs among them; measured:
    what an allocator saw above the inputs, `{"saved": bytes, "backward_peak": bytes}`."""
    held, formulas = {}, dict.fromkeys("QKV", sympy.prod(SYMBOLS))
    for account in measured:
        operation, sizes = program.law.at(account, shape, machine)
        held[account] = dict.fromkeys("QKV", shape.input_bytes // 3) | sizes
        formulas |= {name: program.law.moments(account)[operation][name] for name in sizes}
    lines = [(name, f"${sympy.latex(formulas[name])}$", *(held[of].get(name) for of in held)) for name in formulas]
    lines.append(("predicted in all", "", *(sum(sizes.values()) for sizes in held.values())))
    share = [None if line[-1] is None else line[-1] / lines[-1][-1] for line in lines]
    lines.append(("measured in all", "", *(shape.input_bytes + nbytes for nbytes in measured.values())))
    frame = pd.DataFrame(lines, columns=["component", "formula", "between the phases", "at the peak"])
    frame["share"] = [*share, None]
    return table(frame, {"between the phases": "{:,.0f}", "at the peak": "{:,.0f}", "share": "{:.2%}"})
