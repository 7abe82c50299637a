"""What the tables of several chapters share: numbers as text, a frame as a table, a grid; the tables that recur."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral

import pandas as pd
import sympy
from pandas.io.formats.style import Styler

from attnlib.laws import ACCOUNTS, Law

MIB, GIB = 2**20, 2**30
NO_FIGURE = "–"


def table(frame: pd.DataFrame, formats: Mapping | None = None) -> Styler:
    """A DataFrame as a table of the report: its columns formatted, a dash where there is no figure."""
    return frame.style.format(formats, na_rep=NO_FIGURE).hide(axis="index")


def size(nbytes: float) -> str:
    """Bytes in the largest unit that leaves a number of at least one: "64 MiB"; a dash for NaN."""
    if math.isnan(nbytes):
        return NO_FIGURE
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{digits(nbytes) if nbytes % 1 else format(int(nbytes), ',')} {unit}"
        nbytes /= 1024


def digits(value: float) -> str:
    """Three significant digits, from 0.0001 up without an exponent: "0.0351", "4.00", "1,210"; an integer as one."""
    near = float(f"{value:.3g}")
    if math.isnan(near) or isinstance(value, Integral) or abs(near) < 1e-4:
        return NO_FIGURE if math.isnan(near) else f"{near:,.10g}"
    return f"{near:,.{max(0, 2 - math.floor(math.log10(abs(near))))}f}"


def bracketed(values: Iterable[float], passes: Iterable[float]) -> list[str]:
    """`digits` of each value, in brackets where fewer than five passes stand behind it."""
    return [f"({digits(x)})" if count < 5 else digits(x) for x, count in zip(values, passes, strict=True)]


def plural(count: int, noun: str) -> str:
    """A number with its noun: "1 point", "120 points"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def against(measured: float, predicted: float, form: str = ".1f") -> str:
    """A figure beside its prediction, and by how much that missed."""
    return f"{measured:{form}} (predicted {predicted:{form}}, off by {round(100 * (measured / predicted - 1)) + 0:+d}%)"


def mask(rows: pd.DataFrame) -> pd.Series:
    """The column `causal` in words."""
    return rows["causal"].map({True: "causal", False: "full"})


def grid(rows: pd.DataFrame, cells: Iterable, index: str | list = "seq_len", columns="variant", form: object = None):
    """A table of `cells`, one for each row, by `index` and the values of `columns`, as these come; form: of numbers."""
    frame = rows.assign(cell=cells).pivot(index=index, columns=columns, values="cell")[rows[columns].unique()]
    names = [str(name) for name in frame]
    frame = frame.set_axis(names, axis=1).reset_index()
    return table(frame, dict.fromkeys(names, form) | {one: "{:,}" for one in ("N", "seq_len") if one in frame})


def formula(law: Law, account: str, given: Mapping | None = None) -> str:
    """An account of a law in LaTeX, a line for each moment, with `{symbol or condition: value}` of `given` put in."""
    lines = []
    for operation, terms in law.moments(account).items():
        shown = {name: sympy.sympify(term).subs(given or {}) for name, term in terms.items()}
        named = [rf"\underbrace{{{sympy.latex(f)}}}_{{\text{{{name}}}}}" for name, f in shown.items() if f != 0]
        rows = [" + ".join(named[start : start + 3]) for start in range(0, len(named), 3)]
        lines.append(rf"\text{{{operation}:}}\quad & " + r" \\ & {} + ".join(rows))
    return r"\begin{aligned}" + r" \\[1ex] ".join(lines) + r"\end{aligned}"


def accounts(rows: pd.DataFrame) -> Styler:
    """Configurations of predicted.booked by variant: on how many all accounts are equal, and the largest peak."""
    books = {account: rows.filter(regex=f"^{account}_(law|ledger|requested)_bytes$") for account in ACCOUNTS}
    equal = {f"{one.replace('_', ' ')} equal": figures.nunique(axis=1) == 1 for one, figures in books.items()}
    groups = rows.assign(**equal).groupby("variant", sort=False)
    peaks = (groups["backward_peak_law_bytes"].max() / GIB).map("{:.2f} GiB".format)
    frame = groups.size().to_frame("configurations").join(groups[[*equal]].sum())
    return table(frame.assign(**{"largest peak": peaks}).reset_index())


def slack(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of frontier.search with `slack_bytes`, the room that the law saw left for the N that failed, and who had it.
    rounding_bytes: in blocks larger than asked for; holes_bytes: reserved from the driver and in no block."""
    return rows.assign(
        slack_bytes=(rows["memory_bytes"] - rows["need_bytes"]).clip(lower=0),
        rounding_bytes=rows["allocated_bytes"] - rows["requested_bytes"],
        holes_bytes=rows["reserved_bytes"] - rows["allocated_bytes"],
    )


def frontiers(rows: pd.DataFrame) -> Styler:
    """Predicted and found largest N per case, and where the difference went, in MiB."""
    rows = slack(rows).rename(columns={"head_dim": "d_model", "allocator": "pool"})
    frame = rows[["variant", *(one for one in ("d_model", "dtype") if rows[one].nunique() > 1), "phase", "pool"]]
    figures = {"GiB": rows["memory_bytes"] / GIB}
    figures |= {one: rows[f"{one}_seq_len"].map("{:,}".format) for one in ("predicted", "found")}
    forms = {"GiB": "{:.1f}", "slack": "{:,.1f}", "tried": "{:,.1f}", "rounding": "{:.3f}", "holes": "{:,.1f}"}
    return table(frame.assign(**figures, **{one: rows[f"{one}_bytes"] / MIB for one in list(forms)[1:]}), forms)
