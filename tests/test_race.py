"""Who is faster, and how sure we are: the logic of duels, on fixed numbers."""

import math
import statistics

import numpy as np
import pytest

from attnlib import VARIANTS
from attnlib.core import Shape, UserError
from report import race as races
from report.race import BATCHES, duel_jobs, duels, interval, ratio

NAIVE, MATH = VARIANTS["naive"], VARIANTS["sdpa_math"]
SHAPE = Shape(1, 1, 16, 8)


def student(t):
    """How likely Student's t with four degrees of freedom lies within ±t, in closed form."""
    u = t / math.sqrt(1 + t**2 / 4)
    return 2 * 3 / 8 * u * (1 - u**2 / 12)


def test_the_quantile_is_that_of_students_t_for_so_many_batches():
    assert BATCHES == 5 and student(races.T_99) == pytest.approx(0.99, abs=1e-5)


def test_an_interval_is_that_of_the_mean_logarithm():
    """By hand: exp(mean ± 4.604 · s / √5) of the logarithms, s their standard deviation with n − 1."""
    medians = [1.1, 1.2, 1.3, 1.25, 1.15]
    logs = [math.log(x) for x in medians]
    reach = 4.604 * statistics.stdev(logs) / math.sqrt(5)
    ends = [math.exp(statistics.mean(logs) + end * reach) for end in (0, -1, 1)]
    assert interval(medians) == pytest.approx(ends, rel=1e-4)
    low_again, high_again = (1 / end for end in interval([1 / x for x in medians])[:0:-1])
    assert (low_again, high_again) == pytest.approx(interval(medians)[1:])  # whoever is first


def test_equal_batches_leave_no_doubt_and_other_than_five_are_refused():
    assert interval([2.0] * BATCHES) == pytest.approx((2, 2, 2))
    with pytest.raises(UserError, match="made of 5 batches, not 4"):
        interval([2.0] * 4)


def test_the_interval_covers_the_ratio_as_often_as_it_says():
    """Batches of lognormal noise around a ratio of one, each with an offset of its own, as inputs and a clock make it.
    Of 400 intervals of 99 % at least 97 % must hold the ratio."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        samples = [np.exp(draw.normal(0, 0.05) + draw.normal(0, 0.01, 12)) for _ in range(BATCHES)]
        _, low, high = interval([float(np.median(batch)) for batch in samples])
        held += low <= 1 <= high
    assert held >= 0.97 * 400


def test_a_ratio_is_of_calls_made_in_the_same_round():
    """A clock that sags slows all alike: the rounds take 1, 10 and 100 ms, the second always half as long again."""
    batch = np.array([[1.0, 1.5], [10.0, 15.0], [100.0, 150.0]])
    assert ratio([batch] * BATCHES, 1, 0) == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5})


def batches(ratios, run=1, **changes):
    """Rows of one duel's batches."""
    names = {**SHAPE.columns(), "phase": "forward", "first": "naive", "second": "tiled", "run": run, "rounds": 10}
    return [
        {**names, "first_ms": x, "second_ms": 1.0, "ratio": x, "batch_of_run": at, **changes}
        for at, x in enumerate(ratios)
    ]


def test_a_duel_is_made_of_its_batches():
    """Medians over the batches, the interval over their ratios, all rounds together; in the order in which duels come,
    though the jobs go through all duels batch by batch."""
    one, two = batches([2.0, 2.2, 2.1, 1.9, 2.0]), batches([0.5, 0.5, 0.5, 0.5, 0.5], phase="backward")
    mixed = [row for pair in zip(one, two, strict=True) for row in pair]
    slow, fast = duels(mixed)
    assert (slow["first_ms"], slow["second_ms"], slow["rounds"]) == (2.0, 1.0, 50) and "batch_of_run" not in slow
    assert (slow["ratio"], slow["low"], slow["high"]) == pytest.approx(interval([2.0, 2.2, 2.1, 1.9, 2.0]))
    assert 1 < slow["low"] < slow["ratio"] < slow["high"] and fast["high"] == pytest.approx(0.5)


def test_runs_are_apart_and_lost_batches_are_told():
    first, again = duels(batches([2.0] * 5) + batches([3.0] * 5, run=2))
    assert (first["ratio"], again["ratio"]) == pytest.approx((2, 3))
    with pytest.raises(UserError, match="5 batches, not 4"):
        duels(batches([2.0] * 4))


def test_equals_are_not_told_apart():
    """Batches that scatter around one, as a clock makes them."""
    (row,) = duels(batches([1.01, 0.98, 1.0, 1.02, 0.99]))
    assert row["low"] < 1 < row["high"]


def test_each_batch_of_a_duel_has_a_process_of_its_own():
    """Two runs of five batches: ten processes, each for all pairs."""
    jobs = duel_jobs([(NAIVE, MATH, SHAPE, "forward"), (NAIVE, MATH, SHAPE, "backward")], "cpu", 0.01)
    processes = [job.process for job in jobs]
    assert len(jobs) == len({job.name for job in jobs}) == 20 and len({*processes}) == 2 * BATCHES
    assert processes == sorted(processes), "a process is not left and entered again"
    assert [job.arguments[-2:] for job in jobs] == [(0.01 / BATCHES, False)] * 20


def test_a_batch_of_a_duel_is_a_row(worker):
    job = duel_jobs([(NAIVE, MATH, SHAPE, "backward")], "cpu", 0.01)[3]
    row = worker.call(job.function, *job.arguments)
    assert (row["first"], row["second"], row["phase"], row["run"], row["batch_of_run"]) == (
        "naive", "sdpa_math", "backward", 1, 3
    )  # fmt: skip
    assert row["first_ms"] > 0 and row["second_ms"] > 0 and 0 < row["ratio"] < math.inf and 3 <= row["rounds"] <= 50


def test_a_duel_may_be_timed_as_a_user_waits(monkeypatch):
    """Each call alone, in turns, and on no other clock."""
    monkeypatch.setattr(races, "milliseconds", None)
    row = races.duel_batch(NAIVE, MATH, SHAPE, "backward", 1, 0, "cpu", 0.01, users=True)
    assert row["rounds"] >= 3 and row["first_ms"] > 0 and 0 < row["ratio"] < math.inf


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(UserError, match="phase must be forward or backward, not 'Forward'"):
        races.passes(NAIVE, SHAPE, "cpu", "Forward", 0)
