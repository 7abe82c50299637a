"""Which of several variants is faster, and how sure we are: runs that take turns, ratios, and confidence intervals.

What is compared alternates, in an order drawn for each round, so that a clock that sags slows all alike. Each batch of
rounds has inputs of its own, in a duel a process of its own as well, since times differ between processes too. The
interval of a ratio is Student's t over the logarithms of the batches' medians: the batches are independent, the rounds
within one are not."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product

import numpy as np
import torch

from attnlib.core import PHASES, Shape, UserError
from attnlib.laws import Variant, work
from attnlib.rows import SIZES
from attnlib.timing.clock import (
    PASSES,
    alone,
    estimate,
    graphed,
    in_a_row,
    longest_kernel,
    milliseconds,
    milliseconds_alone,
    time_passes,
)
from attnlib.timing.machine import square_product
from attnlib.timing.sweep import Job, Row, point_name

BATCHES = 5
T_99 = 4.604  # Student's t with BATCHES - 1 degrees of freedom, for 99 %: a table of a few dozen shall hold as a whole
RATIO = ("ratio", "low", "high")
CLOCKS = ["seq_len", "alone_ms", "in_a_row_ms", "queued_ms", "graph_ms"]  # the numbers of a row of `by_each_clock`


def passes(variant: Variant, shape: Shape, device: str, phase: str, seed: int) -> Callable:
    """A function that runs one forward pass, or one backward pass of a forward pass done before.

    Raises UserError for a phase that is neither "forward" nor "backward"."""
    if phase not in PHASES:
        raise UserError(f"phase must be forward or backward, not {phase!r}")
    inputs = variant.inputs(shape, device, seed)
    if phase == "forward":
        return lambda: variant.fn(*inputs, causal=shape.causal)
    o = variant.fn(*inputs, causal=shape.causal)
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)


def warm_up(functions: Sequence[Callable], device: str | torch.device) -> float:
    """Call each function, on a GPU twice. Returns the longest that the host took to launch the second call, in ms."""
    on_gpu, slowest = torch.device(device).type == "cuda", 0.0
    for fn in functions:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            fn()
            slowest = max(slowest, 1e3 * (time.perf_counter() - begun))
    return slowest


def batch(
    entries: Sequence[tuple[Variant, Shape]], device: str, phase: str, seed: int, budget_s: float, *others: Callable,
    users: bool = False,
) -> np.ndarray:  # fmt: skip
    """`[rounds, contestants]` milliseconds: the functions `others` and `passes` of each `(variant, shape)`, in turns.

    As many rounds as fit in `budget_s` seconds, from 3 to 50. On the device's clock each call waits twice as long as
    the host takes to launch the slowest of them; on the `users` clock it is made alone."""
    contestants = [*others, *(passes(variant, shape, device, phase, seed) for variant, shape in entries)]
    wait_ms = 2 * warm_up(contestants, device)
    timed = partial(milliseconds_alone, contestants) if users else partial(milliseconds, contestants, wait_ms=wait_ms)
    begun = time.perf_counter()
    times = timed(rounds=2, device=device)
    rounds = min(50, max(3, int(2 * budget_s / (time.perf_counter() - begun))))
    return np.concatenate([times, timed(rounds=rounds - 2, device=device)])


def interval(medians: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of one ratio per batch, and the ends of its 99 % confidence interval.

    Exact for batches whose logarithms are normal and independent. Raises UserError for other than BATCHES of them."""
    if len(medians) != BATCHES:
        raise UserError(f"an interval is made of {BATCHES} batches, not {len(medians)}")
    logs = np.log(medians)
    middle, reach = float(logs.mean()), T_99 * float(logs.std(ddof=1)) / math.sqrt(BATCHES)
    return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


def ratio(times: Sequence[np.ndarray], first: int, second: int) -> dict[str, float]:
    """RATIO: how many times as long contestant `first` takes as `second`, from calls made in the same round."""
    return dict(zip(RATIO, interval([float(np.median(one[:, first] / one[:, second])) for one in times]), strict=True))


def duel_batch(
    first: Variant, second: Variant, shape: Shape, phase: str, run: int, seed: int, device: str, budget_s: float,
    users: bool = False,
) -> Row:  # fmt: skip
    """One batch of a duel: the shape's columns, `phase, first, second`, their median times `first_ms, second_ms`,
    `ratio`, the median of the ratios of calls made in the same round, `rounds`, `run` and `batch_of_run`."""
    times = batch([(first, shape), (second, shape)], device, phase, seed, budget_s, users=users)
    first_ms, second_ms = np.median(times, axis=0).tolist()
    row = {**shape.columns(), "phase": phase, "first": first.name, "second": second.name, "first_ms": first_ms}
    row |= {"second_ms": second_ms, "ratio": float(np.median(times[:, 0] / times[:, 1]))}
    return row | {"rounds": len(times), "run": run, "batch_of_run": seed}


def duel_jobs(
    pairs: Sequence[tuple[Variant, Variant, Shape, str]],
    device: str,
    budget_s: float,
    runs: int = 2,
    apart: bool = True,
    users: bool = False,
) -> list[Job]:
    """`duel_batch` for each `(first, second, shape, phase)`, BATCHES times in each of `runs`, in processes of their own
    if `apart`, by the device's clock or by the `users`."""
    jobs = []
    for run, seed, (first, second, shape, phase) in product(range(1, runs + 1), range(BATCHES), pairs):
        name = f"run {run}, batch {seed}: {first.name} against {point_name(second, shape)} {phase}"
        arguments = (first, second, shape, phase, run, seed, device, budget_s / BATCHES, users)
        # never where a profiler has run, which may make launches slower from then on
        process = (run, seed) if apart else "alone" if users else None
        jobs.append(Job(name, duel_batch, arguments, process=process))
    return jobs


def duels(rows: Iterable[Row]) -> list[Row]:
    """Duels from the rows of their batches: their columns with the medians over the batches, and RATIO."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        names = tuple(row[column] for column in (*SIZES, "phase", "first", "second", "run"))
        found.setdefault(names, []).append(row)
    whole = []
    for batches in found.values():
        row = {name: x for name, x in batches[0].items() if name != "batch_of_run"}
        row |= {name: float(np.median([one[name] for one in batches])) for name in ("first_ms", "second_ms")}
        row |= dict(zip(RATIO, interval([one["ratio"] for one in batches]), strict=True))
        whole.append(row | {"rounds": sum(one["rounds"] for one in batches)})
    return whole


def by_each_clock(variant: Variant, shape: Shape, phase: str, device: str) -> Row:
    """One pass, "forward" or "forward_backward", by the user's clock, alone and in a row, and by the device's, queued
    and as a CUDA graph: medians in ms, None for a graph that cannot be recorded."""
    inputs = variant.inputs(shape, device)
    do = torch.randn_like(inputs[0])

    def call() -> object:
        o = variant.fn(*inputs, causal=shape.causal)
        return o if phase == "forward" else torch.autograd.grad(o, inputs, do)

    _, launch_ms = estimate(call, device, 1.0)
    figures = {"alone": np.median(alone(call, device, PASSES)), "in_a_row": in_a_row(call, device, PASSES)}
    figures["queued"] = np.median(time_passes(call, device, PASSES, launch_ms))
    row = {"variant": variant.name, **shape.columns(), "phase": phase, "graph_ms": None}
    with suppress(UserError):
        figures["graph"] = np.median(time_passes(graphed(call, device), device, PASSES))
    return row | {f"{name}_ms": float(ms) for name, ms in figures.items()}


def clock_jobs(variant: Variant, shapes: Iterable[Shape], device: str, apart: bool = False) -> list[Job]:
    """`by_each_clock` of each shape, forward, and forward and backward; `apart` if a profiler has run in the worker."""
    todo = product(shapes, ("forward", "forward_backward"))
    names = {(one, phase): f"{point_name(variant, one)} {phase}" for one, phase in todo}
    return [
        Job(name, by_each_clock, (variant, *one, device), process="clocks" if apart else None)
        for one, name in names.items()
    ]


def run_race(
    entries: Sequence[tuple[Variant, Shape]], device: str, phase: str, budget_s: float, whole: bool
) -> list[Row]:
    """A row for each `(variant, shape)`, all taking turns: the shape's columns, `phase, variant, ms, tflop_s`.

    In a `whole` race a matrix product of the same dtype takes turns with them, and a row has more: its `gemm_ms` and
    `gemm_tflop_s`; `share`, the rate of useful operations over the product's; `of_default`, how many times as fast as
    the first entry it is, with `_low` and `_high`; the `kernel` that ran longest; and, as the reference for the clock,
    `do_bench_ms` on CUDA: triton's do_bench on the same call, as its documentation shows."""
    matmul, matmul_flops = square_product(device, entries[0][1].dtype) if whole else (None, 0)
    others = [matmul] if matmul else []
    times = [batch(entries, device, phase, seed, budget_s / BATCHES, *others) for seed in range(BATCHES)]
    medians = np.median(np.concatenate(times), axis=0).tolist()
    found = []
    for place, ((variant, shape), ms) in enumerate(zip(entries, medians[len(others) :], strict=True), 1):
        row: Row = {**shape.columns(), "phase": phase, "variant": variant.name, "ms": ms}
        row["tflop_s"] = work(variant, shape, phase) / ms / 1e9
        if whole:
            call, won = passes(variant, shape, device, phase, 0), ratio(times, 1, place)
            row |= {"gemm_ms": medians[0], "gemm_tflop_s": matmul_flops / medians[0] / 1e9}
            row |= {"share": row["tflop_s"] / row["gemm_tflop_s"], "kernel": longest_kernel(call, device)}
            row |= {"of_default": won["ratio"], "of_default_low": won["low"], "of_default_high": won["high"]}
            row["do_bench_ms"] = None
            if torch.device(device).type == "cuda":
                from triton.testing import do_bench

                row["do_bench_ms"] = do_bench(call, warmup=10, rep=50, return_mode="median")
        found.append(row)
    return found


def race_jobs(
    groups: Sequence[Sequence[tuple[Variant, Shape]]], device: str, budget_s: float, *, whole: bool = False
) -> list[Job]:
    """`run_race` of each group, forward and backward."""
    jobs = []
    for group, phase in product(groups, PHASES):
        name = f"{phase} {', '.join(point_name(*entry) for entry in group)}"
        jobs.append(Job(name, run_race, (group, device, phase, budget_s, whole)))
    return jobs
