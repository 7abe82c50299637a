"""What notebooks 03 and 04 make of their rows: rates, kernels that were picked, errors, and crossovers.

A crossover is the length from which on one variant wins: in time by races, in memory by laws."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import pandas as pd

from attnlib import VARIANTS
from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import Variant, bytes_needed, useful_flops
from attnlib.memory.fit import at_length
from attnlib.memory.ledger import ledger
from attnlib.rows import shape_of
from report.accuracy import RESULTS
from report.race import duel_jobs, duels
from report.run import Run, say
from report.tables import bracketed, grid, size, table

DUEL_KEYS = ["dtype", "head_dim", "phase"]  # what a crossover is looked for in
RACE_KEYS = ["head_dim", "causal", "seq_len", "phase"]  # what names a race
STARTS = {"≤": "the shortest length tried,", ">": "beyond N ="}  # of what `length` says
OF_DEFAULT = ["of_default", "of_default_low", "of_default_high"]
RACED = ["ms", "do_bench_ms", "gemm_ms", "gemm_tflop_s", "share", *OF_DEFAULT]  # the numbers of a row of a race


def ended(rows: pd.DataFrame, column: str, unit: float = 1):
    """A table of `column` by N and variant, bracketed of fewer than five passes, or how it ended; of those ever taken."""
    rows = rows[rows.groupby("variant")["status"].transform(lambda statuses: (statuses != "unsupported").any())]
    passes = [5] * len(rows) if "bytes" in column else rows["forward_backward_ms_count"]
    shown = rows["status"].where(rows[column].isna(), bracketed(rows[column] / unit, passes))
    return grid(rows.rename(columns={"seq_len": "N"}), shown, "N")


def with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a sweep with `forward_tflop_s` and `backward_tflop_s`, by the operations of laws.useful_flops."""
    shapes = [shape_of(row) for row in rows.to_dict("records")]
    rates = {phase: [useful_flops(one, phase) for one in shapes] / rows[f"{phase}_ms"] / 1e9 for phase in PHASES}
    return rows.assign(**{f"{phase}_tflop_s": rate for phase, rate in rates.items()})


def picks(rows: pd.DataFrame) -> pd.DataFrame:
    """For each race the kernel behind sdpa_default (`picked`), and the `fastest` of PyTorch's own pinned kernels, with
    how many times as fast that is (`of_default`, `_low`, `_high`)."""
    found = []
    # a kernel's name without its return type, parameters and template arguments
    names_alone = rows["kernel"].str.replace(r"^void |<.*|\(.*", "", regex=True).str.split("::").str[-1]
    for names, race in rows.assign(kernel=names_alone).groupby(RACE_KEYS, sort=False):
        race = race.set_index("variant")
        pinned, default = race[race.index.str.startswith("sdpa_")].drop("sdpa_default"), race.loc["sdpa_default"]
        picked = ", ".join(pinned.index[pinned["kernel"] == default["kernel"]]) or default["kernel"]
        best = pinned["of_default"].idxmax()
        row = dict(zip(RACE_KEYS, names, strict=True)) | {"picked": picked, "fastest": best}
        found.append(row | pinned.loc[best, OF_DEFAULT].to_dict())
    return pd.DataFrame(found)


def leader(rows: pd.DataFrame) -> str:
    """Which kernel wins most races of rows, and how it does against PyTorch's default in the longest ones: a sentence."""
    named = rows[rows["variant"] != "sdpa_default"]
    best = named.loc[named.groupby(RACE_KEYS)["ms"].idxmin(), "variant"]
    name, longest = best.mode()[0], rows["seq_len"].max()
    far = named.query("variant == @name and seq_len == @longest")["of_default"]
    return f"Of the kernels raced, `{name}` is the fastest in {(best == name).sum()} of {len(best)} races; at N = {longest:,} it is {far.min():.2f} to {far.max():.2f} times as fast as what PyTorch picks by default."


def worst(rows: Iterable[dict]) -> float:
    """The largest error over that of the reference, in rows of accuracy.compared."""
    return max(row[f"{result}_of_reference"] for row in rows for result in RESULTS)


def errors_over_naive(rows: pd.DataFrame, name: str, dtype: str) -> tuple[float, float]:
    """The smallest and the largest error of a variant over that of `naive`, over RESULTS and masks."""
    errors = rows[rows["dtype"] == dtype].set_index(["variant", "causal"])[[f"{r}_error" for r in RESULTS]].sort_index()
    over = errors.loc[name] / errors.loc["naive"]
    return over.min(axis=None), over.max(axis=None)


def duelled(
    run: Run, name: str, pairs: Sequence[tuple[Variant, Variant, Shape, str]], budget_s: float, users: bool = False
) -> pd.DataFrame:
    """The duels of `(first, second, shape, phase)`, see timing.race.duels, from the rows called `name`: two runs whose
    batches have processes of their own, or, in the quick profile and on the `users` clock, one run in a single one."""
    numbers, brief = ("first_ms", "second_ms", "ratio", "rounds", "run"), users or run.profile.suffix != ""
    how = {"runs": 1 if brief else 2, "apart": not brief, "users": users}
    jobs = () if run.replay else duel_jobs(pairs, run.device, budget_s, **how)
    rows = run.collect(name, jobs, numbers)
    return pd.DataFrame(duels(rows.to_dict("records")))


def crossing(lengths: Iterable[int], values: Iterable[float]) -> float:
    """The N from which on all values exceed one: between two lengths by a straight line through log(value) over log N.
    The shortest length if that is so everywhere, infinity if it is not so at the longest."""
    points = sorted(zip(lengths, values, strict=True), reverse=True)
    if points[0][1] <= 1:
        return math.inf
    for (n, value), (below, at_below) in zip(points, points[1:], strict=False):
        if at_below <= 1:
            share = math.log(value) / math.log(value / at_below)
            return math.exp(math.log(n) - share * math.log(n / below))
    return float(points[-1][0])


def crossings(rows: pd.DataFrame) -> pd.DataFrame:
    """For each of DUEL_KEYS and run of duels: `seq_len`, from which on `second` wins, between `low` and `high`, where
    the ratio's whole interval says so; `shortest` and `longest` length tried, `least` and `most` of the ratio there."""
    found = []
    for names, cell in rows.groupby([*DUEL_KEYS, "run", "first", "second"], sort=False):
        cell = cell.sort_values("seq_len")
        # where the ratio's high end passes one is the low end of the crossover
        at, low, high = (crossing(cell["seq_len"], cell[column]) for column in ("ratio", "high", "low"))
        ends = {"shortest": cell["seq_len"].iloc[0], "longest": cell["seq_len"].iloc[-1]}
        ends |= {"least": cell["ratio"].iloc[0], "most": cell["ratio"].iloc[-1]}
        row = dict(zip((*DUEL_KEYS, "run", "first", "second"), names, strict=True))
        found.append(row | {"seq_len": at, "low": low, "high": high, **ends})
    return pd.DataFrame(found)


def length(n: float, cell: dict) -> str:
    """A length of `crossings`: a number, or that it lies beyond the lengths tried."""
    if math.isinf(n):
        return f"> {cell['longest']:,}"
    return f"≤ {cell['shortest']:,}" if n <= cell["shortest"] else f"{n:,.0f}"


def wins(cells: pd.DataFrame, dtype: str) -> str:
    """From which lengths on the second wins in a type, in the first run, and by how much at the longest: a sentence."""
    found = cells.query("run == 1 and dtype == @dtype")
    froms = []
    for phase, each in found.groupby("phase", sort=False):
        texts = [length(cell["seq_len"], cell) for cell in each.to_dict("records")]
        texts = [f"{STARTS.get(text[0], 'N =')} {text.lstrip('≤> ')}" for text in texts]
        at = each.assign(text=texts).groupby("text", sort=False)["head_dim"].agg(lambda ds: " and ".join(map(str, ds)))
        froms.append(f"{phase} from {' or '.join(f'{text} (D = {d})' for text, d in at.items())}")
    least, most, n = found["most"].min(), found["most"].max(), found["longest"].max()
    names = ", ".join(f"`{name}`" for name in found["second"].unique())
    return f"In {dtype}, without a mask, {names} takes less time {', '.join(froms)} on; at N = {n:,} `naive` takes {least:.1f} to {most:.1f} times as long"


def froms(cells: pd.DataFrame) -> str:
    """From which N on the second wins: "forward from N = 512, backward from N = 1024"."""
    told = [f"{row['phase']} from N = {length(row['seq_len'], row)}" for row in cells.to_dict("records")]
    return ", ".join(text.replace("N = >", "N >").replace("N = ≤", "N ≤") for text in told)


def crossovers(cells: pd.DataFrame):
    """A table of the lengths from which the second wins, with intervals, from each run; and ratios at both ends."""
    found = []
    for names, runs in cells.groupby(DUEL_KEYS, sort=False):
        one, *others = runs.sort_values("run").to_dict("records")
        row = dict(zip(("dtype", "D", "phase"), names, strict=True)) | {"variant": one["second"]}
        at, *ends = (length(one[end], one) for end in ("seq_len", "low", "high"))
        row |= {"wins from N": at if set(ends) == {at} else f"{at} [{ends[0]}, {ends[1]}]"}
        if others:
            row["second run"] = length(others[0]["seq_len"], others[0])
        row |= {f"at N = {one[n]:,}": f"{one[ratio]:.2f}×" for n, ratio in (("shortest", "least"), ("longest", "most"))}
        found.append(row)
    return table(pd.DataFrame(found))


def reproduced(run: Run, rows: pd.DataFrame, cells: pd.DataFrame) -> bool:
    """Observe how many crossovers, and single ratios, a second run finds in the first's intervals; whether all."""
    one, two = (cells[cells["run"] == number].reset_index() for number in (1, 2))
    if two.empty:
        say("There was one run, in one process: how well it repeats is not known.")
        return True
    same = int(((one["low"] <= two["seq_len"]) & (two["seq_len"] <= one["high"])).sum())
    text = f"crossovers of {len(one)} that the second run finds within the first's interval"
    found = run.observe(text, same, least=len(one), form="d")
    one, two = (rows[rows["run"] == number] for number in (1, 2))
    both = one.merge(two, on=[*DUEL_KEYS, "seq_len"], suffixes=("", "_again"))
    again = both["ratio_again"].between(both["low"], both["high"]).sum()
    say(f"Of the single ratios, {again} of {len(both)} lie in the first run's interval the second time.")
    return found


def relapses(rows: pd.DataFrame) -> list[str]:
    """A sentence for each cell of duels in which flash wins at the shortest length and loses later, whole intervals."""
    found = []
    for (dtype, d, phase), cell in rows.sort_values("seq_len").groupby(DUEL_KEYS, sort=False):
        lost = cell.loc[cell["high"] < 1, "seq_len"]
        if cell["low"].iloc[0] > 1 and len(lost):
            where = f"loses at N = {' to '.join(dict.fromkeys(map('{:,}'.format, (lost.iloc[0], lost.iloc[-1]))))}"
            found.append(f"In {dtype} at D = {d}, {phase}, flash wins at the shortest lengths too, and {where}.")
    return found


def blocks_at_crossover(cells: pd.DataFrame, heads: int) -> float:
    """The most blocks of 128 rows, over all heads, at any backward crossover in a half-size type."""
    found = cells[(cells["phase"] == "backward") & (cells["dtype"] != "float32") & (cells["seq_len"] < math.inf)]
    return heads * found["seq_len"].max() / 128 if len(found) else 0.0


def ledger_traffic(variants: Iterable[Variant], shape: Shape, machine: Machine) -> pd.DataFrame:
    """As traffic.counted, for a device without counters: the traffic of the ledger, each operand once an operation."""
    found = []
    for variant in variants:
        rows = pd.DataFrame(ledger(variant, shape, machine)).groupby("phase")["traffic_bytes"].sum()
        names = {"variant": variant.name, **shape.columns()}
        found += [names | {"phase": p, "dram_bytes": rows[p], "useful_flops": useful_flops(shape, p)} for p in PHASES]
    return pd.DataFrame(found)


def memory_crossover(first: Variant, second: Variant, shape: Shape, phase: str, machine: Machine) -> int:
    """The N from which on `second` needs less memory than `first`, by their laws; 1 if it always does."""

    def need(one: Variant, n: int) -> int:
        return bytes_needed(one, at_length(shape, n), machine, phase)

    longest = 4096  # from there on the matrices decide
    return next((n + 1 for n in range(longest, 0, -1) if need(second, n) >= need(first, n)), 1)


def memory_crossovers(rivals: Mapping[str, str], head_dims: Iterable[int], machine: Machine):
    """A table of `memory_crossover` of `naive` and each type's rival, `{dtype: variant}`, and of bytes at N = 16384."""
    found = []
    for (dtype, name), d in product(rivals.items(), head_dims):
        both, shape = (VARIANTS["naive"], VARIANTS[name]), Shape(1, 8, 1, d, dtype)
        row = {"dtype": dtype, "D": d, "flash": name}
        for title, phase in (("forward", "forward"), ("training", "backward")):
            row[f"{title}, from N"] = f"{memory_crossover(*both, shape, phase, machine):,}"
        less, more = (size(bytes_needed(one, at_length(shape, 16384), machine)) for one in reversed(both))
        found.append(row | {"training at N = 16,384": f"{less} instead of {more}"})
    return table(pd.DataFrame(found))
