"""The tables of notebook 02, each made from laws, ledgers or rows and nothing else."""

import math

import pandas as pd
import sympy

from attnlib import VARIANTS, fit, published
from attnlib.check import SOURCES
from attnlib.core import ACCOUNTS, SYMBOLS, Law, N, Shape, Variant
from attnlib.memory import ledger
from attnlib.stored import ROOT
from attnlib.tables import GIB, MIB, NO_FIGURE, digits, table

CLAIMED = {"naive_custom": 3, "naive": 2, "naive_weights_only": 1}  # N×N tensors, by the published A800 report
MEMORIES = {"GTX 1080": "7.9GiB", "RTX 4090": "24GiB", "L40S": "48GiB", "A100, H100": "80GB", "H200": "139.8GiB"}


def formula(law: Law, account: str, given: dict | None = None) -> str:
    """An account of a law in LaTeX, a line for each moment, each term named; a peak is the largest of its moments.

    given: `{symbol or condition: value}` put in first.
    """
    lines = []
    for operation, terms in law.moments(account).items():
        shown = {name: sympy.sympify(f).subs(given or {}) for name, f in terms.items()}
        named = [rf"\underbrace{{{sympy.latex(f)}}}_{{\text{{{name}}}}}" for name, f in shown.items() if f != 0]
        rows = [" + ".join(named[start : start + 3]) for start in range(0, len(named), 3)]
        lines.append(rf"\text{{{operation}:}}\quad & " + r" \\ & {} + ".join(rows))
    return r"\begin{aligned}" + r" \\[1ex] ".join(lines) + r"\end{aligned}"


def alive(variant: Variant, shape: Shape, device: str):
    """The ledger's view of memory: what is alive at the end of each operation, in MiB and in score matrices."""
    matrix = shape.batch * shape.heads * shape.seq_len**2 * shape.element_size
    found = [
        (row["phase"], row["op"], row["alive_bytes"] / MIB, row["alive_bytes"] / matrix)
        for row in ledger(variant, shape, device)
        if row["phase"] != "upstream" and row["op"] != "return"
    ]
    frame = pd.DataFrame(found, columns=["phase", "operation", "alive MiB", "in N×N matrices"])
    return table(frame, {"alive MiB": "{:,.1f}", "in N×N matrices": "{:.2f}"})


def components(variant: Variant, shape: Shape, account: str, device: str, measured: float = math.nan, held=math.nan):
    """Every term of one account at one shape: formula, bytes, share; quadratic and linear totals; what was measured.

    measured: the allocator's bytes above the inputs, if known; held: all that it had allocated on the device then.
    """
    law = variant.law
    operation, sizes = law.at(account, shape, device)
    inputs = dict.fromkeys("QKV", shape.input_bytes // 3)
    formulas = dict.fromkeys("QKV", sympy.prod(SYMBOLS)) | law.moments(account)[operation]
    total = shape.input_bytes + sum(sizes.values())
    found = [
        (name, f"${sympy.latex(formulas[name])}$", f"{nbytes:,}", f"{nbytes / total:.2%}")
        for name, nbytes in {**inputs, **sizes}.items()
    ]
    quadratic = sum(nbytes for name, nbytes in sizes.items() if sympy.degree(formulas[name], N) == 2)
    sums = {"total quadratic": quadratic, "total linear": total - quadratic, "total predicted": total}
    sums |= {"total measured": shape.input_bytes + measured}
    if not math.isnan(held):
        sums |= {
            "cuBLAS's workspace, and rounding to blocks": held - shape.input_bytes - measured,
            "all allocated": held,
        }
    for name, nbytes in sums.items():
        known = not math.isnan(nbytes)
        figures = (f"{int(nbytes):,}", f"{nbytes / total:.2%}") if known else (NO_FIGURE, NO_FIGURE)
        found.append((name, "", *figures))
    return table(pd.DataFrame(found, columns=["component", "formula", "bytes", "share"]))


def accounts(rows: pd.DataFrame):
    """Random configurations by variant: on how many the accounts are equal, and what the allocator gave out beyond."""
    sources, found = [source for source in SOURCES if f"saved_{source}_bytes" in rows], []
    for variant, group in rows.groupby("variant", sort=False):
        cells = {"variant": variant, "configurations": len(group)}
        for account in ACCOUNTS:
            figures = group[[f"{account}_{source}_bytes" for source in sources]]
            cells[f"{account.replace('_', ' ')} equal"] = int((figures.nunique(axis=1, dropna=True) == 1).sum())
        cells["largest peak"] = f"{group['backward_peak_law_bytes'].max() / GIB:.2f} GiB"
        found.append(cells)
    return table(pd.DataFrame(found))


def blocks(rows: pd.DataFrame):
    """What the allocator gave out beyond what was requested, per account: rounding to 512 bytes, blocks not split."""
    found = []
    for account in ACCOUNTS:
        over = rows[f"{account}_allocated_bytes"] - rows[f"{account}_requested_bytes"]
        rounding = rows[f"{account}_rounding_bytes"]
        unsplit = over - rounding
        figures = (over.median(), rounding.median(), rounding.max(), unsplit.median() / MIB, unsplit.max() / MIB)
        found.append((account.replace("_", " "), *figures))
    columns = ["account", "beyond, median bytes", "rounding, median bytes", "rounding, most bytes"]
    columns += ["not split, median MiB", "not split, most MiB"]
    return table(pd.DataFrame(found, columns=columns), dict.fromkeys(columns[1:], digits))


def matrices(row, column: str, shape: Shape) -> float:
    """A figure of a sweep's row in bytes as a number of N×N matrices of the shape's dtype."""
    return row[column] / (shape.batch * shape.heads * shape.seq_len**2 * shape.element_size)


def kept(rows: pd.DataFrame, shape: Shape, device: str):
    """How many N×N tensors each variant keeps: as published 002 claims, by the law, as measured; and its time."""
    found = []
    for row in rows.to_dict("records"):
        law = {"saved_bytes": VARIANTS[row["variant"]].law.bytes("saved", shape, device)}
        claimed = CLAIMED.get(row["variant"], NO_FIGURE)
        cells = (claimed, f"{matrices(law, 'saved_bytes', shape):.3f}", f"{matrices(row, 'saved_bytes', shape):.3f}")
        found.append((row["variant"], *cells, f"{row['saved_bytes'] / MIB:,.1f}", digits(row["forward_backward_ms"])))
    columns = ["variant", "published", "law", "measured", "saved MiB", "forward + backward ms"]
    return table(pd.DataFrame(found, columns=columns))


def slack(rows: pd.DataFrame) -> pd.DataFrame:
    """Frontier rows with `slack_bytes`, the room that the law saw left for the N that failed, and who had it.

    rounding_bytes: in blocks larger than asked for; holes_bytes: reserved from the driver and in no block.
    """
    return rows.assign(
        slack_bytes=(rows["memory_bytes"] - rows["need_bytes"]).clip(lower=0),
        rounding_bytes=rows["allocated_bytes"] - rows["requested_bytes"],
        holes_bytes=rows["reserved_bytes"] - rows["allocated_bytes"],
    )


def frontier(rows: pd.DataFrame):
    """Predicted and found largest N per case, and where the difference went, in MiB."""
    rows = slack(rows)
    frame = pd.DataFrame(
        {
            "variant": rows["variant"],
            "d_model": rows["head_dim"],
            "dtype": rows["dtype"],
            "phase": rows["phase"],
            "pool": rows["allocator"],
            "GiB": rows["memory_bytes"] / GIB,
            "predicted": rows["predicted_seq_len"],
            "found": rows["found_seq_len"],
            "slack": rows["slack_bytes"] / MIB,
            "tried": rows["tried_bytes"] / MIB,
            "rounding": rows["rounding_bytes"] / MIB,
            "holes": rows["holes_bytes"] / MIB,
        }
    )
    if rows["head_dim"].nunique() == 1:
        frame = frame.drop(columns="d_model")
    if rows["dtype"].nunique() == 1:
        frame = frame.drop(columns="dtype")
    return table(
        frame, {"GiB": "{:.1f}", "slack": "{:,.1f}", "tried": "{:,.1f}", "rounding": "{:.3f}", "holes": "{:,.1f}"}
    )


def cells(rows: pd.DataFrame):
    """Which cells of a published grid run: per variant and N a mark for each d_model, in ascending order."""
    marks = rows.assign(mark=rows["fits"].map({True: "runs", False: "OOM"}))
    frame = marks.pivot(index="variant", columns=["seq_len", "head_dim"], values="mark")
    joined = frame.T.groupby("seq_len").agg(lambda column: " ".join(sorted(set(column)))).T
    joined.columns = [f"N = {n}" for n in joined.columns]
    return table(joined.loc[list(dict.fromkeys(rows["variant"]))].reset_index())


def same_endings(rows: pd.DataFrame, name: str) -> tuple[int, int]:
    """The cells that `rows` share with data/published/<name>.csv, and on how many of them both run or both fail."""
    theirs = published.read(ROOT / "data" / "published" / f"{name}.csv")
    ended = {
        (s.seq_len, s.head_dim): status == "ok" for s, status in zip(theirs["shape"], theirs["status"], strict=True)
    }
    mine = {(row.seq_len, row.head_dim): row.fits for row in rows.itertuples()}
    shared = mine.keys() & ended.keys()
    return len(shared), sum(mine[cell] == ended[cell] for cell in shared)


def text(form: dict[str, int]) -> str:
    """A closed form as people write it: "14L + 2S + 5M"."""
    return " + ".join(f"{count if count > 1 else ''}{name}" for name, count in form.items() if count)


def closed_forms(found: dict[str, tuple]):
    """`{source: (rows, column)}` of published tables: the smallest closed form, and how many there are."""
    lines = []
    for source, (rows, column) in found.items():
        form, forms = published.smallest(rows, column), published.closed_forms(rows, column)
        equal = published.reproduce(rows, column, form)["equal"]
        ties = [" = ".join(tied(d)) for d in published.dependencies(rows, column)]
        lines.append((source, text(form), f"{int(equal.sum())} of {len(equal)}", len(forms), ", ".join(ties)))
    return table(pd.DataFrame(lines, columns=["table", "closed form", "reproduced", "solutions", "cannot tell apart"]))


def tied(dependency: dict[str, int]) -> list[str]:
    """{"S": 1, "M": -32} as ["S", "32M"]."""
    left = text({name: count for name, count in dependency.items() if count > 0})
    return [left, text({name: -count for name, count in dependency.items() if count < 0})]


def fits(names, shape: Shape, device: str):
    """The largest N in training of the variants `names` for the memories of some GPUs."""
    found = []
    for gpu, memory in MEMORIES.items():
        options = fit.options(shape, fit.nbytes(memory), device).set_index("variant")["training"]
        found.append({"memory": f"{memory} ({gpu})", **{name: f"{options[name]:,}" for name in names}})
    return table(pd.DataFrame(found))


def remedies(rows: pd.DataFrame, base: dict):
    """Bytes kept, peak and time of each variant and dtype relative to `base`, `{column: value}` of one row."""
    start = rows.loc[(rows[list(base)] == pd.Series(base)).all(axis=1)].iloc[0]
    frame = rows[["variant", "dtype"]].copy()
    for label, column in (("kept", "saved_bytes"), ("peak", "backward_peak_bytes"), ("time", "forward_backward_ms")):
        unit = 1 if column.endswith("ms") else MIB
        frame[f"{label}{' ms' if unit == 1 else ' MiB'}"] = [digits(x / unit) for x in rows[column]]
        frame[f"{label} ×"] = [f"{x / start[column]:.2f}" for x in rows[column]]
    return table(frame)
