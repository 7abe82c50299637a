"""Which of several variants is faster, and how sure we are: runs that take turns, ratios, and confidence intervals.

What is compared alternates, in an order drawn for each round, so that a clock that sags slows all alike. An interval is
a bootstrap over batches, each with inputs of its own, and over the rounds within them (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", chapter 13), widened for the small number of batches. In a duel each batch has a process
of its own as well, since times differ between processes too.
"""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch

from attnlib import VARIANTS
from attnlib import device as dev
from attnlib.core import AttnError, Shape, Variant, dense_reach, useful_flops
from attnlib.sweep import Worker, forkserver

BATCHES, DRAWS = 5, 1000
LEVEL = 0.99  # of the intervals: a table of a few dozen shall hold as a whole
# A bootstrap over n batches sees too little spread by sqrt((n - 1) / n), and the normal quantile that its percentiles
# amount to, 2.576, is too small by what Student's t with n - 1 degrees of freedom exceeds it, 4.604 (Hesterberg 2015,
# "What Teachers Should Know About the Bootstrap": expanded percentile intervals)
FEW = 4.604 / 2.576 * math.sqrt(BATCHES / (BATCHES - 1))
RATIO = ["ratio", "low", "high"]
DUEL = ["batch", "heads", "seq_len", "head_dim", "first_ms", "second_ms", *RATIO, "rounds", "run"]  # a duel's numbers
RACE = ["seq_len", "head_dim", "ms", "do_bench_ms", "gemm_ms", "share", "of_default", "of_default_low"]
RACE += ["of_default_high", "gemm_tflop_s"]  # numbers of a race's row
HEAT = ["batch", "heads", "seq_len", "head_dim", "ms", "tflop_s"]  # of a heat's


def passes(variant: Variant, shape: Shape, device: str, phase: str, seed: int) -> Callable:
    """A function that runs one forward pass, or one backward pass of a forward pass done before.

    Raises AttnError for a phase that is neither "forward" nor "backward".
    """
    if phase not in ("forward", "backward"):
        raise AttnError(f"phase must be forward or backward, not {phase!r}")
    q, k, v = shape.inputs(device, seed)
    if phase == "forward":
        return lambda: variant.fn(q, k, v, causal=shape.causal)
    o = variant.fn(q, k, v, causal=shape.causal)
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def batch(entries: list[tuple], device: str, phase: str, seed: int, budget_s: float, *others: Callable) -> np.ndarray:
    """`[rounds, contestants]` milliseconds: the functions `others` and `passes` of each `(variant, shape)`, in turns.

    As many rounds as fit in `budget_s` seconds, from 5 to 50. Each call waits twice as long as the host takes to launch
    the slowest of them: the device's time is compared.
    """
    contestants = [*others, *(passes(variant, shape, device, phase, seed) for variant, shape in entries)]
    wait_ms = 2 * dev.warm_up(contestants, device)
    begun = time.perf_counter()
    times = dev.milliseconds(contestants, 2, device, wait_ms)
    rounds = min(50, max(5, int(2 * budget_s / (time.perf_counter() - begun))))
    return np.concatenate([times, dev.milliseconds(contestants, rounds - 2, device, wait_ms)])


def interval(samples: list[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The LEVEL confidence interval of the median over batches: batches drawn with replacement, then within each."""
    draw, sizes = np.random.default_rng(seed), np.array([len(batch) for batch in samples])
    longest = np.arange(sizes.max())
    rounds = np.stack([np.pad(batch, (0, len(longest) - len(batch))) for batch in samples])
    picked = draw.integers(len(samples), size=(DRAWS, len(samples), 1))
    within = (draw.random((DRAWS, len(samples), len(longest))) * sizes[picked]).astype(int)
    drawn = np.where(longest < sizes[picked], rounds[picked, within], np.nan).reshape(DRAWS, -1)
    return tuple(float(x) for x in np.quantile(np.nanmedian(drawn, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def ratio(times: list[np.ndarray], first: int, second: int) -> dict[str, float]:
    """RATIO: the median of the ratios of calls made in the same round, time of `first` over time of `second`."""
    ratios = [batch[:, first] / batch[:, second] for batch in times]
    return dict(zip(RATIO, (float(np.median(np.concatenate(ratios))), *interval(ratios)), strict=True))


def expanded(rows: pd.DataFrame, column: str = "ratio", low: str = "low", high: str = "high") -> pd.DataFrame:
    """Rows with the intervals of their bootstrap made as wide as so few batches ask for: FEW times, on a log scale."""
    ends = {end: rows[column] * (rows[end] / rows[column]) ** FEW for end in (low, high)}
    return rows.assign(**ends)


def medians(times: list[np.ndarray]) -> list[float]:
    """The median time of each contestant over all batches."""
    return [float(x) for x in np.median(np.concatenate(times), axis=0)]


def duel(first: Variant, second: Variant, shape: Shape, phase: str, times: list[np.ndarray]) -> dict:
    """How many times as long `first` takes as `second` at `shape` in `phase`, "forward" or "backward", by their times.

    Columns: the shape's, `phase, first, second, first_ms, second_ms` (medians), RATIO, `rounds`.
    """
    first_ms, second_ms = medians(times)
    names = {"phase": phase, "first": first.name, "second": second.name, "first_ms": first_ms, "second_ms": second_ms}
    return {**shape.columns(), **names, **ratio(times, 0, 1), "rounds": sum(map(len, times))}


def duels(pairs: list[tuple], device: str, budget_s: float) -> Iterator[dict]:
    """`duel` for each of `(first, second, shape, phase)`, twice over, `run` 1 and 2; each batch in its own process."""
    for run in (1, 2):
        times = [[] for _ in pairs]
        for seed in range(BATCHES):
            with Worker(forkserver()) as worker:
                for found, (first, second, shape, phase) in zip(times, pairs, strict=True):
                    entries = [(first, shape), (second, shape)]
                    found.append(worker.call_again(batch, entries, device, phase, seed, budget_s / BATCHES))
        for found, pair in zip(times, pairs, strict=True):
            yield duel(*pair, found) | {"run": run}


def race(shape: Shape, device: str, phase: str, names: list[str], budget_s: float) -> list[dict]:
    """All of `names`, of which sdpa_default is one, and a matrix product of the same dtype, taking turns.

    A row each: the shape's columns, `phase, variant, kernel`; `ms`; `gemm_ms`; `share`, its rate of useful operations
    over the product's; `of_default`, how many times as fast as sdpa_default it is, with `_low` and `_high`; and, as
    the reference for the clock, `do_bench_ms` on CUDA: triton's do_bench on the same call.
    """
    flops = useful_flops(shape, phase)
    product, product_flops = dev.gemm(device, shape.dtype)
    variants = [VARIANTS[name] for name in names]
    entries = [(variant, shape) for variant in variants]
    times = [batch(entries, device, phase, seed, budget_s / BATCHES, product) for seed in range(BATCHES)]
    gemm_ms, *each_ms = medians(times)
    default, found = 1 + names.index("sdpa_default"), []
    for place, (variant, ms) in enumerate(zip(variants, each_ms, strict=True), 1):
        call = passes(variant, shape, device, phase, 0)
        won, low, high = ratio(times, default, place).values()
        share = flops / ms / (product_flops / gemm_ms)
        row = {**shape.columns(), "phase": phase, "variant": variant.name, "kernel": dev.kernel(call, device)}
        row |= {"ms": ms, "gemm_ms": gemm_ms, "gemm_tflop_s": product_flops / gemm_ms / 1e9, "share": share}
        row |= {"of_default": won, "of_default_low": low, "of_default_high": high}
        found.append(row | {"do_bench_ms": None if device == "cpu" else reference_ms(call)})
    return found


def work(variant: Variant, shape: Shape, phase: str) -> int:
    """The useful operations of a variant: core.useful_flops if it is dense, else its own formula."""
    if variant.reach is dense_reach:
        return useful_flops(shape, phase)
    return shape.evaluate(getattr(variant.flops, phase))


def heat(entries: list[tuple[Variant, Shape]], device: str, phase: str, budget_s: float) -> list[dict]:
    """A row for each `(variant, shape)`, all taking turns: the shape's columns, `phase, variant, ms, tflop_s`."""

    times, found = [batch(entries, device, phase, seed, budget_s / BATCHES) for seed in range(BATCHES)], []
    for (variant, shape), ms in zip(entries, medians(times), strict=True):
        row = {**shape.columns(), "phase": phase, "variant": variant.name, "ms": ms}
        found.append(row | {"tflop_s": work(variant, shape, phase) / ms / 1e9})
    return found


def heats(groups: list[list[tuple[Variant, Shape]]], device: str, budget_s: float) -> Iterator[dict]:
    """The rows of `heat` for each group, forward and backward, in a worker."""
    with Worker() as worker:
        for entries in groups:
            for phase in ("forward", "backward"):
                yield from worker.call(heat, entries, device, phase, budget_s)


def reference_ms(fn) -> float:
    """The median time of `fn` by triton's do_bench, called as its documentation shows."""
    from triton.testing import do_bench

    return do_bench(fn, return_mode="median")


def races(shapes: list[Shape], device: str, candidates: list[str], budget_s: float) -> Iterator[dict]:
    """The rows of `race` at each shape, forward and backward, among those of `candidates` that run there."""
    with Worker() as worker:
        for shape in shapes:
            names = [name for name in candidates if not worker.call(VARIANTS[name].needs, shape, device)]
            for phase in ("forward", "backward"):
                yield from worker.call(race, shape, device, phase, names, budget_s)


def crossing(lengths, values) -> float:
    """The N from which on all values exceed one: between two lengths by a straight line through log(value) over log N.

    The shortest length if that is so everywhere, infinity if it is not so at the longest.
    """
    points = sorted(zip(lengths, values, strict=True), reverse=True)
    if points[0][1] <= 1:
        return math.inf
    for (n, value), (below, at_below) in zip(points, points[1:], strict=False):
        if at_below <= 1:
            share = math.log(value) / math.log(value / at_below)
            return math.exp(math.log(n) - share * math.log(n / below))
    return float(points[-1][0])


def crossings(rows: pd.DataFrame) -> pd.DataFrame:
    """For each dtype, head_dim, phase and run of `duels`: `seq_len`, from which on `second` wins, between `low` and
    `high`, where the whole interval of the ratio says so; `shortest` and `longest` lengths tried, `least` and `most`
    of the ratio there."""
    found = []
    for names, cell in rows.groupby(["dtype", "head_dim", "phase", "run"], sort=False):
        cell = cell.sort_values("seq_len")
        at, high, low = (crossing(cell["seq_len"], cell[column]) for column in ("ratio", "low", "high"))
        ends = {"shortest": cell["seq_len"].iloc[0], "longest": cell["seq_len"].iloc[-1]}
        ends |= {"least": cell["ratio"].iloc[0], "most": cell["ratio"].iloc[-1]}
        keys = dict(zip(("dtype", "head_dim", "phase", "run"), names, strict=True))
        found.append({**keys, "first": cell["first"].iloc[0], "second": cell["second"].iloc[0]})
        found[-1] |= {"seq_len": at, "low": low, "high": high, **ends}
    return pd.DataFrame(found)
