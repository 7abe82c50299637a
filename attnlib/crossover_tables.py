"""The crossovers of notebooks 03 and 04: where flash or dilated attention wins, in time by races, in memory by laws."""

import math

import pandas as pd

from attnlib import VARIANTS
from attnlib.core import Shape
from attnlib.fit import at_length, need
from attnlib.memory import ledger, reached
from attnlib.tables import size, table


def length(n: float, cell: dict) -> str:
    """A length of crossover.crossings: a number, or that it lies beyond the lengths tried."""
    if math.isinf(n):
        return f"> {cell['longest']}"
    return f"≤ {cell['shortest']}" if n <= cell["shortest"] else f"{n:.0f}"


def froms(cells: pd.DataFrame) -> str:
    """From which lengths on the second variant wins, in words, for the crossings of one run in one dtype."""
    found = {}
    for cell in cells.to_dict("records"):
        shortest = cell["seq_len"] <= cell["shortest"]
        text = f"{cell['shortest']}, the shortest tried," if shortest else length(cell["seq_len"], cell)
        found.setdefault(cell["phase"], {}).setdefault(text, []).append(f"D = {cell['head_dim']}")
    each = ((phase, " or ".join(f"{n} at {' and '.join(d)}" for n, d in at.items())) for phase, at in found.items())
    return "; ".join(f"{phase} from N = {at}" for phase, at in each)


def crossovers(cells: pd.DataFrame):
    """The lengths from which flash wins, with their intervals, from both runs; and the ratios at both ends."""
    found = []
    keys = ["dtype", "head_dim", "phase"]
    for names, runs in cells.groupby(keys, sort=False):
        one, two = runs.sort_values("run").to_dict("records")
        row = dict(zip(keys, names, strict=True)) | {"variant": one["second"]}
        row |= {"wins from N": f"{length(one['seq_len'], one)} [{length(one['low'], one)}, {length(one['high'], one)}]"}
        row |= {"second run": length(two["seq_len"], two)}
        row |= {f"ratio at {one['shortest']}": one["least"], f"ratio at {one['longest']}": one["most"]}
        found.append(row)
    ratios = [column for column in found[0] if column.startswith("ratio")]
    return table(pd.DataFrame(found), dict.fromkeys(ratios, "{:.2f}×"))


def ratios(rows: pd.DataFrame, first: str, second: str) -> str:
    """How many times as long `first` takes as `second` in the forward pass of a sweep, at its two longest lengths."""
    times = rows.pivot_table(index=["head_dim", "seq_len"], columns="variant", values="forward_ms")
    parts = (times[first] / times[second]).dropna().groupby("head_dim").tail(2)
    return ", ".join(f"{ratio:.1f} at D = {d} and N = {n}" for (d, n), ratio in parts.items())


def relapses(duels: pd.DataFrame) -> list[str]:
    """A sentence for each cell in which flash wins at the shortest length and loses at longer ones, whole intervals."""
    found = []
    for (t, d, phase), cell in duels.sort_values("seq_len").groupby(["dtype", "head_dim", "phase"], sort=False):
        lost = cell.loc[cell["high"] < 1, "seq_len"]
        if cell["low"].iloc[0] > 1 and len(lost):
            where = " to ".join(dict.fromkeys(str(n) for n in (lost.iloc[0], lost.iloc[-1])))
            found.append(
                f"In {t} at D = {d}, {phase}, flash wins at the shortest lengths too, and loses at N = {where}."
            )
    return found


def losses(ends: pd.DataFrame) -> list[str]:
    """A sentence for each duel that flash lost, the whole interval below one."""
    return [
        f"A negative result, and it stays: in {r.dtype} at D = {r.head_dim}, {r.phase}, `{r.second}` is *slower* at "
        f"N = {r.seq_len}: {r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]."
        for r in ends[ends["high"] < 1].itertuples()
    ]


def growth(duels: pd.DataFrame) -> float:
    """The most that any median time, of any run, grows from the shortest length of duels to four times that."""
    short = duels[duels["seq_len"] <= 4 * duels["seq_len"].min()].sort_values("seq_len")
    times = short.groupby(["dtype", "head_dim", "phase", "run"])[["first_ms", "second_ms"]]
    return (times.last() / times.first()).max(axis=None)


def inside(duels: pd.DataFrame) -> tuple[int, int]:
    """How many ratios there are, and how many of the second run lie in the interval of the first."""
    keys = ["dtype", "head_dim", "phase", "seq_len"]
    one, two = (duels[duels["run"] == run] for run in (1, 2))
    both = one.merge(two, on=keys, suffixes=("", "_again"))
    return len(both), int(both["ratio_again"].between(both["low"], both["high"]).sum())


def blocks(cells: pd.DataFrame, heads: int) -> float:
    """The most blocks of 128 rows, over all heads, at any backward crossover in a half-size type."""
    found = cells[(cells["phase"] == "backward") & (cells["dtype"] != "float32") & (cells["seq_len"] < math.inf)]
    return heads * found["seq_len"].max() / 128 if len(found) else 0.0


def reproduced(cells: pd.DataFrame) -> tuple[int, int]:
    """How many crossovers there are, and how many of the second run lie in the interval of the first."""
    one, two = (cells[cells["run"] == run].reset_index() for run in (1, 2))
    return len(one), int(((one["low"] <= two["seq_len"]) & (two["seq_len"] <= one["high"])).sum())


def memory_crossover(first: str, second: str, shape: Shape, phase: str, kind: str) -> int:
    """The N from which on `second` needs less memory than `first`, by their laws; 1 if it always does."""

    def less(n):
        sized = at_length(shape, n)
        return need(VARIANTS[second], sized, phase, kind) < need(VARIANTS[first], sized, phase, kind)

    longest = 4096  # from there on the matrices decide
    return next((n + 1 for n in range(longest, 0, -1) if not less(n)), 1)


def memory_crossovers(pairs: list[tuple[str, str, Shape]], kind: str):
    """`memory_crossover` of each pair for a forward pass and for training, and what both need far beyond."""
    found = []
    for first, second, shape in pairs:
        row = {"dtype": shape.dtype, "head_dim": shape.head_dim, "flash": second}
        for title, phase in (("forward", "forward"), ("training", "backward")):
            row[f"{title}, from N"] = memory_crossover(first, second, shape, phase, kind)
        far = [size(need(VARIANTS[name], at_length(shape, 16384), "backward", kind)) for name in (first, second)]
        found.append({**row, "training at N = 16384": " instead of ".join(reversed(far))})
    return table(pd.DataFrame(found))


def booked(name: str, shape: Shape, kind: str) -> int:
    """The most bytes that the ledger of a forward and a backward pass has alive at once, inputs included."""
    moments = reached(ledger(VARIANTS[name], shape, kind)).values()
    return shape.input_bytes + max(moment["alive_bytes"] for moment in moments)
