"""What the notebooks make of races: a real race, names of kernels, crossovers in time and memory, PyTorch's choice."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.laws import bytes_needed
from attnlib.memory.fit import at_length
from notebooks import races
from report import race


def test_a_race_holds_all_against_the_product_and_the_first(device):
    entries = [(VARIANTS[name], Shape(1, 2, 128, 16)) for name in ("sdpa_default", "sdpa_math")]
    rows = race.run_race(entries, device, "backward", 0.05, True)
    assert [row["variant"] for row in rows] == ["sdpa_default", "sdpa_math"]
    assert rows[0]["of_default"] == rows[0]["of_default_low"] == rows[0]["of_default_high"] == 1
    assert all(row["share"] > 0 and row["kernel"] and (row["do_bench_ms"] is None) == (device == "cpu") for row in rows)
    assert len({row["gemm_ms"] for row in rows}) == 1


def test_a_race_among_themselves_has_the_rate_of_useful_operations(worker):
    """Of shapes of its own each; what only a whole race has is not there."""
    entries = [(VARIANTS["naive"], Shape(1, 1, n, 8)) for n in (16, 32)]
    (job, _) = race.race_jobs([entries], "cpu", 0.01)
    rows = worker.call(job.function, *job.arguments)
    assert [row["seq_len"] for row in rows] == [16, 32] and "share" not in rows[0]
    assert all(row["tflop_s"] == pytest.approx(4 * 8 * row["seq_len"] ** 2 / row["ms"] / 1e9) for row in rows)


def test_jobs_of_races_are_told_apart():
    shapes = [Shape(1, 1, 16, 8), Shape(1, 1, 32, 8, causal=True)]
    jobs = race.race_jobs([[(VARIANTS["naive"], shape)] for shape in shapes], "cpu", 0.1)
    assert len({job.name for job in jobs}) == 4 and all(job.process is None for job in jobs)


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
    """The default's own, where no pinned variant runs the same."""
    sizes = {"head_dim": 64, "causal": False, "seq_len": 512, "phase": "forward"}
    rows = pd.DataFrame({"variant": ["sdpa_default", "sdpa_flash"], "kernel": [name, "other"]}).assign(**sizes)
    (found,) = races.picks(rows.assign(of_default=1.0, of_default_low=1.0, of_default_high=1.0)).to_dict("records")
    assert found["picked"] == short


def test_the_pick_is_told_from_the_kernel_that_ran():
    sizes = {"head_dim": 64, "causal": False, "seq_len": 512, "phase": "forward"}
    rows = [
        {"variant": "sdpa_default", "kernel": "void f<1>(x)", "of_default": 1.0},
        {"variant": "sdpa_flash", "kernel": "void f<1>(x)", "of_default": 1.0},
        {"variant": "sdpa_cudnn", "kernel": "g", "of_default": 1.5},
        {"variant": "fa4", "kernel": "h", "of_default": 2.0},
    ]
    rows = pd.DataFrame(rows).assign(**sizes, of_default_low=1.0, of_default_high=2.0)
    (found,) = races.picks(rows).to_dict("records")
    assert (found["picked"], found["fastest"], found["of_default"]) == ("sdpa_flash", "sdpa_cudnn", 1.5)


def test_a_win_counts_only_if_it_lasts():
    lengths = [64, 128, 256, 512]
    assert races.crossing(lengths, [1.1, 0.5, 2.0, 3.0]) == pytest.approx(128 * 2**0.5)
    assert races.crossing(lengths, [0.5, 0.6, 0.7, 0.9]) == float("inf")
    assert races.crossing(lengths, [1.1, 1.2, 1.3, 1.4]) == 64


def test_crossings_lie_between_those_of_the_interval():
    n = pd.Series([64, 128, 256, 512])
    names = {"dtype": "float32", "head_dim": 8, "phase": "forward", "run": 1, "first": "naive", "second": "tiled"}
    rows = pd.DataFrame({"seq_len": n, "ratio": n / 200, "low": n / 240, "high": n / 160}).assign(**names)
    (cell,) = races.crossings(rows).to_dict("records")
    assert (cell["low"], cell["seq_len"], cell["high"]) == pytest.approx((160, 200, 240))


def test_a_crossover_outside_the_lengths_tried_says_so():
    cell = {"shortest": 16, "longest": 1024}
    assert [races.length(n, cell) for n in (16.0, 99.6, float("inf"))] == ["≤ 16", "100", "> 1,024"]


def duels(ratios):
    """Rows of two runs at one length."""
    names = {"dtype": "bfloat16", "head_dim": 64, "phase": "backward", "seq_len": 512}
    return pd.DataFrame([{**names, "run": run, "ratio": r, "low": 0.9, "high": 1.1} for run, r in enumerate(ratios, 1)])


@pytest.mark.parametrize(("second", "count"), [(1.05, 1), (1.2, 0)])
def test_ratios_of_the_second_run_are_counted_in_the_first_ones_interval(monkeypatch, second, count):
    said, rows = [], duels([1.0, second])
    monkeypatch.setattr(races, "say", said.append)
    assert races.reproduced(SimpleNamespace(observe=lambda *_, **__: True), rows, rows)
    assert said == [f"Of the single ratios, {count} of 1 lie in the first run's interval the second time."]


def test_a_cell_that_flash_wins_at_first_and_loses_later_is_told():
    cells = pd.concat([duels([1.0])] * 4).assign(
        seq_len=[16, 32, 64, 128], low=[1.1, 0.7, 0.6, 1.2], high=[1.2, 0.9, 0.8, 1.4]
    )
    assert "loses at N = 32 to 64" in races.relapses(cells)[0]
    assert not races.relapses(cells[1:]) and not races.relapses(cells[:1])


def test_blocks_of_rows_at_the_latest_crossover():
    cells = duels([1.0, 1.0]).assign(seq_len=[640.0, math.inf])
    assert races.blocks_at_crossover(cells, heads=8) == 40 and races.blocks_at_crossover(cells[1:], heads=8) == 0


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_crossover_in_memory_is_where_the_laws_cross(phase):
    shape, machine = Shape(1, 8, 1, 64, "bfloat16"), Machine("cuda")
    pair = VARIANTS["naive"], VARIANTS["sdpa_flash"]
    n = races.memory_crossover(*pair, shape, phase, machine)
    sizes = [[bytes_needed(v, at_length(shape, m), machine, phase) for v in pair] for m in (n - 1, n)]
    assert sizes[0][1] >= sizes[0][0] and sizes[1][1] < sizes[1][0]


def test_rates_are_of_useful_operations():
    row = {**Shape(2, 3, 5, 7).columns(), "variant": "naive", "forward_ms": 2.0, "backward_ms": 5.0}
    (found,) = races.with_rates(pd.DataFrame([row])).to_dict("records")
    assert found["forward_tflop_s"] == found["backward_tflop_s"] == pytest.approx(4 * 2 * 3 * 7 * 25 / 2e9)
