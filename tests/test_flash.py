"""What notebook 03 makes of its rows: counters, names, intervals, crossovers, and PyTorch's choice."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch

from attnlib import VARIANTS, crossover, crossover_tables, flash_tables, results, stored, traffic
from attnlib import device as dev
from attnlib.core import ACCOUNTS, AttnError, Shape
from attnlib.fit import at_length, need
from attnlib.measure import measure

HEADER = '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"\n"","","byte","byte"\n'
SPIN = "cuda::<unnamed>::spin_kernel(long)"


def printed(*kernels) -> str:
    """What ncu prints for kernels, `(name, bytes read, bytes written)`, behind its own remarks."""
    lines = [f'"{at}","{name}","{read:,}","{written:,}"' for at, (name, read, written) in enumerate(kernels)]
    return "==PROF== Connected\n" + HEADER + "\n".join(lines) + "\n"


def test_counters_are_summed_between_waiting_kernels():
    text = printed((SPIN, 9, 9), ("a", 1000, 2000), (SPIN, 9, 9), ("b", 10, 20), ("c<int, 2>(x)", 1, 2))
    forward, backward = traffic.summed(text, ["naive"], Shape(1, 1, 8, 4))
    assert (forward["dram_bytes"], forward["kernels"]) == (3000, 1)
    assert (backward["dram_bytes"], backward["kernels"], backward["phase"]) == (33, 2, "backward")
    assert set(traffic.TRAFFIC) <= set(forward)


WHOLE = printed((SPIN, 9, 9), ("a", 1, 2), (SPIN, 9, 9), ("b", 1, 2))


@pytest.mark.parametrize(
    "damage", [('"byte"', '"Mbyte"'), ('"2"', '"n/a"'), ("dram__bytes_write.sum", "other"), ('"b"', '"spin_kernel"')]
)
def test_damaged_counters_are_no_rows(damage):
    assert traffic.summed(WHOLE, ["naive"], Shape(1, 1, 8, 4))
    assert traffic.summed(WHOLE.replace(*damage), ["naive"], Shape(1, 1, 8, 4)) == []


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM", printed(), printed((SPIN, 1, 1), ("a", 1, 1))])
def test_without_counters_there_are_no_rows(text):
    assert traffic.summed(text, ["naive"], Shape(1, 1, 8, 4)) == []


def test_without_the_profiler_there_are_no_rows(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert traffic.measured(["naive"], Shape(1, 1, 8, 4), "cuda:0") == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Traits<64, 128>, false>(Params)", "flash_fwd_kernel"),
        (
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel<x>::Params)",
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        ),
        ("aten::bmm", "bmm"),
    ],
)
def test_names_of_kernels_are_shortened(name, short):
    assert flash_tables.kernel(name) == short


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_crossover_in_memory_is_where_the_laws_cross(phase):
    shape = Shape(1, 8, 1, 64, "bfloat16")
    n = crossover_tables.memory_crossover("naive", "sdpa_flash", shape, phase, "cuda")
    sizes = [
        [need(VARIANTS[v], at_length(shape, m), phase, "cuda") for v in ("naive", "sdpa_flash")] for m in (n - 1, n)
    ]
    assert sizes[0][1] >= sizes[0][0] and sizes[1][1] < sizes[1][0]


def test_a_crossover_outside_the_lengths_tried_says_so():
    cell = {"shortest": 16, "longest": 1024}
    assert [crossover_tables.length(n, cell) for n in (16.0, 99.6, float("inf"))] == ["≤ 16", "100", "> 1024"]


def test_the_pick_is_told_from_the_kernel_that_ran():
    sizes = {"head_dim": 64, "causal": False, "seq_len": 512, "phase": "forward"}
    rows = [
        {"variant": "sdpa_default", "kernel": "void f<1>(x)", "of_default": 1.0},
        {"variant": "sdpa_flash", "kernel": "void f<1>(x)", "of_default": 1.0},
        {"variant": "sdpa_cudnn", "kernel": "g", "of_default": 1.5},
        {"variant": "fa4", "kernel": "h", "of_default": 2.0},
    ]
    rows = pd.DataFrame(rows).assign(**sizes, of_default_low=1.0, of_default_high=2.0)
    (found,) = flash_tables.picks(rows).to_dict("records")
    assert (found["picked"], found["fastest"], found["of_default"]) == ("sdpa_flash", "sdpa_cudnn", 1.5)


def test_a_row_names_the_kernel_of_the_attention_alone(device):
    from attnlib.block import in_block

    shape = Shape(1, 4, 256, 64, "bfloat16")
    row = measure(in_block(VARIANTS["sdpa_flash"]), shape, device, budget_s=0.05)
    assert ("flash_fwd" if device == "cuda" else "flash_attention_for_cpu") in row["kernel"]


def test_the_ledger_stands_in_for_counters():
    shape = Shape(1, 2, 256, 64)
    rows = flash_tables.intensity(flash_tables.ledgered(["naive", "sdpa_flash"], shape, "cpu")).set_index(
        ["variant", "phase"]
    )
    assert rows.loc[("sdpa_flash", "forward"), "dram_bytes"] == 4 * 4 * 2 * 256 * 64 + 4 * 2 * 256
    assert rows.loc[("sdpa_flash", "forward"), "intensity"] > rows.loc[("naive", "forward"), "intensity"]


def test_agreement_counts_points_that_equal_the_law():
    columns = {f"{account}_{what}bytes": [10, 20] for account in ACCOUNTS for what in ("", "law_")}
    rows = pd.DataFrame(columns).assign(saved_bytes=[10, 21], backward_peak_bytes=[10, float("nan")])
    assert flash_tables.agreement(rows, "cuda") == {"saved": (2, 1), "forward_peak": (2, 2), "backward_peak": (1, 1)}


def test_few_batches_widen_an_interval():
    rows = pd.DataFrame({"ratio": [2.0], "low": [1.0], "high": [3.0]})
    (row,) = crossover.expanded(rows).to_dict("records")
    assert row["low"] == pytest.approx(2 * 0.5**crossover.FEW) and row["high"] == pytest.approx(2 * 1.5**crossover.FEW)
    assert 1.997 < crossover.FEW < 1.999


def test_intervals_hold_a_known_ratio_as_often_as_they_say():
    """Batches of lognormal noise, each with an offset of its own, as inputs and a clock make it: the percentiles alone
    miss the true ratio far more often than one time in a hundred."""
    draw, missed = np.random.default_rng(0), {"as drawn": 0, "expanded": 0}
    for trial in range(200):
        offsets = draw.normal(0, 0.05, crossover.BATCHES)
        batches = [np.exp(offset + draw.normal(0, 0.01, 12)) for offset in offsets]
        low, high = crossover.interval(batches, seed=trial)
        ratio = float(np.median(np.concatenate(batches)))
        rows = pd.DataFrame({"ratio": [ratio], "low": [low], "high": [high]})
        for name, frame in (("as drawn", rows), ("expanded", crossover.expanded(rows))):
            missed[name] += not frame["low"].iloc[0] <= 1 <= frame["high"].iloc[0]
    assert missed["expanded"] <= 6 < missed["as drawn"], missed


def duels(ratios):
    """Rows of two runs at one length."""
    names = {"dtype": "bfloat16", "head_dim": 64, "phase": "backward", "seq_len": 512}
    return pd.DataFrame([{**names, "run": run, "ratio": r, "low": 0.9, "high": 1.1} for run, r in enumerate(ratios, 1)])


def test_ratios_of_the_second_run_are_counted_in_the_first_ones_interval():
    for second, count in ((1.05, 1), (1.2, 0)):
        assert crossover_tables.inside(duels([1.0, second])) == (1, count)


def test_a_cell_that_flash_wins_at_first_and_loses_later_is_told():
    cells = pd.concat([duels([1.0])] * 4).assign(
        seq_len=[16, 32, 64, 128], low=[1.1, 0.7, 0.6, 1.2], high=[1.2, 0.9, 0.8, 1.4]
    )
    assert "loses at N = 32 to 64" in crossover_tables.relapses(cells)[0]
    assert not crossover_tables.relapses(cells[1:]) and not crossover_tables.relapses(cells[:1])


def test_blocks_of_rows_at_the_latest_crossover():
    cells = duels([1.0, 1.0]).assign(seq_len=[640.0, math.inf])
    assert crossover_tables.blocks(cells, heads=8) == 40 and crossover_tables.blocks(cells[1:], heads=8) == 0


@pytest.mark.gpu
def test_races_do_not_depend_on_the_pace_of_the_host():
    """A call that launches its kernels slowly takes the device no longer."""
    x = torch.randn(512, 512, device="cuda")

    def slow():
        for _ in range(3):
            time.sleep(1e-3)
            x.relu()

    functions = [lambda: [x.relu() for _ in range(3)], slow]
    wait_ms = 2 * dev.warm_up(functions, "cuda")
    fast_ms, slow_ms = np.median(dev.milliseconds(functions, 20, "cuda", wait_ms), axis=0)
    assert slow_ms < 2 * fast_ms


def folder(tmp_path, monkeypatch, rows, written):
    """data/x/ with one CSV of `rows` rows where machine.json says that `written` were written."""
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    (tmp_path / "data" / "x").mkdir(parents=True)
    machine = {"machine": "m", "kind": "cpu", "ceilings": {}, "date": "today", "rows": {"03_race": written}}
    (tmp_path / "data" / "x" / "machine.json").write_text(json.dumps({"m": machine}))
    pd.DataFrame({"machine": ["m"] * rows, "torch": ["2"] * rows, "ms": [float(at) for at in range(rows)]}).to_csv(
        tmp_path / "data" / "x" / "03_race.csv", index=False
    )


def test_a_file_that_lost_rows_is_told(tmp_path, monkeypatch):
    folder(tmp_path, monkeypatch, rows=3, written=4)
    with pytest.raises(AttnError, match="3 row.* where 4 were written"):
        results.Run("03_flash", "x", "full", True).record("race", iter(()), ["ms"])


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
    folder(tmp_path, monkeypatch, rows=2, written=2)
    path = tmp_path / "data" / "x" / "03_race.csv"
    sizes = {"batch": 1, "heads": 1, "seq_len": [8, 16], "head_dim": 4, "dtype": "float32", "causal": False}
    rows = pd.read_csv(path).assign(**sizes, status="ok", ms=1.0)
    rows.to_csv(path, index=False)
    assert len(stored.rows_of(path, ["ms"])) == 2
    rows.assign(**{column: cells}).to_csv(path, index=False)
    with pytest.raises(AttnError, match=f"line [23].*{message}"):
        stored.rows_of(path, ["ms"])


def test_a_file_that_was_written_must_be_there(tmp_path, monkeypatch):
    folder(tmp_path, monkeypatch, rows=4, written=4)
    machine = json.loads((tmp_path / "data" / "x" / "machine.json").read_text())
    machine["m"]["rows"]["03_traffic"] = 14
    (tmp_path / "data" / "x" / "machine.json").write_text(json.dumps(machine))
    run = results.Run("03_flash", "x", "full", True)
    assert run.has("traffic") and not run.has("frontier")
    with pytest.raises(AttnError, match="03_traffic.csv"):
        run.record("traffic", iter(()), [])


def test_a_replay_says_which_file_is_missing(tmp_path, monkeypatch):
    folder(tmp_path, monkeypatch, rows=4, written=4)
    run = results.Run("03_flash", "x", "full", True)
    assert len(run.record("race", iter(()), ["ms"])) == 4 and run.has("race") and not run.has("crossover")
    with pytest.raises(AttnError, match="03_crossover.csv"):
        run.record("crossover", iter(()), [])
