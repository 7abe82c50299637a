"""The rows of data/: damaged ones are refused in one line, older ones are read as they would be written today."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import COMMITTED

from attnlib import FAMILIES
from attnlib.core import Machine, UserError
from attnlib.rows import COLUMNS, FIGURES, POINT, SCHEMA
from report import stored
from report.run import Run
from report.skipping import NotMeasured

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"


def sweeps():
    """Every committed file of measured points, of every device."""
    paths = sorted(path for device in COMMITTED for path in (DATA / device).glob("[0-9]*.csv"))
    return [path for path in paths if {*POINT, "forward_ms", "status"} <= {*pd.read_csv(path, nrows=0)}]


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """A copy of the data of the H200, to be damaged."""
    shutil.copytree(DATA / "nvidia-h200", tmp_path / "data" / "nvidia-h200")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    return tmp_path / "data" / "nvidia-h200"


DAMAGES = {
    "a missing column": lambda rows: rows.drop(columns="saved_bytes"),
    "no rows": lambda rows: rows.head(0),
    "a row less": lambda rows: rows.iloc[1:],
    "a row twice": lambda rows: pd.concat([rows.iloc[1:], rows.tail(1)]),
}
CELLS = [
    *(("status", "fast"), ("machine", "another"), ("torch", "2.11.0"), ("forward_ms", "fast"), ("forward_ms", "")),
    *(("forward_ms", "-3"), ("forward_ms", "inf"), ("seq_len", "-4"), ("seq_len", "long"), ("causal", "maybe")),
    *(("dtype", "float8"), ("variant", "flash9"), ("machine", "")),
]


@pytest.mark.parametrize("damage", [*DAMAGES, *CELLS], ids=str)
def test_a_damaged_csv_is_refused_in_one_line(h200, damage):
    path = h200 / "01_naive_sweep.csv"
    rows = pd.read_csv(path, dtype=str)
    if damage in CELLS:
        rows.loc[3, damage[0]] = damage[1]
    else:
        rows = DAMAGES[damage](rows)
    rows.to_csv(path, index=False)
    with pytest.raises(UserError) as error:
        stored.load("nvidia-h200", "01_naive_sweep", FAMILIES["plain"])
    assert "\n" not in str(error.value) and "01_naive_sweep.csv" in str(error.value)


def test_a_row_of_a_variant_that_was_not_asked_for_is_refused():
    """By a sweep: what stands in its file are its own points, or the file is another's."""
    assert {*stored.load("nvidia-h200", "01_naive_sweep")["variant"]} >= {"naive"}
    with pytest.raises(UserError, match="line [0-9]+: variant 'naive_custom' is none that was asked for"):
        stored.load("nvidia-h200", "01_naive_sweep", ["naive"])


@pytest.mark.parametrize("text", ["[]", "{", '{"a": {}}', '{"a": 1}', ""])
def test_a_damaged_machine_json_is_refused(h200, text):
    (h200 / "machine.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        stored.machine_of("nvidia-h200")


@pytest.mark.parametrize("name", ["nowhere", "published", "../data/nvidia-h200", ""])
def test_a_device_without_data_is_refused_with_those_there_are(name):
    with pytest.raises(UserError, match="nvidia-h200"):
        stored.machine_of(name)


def test_a_report_names_each_day_that_its_data_were_measured(h200):
    path = h200 / "machine.json"
    known = json.loads(path.read_text())
    for facts in known.values():
        facts["dates"] = {"01_clocks": "2026-01-02", "01_naive_sweep": "2026-01-02", "01_options": "2026-01-03"}
        facts["dates"]["01_profile"] = "2026-01-03"
        facts["date"] = "2026-01-04"
    path.write_text(json.dumps(known))
    assert stored.machine_of("nvidia-h200", "01").date == "2026-01-02 and 2026-01-03"
    assert stored.machine_of("nvidia-h200", "03").date == "2026-01-04"


@pytest.mark.parametrize("device", COMMITTED)
def test_the_machine_of_data_is_what_its_record_says(device):
    found = stored.machine_of(device)
    facts = json.loads((DATA / device / "machine.json").read_text())[found.machine]
    assert isinstance(found, Machine) and found.slug == device and found.kind == facts["kind"]
    assert found.threads == facts["threads"] and {*found.ceilings} >= {"launch_us", "copy_gb_s", "gemm_tflop_s"}


@pytest.mark.parametrize("path", sweeps(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_points_are_read_with_the_columns_of_today(path):
    """All rows, and every figure as it stands in the file."""
    raw, rows = pd.read_csv(path), stored.rows_of(path, FIGURES)
    assert {*COLUMNS} == {*rows} and (rows["variant"] == raw["variant"]).all()
    for column in FIGURES:
        np.testing.assert_array_equal(rows[column], raw[column])


def small(tmp_path, monkeypatch, rows, written, **columns):
    """data/x/ with a CSV of `rows` rows where machine.json says that `written` were written."""
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    (tmp_path / "data" / "x").mkdir(parents=True)
    machine = {"machine": "m", "kind": "cpu", "ceilings": {}, "date": "today", "rows": {"03_race": written}}
    (tmp_path / "data" / "x" / "machine.json").write_text(json.dumps({"m": machine}))
    path = tmp_path / "data" / "x" / "03_race.csv"
    frame = pd.DataFrame(
        {"machine": ["m"] * rows, "torch": "2", "schema": SCHEMA, "ms": [float(at) for at in range(rows)]}
    )
    frame.assign(**columns).to_csv(path, index=False)
    return path


def test_rows_of_today_are_read_as_they_are(tmp_path, monkeypatch):
    ends = {"ratio": [2.0, 3.0], "low": [1.5, 2.5], "high": [2.5, 4.0]}
    path = small(tmp_path, monkeypatch, rows=2, written=2, **ends)
    found = stored.rows_of(path, ["ms", *ends])
    assert {name: found[name].tolist() for name in ends} == ends


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("ms", [1.0, math.inf], "not a number"),
        ("ms", [1.0, None], "lacks figures"),
        ("status", ["ok", "fast"], "status 'fast'"),
        ("dtype", ["float32", "float8"], "dtype"),
        ("seq_len", [8, 8], "there twice"),
    ],
)
def test_a_damaged_row_is_told_with_its_line(tmp_path, monkeypatch, column, cells, message):
    sizes = {"batch": 1, "heads": 1, "seq_len": [8, 16], "head_dim": 4, "dtype": "float32", "causal": False}
    path = small(tmp_path, monkeypatch, rows=2, written=2, **sizes | {"status": "ok", "ms": 1.0})
    assert len(stored.rows_of(path, ["ms"])) == 2
    pd.read_csv(path).assign(**{column: cells}).to_csv(path, index=False)
    with pytest.raises(UserError, match=f"line [23].*{message}"):
        stored.rows_of(path, ["ms"])


def test_a_file_that_lost_rows_is_told(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch, rows=3, written=4)
    with pytest.raises(UserError, match="3 row.* where 4 were written"):
        Run("03_flash", "x", "full", True).collect("race", (), ["ms"])


def test_a_replay_says_which_rows_are_missing(tmp_path, monkeypatch):
    """They cost no report: an older device lacks a newer experiment."""
    small(tmp_path, monkeypatch, rows=4, written=4)
    run = Run("03_flash", "x", "full", True)
    assert len(run.collect("race", (), ["ms"])) == 4 and run.has("race") and not run.has("crossover")
    with pytest.raises(NotMeasured, match="Not measured on this device yet: .crossover. of chapter 3"):
        run.collect("crossover", (), [])


def test_a_reader_is_told_who_else_used_the_gpu_and_whether_its_power_limit_held_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    monkeypatch.setattr(stored, "several_occasions", lambda *_: None)
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    pd.DataFrame({"power_w": [100.0, 699.0, None]}).to_csv(folder / "01_a.csv")
    pd.DataFrame({"ms": [1.0]}).to_csv(folder / "02_b.csv")
    machine = Machine("cuda", notes=("Others.",), power_limit_w=700.0)
    others, power = stored.notes_of("x", machine)
    assert others == "Others." and power.startswith(
        "In 1 of 2 points, short bursts with rests between, the GPU drew at least 97%"
    )
    assert stored.notes_of("x", Machine("cuda")) == []


def test_rows_of_several_occasions_are_told_apart(tmp_path, monkeypatch):
    """But not those that another PyTorch left, which say so themselves."""
    torch_of = {"a": "2.11", "b": "2.11", "c": "2.14"}
    monkeypatch.setattr(stored, "machines", lambda _: {one: {"torch": torch} for one, torch in torch_of.items()})
    paths = [tmp_path / f"{name}.csv" for name in ("01_x", "03_x", "05_x", "07_x")]
    for path, one in zip(paths, ("a", "b", "c", "b"), strict=True):
        pd.DataFrame({"machine": [one]}).to_csv(path, index=False)
    told = stored.several_occasions(paths, Machine("cuda", torch="2.11"))
    assert "2 occasions, those of chapters 1 and those of chapters 3, the first appendix;" in told
    assert stored.several_occasions(paths[:1], Machine("cuda", torch="2.11")) is None
