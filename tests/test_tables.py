"""Tables and colours: numbers as people read them, a dash where there is none, one colour for one name."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import CPU_DATA

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.laws import ACCOUNTS, c
from attnlib.memory.check import compare
from notebooks.restated import across
from report import plots, tables
from report.predicted import agreement, with_floors, with_laws
from report.stored import load, machine_of


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.035123, "0.0351"), (1209.7, "1,210"), (0.000351, "0.000351"), (0.0, "0"), (3, "3"), (math.nan, "–")]
    + [(4.0, "4.00"), (12.0, "12.0"), (-33.0, "-33.0"), (9.996, "10.0"), (999.7, "1,000"), (np.int64(40), "40")],
)
def test_three_digits_without_an_exponent(value, text):
    assert tables.digits(value) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(1, "1 bytes"), (1023, "1,023 bytes"), (2048, "2 KiB"), (64 * 2**20, "64 MiB"), (2**41, "2,048 GiB")]
    + [(2**31 + 2**20, "2.00 GiB"), (1.5 * 2**30, "1.50 GiB")],
)
def test_sizes_in_the_largest_unit(nbytes, text):
    assert tables.size(nbytes) == text


ROWS = pd.DataFrame(
    {
        "seq_len": [512, 512, 256, 256],
        "variant": ["naive", "tiled", "naive", "tiled"],
        "causal": [False, True, False, True],
        "ms": [4.0, np.nan, 1.0, 0.5],
    }
)


def test_a_grid_has_its_variants_in_the_order_in_which_they_were_measured():
    frame = tables.grid(ROWS, ROWS["ms"], form=tables.digits).data
    assert [*frame] == ["seq_len", "naive", "tiled"] and frame["seq_len"].tolist() == [256, 512]
    assert frame["naive"].tolist() == [1, 4]
    assert [*tables.grid(ROWS[::-1], ROWS["ms"][::-1]).data] == ["seq_len", "tiled", "naive"]


def test_where_there_is_no_figure_stands_a_dash():
    html = tables.grid(ROWS, ROWS["ms"]).to_html()
    assert "–" in html and "nan" not in html.lower()


def test_a_mask_is_a_word():
    assert tables.mask(ROWS).tolist() == ["full", "causal", "full", "causal"]


def test_the_formula_of_a_law_names_every_term_that_is_there():
    """In LaTeX; what is zero under the given conditions is left out."""
    law = VARIANTS["naive"].law
    text = tables.formula(law, "saved", {c: 0})
    assert r"\text{weights}" in text and r"\text{output}" in text and "mask" not in text
    assert r"\text{mask}" in tables.formula(law, "saved")
    assert all(rf"\text{{{operation}:}}" in tables.formula(law, "backward_peak") for operation in law.backward_peak)


def test_the_table_of_accounts_counts_where_all_are_equal():
    machine, shapes = machine_of(CPU_DATA), (Shape(1, 1, 64, 8), Shape(1, 1, 65, 8))
    rows = pd.DataFrame([compare(VARIANTS["naive"], shape, machine) for shape in shapes])
    rows.loc[1, "saved_ledger_bytes"] += 1
    (found,) = tables.accounts(rows).data.to_dict("records")
    assert (found["configurations"], found["saved equal"], found["forward peak equal"]) == (2, 1, 2)


def test_a_point_without_a_law_has_a_row_without_its_figures():
    """sdpa_default: what it needs depends on what PyTorch picks."""
    machine, shape = machine_of("nvidia-h200"), Shape(1, 1, 64, 8, "bfloat16")
    rows = pd.DataFrame([{"variant": name, **shape.columns()} for name in ("naive", "sdpa_default")])
    found = with_laws(rows, machine)
    assert found["needed_bytes"].notna().tolist() == [True, False] and (found["input_bytes"] == shape.input_bytes).all()
    assert (found.loc[0, "needed_bytes"] - shape.input_bytes) == found.loc[0, "backward_peak_law_bytes"]


def test_the_tally_counts_what_was_measured_and_what_agrees():
    """To the byte on a GPU; the CPU's allocator may count a wrapped number more, and never less than the law."""
    shape = Shape(1, 1, 10, 4)
    law = {f"{a}_bytes": VARIANTS["naive"].law.bytes(a, shape, Machine("cuda")) for a in ACCOUNTS}
    row = {"variant": "naive", **shape.columns(), **law}
    rows = [row, row | {"saved_bytes": 561, "backward_peak_bytes": None}]
    found = {"saved": (2, 1), "forward_peak": (2, 2), "backward_peak": (1, 1)}
    assert agreement(pd.DataFrame(rows), VARIANTS, Machine("cuda")) == found
    assert agreement(pd.DataFrame(rows), VARIANTS, Machine("cpu"))["saved"] == (2, 2)
    assert agreement(pd.DataFrame([row | {"saved_bytes": 559}]), VARIANTS, Machine("cpu"))["saved"] == (1, 0)


def test_a_point_without_a_law_is_not_counted():
    """No law, no agreement: a row of `sdpa_default` is measured and held against nothing."""
    row = {"variant": "sdpa_default", **Shape(1, 1, 10, 4).columns(), **{f"{a}_bytes": 1 for a in ACCOUNTS}}
    assert agreement(pd.DataFrame([row]), VARIANTS, Machine("cpu")) == dict.fromkeys(ACCOUNTS, (0, 0))


@pytest.mark.parametrize("device", ["nvidia-h200", CPU_DATA])
def test_measured_points_lie_above_their_floors(device):
    """Of chapter 1's committed points most; only a cache undercuts the floor of copies from memory."""
    rows = load(device, "01_naive_sweep").query("head_dim == 64 and seq_len >= 1024")
    found = with_floors(rows, machine_of(device, "01")).dropna(subset=["backward_ms"])
    assert (found["backward_floor_ms"] > 0).all() and {*found["backward_regime"]} <= {
        "launch",
        "latency",
        "bandwidth",
        "compute",
    }
    assert (found["backward_ms"] / found["backward_floor_ms"]).median() > 0.9


def test_a_colour_belongs_to_a_name_and_not_to_a_place_in_the_table():
    """So that a new variant changes no figure that is there; and no two have the same."""
    known = {name: plots.colour(name) for name in VARIANTS}
    assert len({*known.values()}) == len(known) and known["naive"] == "#de8f05"
    new = [plots.colour(f"new {at}") for at in range(9)]
    assert len({*new, *known.values()}) == len(known) + 9
    assert {name: plots.colour(name) for name in [*VARIANTS][::-1]} == known and plots.colour("new 3") == new[3]


def test_a_prediction_is_told_with_its_miss():
    assert tables.against(2.1, 2.0) == "2.1 (predicted 2.0, off by +5%)"
    assert tables.against(1.35, 2.1, ".2f") == "1.35 (predicted 2.10, off by -36%)"
    assert tables.against(0.999, 1.0) == "1.0 (predicted 1.0, off by +0%)"


def test_a_time_of_few_passes_stands_in_brackets():
    assert tables.bracketed([4.0, 0.5, math.nan], [5, 4, math.nan]) == ["4.00", "(0.500)", "–"]


def test_one_is_no_plural():
    assert [tables.plural(count, "point") for count in (0, 1, 1200)] == ["0 points", "1 point", "1,200 points"]


def test_machines_beside_each_other_have_bytes_as_the_laws_say_and_times_of_their_own():
    every = across.beside(load("nvidia-h200", "01_naive_sweep"), machine_of("nvidia-h200", "01_naive_sweep"))
    assert {"GTX 1080", "A800", "CPU (published)", "NVIDIA H200"} <= {*every["source"]}
    own = every[~every["published"].astype(bool)]
    assert (own["equal"] == own["points"]).all() and (own["ms"] >= own["least_ms"]).loc[own["ms"].notna()].all()
    assert every.loc[every["published"].astype(bool), "least_ms"].isna().all()
