"""The block around an attention variant, and the runs that alternate."""

import os
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from attnlib import VARIANTS, crossover
from attnlib.block import block, block_inputs, in_block
from attnlib.core import AttnError, Shape
from attnlib.measure import measure


def test_the_block_is_what_torch_calls_attention_with_a_residual_and_a_norm():
    """nn.MultiheadAttention with the same weights, then x + …, then nn.LayerNorm."""
    shape = Shape(2, 3, 10, 4)
    x, qkv_weight, out_weight, gain, bias = block_inputs(shape)
    attention = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    attention.load_state_dict({"in_proj_weight": qkv_weight, "out_proj.weight": out_weight})
    hidden = x.flatten(2)
    expected = torch.nn.LayerNorm(12)(hidden + attention(hidden, hidden, hidden, need_weights=False)[0])
    found = block(VARIANTS["naive"].fn, x, qkv_weight, out_weight, gain, bias)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["naive_custom", "naive_recompute", "sdpa_math", "sdpa_flash", "tiled"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_gives_the_same_block(name, causal):
    inputs = block_inputs(Shape(2, 3, 33, 8))
    results = []
    for variant in ("naive", name):
        o = in_block(VARIANTS[variant]).fn(*inputs, causal=causal)
        results.append([o, *torch.autograd.grad(o, inputs, torch.ones_like(o) + o.detach())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_block_is_measured_like_a_variant(device):
    row = measure(in_block(VARIANTS["sdpa_flash"]), Shape(2, 2, 64, 16, "bfloat16"), device, budget_s=0.1)
    assert row["status"] == "ok" and row["variant"] == "sdpa_flash" and row["forward_backward_ms"] > 0


def sleeper(name, seconds):
    def sleep(q, k, v, *, causal):
        time.sleep(seconds)
        return q + k + v

    return replace(VARIANTS["naive"], name=name, fn=sleep)


def sleep_duel(first, second, phase, budget_s):
    shape = Shape(1, 1, 4, 4)
    entries = [(first, shape), (second, shape)]
    times = [crossover.batch(entries, "cpu", phase, seed, budget_s) for seed in range(crossover.BATCHES)]
    return crossover.duel(first, second, shape, phase, times)


def test_a_duel_finds_who_is_slower_and_by_how_much():
    row = sleep_duel(sleeper("slow", 0.004), sleeper("fast", 0.002), "forward", 0.1)
    assert 1.5 < row["low"] <= row["ratio"] <= row["high"] < 2.5
    assert row["first"] == "slow" and row["rounds"] >= 5 * crossover.BATCHES


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(AttnError, match="phase must be forward or backward, not 'Forward'"):
        crossover.passes(VARIANTS["naive"], Shape(1, 1, 4, 4), "cpu", "Forward", 0)


def test_equals_are_not_told_apart():
    row = sleep_duel(sleeper("one", 0.002), sleeper("other", 0.002), "backward", 0.04)
    assert row["low"] < 1.1 and row["high"] > 0.9


def process_of(entries, device, phase, seed, budget_s):
    return np.full((5, 2), [os.getpid(), 1.0])


def test_each_batch_of_a_duel_has_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(crossover, "batch", process_of)
    monkeypatch.setattr(crossover, "duel", lambda *pair: {"processes": [times[0, 0] for times in pair[-1]]})
    pair = (VARIANTS["naive"], VARIANTS["sdpa_math"], Shape(1, 1, 16, 8), "forward")
    one, same, two, _ = crossover.duels([pair] * 2, "cpu", 0.01)
    assert one["processes"] == same["processes"] and [one["run"], two["run"]] == [1, 2]
    assert len({*one["processes"], *two["processes"]}) == 2 * crossover.BATCHES


def test_the_interval_covers_the_median_as_often_as_it_says():
    """With batches that differ from each other, most of 40 intervals should cover the true ratio."""
    draw = np.random.default_rng(3)
    covered = 0
    for seed in range(40):
        batches = [1.2 + draw.normal(0, 0.02) + draw.normal(0, 0.05, size=20) for _ in range(crossover.BATCHES)]
        low, high = crossover.interval(batches, seed)
        covered += low <= 1.2 <= high
    assert covered >= 34


def test_a_win_counts_only_if_it_lasts():
    lengths = [64, 128, 256, 512]
    assert crossover.crossing(lengths, [1.1, 0.5, 2.0, 3.0]) == pytest.approx(128 * 2**0.5)
    assert crossover.crossing(lengths, [0.5, 0.6, 0.7, 0.9]) == float("inf")
    assert crossover.crossing(lengths, [1.1, 1.2, 1.3, 1.4]) == 64


def test_crossings_lie_between_those_of_the_interval():
    n = pd.Series([64, 128, 256, 512])
    names = {"dtype": "float32", "head_dim": 8, "phase": "forward", "run": 1, "first": "naive", "second": "tiled"}
    rows = pd.DataFrame({"seq_len": n, "ratio": n / 200, "low": n / 240, "high": n / 160}).assign(**names)
    (cell,) = crossover.crossings(rows).to_dict("records")
    assert (cell["low"], cell["seq_len"], cell["high"]) == pytest.approx((160, 200, 240))


def test_a_race_holds_all_against_the_product_and_the_default():
    rows = pd.DataFrame(crossover.race(Shape(1, 2, 128, 16), "cpu", "backward", ["sdpa_math", "sdpa_default"], 0.2))
    default = rows.set_index("variant").loc["sdpa_default"]
    assert default["of_default"] == default["of_default_low"] == 1
    assert (rows["share"] > 0).all() and rows["gemm_ms"].nunique() == 1
    assert set(crossover.RACE) <= set(rows)
